"""What a solver costs beyond f, against torchdeq 0.1.0 in the same run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from benchmarks.goals import record
from benchmarks.timing import paired
from deqsolvers import Anderson, Broyden, fixed_point

torchdeq_solver = pytest.importorskip("torchdeq.solver", reason="torchdeq is not installed")

STEPS = 30
MEMORY = 6


def contraction(batch: int, features: int, device: torch.device) -> tuple[Callable, Tensor]:
    """An elementwise contraction with rates from 0 to 0.9: cheap, and never converged early."""
    generator = torch.Generator().manual_seed(0)
    rates = torch.linspace(0, 0.9, features).expand(batch, features).contiguous().to(device)
    shift = torch.randn(batch, features, generator=generator).to(device)
    return lambda z: torch.addcmul(shift, rates, z), torch.zeros(batch, features, device=device)


def beyond_f(seconds: dict[str, float], name: str, calls: int) -> float:
    return seconds[name] - calls * seconds["f"]


@pytest.mark.parametrize(
    ("method", "batch", "features", "goal"),
    [
        ("anderson", 1, 1_000, 2),
        ("anderson", 64, 1_000, 2),
        ("anderson", 1, 250_000, 6),
        ("anderson", 16, 250_000, 4),
        ("broyden", 16, 250_000, 10),
    ],
)
def test_overhead(
    method: str, batch: int, features: int, goal: float, device: torch.device
) -> None:
    f, z0 = contraction(batch, features, device)
    ours = Anderson(MEMORY) if method == "anderson" else Broyden(STEPS)
    theirs = getattr(torchdeq_solver, f"{method}_solver", None) or getattr(
        __import__(f"torchdeq.solver.{method}", fromlist=["x"]), f"{method}_solver"
    )

    def run_ours() -> object:
        return fixed_point(f, z0, solver=ours, tol=None, max_steps=STEPS, final="last")

    @torch.no_grad()
    def run_theirs() -> object:
        extra = {"m": MEMORY} if method == "anderson" else {}
        return theirs(f, z0, max_iter=STEPS, tol=0.0, stop_mode="rel", **extra)

    large = batch * features > 1_000_000
    functions = {"ours": run_ours, "torchdeq": run_theirs, "f": lambda: f(z0)}
    seconds = paired(functions, device, repeats=3 if large else 15)
    ratio = beyond_f(seconds, "torchdeq", STEPS) / beyond_f(seconds, "ours", STEPS)
    print(
        f"\n{method} ({batch}, {features}): ours {1e3 * beyond_f(seconds, 'ours', STEPS):.1f} ms, "
        f"torchdeq {1e3 * beyond_f(seconds, 'torchdeq', STEPS):.1f} ms beyond f"
    )
    record(f"{method} ({batch}, {features}): torchdeq / ours, beyond f", ratio, ">", goal)
