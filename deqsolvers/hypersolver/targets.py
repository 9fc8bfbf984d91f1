"""The fixed points z* that a HyperSolver learns from, and a cache of them."""

from __future__ import annotations

import ctypes
import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deqsolvers.deq import DEQ
from deqsolvers.solvers import Anderson, Picard, Solver
from deqsolvers.state import Layout, map_rows, take_rows

# A z* whose own residual is above this is no target.
RELIABLE = 1e-2
_IN_MEMORY = 2**30  # bytes


@dataclass(frozen=True)
class Target:
    """What one batch can teach: the samples with a reliable z* other than zero.

    The others leave the batch here: a weight of zero would not keep their NaN out of the gradient.
    Where f may couple samples (``drop_converged=False``), z* is one of the whole batch: either all
    are reliable and all stay, those at zero unjudged, or none.

    Attributes:
        inputs: of f, the samples that stay.
        goal: (rows, features) their z*.
        layout: of the state.
        skipped: how many samples teach nothing.
        judged: (rows,) whether distances of a sample count; None for all.
    """

    inputs: tuple[Any, ...]
    goal: Tensor
    layout: Layout
    skipped: int
    judged: Tensor | None = None

    @property
    def samples(self) -> int:
        """How many the batch had."""
        return len(self.goal) + (self.skipped if self.judged is None else 0)

    def judge(self, values: Tensor) -> Tensor:
        """Of ``values`` (..., rows) those that count."""
        return values if self.judged is None else values[..., self.judged]


class Teacher:
    """Solves batches for z* with a classic solver, each batch once if there is a cache.

    Args:
        deq: provides f.
        solver: `Anderson` with memory 10 if None.
        tol, max_steps: its relative tolerance and limit; ``stall_after`` and ``drop_converged`` are
            the DEQ's own.
        cache: True keeps z* in memory, up to a gibibyte; a folder keeps it there, for later
            fits too. A batch is known again by its values, and so are the weights of an f that is
            an nn.Module; what a folder holds is used only where f, evaluated once, leaves it in
            place.
    """

    def __init__(
        self,
        deq: DEQ,
        solver: Solver | None = None,
        tol: float = 1e-4,
        max_steps: int = 100,
        cache: bool | str | Path = False,
    ):
        self.solver = solver or Anderson(memory=10)
        self.tol, self.max_steps = tol, max_steps
        # Whether samples may leave the batch, and how long a plateau is, stay the layer's own.
        self.deq = deq.with_solver(
            self.solver,
            raise_on_failure=False,
            tol=tol,
            max_steps=max_steps,
            relative=True,
            final="best",
        )
        self.whole = not self.deq.options.drop_converged
        self.folder = None if isinstance(cache, bool) else Path(cache)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.caching = cache is not False
        self._kept: dict[str, tuple[Any, Tensor]] = {}
        self._trusted: set[Path] = set()  # files that were written or checked here
        self._bytes = 0
        self._map = ""
        if self.caching:
            self._map = _digest((), f"{fingerprint(deq.f)} {self.solver!r} {tol} {max_steps}")

    def target(self, batch: Any) -> Target:
        """z* for one item of ``batches``: f's inputs, a tensor, or a tuple or list of them."""
        inputs = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        z, residual = self._solve(inputs)
        layout = Layout.of(z)
        with torch.no_grad():
            goal = layout.flatten(z)
            # Distances are relative to ||z*||, and none is so to zero.
            usable = goal.square().sum(1) > 0
            reliable = residual <= RELIABLE
            if self.whole and reliable.all() and usable.any():
                return Target(inputs, goal, layout, int((~usable).sum()), usable)
            taught = torch.zeros_like(usable) if self.whole else reliable & usable
            rows = taught.nonzero().squeeze(1)
            kept = map_rows(partial(take_rows, rows=rows), inputs, len(goal))
            return Target(kept, goal[rows], layout, len(goal) - len(rows))

    def _solve(self, inputs: tuple[Any, ...]) -> tuple[Any, Tensor]:
        if not self.caching:
            solution = self.deq.solve(*inputs)
            return solution.z, solution.residual
        key = _digest(pytree.tree_leaves(inputs), self._map)
        file = self.folder / f"{key}.pt" if self.folder is not None else None
        if key in self._kept:
            return self._kept[key]
        if file is not None and file.exists():
            found = self._stored(file, inputs)
            if found is not None:
                return found
        solution = self.deq.solve(*inputs)
        found = (solution.z, solution.residual)
        size = sum(leaf.numel() * leaf.element_size() for leaf in pytree.tree_leaves(found))
        if file is not None:
            write_whole(file, {"z": solution.z, "residual": solution.residual})
            self._trusted.add(file)
        elif self._bytes + size <= _IN_MEMORY:
            self._kept[key] = found
            self._bytes += size
        return found

    def _stored(self, file: Path, inputs: tuple[Any, ...]) -> tuple[Any, Tensor] | None:
        """What ``file`` holds; None if another f made it, of which weights need not tell."""
        leaves = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
        device = leaves[0].device if leaves else None
        stored = torch.load(file, map_location=device, weights_only=True)
        z, residual = stored["z"], stored["residual"]
        if file in self._trusted:
            return z, residual
        now = self.deq.with_solver(Picard(), tol=None, max_steps=1, final="last").solve(
            *inputs, z0=z, trace=True
        )
        assert now.trace is not None
        # Twice as much, because another device or number of threads rounds differently.
        fits = now.trace[0] <= 2 * residual.clamp_min(self.tol)
        if not bool((fits | ~(residual <= RELIABLE)).all()):
            return None
        self._trusted.add(file)
        return z, residual


def fingerprint(f: Any) -> str:
    """Of the weights of f; every f that is no nn.Module has the same."""
    return _digest(f.state_dict().values() if isinstance(f, nn.Module) else (), "")


def _digest(leaves: Iterable[Any], text: str) -> str:
    state = hashlib.blake2b(text.encode(), digest_size=16)
    for leaf in leaves:
        if isinstance(leaf, Tensor):
            state.update(f"{leaf.dtype} {tuple(leaf.shape)}".encode())
            values = leaf.detach().resolve_conj().cpu().contiguous().reshape(-1)
            values = torch.view_as_real(values).reshape(-1) if leaf.is_complex() else values
            size = values.numel() * values.element_size()
            state.update((ctypes.c_char * size).from_address(values.data_ptr()))  # without NumPy
        else:
            state.update(repr(leaf).encode())
    return state.hexdigest()


def write_whole(path: Path, content: Any) -> None:
    """`torch.save` that leaves the old file or the new one, whatever interrupts it."""
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        with open(partial, "wb") as file:
            torch.save(content, file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
