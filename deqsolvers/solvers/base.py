"""What a solver is: hyper-parameters, and `init` and `step` over an explicit memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor

from deqsolvers.modes import may_overwrite
from deqsolvers.state import Layout

# From this width on it pays to cut a row for several cores.
_LONG = 16384


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
    row on its own. They must not write into their arguments.
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
    """The last ``size`` matrices (B, features) that were pushed, in a ring (size, B, features).

    Under autograd every push makes a new buffer, since earlier ones may be saved for backward;
    otherwise it writes in place.
    """

    def __init__(self, size: int, like: Tensor):
        self.size = size
        self.pushed = 0
        self.buffer = like.new_empty(size, *like.shape)

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
            entries = list(self.buffer[: self.filled].unbind(0))
            entries[self.slot : self.slot + 1] = [value]
            self.buffer = torch.stack(entries)
        else:
            self.buffer[self.slot].copy_(value)
        self.pushed += 1

    def room(self) -> Tensor | None:
        """Where the next push writes, for ``out=``; None where a push makes a new buffer.

        A push of what was written there copies nothing.
        """
        return self.buffer[self.slot] if may_overwrite() else None

    def push_difference(self, new: Tensor, old: Tensor) -> None:
        """Write ``new - old`` over the oldest entry, without a temporary."""
        if not may_overwrite():
            self.push(new - old)
        else:
            torch.sub(new, old, out=self.buffer[self.slot])
            self.pushed += 1

    def dot(self, x: Tensor) -> Tensor:
        """(B, filled) inner products of every entry with ``x`` (B, features)."""
        cuts = _cuts(x)
        # In this order, not entries times x, the product of long rows runs at memory speed.
        products = torch.bmm(_cut(x, cuts).unsqueeze(1), self._entries(cuts).mT).squeeze(1)
        return products if cuts == 1 else products.unflatten(0, (-1, cuts)).sum(1)

    def combine(self, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """(B, features) sum of the entries weighted by ``weights`` (B, filled)."""
        cuts = _cuts(self.buffer[0])
        place = None if out is None else _cut(out, cuts).unsqueeze(1)
        total = torch.bmm(_repeat(weights, cuts).unsqueeze(1), self._entries(cuts), out=place)
        return total.reshape(self.buffer.shape[1:]) if out is None else out

    def subtract_from(self, x: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """``x`` (B, features) less the entries times ``weights`` (B, filled)."""
        return self._add(x, weights, -1, out)

    def add_to(self, x: Tensor, weights: Tensor, out: Tensor | None = None) -> Tensor:
        """``x`` (B, features) plus the entries times ``weights`` (B, filled)."""
        return self._add(x, weights, 1, out)

    def _add(self, x: Tensor, weights: Tensor, sign: int, out: Tensor | None) -> Tensor:
        cuts = _cuts(x)
        place = None if out is None else _cut(out, cuts).unsqueeze(1)
        total = torch.baddbmm(
            _cut(x, cuts).unsqueeze(1),
            _repeat(weights, cuts).unsqueeze(1),
            self._entries(cuts),
            alpha=sign,
            out=place,
        )
        return total.reshape(x.shape) if out is None else out

    def _entries(self, cuts: int) -> Tensor:
        """(B * cuts, filled, features / cuts) what is stored, a batch of matrices."""
        return _cut(self.buffer[: self.filled], cuts).transpose(0, 1)

    def take(self, rows: Tensor) -> None:
        """Keep only these samples."""
        self.buffer = self.buffer[:, rows]


def _cuts(x: Tensor) -> int:
    """How many pieces each row of ``x`` (B, features) is worked on in.

    On a CPU a batched product gives each core whole samples; where there are fewer samples than
    cores, and rows are long, they are cut.
    """
    batch, features = x.shape
    if features < _LONG or not x.is_cpu or not may_overwrite():
        return 1
    threads = torch.get_num_threads()
    if batch >= threads:
        return 1
    cuts = -(-threads // batch)
    return cuts if features % cuts == 0 and x.is_contiguous() else 1


def _cut(x: Tensor, cuts: int) -> Tensor:
    """(..., B * cuts, features / cuts) view of ``x`` (..., B, features)."""
    return x if cuts == 1 else x.view(*x.shape[:-2], -1, x.shape[-1] // cuts)


def _repeat(weights: Tensor, cuts: int) -> Tensor:
    return weights if cuts == 1 else weights.repeat_interleave(cuts, dim=0)


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
