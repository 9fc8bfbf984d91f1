"""Work done for batches whose samples need very different numbers of steps."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.methods import OURS, TORCHDEQ, torchdeq_solver
from benchmarks.results import Results
from benchmarks.settings import Settings
from benchmarks.timing import paired
from deqsolvers import Anderson, Broyden, Picard, Solution, Solver, fixed_point

RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.97)
FEATURES = 20_000
TOL, STEPS = 1e-5, 500
SOLVERS: dict[str, Solver] = {"Picard": Picard(), "Anderson": Anderson(), "Broyden": Broyden()}


def f(z: Tensor, rates: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(rates * z.roll(1, dims=1) + x)


@pytest.mark.parametrize("method", SOLVERS)
def test_uneven(method: str, settings: Settings, results: Results) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(RATES), FEATURES, generator=generator)
    x = x.to(settings.device, settings.dtype)
    rates = torch.tensor(RATES).unsqueeze(1).to(x)
    z0 = torch.zeros_like(x)

    def ours(drop: bool) -> Solution:
        return fixed_point(
            f,
            z0,
            (rates, x),
            solver=SOLVERS[method],
            tol=TOL,
            max_steps=STEPS,
            drop_converged=drop,
        )

    together = ours(drop=True)
    staying = ours(drop=False)
    assert bool(together.converged.all())
    alone = int(together.evaluations.sum())
    rows = {(OURS, "leave"): together.rows_evaluated, (OURS, "stay"): staying.rows_evaluated}
    runs: dict[tuple[str, str], Callable[[], object]] = {
        (OURS, "leave"): lambda: ours(drop=True),
        (OURS, "stay"): lambda: ours(drop=False),
    }
    theirs = _torchdeq(method, rates, x, z0)
    if theirs is not None:
        counted, run = theirs
        run()
        rows[TORCHDEQ, "stay"] = counted[0]
        runs[TORCHDEQ, "stay"] = run
    timings = paired(runs, settings.device, settings.effort, warm=True)
    for (library, converged), evaluated in rows.items():
        results.add(
            "uneven",
            {"method": method, "library": library, "converged samples": converged},
            {
                "rows evaluated": evaluated,
                "rows / sum of samples alone": evaluated / alone,
                "time [ms]": timings.of((library, converged)).scaled(1e3),
            },
        )
    results.goal(
        f"{method}, uneven batch: rows evaluated / sum of samples alone",
        together.rows_evaluated / alone,
        "<=",
        1.3,
    )


def _torchdeq(
    method: str, rates: Tensor, x: Tensor, z0: Tensor
) -> tuple[list[int], Callable[[], object]] | None:
    try:
        solve = torchdeq_solver(method)
    except ImportError:
        return None
    counted = [0]

    @torch.no_grad()
    def run() -> object:
        counted[0] = 0

        def counting(z: Tensor) -> Tensor:
            counted[0] += len(z)
            return f(z, rates, x)

        return solve(counting, z0, max_iter=STEPS, tol=TOL, stop_mode="rel")

    return counted, run
