"""The suite as its user meets it, and what its measurements rest on."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks.gradients import exact_gradient
from benchmarks.methods import SCIPY, methods_for
from benchmarks.overhead import STEPS, least_states
from benchmarks.problems import Problem
from tests.deqsolvers.maps import TanhMap, normal

ROOT = Path(__file__).resolve().parent.parent.parent


def run_pytest(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "benchmarks/test_uneven.py", "-rs", *arguments]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_without_the_flag_everything_is_skipped_with_a_word() -> None:
    done = run_pytest()
    assert done.returncode == 0
    assert "3 skipped" in done.stdout
    assert "give --benchmark to run it" in done.stdout


@pytest.mark.parametrize(
    ("option", "value", "message"),
    [
        ("run", "nowhere", "nowhere is no run of polypseg-train"),
        ("device", "tpu", "--benchmark-device: expected cpu, cuda or cuda:N, got 'tpu'"),
        pytest.param(
            "device",
            "cuda",
            "--benchmark-device: torch sees no CUDA device here; give cpu",
            marks=pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU"),
        ),
        ("out", "pyproject.toml", "--benchmark-out: pyproject.toml is a file; give a folder"),
    ],
)
def test_an_unfit_option_is_an_error_before_anything_is_measured(
    option: str, value: str, message: str
) -> None:
    done = run_pytest("--benchmark", f"--benchmark-{option}", value)
    assert done.returncode == 4
    assert message in done.stderr


@pytest.mark.parametrize("name", ["Anderson", "Broyden", "Newton-Krylov"])
def test_scipy_stops_on_the_residual_that_others_stop_on(name: str) -> None:
    pytest.importorskip("scipy")
    f, x = TanhMap(20, norm=0.5), normal(2, 20, seed=7)
    problem = Problem("tanh", f, torch.zeros_like(x), x, torch.zeros_like(x), 0.5)
    (method,) = (m for m in methods_for(problem) if (m.name, m.library) == (name, SCIPY))
    for tol in (1e-2, 1e-4):
        z = method.solve(f, problem, tol, 100)
        assert 0.01 * tol < problem.residual(z) <= tol


def test_least_states_by_hand() -> None:
    assert STEPS == 30
    assert least_states("Picard", 6) == 2 * 30
    # Steps 1 to 5 have 0 .. 4 older columns, steps 6 to 29 have 5; each is read in both histories.
    assert least_states("Anderson", 6) == 2 + 29 * 7 + 2 * (0 + 1 + 2 + 3 + 4 + 24 * 5)
    assert least_states("Broyden", 6) == 30 * 4 + 2 * sum(range(30))


def test_the_exact_gradient_is_that_of_finite_differences() -> None:
    f = TanhMap(3, norm=0.5)
    x = normal(2, 3, seed=7)

    def solve(x: torch.Tensor) -> torch.Tensor:
        z = torch.zeros_like(x)
        with torch.no_grad():
            for _ in range(100):
                z = f(z, x)
        return z

    exact = solve(x)
    gradient = exact_gradient(Problem("tanh", f, torch.zeros_like(x), x, exact, 0.5))
    generator = torch.Generator().manual_seed(2)  # the loss is <v, z*> with this v
    v = torch.randn(x.shape, generator=generator, dtype=torch.float64)
    step = 1e-6
    for place in range(x.numel()):
        moved = torch.zeros(x.numel(), dtype=torch.float64)
        moved[place] = step
        change = solve(x + moved.view_as(x)) - solve(x - moved.view_as(x))
        assert float(gradient[place]) == pytest.approx(
            float((v * change).sum()) / (2 * step), rel=1e-6
        )
