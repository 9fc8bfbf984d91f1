"""Limited-memory Broyden."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from deqsolvers.solvers.base import History, Memory, Solver, check_count, check_fraction
from deqsolvers.state import Layout


@dataclass
class _BroydenMemory(Memory):
    u: History
    v: History
    length: Tensor  # (B,) newest rank-one terms that are in use, shorter after a reset
    last: tuple[Tensor, Tensor] | None = None  # z of the last step, and H g with the H that made it

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        if self.last is not None:
            self.last = self.last[0][rows], self.last[1][rows]


class Broyden(Solver):
    """Broyden's first method on ``g(z) = f(z) - z``, with an inverse Jacobian of limited rank.

    The inverse is ``H = -I + sum_i u_i v_i^T`` and is updated by the Sherman-Morrison formula
    (Broyden, 1965). At most ``memory`` rank-one terms are kept; when they are full the sample
    starts again from -I. A sample whose update would divide by almost zero is reset in the same
    way.

    Args:
        memory: how many rank-one terms are kept, at least 1.
        damping: fraction of the quasi-Newton step that is taken, in (0, 1].
    """

    # An update is skipped where the secant denominator is this small against its factors.
    _SINGULAR = 1e-10

    def __init__(self, memory: int = 20, damping: float = 1.0):
        self.memory = check_count("memory", memory)
        self.damping = check_fraction("damping", damping)

    def __repr__(self) -> str:
        return f"Broyden(memory={self.memory}, damping={self.damping})"

    def init(self, z: Tensor, layout: Layout) -> _BroydenMemory:
        return _BroydenMemory(
            u=History(self.memory, z),
            v=History(self.memory, z),
            length=torch.zeros(z.shape[0], dtype=torch.int64, device=z.device),
        )

    def step(self, memory: _BroydenMemory, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        hg = self._apply(memory.u, memory.v, memory.length, g)
        if memory.last is not None:
            last_z, last_hg = memory.last
            hg = self._update(memory, z - last_z, g, hg, hg - last_hg)
        memory.last = z, hg
        return z.add(hg, alpha=-self.damping)

    def _update(
        self, memory: _BroydenMemory, step: Tensor, g: Tensor, hg: Tensor, h_change: Tensor
    ) -> Tensor:
        """Add the rank-one term of the last step; returns H g with the new H.

        ``h_change`` is H times the change of g over that step, with the old H.
        """
        v = self._apply(memory.v, memory.u, memory.length, step)
        denominator = torch.linalg.vecdot(step, h_change).unsqueeze(1)
        size = (
            torch.linalg.vector_norm(step, dim=1) * torch.linalg.vector_norm(h_change, dim=1)
        ).unsqueeze(1)
        usable = denominator.abs() > self._SINGULAR * size
        inverse = torch.where(usable, 1 / denominator, 0.0)
        u = (step - h_change).mul_(inverse)
        full = (memory.length == self.memory) | ~usable.squeeze(1)
        # A sample that did not move is one that the loop holds, decided; its H stays as it is.
        held = (step == 0).all(1)
        full = full & ~held
        memory.u.push(u)
        memory.v.push(torch.where(held.unsqueeze(1), 0.0, v))
        memory.length = torch.where(full, 0, (memory.length + 1).clamp_max(self.memory))
        updated = hg + u * torch.linalg.vecdot(v, g).unsqueeze(1)
        # After a reset H is -I again, and the next difference must be taken with that H.
        return torch.where(full.unsqueeze(1), -g, updated)

    def inverse_transposed(self, memory: _BroydenMemory, v: Tensor) -> Tensor:
        """``H^T v``, H the estimate of the inverse Jacobian of f(z) - z that ``memory`` holds."""
        return self._apply(memory.v, memory.u, memory.length, v)

    @staticmethod
    def _apply(left: History, right: History, length: Tensor, x: Tensor) -> Tensor:
        """``(-I + sum_i left_i right_i^T) x`` over the terms in use; swapped, the transpose."""
        if left.filled == 0:
            return -x
        weights = torch.where(left.ages() < length.unsqueeze(1), right.dot(x), 0.0)
        return left.combine(weights).sub_(x)
