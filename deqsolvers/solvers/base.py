"""What a solver is: hyper-parameters, and `init` and `step` over an explicit memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from deqsolvers.modes import may_overwrite
from deqsolvers.state import Layout


@dataclass
class Memory:
    """What a solver remembers between steps; every tensor and `History` has a row a sample."""

    def take(self, rows: Tensor) -> None:
        """Keep only these rows, because the other samples left the batch."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value[rows])
            elif isinstance(value, History):
                value.take(rows)


class Solver(ABC):
    """A method that turns (z, f(z)) into the next z.

    A solver knows nothing of stopping, statuses or autograd: `deqsolvers.fixed_point` owns those.
    To add a method, write these two functions; they see (B, features) matrices and must treat every
    row on its own. They must not write into their arguments, and may keep ``g`` for one more step
    only, because its memory is used again.
    """

    @abstractmethod
    def init(self, z: Tensor, layout: Layout) -> Any:
        """Fresh memory for a solve that starts at ``z`` (B, features)."""

    @abstractmethod
    def step(self, memory: Any, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        """The iterate after ``z``, given ``fz = f(z)`` and ``g = fz - z``, all (B, features)."""

    def start(self, *inputs: Any) -> Any | None:
        """A state to start from where the caller gives none; None if the method has no opinion."""
        return None


class History:
    """The last ``size`` matrices (B, features) that were pushed, in a ring (B, size, features).

    Under autograd every push makes a new buffer, since earlier ones may be saved for backward;
    otherwise it writes in place.
    """

    # From this width on a loop of matrix-vector products over the samples beats a batched product.
    _WIDE = 8192

    def __init__(self, size: int, like: Tensor):
        self.size = size
        self.pushed = 0
        self.buffer = like.new_empty(like.shape[0], size, like.shape[1])

    @property
    def filled(self) -> int:
        """How many slots hold data."""
        return min(self.pushed, self.size)

    @property
    def slot(self) -> int:
        """The slot that the next push writes."""
        return self.pushed % self.size

    @property
    def newest(self) -> int:
        """The slot that the last push wrote."""
        return (self.pushed - 1) % self.size

    def ages(self) -> Tensor:
        """(filled,) how many pushes ago each slot was written, 0 for the newest."""
        slots = torch.arange(self.filled, device=self.buffer.device)
        return (self.pushed - 1 - slots).remainder(self.size)

    def push(self, value: Tensor) -> None:
        """Write ``value`` over the oldest entry."""
        if torch.is_grad_enabled():
            entries = list(self.buffer[:, : self.filled].unbind(1))
            entries[self.slot : self.slot + 1] = [value]
            self.buffer = torch.stack(entries, dim=1)
        else:
            self.buffer[:, self.slot].copy_(value)
        self.pushed += 1

    def push_difference(self, new: Tensor, old: Tensor) -> None:
        """Write ``new - old`` over the oldest entry, without a temporary."""
        if not may_overwrite():
            self.push(new - old)
        else:
            torch.sub(new, old, out=self.buffer[:, self.slot])
            self.pushed += 1

    def dot(self, x: Tensor) -> Tensor:
        """(B, filled) inner products of every entry with ``x`` (B, features)."""
        buffer = self.buffer[:, : self.filled]
        if self._by_rows(x):
            products = x.new_empty(buffer.shape[:2])
            for row in range(len(x)):
                torch.mv(buffer[row], x[row], out=products[row])
            return products
        if x.is_cuda:
            return torch.bmm(buffer, x.unsqueeze(-1)).squeeze(-1)
        return (buffer * x.unsqueeze(1)).sum(-1)

    def combine(self, weights: Tensor) -> Tensor:
        """(B, features) sum of the entries weighted by ``weights`` (B, filled)."""
        buffer = self.buffer[:, : self.filled]
        if self._by_rows(self.buffer):
            total = buffer.new_empty(len(buffer), buffer.shape[2])
            for row in range(len(buffer)):
                torch.mv(buffer[row].t(), weights[row], out=total[row])
            return total
        return torch.bmm(weights.unsqueeze(1), buffer).squeeze(1)

    def subtract_from(self, x: Tensor, weights: Tensor) -> Tensor:
        """A new tensor: ``x`` (B, features) less the entries times ``weights`` (B, filled)."""
        return self._add(x, weights, -1)

    def add_to(self, x: Tensor, weights: Tensor) -> Tensor:
        """A new tensor: ``x`` (B, features) plus the entries times ``weights`` (B, filled)."""
        return self._add(x, weights, 1)

    def _add(self, x: Tensor, weights: Tensor, sign: int) -> Tensor:
        buffer = self.buffer[:, : self.filled]
        if self._by_rows(x):
            difference = torch.empty_like(x)
            for row in range(len(x)):
                torch.addmv(x[row], buffer[row].t(), weights[row], alpha=sign, out=difference[row])
            return difference
        return torch.baddbmm(x.unsqueeze(1), weights.unsqueeze(1), buffer, alpha=sign).squeeze(1)

    def _by_rows(self, x: Tensor) -> bool:
        # On a CPU one batched product of long rows leaves most of the memory bandwidth unused.
        if x.is_cuda or not may_overwrite():
            return False
        return x.shape[-1] >= self._WIDE

    def take(self, rows: Tensor) -> None:
        """Keep only these samples."""
        self.buffer = self.buffer[rows]


def check_fraction(name: str, value: float) -> float:
    """``value`` if it lies in (0, 1]; ValueError otherwise."""
    if not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value}")
    return float(value)


def check_solver(solver: object) -> None:
    """TypeError unless ``solver`` is a `Solver` object."""
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a Solver such as Anderson(), got {solver!r}")


def check_count(name: str, value: int, least: int = 1) -> int:
    """``value`` if it is an integer of at least ``least``; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return value
