"""Work done for batches whose samples need very different numbers of steps."""

from __future__ import annotations

import torch
from torch import Tensor

from benchmarks.goals import record
from deqsolvers import Anderson, Broyden, Picard, Solver, fixed_point

RATES = (0.05, 0.1, 0.2, 0.3, 0.5, 0.7, 0.9, 0.97)


def f(z: Tensor, rates: Tensor, x: Tensor) -> Tensor:
    return torch.tanh(rates * z.roll(1, dims=1) + x)


def test_rows_evaluated(device: torch.device) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(len(RATES), 64, generator=generator).to(device)
    rates = torch.tensor(RATES, device=device).unsqueeze(1)
    solvers: list[Solver] = [Picard(), Anderson(), Broyden()]
    for solver in solvers:
        together = fixed_point(
            f, torch.zeros_like(x), (rates, x), solver=solver, tol=1e-5, max_steps=300
        )
        assert bool(together.converged.all())
        alone = int(together.evaluations.sum())
        ratio = together.rows_evaluated / alone
        worst = together.calls * len(RATES) / alone
        print(
            f"\n{solver}: {together.rows_evaluated} rows, {alone} alone; {worst:.2f}x if all stayed"
        )
        record(f"{type(solver).__name__}: rows evaluated / sum of samples alone", ratio, "<", 1.3)
