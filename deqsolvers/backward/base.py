"""What every backward pass has in common."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

from torch import Tensor

from deqsolvers.fixed_point import iterate
from deqsolvers.modes import undifferentiated
from deqsolvers.normalization import forget_unrecorded_weights
from deqsolvers.options import Options
from deqsolvers.solution import Solution
from deqsolvers.solvers import Solver
from deqsolvers.state import Layout


class Backward(ABC):
    """A way to get gradients through a fixed point.

    Most methods solve without recording and attach a gradient to the solution: they implement
    `attach`. One that needs the solve itself overrides `solve`.
    """

    def solve(
        self,
        f: Callable[..., Any],
        z0: Any,
        inputs: tuple[Any, ...],
        solver: Solver,
        options: Options,
    ) -> tuple[Any, Solution]:
        """A differentiable state and the forward `Solution`."""
        with undifferentiated(), forget_unrecorded_weights():
            solution = iterate(f, z0, inputs, solver, options)
        return self.attach(f, inputs, solution), solution

    @abstractmethod
    def attach(self, f: Callable[..., Any], inputs: tuple[Any, ...], solution: Solution) -> Any:
        """A state at or near ``solution.z``, differentiable w.r.t. all that f depends on."""


def on_matrices(
    f: Callable[..., Any], inputs: tuple[Any, ...], layout: Layout
) -> Callable[[Tensor], Tensor]:
    """f as a map of (B, features) matrices."""
    return lambda matrix: layout.flatten(f(layout.unflatten(matrix), *inputs))
