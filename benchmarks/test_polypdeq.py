"""PolypDEQ: its f at 352 px, and predictions with trained weights where there are any."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
import torch
from torch import Tensor

from benchmarks import approaches, polyps
from benchmarks.results import Results
from benchmarks.settings import Settings
from benchmarks.test_work_precision import TOLERANCES
from benchmarks.test_work_precision import measure as measure_work_precision
from benchmarks.timing import Effort, Quartiles, paired
from deqsolvers import Broyden
from polypseg.config import make_config
from polypseg.inference import load_model
from polypseg.models import PolypDEQ, build_hand_over, build_hypersolver, build_solver
from polypseg.predictor import available_solvers

SIZE = 352
BROYDEN = "Broyden, 100 steps"
IMAGES = 8
# From here on classic solvers need tens of steps.
WEAK_RADIUS = 0.9


def test_random_weights(settings: Settings, results: Results) -> None:
    torch.manual_seed(0)
    model = PolypDEQ()
    pictures = polyps.images(1, SIZE, settings)
    problem = polyps.problem(f"PolypDEQ {SIZE} px, random", model, pictures, settings)
    # Tighter ones take minutes.
    tolerances = TOLERANCES[:2] if settings.quick else TOLERANCES
    measure_work_precision(problem, settings, results, tolerances, settings.slow_effort)


def test_parameters(results: Results) -> None:
    model = PolypDEQ()
    hyper = build_hypersolver(model, make_config().hyper)
    share = sum(p.numel() for p in hyper.parameters()) / sum(p.numel() for p in model.parameters())
    results.goal("HyperSolver of PolypDEQ: parameters, % of the DEQ", 100 * share, "<=", 3)


def test_trained(settings: Settings, results: Results) -> None:
    runs = polyps.trained_runs(settings)
    radii = []
    for run in runs:
        radii.append(_solve(run, settings, results))
        _approach(run, settings, results)
        for batch in (1, 8):
            _predict(run, batch, settings, results)
        _cost(run, results)
    if not runs:
        _unmeasured("PolypDEQ", "needs a trained model: --benchmark-run DIR", results)
        pytest.skip("no trained model is here; give --benchmark-run DIR")
    if max(radii) < WEAK_RADIUS:
        why = f"the largest radius of the trained models here is {max(radii):.2f}"
        _unmeasured(f"weakly regularised PolypDEQ (radius from {WEAK_RADIUS})", why, results)


def _unmeasured(label: str, why: str, results: Results) -> None:
    """The goals of a model that is missing."""
    for batch in (1, 8):
        results.goal(f"{label}, batch {batch}: {BROYDEN} / HyperSolver", None, ">=", 30, why)
        results.goal(f"{label}, batch {batch}: HyperSolver / explicit pass", None, "<=", 2.5, why)
    results.goal(f"{label}: Dice points that the HyperSolver loses", None, "<=", 0.3, why)
    results.goal(
        f"{label}: time to fit the HyperSolver, % of the DEQ's training", None, "<=", 5, why
    )


def _solve(run: Path, settings: Settings, results: Results) -> float:
    """Solvers against tolerance on one image of the run's own size; returns the radius at z*."""
    model, config = load_model(run, "broyden")
    sizes = {config.data.size} if settings.quick else {config.data.size, SIZE}
    radius = 0.0
    for size in sorted(sizes):
        pictures = polyps.images(1, size, settings)
        name = f"PolypDEQ {size} px, {run.name}"
        problem = polyps.problem(name, copy.deepcopy(model), pictures, settings)
        tolerances = TOLERANCES[:3] if settings.quick else TOLERANCES
        measure_work_precision(problem, settings, results, tolerances, settings.slow_effort)
        radius = max(radius, problem.radius)
    return radius


def _approach(run: Path, settings: Settings, results: Results) -> None:
    """Distances to z* with the run's HyperSolver, over a few images."""
    if "hyper" not in available_solvers(run):
        return
    model, config = load_model(run, "broyden")
    count = 2 if settings.quick else IMAGES
    pictures = polyps.images(count, config.data.size, settings)
    name = f"PolypDEQ {config.data.size} px, {run.name}"
    problem = polyps.problem(name, model, pictures, settings)
    hyper = load_model(run, "hyper")[0].deq.solver.to(problem.x)
    memory = config.solve.anderson_memory
    handing_over = build_hand_over(hyper, memory, config.hyper.steps)
    hypers = {"HyperSolver": hyper, "HyperSolver, then Anderson": handing_over}
    anderson = build_solver("anderson", memory)  # with the same safeguard
    approaches.measure(problem, hypers, settings, results, settings.slow_effort, anderson)


def _predict(run: Path, batch: int, settings: Settings, results: Results) -> None:
    """Mean time from a batch of images to logits, of every way to predict, in one run."""
    if "hyper" not in available_solvers(run):
        return
    hyper, config = load_model(run, "hyper")
    batches = polyps.images(IMAGES, config.data.size, settings).split(batch)
    hyper.to(settings.device)
    with torch.no_grad():
        counts = [hyper(pictures).solution.evaluations for pictures in batches]
    used = torch.cat(counts).float().mean().item()
    steps = round(used)
    chosen = f"HyperSolver, {used:.3g} evaluations"
    models = {chosen: hyper}
    stopped = load_model(run, "anderson")[0]
    stopped.deq = stopped.deq.with_solver(
        stopped.deq.solver, tol=None, max_steps=steps, final="last"
    )
    models[f"Anderson, {steps} evaluations"] = stopped
    models["Anderson, tol 1e-3"] = load_model(run, "anderson", tol=1e-3)[0]
    models["Broyden, tol 1e-3"] = load_model(run, "broyden", tol=1e-3)[0]
    long = load_model(run, "broyden")[0]
    long.deq = long.deq.with_solver(
        Broyden(config.solve.memory), tol=None, max_steps=100, final="last"
    )
    models[BROYDEN] = long
    # One pass takes the same time with the weights of either phase.
    passes = {"explicit pass": hyper.explicit}
    passes.update({name: model.to(settings.device) for name, model in models.items()})
    times = _times(passes, batches, settings)
    for name in passes:
        results.add(
            "polypdeq",
            {"run": run.name, "px": config.data.size, "batch": batch, "method": name},
            {
                "time [ms]": times[name].scaled(1e3),
                "/ explicit pass": times[name].median / times["explicit pass"].median,
                f"{BROYDEN} / this": times[BROYDEN].median / times[name].median,
            },
        )
    label = f"{run.name}, batch {batch}"
    ratio = times[BROYDEN].median / times[chosen].median
    results.goal(f"{label}: {BROYDEN} / HyperSolver", ratio, ">=", 30)
    ratio = times[chosen].median / times["explicit pass"].median
    results.goal(f"{label}: HyperSolver / explicit pass", ratio, "<=", 2.5)


def _times(
    passes: dict[str, Callable[[Tensor], object]], batches: Sequence[Tensor], settings: Settings
) -> dict[str, Quartiles]:
    """Of a batch, by ways to predict that take turns.

    The hundred steps take as long for any images, and so long that one batch, few rounds and no
    warming do.
    """

    @torch.no_grad()
    def run(name: str, batches: Sequence[Tensor]) -> None:
        for pictures in batches:
            passes[name](pictures)

    others = {name: partial(run, name, batches) for name in passes if name != BROYDEN}
    timings = paired(others, settings.device, settings.slow_effort)
    times = {name: timings.of(name).scaled(1 / len(batches)) for name in others}
    long = {BROYDEN: partial(run, BROYDEN, batches[:1])}
    few = Effort(1, 10, 3) if settings.quick else Effort(5, 0, 5)
    times[BROYDEN] = paired(long, settings.device, few, warm=True).of(BROYDEN)
    return times


def _cost(run: Path, results: Results) -> None:
    """What the HyperSolver costs in Dice and in training, from what the run recorded."""
    lost = polyps.dice_lost(run)
    for protocol, points in lost.items():
        results.goal(
            f"{run.name}, protocol {protocol}: Dice points that the HyperSolver loses",
            points,
            "<=",
            0.3,
            "recorded by polypseg-evaluate, worst test set",
        )
    if not lost:
        why = "the run has no evaluation/summary.csv with both"
        results.goal(f"{run.name}: Dice points that the HyperSolver loses", None, "<=", 0.3, why)
    seconds = polyps.phase_seconds(run)
    training = seconds.get("explicit", 0) + seconds.get("implicit", 0)
    known = training > 0 and "hyper" in seconds
    results.goal(
        f"{run.name}: time to fit the HyperSolver, % of the DEQ's training",
        100 * seconds["hyper"] / training if known else None,
        "<=",
        5,
        "recorded by polypseg-train" if known else "no results.csv has all phases of this run",
    )
