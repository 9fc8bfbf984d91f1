"""Large tensors that a solve uses again, because fresh ones are slow on a CPU."""

from __future__ import annotations

import math
import threading
from functools import cache

import torch
from torch import Tensor

from deqsolvers.modes import may_overwrite

# From this size on malloc maps fresh pages, and the faults cost as much as several passes.
_LARGE = 128 * 1024
# Larger pieces glibc always returns to the system when they are freed.
_RETURNED = 32 * 1024 * 1024
# Not public, though torch itself rests on it; without it no memory is used again.
_COUNTS = hasattr(torch._C, "_storage_Use_Count")


class Buffers:
    """Hands out uninitialised tensors, and hands one out again once nobody else looks at it.

    Every view counts as a look, a tensor that f has kept as much as the solver's own, so nobody
    has to promise to be done with a tensor.
    """

    def __init__(self) -> None:
        self._own: list[tuple[Tensor, int]] = []  # with the owners its storage has when unused
        self._in_place = _COUNTS and may_overwrite()

    def like(self, x: Tensor) -> Tensor | None:
        """A tensor like ``x`` for ``out=``. None, which allocates as usual, where that is cheap
        or a graph is recorded."""
        if not self._in_place or x.numel() * x.element_size() < _LARGE or not x.is_cpu:
            return None
        self._own = [entry for entry in self._own if entry[0].shape == x.shape]
        for tensor, unused in self._own:
            if _owners(tensor) == unused:
                return tensor.detach()
        _raise_trim_threshold()
        tensor = torch.empty_like(x)
        self._own.append((tensor, _owners(tensor)))
        return tensor.detach()


class Reserve:
    """The memory of a solver's last history, kept for its next solve where malloc would not.

    Page faults on fresh memory take a fifth of a solve with a large history. While the memory is in
    use, by another thread or what a solve left, the next solve gets memory of its own.
    Copies and pickles of a reserve are empty.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._kept: Tensor | None = None
        self._unused = 0  # owners of its storage when nobody looks at it

    def __reduce__(self) -> tuple[type[Reserve], tuple[()]]:
        return Reserve, ()

    def empty(self, shape: tuple[int, ...], like: Tensor) -> Tensor:
        """An uninitialised tensor of the dtype and device of ``like``."""
        size = math.prod(shape) * like.element_size()
        plain = like.is_cpu and type(like) is Tensor  # not one that a tracer made up
        if size <= _RETURNED or not (_COUNTS and plain and may_overwrite()):
            return like.new_empty(shape)
        with self._lock:
            if not self._serves(size):
                self._kept = None  # before there is more
                with torch.inference_mode(False):  # other solves could not write there
                    self._kept = torch.empty(size, dtype=torch.uint8)
                self._unused = _owners(self._kept)
            assert self._kept is not None
            return self._kept[:size].view(like.dtype).view(shape)

    def _serves(self, size: int) -> bool:
        if self._kept is None or _owners(self._kept) != self._unused:
            return False
        return size <= len(self._kept) <= 2 * size


@cache
def _raise_trim_threshold() -> None:
    """Let glibc keep up to 64 MiB of what is freed, rather than twice its largest block so far.

    Otherwise what f returns and what a step needs is mapped anew time and again. glibc learns it
    from a large block that is freed; of this one not a page is touched.
    """
    torch.empty(_RETURNED - _LARGE, dtype=torch.uint8)


def _owners(x: Tensor) -> int:
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)
