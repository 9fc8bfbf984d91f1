"""What implicit gradients are compared with, and a layer that solves as far as rounding allows."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor

from deqsolvers import DEQ, Anderson, Implicit, Solver

EXACT: dict[str, Any] = {"tol": 1e-12, "max_steps": 300}


def exact(f: Callable[..., Any], solver: Solver | None = None, **options: Any) -> DEQ:
    """A DEQ whose forward and backward solves go to the limit of double precision."""
    solver = solver or Anderson(memory=10)
    return DEQ(f, solver, backward=Implicit(solver, **EXACT), **{**EXACT, **options})


def unrolled(f: Callable[..., Tensor], z0: Tensor, *inputs: Any, steps: int = 250) -> Tensor:
    """The fixed point by plain iteration that autograd records from the first step on."""
    z = z0
    for _ in range(steps):
        z = f(z, *inputs)
    return z
