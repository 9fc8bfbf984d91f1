"""A HyperSolver, fitted here in seconds to small DEQs, against classic solvers."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from benchmarks import approaches
from benchmarks.maps import PerceptronMap
from benchmarks.problems import make
from benchmarks.results import Results
from benchmarks.settings import Settings
from deqsolvers import DEQ, HandOver, HyperSolver, Solver, fit_hypersolver

FEATURES, LATENT, BATCH = 64, 16, 64
# Scale of the map: the weaker contraction needs many classic steps, the stronger one few.
MAPS = {"weakly contracting MLP": 2.0, "strongly contracting MLP": 1.0}


def draw(seed: int) -> Tensor:
    """(BATCH, FEATURES) inputs which, like features of real data, fill few dimensions."""
    generator = torch.Generator().manual_seed(0)
    mixing = torch.randn(LATENT, FEATURES, generator=generator, dtype=torch.float64)
    generator.manual_seed(seed)
    latent = torch.randn(BATCH, LATENT, generator=generator, dtype=torch.float64)
    return latent @ mixing / LATENT**0.5


@pytest.mark.parametrize("name", MAPS)
def test_hypersolver(name: str, settings: Settings, results: Results) -> None:
    torch.manual_seed(0)
    f = PerceptronMap(FEATURES, MAPS[name]).double()
    problem = make(name, f, draw(seed=1), settings)
    updates = 200 if settings.quick else 800
    batches = [draw(seed=2 + place).to(problem.x) for place in range(updates // 4)]
    hypers: dict[str, Solver] = {}
    for label, rank in (("HyperSolver", 0), ("HyperSolver, preconditioned", FEATURES // 2)):
        torch.manual_seed(0)
        hyper = HyperSolver.for_vectors(FEATURES, rank=rank).to(problem.x)
        fit_hypersolver(hyper, DEQ(problem.f), batches, epochs=4, lr=3e-3, cache=True)
        hypers[label] = hyper
        if label == "HyperSolver":
            hypers["HyperSolver, then Anderson"] = HandOver(hyper)
    approaches.measure(problem, hypers, settings, results, settings.effort)
