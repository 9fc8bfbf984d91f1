"""Any nested state (tensor, tuple, list, dict; batch first) as one (batch, features) matrix."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Solver algebra never runs below single precision; see `Layout.dtype`.
_WORKING_DTYPES = {
    torch.float16: torch.float32,
    torch.bfloat16: torch.float32,
    torch.float32: torch.float32,
    torch.float64: torch.float64,
    torch.complex64: torch.float32,
    torch.complex128: torch.float64,
}

_GUESSED = " (a DEQ that is given no z0 starts from zeros like its first input)"


@dataclass(frozen=True)
class Layout:
    """How a nested state lies in a matrix of one row a sample.

    Complex leaves take two real columns an entry, so that solvers only ever see real numbers.

    Attributes:
        structure: the nesting, as a pytree specification.
        shapes: shape of each leaf without the batch dimension.
        dtypes: dtype of each leaf; `unflatten` restores them.
        dtype: real dtype of the matrix: fp32, or fp64 if any leaf has double precision.
        device: where the state lives.
        matrix: whether the state is such a matrix itself.
        epsilon: relative rounding error of f(z), from the narrowest dtype that it passes through.
    """

    structure: Any
    shapes: tuple[torch.Size, ...]
    dtypes: tuple[torch.dtype, ...]
    dtype: torch.dtype
    device: torch.device
    matrix: bool
    epsilon: float

    @staticmethod
    def of(state: Any, name: str = "z0", computed_in: torch.dtype | None = None) -> Layout:
        """The layout of ``state``.

        Args:
            name: what errors call it.
            computed_in: a narrower dtype that f computes in (autocast).

        Raises:
            TypeError: a leaf is not a floating-point or complex tensor.
            ValueError: no leaf, a leaf without batch dimension, batch sizes or devices that differ.
        """
        leaves, structure = pytree.tree_flatten(state)
        if not leaves:
            raise ValueError(f"{name} holds no tensor; give at least one, batch first")
        for leaf in leaves:
            if not isinstance(leaf, Tensor):
                raise TypeError(
                    f"{name} must be a tensor or a tuple, list or dict of tensors; "
                    f"it holds a {type(leaf).__name__}"
                )
            if leaf.dtype not in _WORKING_DTYPES:
                accepted = ", ".join(str(dtype).removeprefix("torch.") for dtype in _WORKING_DTYPES)
                raise TypeError(
                    f"{name} has dtype {leaf.dtype}; a fixed point needs one of {accepted}. "
                    "Convert it, for example with .float()"
                )
            if leaf.dim() == 0:
                raise ValueError(
                    f"{name} holds a tensor without dimensions; the first one is the batch: "
                    "use .reshape(1)"
                )
        batches = sorted({leaf.shape[0] for leaf in leaves})
        if len(batches) > 1:
            raise ValueError(f"the tensors of {name} have different batch sizes: {batches}")
        devices = {leaf.device for leaf in leaves}
        if len(devices) > 1:
            raise ValueError(f"the tensors of {name} lie on different devices: {devices}")
        narrow = [leaf.dtype for leaf in leaves] + ([computed_in] if computed_in else [])
        double = any(_WORKING_DTYPES[leaf.dtype] is torch.float64 for leaf in leaves)
        dtype = torch.float64 if double else torch.float32
        return Layout(
            structure,
            tuple(leaf.shape[1:] for leaf in leaves),
            tuple(leaf.dtype for leaf in leaves),
            dtype,
            leaves[0].device,
            isinstance(state, Tensor) and state.dim() == 2 and state.dtype == dtype,
            max(torch.finfo(dtype).eps for dtype in narrow),
        )

    @property
    def widths(self) -> list[int]:
        """Columns of each leaf in the matrix."""
        return [
            shape.numel() * (2 if dtype.is_complex else 1)
            for shape, dtype in zip(self.shapes, self.dtypes, strict=True)
        ]

    @property
    def rounds(self) -> bool:
        """Whether `unflatten` loses precision, because a leaf is narrower than the matrix."""
        return any(_real(dtype) != self.dtype for dtype in self.dtypes)

    def flatten(self, state: Any) -> Tensor:
        """(B, features) matrix of ``state``; a view where no conversion is needed."""
        if isinstance(state, Tensor):  # the common case, without a walk through the tree
            return self._column(state)
        leaves = self.structure.flatten_up_to(state)  # by key, in whatever order f made a dict
        if len(leaves) == 1:
            return self._column(leaves[0])
        return torch.cat([self._column(leaf) for leaf in leaves], dim=1)

    def _column(self, leaf: Tensor) -> Tensor:
        if leaf.is_complex():
            leaf = torch.view_as_real(leaf.resolve_conj())
        if leaf.dim() != 2:
            leaf = leaf.reshape(leaf.shape[0], math.prod(leaf.shape[1:]))
        return leaf if leaf.dtype == self.dtype else leaf.to(self.dtype)

    def unflatten(self, matrix: Tensor) -> Any:
        """The nested state that ``matrix`` (rows, features) stands for; views where possible."""
        if self.matrix:
            return matrix
        rows = matrix.shape[0]
        columns = [matrix] if len(self.shapes) == 1 else matrix.split(self.widths, dim=1)
        leaves = []
        for column, shape, dtype in zip(columns, self.shapes, self.dtypes, strict=True):
            if dtype.is_complex:
                pairs = column.to(_real(dtype)).reshape(rows, *shape, 2)
                leaves.append(torch.view_as_complex(pairs.contiguous()))
            else:
                leaf = column if len(shape) == 1 else column.reshape(rows, *shape)
                leaves.append(leaf if dtype == self.dtype else leaf.to(dtype))
        if self.structure.is_leaf():
            return leaves[0]
        return pytree.tree_unflatten(leaves, self.structure)

    def check(self, state: Any, rows: int, name: str = "z0", maker: str = "f") -> None:
        """Raise ValueError, naming the difference, unless ``state`` has this layout and ``rows``
        rows.

        Dtypes may differ: f may compute in half precision (autocast) on an fp32 state.

        Args:
            name: what errors call the state of this layout.
            maker: what they call the function that returned ``state``.
        """
        structure = pytree.tree_structure(state)
        try:
            leaves = self.structure.flatten_up_to(state)
            fits = len(leaves) == structure.num_leaves
        except ValueError:
            fits = False
        if not fits or structure.num_nodes != self.structure.num_nodes:
            raise ValueError(
                f"{maker} must return a state of the structure of {name}, {self.structure}; "
                f"got {structure}"
            )
        for leaf, shape, dtype in zip(leaves, self.shapes, self.dtypes, strict=True):
            if not isinstance(leaf, Tensor) or leaf.shape != (rows, *shape):
                got = tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf).__name__
                hint = _GUESSED if name == "z0" else ""
                raise ValueError(
                    f"{maker} must return the shape of {name}, {(rows, *shape)}; got {got}{hint}"
                )
            if leaf.is_complex() != dtype.is_complex:
                raise ValueError(f"{maker} returned {leaf.dtype} for a state of {dtype}")
            if leaf.device != self.device:
                raise ValueError(
                    f"{maker} returned a tensor on {leaf.device} for a state on {self.device}"
                )


def _real(dtype: torch.dtype) -> torch.dtype:
    return torch.empty(0, dtype=dtype).real.dtype if dtype.is_complex else dtype


def check_inputs(inputs: object) -> None:
    """TypeError unless ``inputs`` is a tuple."""
    if not isinstance(inputs, tuple):
        raise TypeError(
            "inputs must be a tuple of f's further arguments, such as (x,); got "
            f"{type(inputs).__name__}"
        )


def map_rows(function: Callable[[Tensor], Tensor], inputs: Any, batch: int) -> Any:
    """Apply ``function`` to every tensor of the nested ``inputs``; other leaves pass unchanged.

    Raises:
        ValueError: a tensor whose first dimension is not ``batch``.
    """

    def one(leaf: Any) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        if leaf.dim() == 0 or leaf.shape[0] != batch:
            raise ValueError(
                f"a tensor in inputs has shape {tuple(leaf.shape)}; its first dimension must be "
                f"the batch, {batch} as in z0. If z0 (a warm start?) is right, the tensor may be "
                "one that all samples share: let f close over it or, where create_graph=True asks "
                "for the gradient of a computed one, w, pass w.expand(B, *w.shape), B the batch"
            )
        return function(leaf)

    return pytree.tree_map(one, inputs)


def take_rows(leaf: Tensor, rows: Tensor) -> Tensor:
    """These rows of ``leaf``, uncopied where one row stands for all (``w.expand(B, ...)``)."""
    if leaf.layout == torch.strided and leaf.stride(0) == 0:
        return leaf[:1].expand(len(rows), *leaf.shape[1:])
    return leaf[rows]
