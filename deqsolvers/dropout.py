"""Variational dropout: one mask for a whole solve."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree


@dataclass(frozen=True)
class _Scope:
    """What the layers see while one f is evaluated.

    Attributes:
        masks: those that were drawn so far, for the whole batch.
        batch: how many samples that is, None if nobody knows yet.
        rows: which of them this evaluation holds, None for all.
    """

    masks: dict[VariationalDropout, Tensor]
    batch: int | None = None
    rows: Tensor | None = None


_scope: ContextVar[_Scope | None] = ContextVar("deqsolvers_dropout", default=None)


class VariationalDropout(nn.Module):
    """Dropout whose mask is drawn once per solve; for use inside the f of a `DEQ`.

    Ordinary dropout makes every evaluation of f another function, which has no fixed point. Here
    all evaluations of one solve, the recorded call behind its gradient, and whatever its backward
    pass evaluates later use the same mask; the next solve draws a new one. Every sample has its own
    mask and keeps it when others leave the batch.

    Masks belong to the solve and not to the layer, so that several solves may wait for one backward
    pass. Outside of `DEQ` and `fixed_point`, say where a mask ends with `fixed_masks`. In
    evaluation mode the layer does nothing.

    Use one layer for each place in f. The first dimension of its input must be the batch. Do not
    put it into a part of f that recomputes itself in the backward pass (activation checkpointing):
    it cannot know then which solve is meant, and raises an error. The same holds if the whole DEQ
    is compiled; compile f alone.

    Args:
        p: probability that an entry is zeroed, in [0, 1); the others are scaled by 1 / (1 - p).
        shared_dims: dimensions of the input along which the mask does not vary: (2, 3) drops whole
            channels of images (B, C, H, W), (1,) uses one mask for all tokens of (B, L, C), (1, 2,
            3) drops the whole branch of an image (stochastic depth), (0,) treats all samples alike.

    Raises:
        ValueError: p is out of range; in a forward pass, the input does not fit the mask.
        RuntimeError: in a forward pass, the layer trains outside of a solve and of `fixed_masks`.

    Source: Gal & Ghahramani, "A theoretically grounded application of dropout in recurrent neural
        networks" (NeurIPS 2016), as used by Bai, Kolter & Koltun (2019).
    """

    def __init__(self, p: float = 0.5, shared_dims: tuple[int, ...] = ()):
        super().__init__()
        if not 0 <= p < 1:
            raise ValueError(f"p must be at least 0 and below 1, got {p}")
        self.p = float(p)
        self.shared_dims = tuple(shared_dims)

    def extra_repr(self) -> str:
        return f"p={self.p}, shared_dims={self.shared_dims}"

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.p == 0:
            return x
        return x * self._mask(x).to(x.dtype)

    def _mask(self, x: Tensor) -> Tensor:
        scope = _scope.get()
        if scope is None:
            raise RuntimeError(
                "a VariationalDropout layer in training mode was called outside of a DEQ solve; "
                "write `with fixed_masks():` around all the calls that should share its mask"
            )
        mask = scope.masks.get(self)
        if mask is None:
            mask = scope.masks[self] = self._draw(x, scope.batch or x.shape[0])
        if scope.rows is not None and len(scope.rows) != scope.batch and mask.shape[0] > 1:
            mask = mask[scope.rows]
        fits = all(size in (1, other) for size, other in zip(mask.shape, x.shape, strict=False))
        if mask.dim() != x.dim() or not fits:
            raise ValueError(
                f"a VariationalDropout layer was called on {tuple(x.shape)}, but its mask in this "
                f"solve is {tuple(mask.shape)}. Use one layer for each place in f, inputs whose "
                "first dimension is the batch, and one `with fixed_masks():` for each batch"
            )
        return mask

    def _draw(self, x: Tensor, batch: int) -> Tensor:
        shape = [batch, *x.shape[1:]]
        for dim in self.shared_dims:
            shape[dim] = 1
        # Not in place, which vmap with randomness="different" refuses.
        entries = torch.empty(shape, dtype=x.real.dtype, device=x.device)
        return torch.bernoulli(entries, 1 - self.p).div_(1 - self.p)


@contextlib.contextmanager
def fixed_masks() -> Iterator[None]:
    """Within this block every `VariationalDropout` layer keeps the mask that it draws first.

    A `DEQ` does this by itself for its solves and their gradients, and `fixed_point` for a solve.
    Use the block where more should see the same f, such as a regulariser on f at the solution or an
    unrolled f::

        with fixed_masks():
            z, solution = deq(x)
            loss = criterion(z) + jacobian_regularizer(deq.f, solution.z, (x,))

    A block inside another one, or a solve inside the f of another one, uses the masks of the outer
    one: else the outer f would change between its evaluations.
    """
    if _scope.get() is not None:
        yield
        return
    token = _scope.set(_Scope({}))
    try:
        yield
    finally:
        _scope.reset(token)


def hold_masks(
    f: Callable[..., Any], inputs: tuple[Any, ...], z0: Any
) -> tuple[Callable[..., Any], tuple[Any, ...]]:
    """f and its inputs for one solve from ``z0``, with masks that last as long as this f does.

    The sample numbers become one more input. The loop selects from them whenever it selects
    samples, which is how the masks follow.
    """
    leaves = [leaf for leaf in pytree.tree_leaves(z0) if isinstance(leaf, Tensor) and leaf.dim()]
    # Without a state the solve itself says what is wrong. A trace of a whole solve cannot hold the
    # scope; layers that need it say so.
    if not leaves or torch.compiler.is_compiling():
        return f, inputs
    batch = leaves[0].shape[0]
    outer = _scope.get() or _Scope({})
    if outer.rows is None:
        outer = _Scope(outer.masks, batch, torch.arange(batch, device=leaves[0].device))
    elif len(outer.rows) != batch:  # an inner solve over something else than the outer samples
        return f, inputs

    scope = outer

    def held(z: Any, rows: Tensor, *inputs: Any) -> Any:
        nonlocal scope
        if scope.rows is not rows:  # samples have left, or a transform passes them on
            scope = _Scope(outer.masks, outer.batch, rows)
        token = _scope.set(scope)
        try:
            return f(z, *inputs)
        finally:
            _scope.reset(token)

    return held, (outer.rows, *inputs)
