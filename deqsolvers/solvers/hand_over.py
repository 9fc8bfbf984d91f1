"""A fast solver for the first steps and a sure one for the rest."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deqsolvers.modes import may_look
from deqsolvers.solvers.anderson import Anderson
from deqsolvers.solvers.base import Memory, Solver, check_count, check_solver
from deqsolvers.solvers.broyden import Broyden
from deqsolvers.solvers.hyper import HyperSolver
from deqsolvers.solvers.newton_krylov import NewtonKrylov
from deqsolvers.state import Layout


@dataclass
class _HandOverMemory(Memory):
    first: Any
    then: Any
    handed: Tensor  # (B,) bool, samples that `then` has taken over
    size: Tensor  # (B,) ||g|| at the last evaluation
    z: Tensor | None = None  # there
    fz: Tensor | None = None
    steps: int = 0
    finished: bool = False  # the host knows that every sample has been handed over

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        if not self.finished:
            self.first.take(rows)
        self.then.take(rows)


class HandOver(nn.Module, Solver):
    """Starts with one solver and hands each sample to another where the first is slow.

    A `HyperSolver` is fast at first and promises nothing later; ``HandOver(hyper)`` goes on from
    the point reached with `Anderson`, in the same loop, and so promises what Anderson does. The
    second solver sees every pair (z, f(z)) of the first too, so its first own step already draws on
    a full history.

    Args:
        first: takes the first steps, and gives the start.
        then: takes over; if None, `Anderson` with the preconditioner of ``first``, where it is a
            `HyperSolver` that has one.
        slowest: a sample whose ``||f(z) - z||`` falls to more than this fraction in one step of
            ``first`` is handed over. None takes what f itself contracts by along that step,
            ``||f(z_k) - f(z_(k-1))|| / ||z_k - z_(k-1)||`` and at most 1: where ``first`` gains no
            more than plain iteration would. So is a sample for which ``first`` returns a
            non-finite state.
        after: hand every sample over after so many steps. None takes as many as ``first`` was
            fitted for, where it is a fitted `HyperSolver`, and sets no limit else.

    Raises:
        TypeError: ``then`` is `Broyden` or `NewtonKrylov`, which learn along their own steps only.
        ValueError: ``slowest`` or ``after`` is out of range.
    """

    def __init__(
        self,
        first: Solver,
        then: Solver | None = None,
        *,
        slowest: float | None = None,
        after: int | None = None,
    ):
        super().__init__()
        check_solver(first)
        self.first = first
        learned = first.preconditioner if isinstance(first, HyperSolver) else None
        self.then = Anderson(preconditioner=learned) if then is None else then
        check_solver(self.then)
        if isinstance(self.then, (Broyden, NewtonKrylov)):
            raise TypeError(
                "then must be a solver that can use another's history, such as Anderson(); "
                "what Broyden and NewtonKrylov learn holds along their own steps only"
            )
        if slowest is not None and not slowest > 0:
            raise ValueError(f"slowest must be a fraction above 0, got {slowest}")
        self.explores = first.explores or self.then.explores
        self.slowest = slowest
        self.after = None if after is None else check_count("after", after)

    def extra_repr(self) -> str:
        return (
            f"{type(self.first).__name__} -> {self.then!r}, slowest={self.slowest}, "
            f"after={self.after}"
        )

    def start(self, *inputs: Any) -> Any | None:
        return self.first.start(*inputs)

    def init(self, z: Tensor, layout: Layout) -> _HandOverMemory:
        return _HandOverMemory(
            first=self.first.init(z, layout),
            then=self.then.init(z, layout),
            handed=torch.zeros(z.shape[0], dtype=torch.bool, device=z.device),
            size=z.new_full((z.shape[0],), torch.inf),
        )

    def step(self, memory: _HandOverMemory, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        sure = self.then.step(memory.then, z, fz, g)
        if memory.finished:
            return sure
        size = torch.linalg.vector_norm(g.detach(), dim=1)
        if memory.steps:
            # So that a step of no length, where both are 0, counts as slow.
            memory.handed = memory.handed | ~(size / memory.size < self._slowest(memory, z, fz))
        memory.size = size
        if self.slowest is None:
            memory.z, memory.fz = z.detach(), fz.detach()
        if memory.steps == self._limit:
            memory.handed = torch.ones_like(memory.handed)
        memory.steps += 1
        if may_look(z) and bool(memory.handed.all()):
            memory.finished = True
            memory.first = memory.z = memory.fz = None  # nobody needs what they hold any more
            return sure
        fast = self.first.step(memory.first, z, fz, g)
        memory.handed = memory.handed | ~torch.isfinite(fast).all(1)
        return torch.where(memory.handed.unsqueeze(1), sure, fast)

    @property
    def _limit(self) -> int | None:
        fitted = self.first.fitted_on if isinstance(self.first, HyperSolver) else None
        return fitted.steps if self.after is None and fitted is not None else self.after

    def _slowest(self, memory: _HandOverMemory, z: Tensor, fz: Tensor) -> Tensor | float:
        if memory.z is None or memory.fz is None:
            assert self.slowest is not None
            return self.slowest
        outward = torch.linalg.vector_norm(z.detach() - memory.z, dim=1)
        inward = torch.linalg.vector_norm(fz.detach() - memory.fz, dim=1)
        return (inward / outward).clamp_max(1)
