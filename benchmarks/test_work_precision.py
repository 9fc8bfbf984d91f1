"""Evaluations and time of every solver on every problem, against the tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch

from benchmarks.methods import SCIPY, Counted, Method, methods_for
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.results import Results
from benchmarks.settings import Settings
from benchmarks.timing import Effort, paired

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
# At radius 0.99 plain iteration takes about 900 to 1e-6, at 0.93 about 130.
STEPS, SLOWEST_STEPS = 200, 1000


@pytest.mark.parametrize("name", PROBLEMS)
def test_work_precision(name: str, settings: Settings, results: Results) -> None:
    measure(PROBLEMS[name](settings), settings, results)


class _Counting:
    """A solve that counts its evaluations and keeps what it found."""

    def __init__(self, method: Method, problem: Problem, tol: float, steps: int):
        self.problem, self.tol = problem, tol
        self.counted = Counted(problem.f)
        self.solve = partial(method.solve, self.counted, problem, tol, steps)

    def __call__(self) -> None:
        self.counted.rows = 0
        self.z = self.solve()

    def found(self, batch: int, settings: Settings) -> dict[str, float | bool]:
        residual = self.problem.residual(self.z)
        return {
            "evaluations": self.counted.rows / batch,
            "residual": residual,
            "distance": self.problem.distance(self.z),
            # Measuring it again rounds differently.
            "reached": residual <= 1.05 * self.tol + torch.finfo(settings.dtype).eps,
        }


def measure(
    problem: Problem,
    settings: Settings,
    results: Results,
    tolerances: Sequence[float] = TOLERANCES,
    effort: Effort | None = None,
) -> None:
    """Rows of the table work-precision for one problem; ``effort`` None is that of the settings."""
    methods = methods_for(problem)
    batch = len(problem.z0)
    limit = SLOWEST_STEPS if problem.radius > 0.95 else STEPS
    # SciPy takes a sample at a time: where it fails, a thousand iterations are a minute.
    steps = {
        m: min(limit, 100) if m.library == SCIPY and settings.quick else limit for m in methods
    }
    effort = effort or settings.effort
    for tol in tolerances:
        if not methods:
            break
        solves = {m: _Counting(m, problem, tol, steps[m]) for m in methods}
        timings = paired(solves, settings.device, Effort(1, 0, 1), warm=True)
        rows = {m: solves[m].found(batch, settings) for m in methods}
        # What failed shows as a failure, whatever its time.
        runs = {
            m: partial(m.solve, problem.f, problem, tol, steps[m])
            for m in methods
            if rows[m]["reached"]
        }
        # A single round is what there is already, where one takes as long as all should.
        if effort.rounds > 1 or timings.round_seconds < effort.seconds:
            timings = paired(runs, settings.device, effort, warm=True)
        for method in methods:
            results.add(
                "work-precision",
                {
                    "problem": problem.name,
                    "radius": round(problem.radius, 3),
                    "batch": batch,
                    "features": problem.features,
                    "method": method.name,
                    "library": method.library,
                    "tolerance": tol,
                },
                {
                    "time [ms]": timings.of(method).scaled(1e3) if method in runs else None,
                    **rows[method],
                },
            )
        # What ran out of steps here does so at tighter tolerances too, slowly.
        methods = [m for m in methods if m in runs or rows[m]["evaluations"] < steps[m]]
