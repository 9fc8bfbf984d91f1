"""Limited-memory Broyden."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor
from torch.nn.functional import pad

from deqsolvers.modes import may_look, may_overwrite
from deqsolvers.solvers.base import Memory, Solver, check_count, check_fraction
from deqsolvers.solvers.history import History, row_norms
from deqsolvers.state import Layout


@dataclass
class _BroydenMemory(Memory):
    steps: History  # s_j = z_(j+1) - z_j
    gram: Tensor  # (B, memory, memory) float64, inner products of the steps
    # (B, memory, memory) float64, strictly lower triangular: s_i u_j for j < i, where the factor
    # that step j + 1 added to H is I + u_j s_j^T; 0 for factors not in use.
    lower: Tensor
    p: Tensor  # (B, memory) float64, u_j = p_j s_(j+1) + q_j s_j; both 0 for factors not in use
    q: Tensor  # all 0 without damping
    trues: Tensor  # (B,)
    layout: Layout
    z: Tensor | None = None  # where the last step was taken from
    moved_to: Tensor | None = None  # where it led
    recorded: bool = field(default_factory=lambda: not may_overwrite())  # by autograd, say

    def writable(self, x: Tensor) -> Tensor:
        """``x``, or a copy if ``x`` may be saved for backward."""
        return x.clone() if self.recorded else x


class Broyden(Solver):
    """Broyden's first method on ``g(z) = f(z) - z``, with an inverse Jacobian of limited rank.

    By the Sherman-Morrison formula every step multiplies the inverse by a rank-one factor made of
    the last two steps, ``H <- (I + u s^T) H`` with ``u = (s_new - (1 - damping) s) / (s^T s)``,
    starting from ``H = -I`` (Broyden 1965; the form without a second vector is Kelley's, "Iterative
    methods for linear and nonlinear equations", 1995, section 7.3, here for damped steps too). So
    one vector a step is kept, and with the Gram matrix of the steps ``H g`` takes one pass over
    them for inner products and one to combine them.

    When ``memory`` steps are kept the method starts again from -I. A sample whose update would
    divide by almost zero does the same on its own.

    On a CPU a solver keeps the memory of large states and histories for its next solve.

    Args:
        memory: how many steps are kept, at least 1; with 1, or after a restart, the step is a plain
            one.
        damping: fraction of the quasi-Newton step that is taken, in (0, 1].
    """

    def __init__(self, memory: int = 20, damping: float = 1.0):
        self.memory = check_count("memory", memory)
        self.damping = check_fraction("damping", damping)

    def __repr__(self) -> str:
        return f"Broyden(memory={self.memory}, damping={self.damping})"

    def init(self, z: Tensor, layout: Layout) -> _BroydenMemory:
        square = z.new_zeros(z.shape[0], self._slots, self._slots, dtype=torch.float64)
        slots = self.workspace.history((self._slots, *z.shape), z)
        return _BroydenMemory(
            steps=History(self._slots, z, slots),
            gram=square,
            lower=square.clone(),
            p=square[:, 0].clone(),
            q=square[:, 0].clone(),
            trues=torch.ones(z.shape[0], dtype=torch.bool, device=z.device),
            layout=layout,
        )

    @property
    def _slots(self) -> int:
        # A rank-one factor links two steps.
        return self.memory + 1

    def step(self, memory: _BroydenMemory, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        first, held = memory.z is None, self._held(memory, z)
        memory.z = z
        if memory.steps.filled == self._slots:
            # The last step goes too: H is -I again, and this step is the first of a new product.
            self._clear(memory)
        step = memory.steps.room()
        if memory.steps.filled == 0 or first:
            step = torch.mul(g, self.damping, out=step)
            products = step.new_zeros(len(step), 0, dtype=torch.float64)
        else:
            step, products = self._quasi_newton(memory, g, held, step)
        self._push(memory, step, products)
        memory.moved_to = torch.add(z, step, out=self.workspace.like(z))
        return memory.moved_to

    def _held(self, memory: _BroydenMemory, z: Tensor) -> Tensor | None:
        """(B,) which samples did not take the last step: the loop holds those that it has decided.
        None if all took it."""
        if memory.z is None or memory.moved_to is None or z is memory.moved_to:
            return None
        target = memory.moved_to
        if memory.layout.rounds:  # as the loop does
            target = memory.layout.flatten(memory.layout.unflatten(target))
        # One that was decided is first put back to its best iterate, and then stays there.
        return (z == memory.z).all(1) | ~(z == target).all(1)

    def _clear(self, memory: _BroydenMemory) -> None:
        memory.steps.pushed = 0
        memory.gram, memory.lower = torch.zeros_like(memory.gram), torch.zeros_like(memory.lower)
        memory.p, memory.q = torch.zeros_like(memory.p), torch.zeros_like(memory.q)

    def _quasi_newton(
        self, memory: _BroydenMemory, g: Tensor, held: Tensor | None, out: Tensor | None
    ) -> tuple[Tensor, Tensor]:
        """The next step and its inner products with the steps that are kept (B, k)."""
        k = memory.steps.filled
        gram = memory.gram[:, :k, :k]
        c = memory.steps.dot(g)
        # H_before g = -(g + S a): the factors' inner products solve a triangular system.
        t = torch.linalg.solve_triangular(
            -memory.lower[:, :k, :k], c.unsqueeze(2), upper=False, unitriangular=True
        ).squeeze(2)
        a = pad(memory.p[:, : k - 1] * t[:, :-1], (1, 0))
        if self.damping != 1:
            a = a + memory.q[:, :k] * t
        along = c + torch.bmm(gram, a.unsqueeze(2)).squeeze(2)  # -S^T H_before g
        change, length = -along[:, -1], gram[:, -1, -1]
        denominator = change + (length if self.damping == 1 else length / self.damping)
        # The inner products carry the rounding of the working precision.
        rounding = 10 * torch.finfo(g.dtype).eps
        usable = denominator.abs() > rounding * (change.abs() + length)
        usable = usable.logical_and(length)
        reset = None
        if held is not None or not may_look(g) or not torch.equal(usable, memory.trues):
            moved = torch.ones_like(usable) if held is None else ~held
            # Where H cannot be updated it starts again from -I, and the step is a plain one.
            reset = (~usable & moved).unsqueeze(1)
            change = torch.where(usable, change, 0.0)
            denominator = torch.where(usable, denominator, 1.0)
            length = torch.where(usable & moved, length, torch.inf)
        # With y = H_before g the new H gives -H g = -(1 - sigma) y + (1 / damping - 1) sigma s.
        sigma = change / denominator
        share = ((1 - sigma) * self.damping).unsqueeze(1)
        weights, products = share * a, share * along
        if self.damping != 1:
            part = ((1 - self.damping) * sigma).unsqueeze(1)
            weights = weights + pad(part, (k - 1, 0))
            products = products + part * gram[:, -1]
        if reset is not None:
            share = torch.where(reset, self.damping, share)
            weights = torch.where(reset, 0.0, weights)
            products = torch.where(reset, self.damping * c, products)
        if held is not None:  # they keep their H and stay
            stays = held.unsqueeze(1)
            share, weights = torch.where(stays, 0.0, share), torch.where(stays, 0.0, weights)
            products = torch.where(stays, 0.0, products)
        self._add_factor(memory, k, reset, length)
        # In its place in the history, which spares a copy for the sum and another for the push.
        start = torch.mul(g, share.to(g.dtype), out=out)
        return memory.steps.add_to(start, weights, out), products

    def _add_factor(
        self, memory: _BroydenMemory, k: int, reset: Tensor | None, length: Tensor
    ) -> None:
        """``length`` is that of the last step squared, infinite where H keeps its factors."""
        memory.p = memory.writable(memory.p)
        memory.p[:, k - 1] = inverse = 1 / length
        if self.damping != 1:
            memory.q = memory.writable(memory.q)
            memory.q[:, k - 1] = (self.damping - 1) * inverse
        if reset is not None:
            memory.p = torch.where(reset, 0.0, memory.p)
            memory.q = torch.where(reset, 0.0, memory.q)
            memory.lower = torch.where(reset.unsqueeze(2), 0.0, memory.lower)

    def _push(self, memory: _BroydenMemory, step: Tensor, products: Tensor) -> None:
        """Keep ``step``, whose inner products with the steps before it are known."""
        k = products.shape[1]
        memory.steps.push(step)
        square = row_norms(step).double().square().unsqueeze(1)
        row = torch.cat((products, square), dim=1)
        gram, lower = memory.writable(memory.gram), memory.writable(memory.lower)
        gram[:, k, : k + 1] = row
        gram[:, : k + 1, k] = row
        # s_k u_j for all factors j < k, the one that this step completes among them.
        factors = memory.p[:, :k] * row[:, 1:]
        lower[:, k, :k] = factors if self.damping == 1 else factors + memory.q[:, :k] * row[:, :k]
        memory.gram, memory.lower = gram, lower

    def inverse_transposed(self, memory: _BroydenMemory, v: Tensor) -> Tensor:
        """``H^T v``, H the estimate of the inverse Jacobian of f(z) - z that ``memory`` holds."""
        k = memory.steps.filled
        e = memory.steps.dot(v)
        p, q = memory.p[:, :k], memory.q[:, :k]
        right = q * e + p * torch.nn.functional.pad(e[:, 1:], (0, 1))
        r = torch.linalg.solve_triangular(
            -memory.lower[:, :k, :k].mT, right.unsqueeze(2), upper=True, unitriangular=True
        ).squeeze(2)
        return -memory.steps.add_to(v, r)
