"""PolypDEQ: its f at 352 px, and predictions with trained weights where there are any."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import pytest
import torch

from benchmarks import approaches, polyps
from benchmarks.results import Results
from benchmarks.settings import Settings
from benchmarks.test_work_precision import TOLERANCES
from benchmarks.test_work_precision import measure as measure_work_precision
from benchmarks.timing import Effort, paired
from deqsolvers import Broyden, HandOver
from polypseg.config import make_config
from polypseg.inference import load_model
from polypseg.models import PolypDEQ, build_hypersolver
from polypseg.predictor import available_solvers

SIZE = 352
BROYDEN = "Broyden, 100 steps"


def test_random_weights(settings: Settings, results: Results) -> None:
    torch.manual_seed(0)
    model = PolypDEQ()
    pictures = polyps.images(1, SIZE, settings)
    problem = polyps.problem(f"PolypDEQ {SIZE} px, random", model, pictures, settings)
    # Tighter ones take minutes.
    tolerances = TOLERANCES[:3] if settings.quick else TOLERANCES
    measure_work_precision(problem, settings, results, tolerances)


def test_parameters(results: Results) -> None:
    model = PolypDEQ()
    hyper = build_hypersolver(model, make_config().hyper)
    share = sum(p.numel() for p in hyper.parameters()) / sum(p.numel() for p in model.parameters())
    results.goal("HyperSolver of PolypDEQ: parameters, % of the DEQ", 100 * share, "<=", 3)


def test_trained(settings: Settings, results: Results) -> None:
    runs = polyps.trained_runs(settings)
    # A released model that nobody asked for has to fit into the minutes of quick mode.
    thorough = bool(settings.runs) or not settings.quick
    for run in runs:
        _approach(run, thorough, settings, results)
        for batch in (1, 8) if thorough else (1,):
            _predict(run, batch, settings, results)
        _cost(run, results)
    if not runs:
        why = "needs a trained model: --benchmark-run DIR"
        for batch in (1, 8):
            results.goal(f"PolypDEQ, batch {batch}: {BROYDEN} / HyperSolver", None, ">=", 30, why)
            results.goal(
                f"PolypDEQ, batch {batch}: HyperSolver / explicit pass", None, "<=", 2.5, why
            )
        results.goal("PolypDEQ: Dice points that the HyperSolver loses", None, "<=", 0.3, why)
        results.goal(
            "PolypDEQ: time to fit the HyperSolver, % of the DEQ's training", None, "<=", 5, why
        )
        pytest.skip(why)


def _approach(run: Path, thorough: bool, settings: Settings, results: Results) -> None:
    """Tolerances, and distances to z* with the run's HyperSolver, on its own size of image."""
    if "broyden" not in available_solvers(run):
        pytest.skip(f"{run.name} has no weights of the implicit phase")
    model, config = load_model(run, "broyden")
    pictures = polyps.images(4, config.data.size, settings)
    name = f"PolypDEQ {config.data.size} px, {run.name}"
    problem = polyps.problem(name, model, pictures, settings)
    if thorough:
        measure_work_precision(problem, settings, results)
    if "hyper" in available_solvers(run):
        hyper = load_model(run, "hyper")[0].deq.solver.to(problem.x)
        hypers = {"HyperSolver": hyper, "HyperSolver, then Anderson": HandOver(hyper)}
        approaches.measure(problem, hypers, settings, results)


def _predict(run: Path, batch: int, settings: Settings, results: Results) -> None:
    """Time from images to logits, of every way to predict, in one run."""
    if "hyper" not in available_solvers(run):
        return
    hyper, config = load_model(run, "hyper")
    steps = config.solve.hyper_steps
    chosen = f"HyperSolver, {steps} evaluations"
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
    pictures = polyps.images(batch, config.data.size, settings)
    # One pass takes the same time with the weights of either phase.
    passes = {"explicit pass": hyper.to(settings.device).explicit}
    passes.update({name: model.to(settings.device) for name, model in models.items()})
    runs = {name: torch.no_grad()(partial(each, pictures)) for name, each in passes.items()}
    for name, run_once in runs.items():
        if name != BROYDEN:
            run_once()
    # A hundred steps take long enough to need no warming.
    effort = Effort(2, 0, 2) if settings.quick else settings.effort
    timings = paired(runs, settings.device, effort, warm=True)
    for name in passes:
        results.add(
            "polypdeq",
            {"run": run.name, "px": config.data.size, "batch": batch, "method": name},
            {
                "time [ms]": timings.of(name).scaled(1e3),
                "/ explicit pass": timings.ratio(name, "explicit pass"),
                f"{BROYDEN} / this": timings.ratio(BROYDEN, name),
            },
        )
    label = f"{run.name}, batch {batch}"
    ratio = timings.ratio(BROYDEN, chosen).median
    results.goal(f"{label}: {BROYDEN} / HyperSolver", ratio, ">=", 30)
    ratio = timings.ratio(chosen, "explicit pass").median
    results.goal(f"{label}: HyperSolver / explicit pass", ratio, "<=", 2.5)


def _cost(run: Path, results: Results) -> None:
    """What the HyperSolver costs in Dice and in training, from what the run recorded."""
    lost = polyps.dice_lost(run)
    why = "" if lost is not None else "the run has no evaluation/summary.csv with both"
    results.goal(f"{run.name}: Dice points that the HyperSolver loses", lost, "<=", 0.3, why)
    seconds = polyps.phase_seconds(run)
    training = seconds.get("explicit", 0) + seconds.get("implicit", 0)
    known = training > 0 and "hyper" in seconds
    results.goal(
        f"{run.name}: time to fit the HyperSolver, % of the DEQ's training",
        100 * seconds["hyper"] / training if known else None,
        "<=",
        5,
        "" if known else "the run's results.csv lacks a phase",
    )
