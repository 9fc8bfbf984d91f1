"""Anderson acceleration of type I."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from deqsolvers.solvers.anderson import Anderson, AndersonMemory
from deqsolvers.state import Layout


@dataclass
class _Memory(AndersonMemory):
    """Its ``gram`` holds dZ^T dG and its ``products`` are dZ^T g."""

    # (B, filled) float64, lengths of the columns of dZ and of dG
    z_lengths: Tensor = field(kw_only=True)
    g_lengths: Tensor = field(kw_only=True)


class AndersonTypeI(Anderson):
    """Anderson acceleration of type I, which is to type II as the good Broyden method to the bad.

    The step is that of `Anderson`, ``f(z) - dF gamma``, with ``(dZ^T dG) gamma = dZ^T g``: the
    residual, as the last differences model it, becomes orthogonal to the last steps dZ instead of
    as small as possible, so that it may grow on the way. With a full memory and a linear f the
    iterates are those of Arnoldi's method, with type II those of GMRES. A step makes four passes
    over the history where type II makes two.

    The system is solved in double precision with the columns of dZ and dG scaled to length one. A
    sample whose system is then singular to the working precision takes a plain step and starts its
    history again.

    Args:
        memory, damping, safeguard: as for `Anderson`.
        regularization: subtracted from the diagonal of the scaled system, which draws the step to
            a plain one. The default is ten times the machine epsilon of the working precision.

    Source: Fang & Saad, "Two classes of multisecant methods for nonlinear acceleration" (2009);
    Walker & Ni, "Anderson acceleration for fixed-point iterations" (2011), section 2.
    """

    def init(self, z: Tensor, layout: Layout) -> _Memory:
        fresh = self._fresh(z, layout)
        return _Memory(**fresh, z_lengths=fresh["products"], g_lengths=fresh["products"])

    def _update_gram(self, memory: Any, g: Tensor) -> None:
        # dZ = dF - dG, which saves a third history. As in type II, the change of dZ^T g is a
        # column of dZ^T dG.
        slot = memory.dg.newest
        dg = memory.dg.last
        dz = memory.df.last - dg
        column = memory.update_products(memory.df.dot(g) - memory.dg.dot(g))
        row = memory.dg.dot(dz)
        memory.gram.write(slot, row, column, row[:, slot])
        memory.z_lengths = _put(memory.z_lengths, slot, dz)
        memory.g_lengths = _put(memory.g_lengths, slot, dg)

    def _solve(
        self, memory: Any, system: Tensor, right: Tensor, rounding: float
    ) -> tuple[Tensor, Tensor]:
        ridge = rounding if self.regularization is None else self.regularization
        per_row, per_column = _inverse(memory.z_lengths), _inverse(memory.g_lengths)
        system = system * per_row.unsqueeze(2) * per_column.unsqueeze(1)
        right = right * per_row
        # An equation without unknowns (a column of dZ that is unused or zero), or an unknown
        # without equations (likewise of dG), stands for itself.
        alone = (system == 0).all(2) | (system == 0).all(1)
        pivots = torch.where(alone, -1.0, system.diagonal(dim1=1, dim2=2) - ridge)
        system = torch.diagonal_scatter(system, pivots, dim1=1, dim2=2)
        factor, order, info = torch.linalg.lu_factor_ex(system)
        size = factor.detach().diagonal(dim1=1, dim2=2).abs()
        singular = (info != 0) | (size <= rounding).any(1)
        gamma = torch.linalg.lu_solve(factor, order, right.unsqueeze(2)).squeeze(2)
        gamma = gamma * torch.where(alone, 0.0, per_column)
        return gamma, (singular | ~torch.isfinite(gamma).all(1)).to(info.dtype)


def _put(lengths: Tensor, slot: int, column: Tensor) -> Tensor:
    """``lengths`` (B, filled) with that of ``column`` (B, features) at ``slot``."""
    length = torch.linalg.vector_norm(column, dim=1).double().unsqueeze(1)
    return torch.cat((lengths[:, :slot], length, lengths[:, slot + 1 :]), dim=1)


def _inverse(x: Tensor) -> Tensor:
    """``1 / x``, and 0 where x is 0."""
    return torch.where(x > 0, 1 / torch.where(x > 0, x, 1.0), 0.0)
