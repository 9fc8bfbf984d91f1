"""Gradients through the recorded solve."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deqsolvers.backward.base import Backward
from deqsolvers.backward.phantom import JacobianFree
from deqsolvers.fixed_point import iterate
from deqsolvers.options import Options
from deqsolvers.solution import Solution
from deqsolvers.solvers import Solver


class Unrolled(Backward):
    """Ordinary backpropagation through every step of the solver.

    It differentiates the iterate that is returned rather than the fixed point, which is what a
    solve of few steps needs (a HyperSolver, a truncated solve). Memory grows with the number of
    steps; converged samples stay in the batch.
    """

    def __repr__(self) -> str:
        return "Unrolled()"

    def solve(
        self,
        f: Callable[..., Any],
        z0: Any,
        inputs: tuple[Any, ...],
        solver: Solver,
        options: Options,
    ) -> tuple[Any, Solution]:
        with torch.enable_grad():
            solution = iterate(f, z0, inputs, solver, options)
        z = solution.z
        if solution.calls == 0:  # an empty batch, whose gradients are zeros and not nothing
            z = JacobianFree().attach(f, inputs, solution)
        return z, solution.detach()

    def attach(self, f: Callable[..., Any], inputs: tuple[Any, ...], solution: Solution) -> Any:
        raise TypeError("Unrolled records the forward solve; use its solve method")
