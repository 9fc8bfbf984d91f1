"""Anderson acceleration."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from deqsolvers.hypersolver.preconditioners import precondition
from deqsolvers.modes import may_look
from deqsolvers.solvers.base import Memory, Solver, check_count, check_fraction
from deqsolvers.solvers.history import Gram, History, row_norms, solve_positive
from deqsolvers.state import Layout

_TINY = torch.finfo(torch.float64).tiny


@dataclass
class AndersonMemory(Memory):
    """What both types of the method remember."""

    layout: Layout
    df: History  # differences of successive f(z)
    dg: History  # differences of successive residuals
    gram: Gram  # inner products of the columns of dg
    products: Tensor  # (B, filled) float64, columns of dg times the current residual
    # (B,) how many of the newest columns are in use, fewer after a restart. None on a CPU until the
    # first restart: all of them, which saves masks.
    length: Tensor | None
    smallest: Tensor  # (B,) smallest ||g|| since the history began
    least: Tensor  # (B,) float64, the smallest pivot
    solved: Tensor  # (B,) int32, zeros: what `_solve` tells of systems that it could solve
    fz: Tensor | None = None
    g: Tensor | None = None
    misled: Tensor | None = None  # (B,) bool, whose history had to start again

    def update_products(self, products: Tensor) -> Tensor:
        """Keep ``products`` (B, filled); returns how much they have changed."""
        before = self.products
        grown = products.shape[1] - before.shape[1]  # columns that have not replaced another one
        self.products = products
        return products - (pad(before, (0, grown)) if grown else before)


class Anderson(Solver):
    """Anderson acceleration of type II, in the difference form of Walker & Ni (2011).

    With ``dG`` and ``dF`` the last ``memory`` differences of residuals and of f(z), the step is
    ``f(z) - dF gamma`` where gamma minimises ``||g - dG gamma||``. This equals the mixing
    ``sum_i alpha_i f(z_i)`` with ``sum_i alpha_i = 1`` over ``memory + 1`` past pairs
    (HyperPolypDEQ, equations 3 and 4), and is better conditioned when successive residuals are
    nearly parallel.

    The least-squares problem is solved through its Gram matrix in double precision, with every
    column scaled to length one, so that ``regularization`` means the same at every scale of f whose
    squares the working precision can hold (in fp32 about 1e-18 to 1e18; beyond, steps become plain
    ones). A sample whose system is singular all the same takes a plain step and starts its history
    again.

    On a CPU a solver keeps the memory of large states and histories for its next solve.

    Args:
        memory: how many differences are kept, at least 1.
        damping: the mixing factor beta in (0, 1]; below 1 the step keeps part of the mixed iterate.
        regularization: ridge relative to the squared length of each column. The default, ten times
            the machine epsilon of the working precision, is as small as rounding allows.
        safeguard: where f contracts, plain steps always make progress and mixing sometimes does
            not. With a number here, a sample whose residual exceeds that many times the smallest
            since its history began takes a plain step and starts its history again; 1 demands
            that it never grows. The default lets it grow, as maps that expand need.
        preconditioner: a linear map P of residuals, in the structure of the state and sample by
            sample, near ``(I - J)^-1`` with J the Jacobian of f; steps become ``z_bar + damping P
            g_bar`` for the mixed state and residual. `HyperSolver.preconditioner`, once fitted, is
            one. A sample whose history had to start again goes on without it. The solver does not
            own it: move it to the state's device yourself.
    """

    def __init__(
        self,
        memory: int = 5,
        damping: float = 1.0,
        regularization: float | None = None,
        safeguard: float = math.inf,
        preconditioner: nn.Module | None = None,
    ):
        self.memory = check_count("memory", memory)
        self.damping = check_fraction("damping", damping)
        if regularization is not None and not 0 <= regularization < 1:
            raise ValueError(f"regularization must lie in [0, 1), got {regularization}")
        if not safeguard >= 1:
            raise ValueError(f"safeguard must be at least 1, got {safeguard}")
        if not (preconditioner is None or isinstance(preconditioner, nn.Module)):
            raise TypeError(
                "preconditioner must be an nn.Module or None, got a "
                f"{type(preconditioner).__name__}"
            )
        self.regularization = regularization
        self.safeguard = safeguard
        self.preconditioner = preconditioner

    def __repr__(self) -> str:
        return f"{type(self).__name__}(memory={self.memory}, damping={self.damping})"

    def init(self, z: Tensor, layout: Layout) -> AndersonMemory:
        return AndersonMemory(**self._fresh(z, layout))

    def _fresh(self, z: Tensor, layout: Layout) -> dict[str, Any]:
        """What a memory starts with."""
        batch = z.shape[0]
        masks = not may_look(z)
        df, dg = History.pair(self.memory, z, self.workspace)
        return {
            "layout": layout,
            "df": df,
            "dg": dg,
            "gram": Gram(self.memory, z),
            "products": z.new_zeros(batch, dg.filled, dtype=torch.float64),
            "length": torch.zeros(batch, dtype=torch.int64, device=z.device) if masks else None,
            "smallest": z.new_full((batch,), torch.inf),
            "least": z.new_full((batch,), _TINY, dtype=torch.float64),
            "solved": torch.zeros(batch, dtype=torch.int32, device=z.device),
        }

    def step(self, memory: AndersonMemory, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        if memory.g is None or memory.fz is None:
            memory.fz, memory.g = fz, g
            if math.isfinite(self.safeguard):
                memory.smallest = torch.linalg.vector_norm(g.detach(), dim=1)
            return self._mix(memory, fz, g)
        memory.df.push_difference(fz, memory.fz)
        memory.dg.push_difference(g, memory.g)
        memory.fz, memory.g = fz, g
        self._update_gram(memory, g)
        gamma = self._weights(memory, g)
        mixed = memory.df.subtract_from(fz, gamma, out=self.workspace.like(fz))
        if self.damping == 1 and self.preconditioner is None:
            return mixed
        return self._mix(memory, mixed, memory.dg.subtract_from(g, gamma))

    def _mix(self, memory: AndersonMemory, mixed: Tensor, residual: Tensor) -> Tensor:
        """``z_bar + damping P g_bar``, given ``z_bar + g_bar`` and ``g_bar``."""
        if self.preconditioner is None:
            return mixed if self.damping == 1 else mixed.sub(residual, alpha=1 - self.damping)
        step = precondition(self.preconditioner, memory.layout, residual)
        if memory.misled is not None:
            step = torch.where(memory.misled.unsqueeze(1), residual, step)
        return mixed.sub(residual).add(step, alpha=self.damping)

    def _update_gram(self, memory: AndersonMemory, g: Tensor) -> None:
        # One pass over the history gives dG g. The new Gram row dG (g - g_previous) is the change
        # of that product, which saves the second pass and keeps its relative accuracy.
        row = memory.update_products(memory.dg.dot(g))
        length = row_norms(memory.dg.last).double()
        # The ridge is put on once. A column that is zero has a zero right-hand side; any pivot
        # will do.
        ridge = _rounding(g) if self.regularization is None else self.regularization
        square = torch.addcmul(memory.least, length, length, value=1 + ridge)
        memory.gram.write(memory.dg.newest, row, row, square)

    def _weights(self, memory: AndersonMemory, g: Tensor) -> Tensor:
        """(B, filled) gamma."""
        system, right = memory.gram.filled, memory.products
        if memory.length is not None:
            memory.length = (memory.length + 1).clamp_max(self.memory)
            used = memory.dg.ages() < memory.length.unsqueeze(1)
            system = torch.where(used.unsqueeze(1) & used.unsqueeze(2), system, 0.0)
            right = torch.where(used, right, 0.0)
        gamma, info = self._solve(memory, system, right, _rounding(g))
        unmasked = memory.length is None and math.isinf(self.safeguard)
        if unmasked and torch.equal(info, memory.solved):
            return gamma
        restart = info != 0
        if math.isfinite(self.safeguard):
            restart = restart | self._grown(memory, g)
        if memory.length is None:
            if not bool(restart.any()):
                return gamma
            memory.length = torch.full_like(restart, memory.dg.filled, dtype=torch.int64)
        memory.misled = restart if memory.misled is None else memory.misled | restart
        memory.length = torch.where(restart, 0, memory.length)
        return torch.where(restart.unsqueeze(1), 0.0, gamma)

    def _solve(
        self, memory: AndersonMemory, system: Tensor, right: Tensor, rounding: float
    ) -> tuple[Tensor, Tensor]:
        """(B, filled) gamma, and (B,) int32, nonzero where the system is singular or gamma is not
        finite."""
        if memory.length is None:
            return memory.gram.solve(right)
        system.diagonal(dim1=1, dim2=2).clamp_min_(_TINY)  # of columns that are not in use
        return solve_positive(system, right)

    def _grown(self, memory: AndersonMemory, g: Tensor) -> Tensor:
        """(B,) whose residual the safeguard objects to."""
        size = torch.linalg.vector_norm(g.detach(), dim=1)
        grown = size > self.safeguard * memory.smallest
        memory.smallest = torch.where(grown, size, torch.minimum(memory.smallest, size))
        return grown


def _rounding(x: Tensor) -> float:
    """Relative error that products of vectors like ``x`` may have."""
    return 10 * torch.finfo(x.dtype).eps
