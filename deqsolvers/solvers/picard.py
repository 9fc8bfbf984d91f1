"""Damped fixed-point iteration."""

from __future__ import annotations

from torch import Tensor

from deqsolvers.solvers.base import Memory, Solver, check_fraction
from deqsolvers.state import Layout


class Picard(Solver):
    """The iteration ``z <- z + damping (f(z) - z)``.

    Converges where f contracts. A damping below 1 also tames maps whose Jacobian has eigenvalues
    below -1, at the price of speed.

    Args:
        damping: fraction of the residual that is added, in (0, 1].
    """

    def __init__(self, damping: float = 1.0):
        self.damping = check_fraction("damping", damping)

    def __repr__(self) -> str:
        return f"Picard(damping={self.damping})"

    def init(self, z: Tensor, layout: Layout) -> Memory:
        return Memory()

    def step(self, memory: Memory, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        return fz if self.damping == 1 else z.add(g, alpha=self.damping)
