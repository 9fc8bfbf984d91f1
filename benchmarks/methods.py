"""The solvers under comparison, ours and those of other libraries, behind one call."""

from __future__ import annotations

import contextlib
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import Problem
from deqsolvers import Anderson, AndersonTypeI, Broyden, NewtonKrylov, Picard, Solver, fixed_point

OURS, TORCHDEQ, SCIPY = "deqsolvers", "torchdeq", "SciPy"

# Largest state that SciPy's solvers, written for one vector at a time, are asked to solve.
_SCIPY_FEATURES = 10_000


@dataclass
class Counted:
    """f, counting the samples that it is evaluated on."""

    f: Callable[[Tensor, Tensor], Tensor]
    rows: int = field(default=0)

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        self.rows += z.shape[0]
        return self.f(z, x)


# Called with f, the problem, a relative tolerance and a limit of steps; returns the state.
Solve = Callable[[Callable[[Tensor, Tensor], Tensor], Problem, float, int], Tensor]


@dataclass(frozen=True)
class Method:
    """A solver of one library; everything that is not said is at the library's defaults."""

    name: str
    library: str
    solve: Solve


def methods_for(problem: Problem) -> list[Method]:
    """Every method that is installed and fit for the problem's size."""
    chosen = [
        _ours("Picard", Picard()),
        _ours("Anderson", Anderson()),
        _ours("Anderson, type I", AndersonTypeI()),
        _ours("Broyden", Broyden()),
        # Its probes are steps that do not lower the residual.
        _ours("Newton-Krylov", NewtonKrylov(), stall_after=100),
    ]
    if importlib.util.find_spec("torchdeq"):
        chosen += [_torchdeq(name) for name in ("Picard", "Anderson", "Broyden")]
    if (
        importlib.util.find_spec("scipy")
        and problem.features <= _SCIPY_FEATURES
        and problem.z0.device.type == "cpu"
    ):
        chosen += [_scipy(name) for name in ("Anderson", "Broyden", "Newton-Krylov")]
    return chosen


def _ours(name: str, solver: Solver, **options: Any) -> Method:
    def solve(
        f: Callable[[Tensor, Tensor], Tensor], problem: Problem, tol: float, steps: int
    ) -> Tensor:
        return fixed_point(
            f, problem.z0, (problem.x,), solver=solver, tol=tol, max_steps=steps, **options
        ).z

    return Method(name, OURS, solve)


def torchdeq_solver(name: str) -> Callable:
    """torchdeq's solver function: Picard, Anderson or Broyden."""
    from torchdeq.solver.anderson import anderson_solver
    from torchdeq.solver.broyden import broyden_solver
    from torchdeq.solver.fp_iter import fixed_point_iter

    return {"Picard": fixed_point_iter, "Anderson": anderson_solver, "Broyden": broyden_solver}[
        name
    ]


def _torchdeq(name: str) -> Method:
    solver = torchdeq_solver(name)

    @torch.no_grad()
    def solve(
        f: Callable[[Tensor, Tensor], Tensor], problem: Problem, tol: float, steps: int
    ) -> Tensor:
        return solver(
            lambda z: f(z, problem.x), problem.z0, max_iter=steps, tol=tol, stop_mode="rel"
        )[0]

    return Method(name, TORCHDEQ, solve)


class _Stopped(Exception):
    """Leaves a solver of SciPy from its callback."""


def _scipy(name: str) -> Method:
    """SciPy solves a vector, so the samples go one after the other.

    Its tolerances are absolute or relative to the first residual. So its callback stops it, on the
    residual that every other method is stopped on.
    """
    import numpy as np
    from scipy import optimize

    function = {
        "Anderson": optimize.anderson,
        "Broyden": optimize.broyden1,
        "Newton-Krylov": optimize.newton_krylov,
    }[name]

    @torch.no_grad()
    def solve(
        f: Callable[[Tensor, Tensor], Tensor], problem: Problem, tol: float, steps: int
    ) -> Tensor:
        found = problem.z0.clone()
        for row in range(len(problem.z0)):
            x = problem.x[row : row + 1]
            last = problem.z0[row].numpy().ravel()

            def residual(z: np.ndarray, x: Tensor = x) -> np.ndarray:
                state = torch.from_numpy(z).to(x.dtype).view_as(x)
                return (f(state, x) - state).numpy().ravel()

            def stop(z: np.ndarray, difference: np.ndarray) -> None:
                nonlocal last
                last = z
                if np.linalg.norm(difference) <= tol * np.linalg.norm(z + difference):
                    raise _Stopped

            # How far it came is measured, whatever it says.
            with contextlib.suppress(_Stopped, optimize.NoConvergence):
                function(residual, last, f_tol=0.0, maxiter=steps, callback=stop)
            found[row] = torch.as_tensor(np.asarray(last)).view_as(found[row])
        return found

    return Method(name, SCIPY, solve)
