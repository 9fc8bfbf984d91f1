"""Evaluations and time of every solver on every problem, against the tolerance."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import pytest
import torch

from benchmarks.methods import SCIPY, Counted, methods_for
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
    for tol in tolerances:
        if not methods:
            break
        rows = {}
        for method in methods:
            counted = Counted(problem.f)
            z = method.solve(counted, problem, tol, steps[method])
            residual = problem.residual(z)
            rows[method] = {
                "evaluations": counted.rows / batch,
                "residual": residual,
                "distance": problem.distance(z),
                # Measuring it again rounds differently.
                "reached": residual <= 1.05 * tol + torch.finfo(settings.dtype).eps,
            }
        # What failed shows as a failure, whatever its time.
        runs = {
            m: partial(m.solve, problem.f, problem, tol, steps[m])
            for m in methods
            if rows[m]["reached"]
        }
        timings = paired(runs, settings.device, effort or settings.effort, warm=True)
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
