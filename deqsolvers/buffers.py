"""Large tensors that a solve uses again, because fresh ones are slow on a CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from deqsolvers.modes import may_overwrite

# From this size on malloc maps fresh pages, and the faults cost as much as several passes.
_LARGE = 128 * 1024
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
        tensor = torch.empty_like(x)
        self._own.append((tensor, _owners(tensor)))
        return tensor.detach()


def _owners(x: Tensor) -> int:
    return torch._C._storage_Use_Count(x.untyped_storage()._cdata)
