"""Evaluations and time of every solver on every problem, against the tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest

from benchmarks.methods import Counted, methods_for
from benchmarks.problems import PROBLEMS, Problem
from benchmarks.results import Results
from benchmarks.settings import Settings
from benchmarks.timing import paired

TOLERANCES = (1e-1, 1e-2, 1e-3, 1e-4, 1e-5, 1e-6)
STEPS = 100


@pytest.mark.parametrize("name", PROBLEMS)
def test_work_precision(name: str, settings: Settings, results: Results) -> None:
    measure(PROBLEMS[name](settings), settings, results)


def measure(
    problem: Problem,
    settings: Settings,
    results: Results,
    tolerances: Sequence[float] = TOLERANCES,
) -> None:
    """Rows of the table work-precision for one problem."""
    methods = methods_for(problem)
    batch = len(problem.z0)
    for tol in tolerances:
        if not methods:
            break
        rows = {}
        for method in methods:
            counted = Counted(problem.f)
            z = method.solve(counted, problem, tol, STEPS)
            residual = problem.residual(z)
            rows[method] = {
                "evaluations": counted.rows / batch,
                "residual": residual,
                "distance": problem.distance(z),
                # Measuring it again rounds differently.
                "reached": residual <= 1.05 * tol,
            }
        runs = {m: partial(m.solve, problem.f, problem, tol, STEPS) for m in methods}
        timings = paired(runs, settings.device, settings.effort, warm=True)
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
                {"time [ms]": timings.of(method).scaled(1e3), **rows[method]},
            )
        # What ran out of steps here does so at tighter tolerances too, slowly.
        methods = [
            method
            for method in methods
            if rows[method]["reached"] or rows[method]["evaluations"] < STEPS
        ]
