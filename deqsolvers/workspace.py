"""Large tensors that solves use again, because fresh ones are slow on a CPU."""

from __future__ import annotations

import math
import threading
from functools import cache

import torch
from torch import Tensor

from deqsolvers.modes import may_overwrite

# From this size on malloc maps fresh pages, and the faults cost as much as several passes.
_LARGE = 128 * 1024
# From this size on histories are kept as well.
_LONG = 1024 * 1024
# Larger pieces glibc always returns to the system when they are freed, and smaller ones whenever
# twice as much is free at the end of its heap, whoever freed it.
_RETURNED = 32 * 1024 * 1024
# Not public, though torch itself rests on it; without it no memory is used again.
_COUNTS = hasattr(torch._C, "_storage_Use_Count")


class _Piece:
    """Memory that is kept."""

    def __init__(self, shape: tuple[int, ...], dtype: torch.dtype):
        with torch.inference_mode(False):  # else solves outside of it could not write there
            self.tensor = torch.empty(shape, dtype=dtype)
        self._alone = self._owners()

    def _owners(self) -> int:
        return torch._C._storage_Use_Count(self.tensor.untyped_storage()._cdata)

    @property
    def unused(self) -> bool:
        """Whether nobody else looks at it."""
        return self._owners() == self._alone


class Workspace:
    """A solver's large tensors on a CPU, handed out again once nobody else looks at them.

    Without it page faults take up to half of a solve of few steps. Every view counts as a look, a
    tensor that f has kept as much as the solver's own, so nobody has to promise to be done with a
    tensor. Solves in several threads may share one; copies and pickles of it are empty.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._states: list[_Piece] = []
        self._history: _Piece | None = None

    def __reduce__(self) -> tuple[type[Workspace], tuple[()]]:
        return Workspace, ()

    def like(self, x: Tensor) -> Tensor | None:
        """A tensor of the shape and dtype of ``x`` for ``out=``. None, which allocates as usual,
        where that is cheap or a graph is recorded."""
        if x.numel() * x.element_size() < _LARGE or not _serves(x):
            return None
        with self._lock:
            # What is of no use any more goes before there is more.
            self._states = [kept for kept in self._states if kept.tensor.shape == x.shape]
            for kept in self._states:
                if kept.tensor.dtype == x.dtype and kept.unused:
                    return kept.tensor.detach()
            _raise_trim_threshold()
            self._states.append(_Piece(x.shape, x.dtype))
            return self._states[-1].tensor.detach()

    def history(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of the dtype and device of ``like``.

        Its memory is that of the last one, where this was large enough and is not in use: by
        another thread, say, or by what a solve left.
        """
        size = math.prod(shape) * like.element_size()
        if size < _LONG or not _serves(like):
            return like.new_empty(shape)
        with self._lock:
            kept = self._history
            if kept is None or not kept.unused or not size <= len(kept.tensor) <= 2 * size:
                kept = self._history = None  # before there is more
                kept = self._history = _Piece((size,), torch.uint8)
            return kept.tensor[:size].view(like.dtype).view(shape)

    def end(self) -> None:
        """Forget at the end of a solve the states that somebody still looks at.

        A result is its owner's for good: it may be shared with other processes, which nobody here
        could know to look at it.
        """
        if self._states:
            with self._lock:
                self._states = [kept for kept in self._states if kept.unused]


def _serves(x: Tensor) -> bool:
    """Whether memory for ``x`` may be used again: not for one that a tracer made up, say."""
    return _COUNTS and x.is_cpu and type(x) is Tensor and may_overwrite()


@cache
def _raise_trim_threshold() -> None:
    """Let glibc keep up to 64 MiB of what is freed, rather than twice its largest block so far.

    Otherwise what f returns and what a step needs is mapped anew time and again. glibc learns it
    from a large block that is freed; of this one not a page is touched.
    """
    torch.empty(_RETURNED - _LARGE, dtype=torch.uint8)
