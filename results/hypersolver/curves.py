"""Distance to the fixed point and quality of the answer, against evaluations of f and time."""

from __future__ import annotations

import csv
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure
from torch import Tensor

from deqsolvers import DEQ, Anderson, Broyden, HandOver, HyperSolver, Picard, Solver, fixed_point
from deqsolvers.state import Layout

EVALUATIONS = 12
FLOOR = 3e-6  # distances below it are rounding, of z* as much as of the iterate


@dataclass(frozen=True)
class Point:
    """One solver after one number of evaluations of f, over all validation samples.

    ``distance`` is ``||z - z*|| / ||z*||``; ``quality`` is the application's own score; ``seconds``
    is the median time of solving one batch.
    """

    problem: str
    solver: str
    evaluations: int
    distance: float
    distance_median: float
    distance_worst: float
    quality: float
    seconds: float


class WithStart(Solver):
    """A classic solver that starts where an initializer says."""

    def __init__(self, solver: Solver, hyper: HyperSolver):
        self.solver, self.hyper = solver, hyper

    def start(self, *inputs: Tensor) -> Tensor:
        return self.hyper.start(*inputs)

    def init(self, z: Tensor, layout: Layout) -> Any:
        return self.solver.init(z, layout)

    def step(self, memory: Any, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        return self.solver.step(memory, z, fz, g)


def rivals(learned: Mapping[str, HyperSolver], anderson: Anderson) -> dict[str, Solver]:
    """The solvers that the issue compares, and each learned one alone and handing over."""
    solvers: dict[str, Solver] = {
        "Picard": Picard(),
        "Broyden": Broyden(20),
        "Anderson": anderson,
    }
    for name, hyper in learned.items():
        hyper.eval()
        if hyper.initializer is not None:
            solvers[f"Anderson from the start of {name}"] = WithStart(anderson, hyper)
        solvers[name] = hyper
        solvers[f"{name}, handing over"] = handing_over(hyper, anderson)
    return solvers


def handing_over(hyper: HyperSolver, anderson: Anderson) -> HandOver:
    """To an Anderson like ``anderson`` with the preconditioner that ``hyper`` has learned."""
    then = Anderson(
        anderson.memory,
        anderson.damping,
        anderson.regularization,
        anderson.safeguard,
        hyper.preconditioner,
    )
    return HandOver(hyper, then)


def measure(
    problem: str,
    deq: DEQ,
    batches: Sequence[Tensor],
    solvers: Mapping[str, Solver],
    quality: Callable[[int, Tensor], Sequence[float]],
    goals: Sequence[Tensor],
    repeats: int = 3,
) -> list[Point]:
    """Run every solver for `EVALUATIONS` evaluations of f on every batch and look at each state.

    Args:
        quality: of the states of batch i, one number a sample.
        goals: z* of every batch.
        repeats: timed repeats of every solve of the first batch; the solvers take turns.
    """
    seconds: dict[str, list[list[float]]] = {name: [] for name in solvers}
    for _ in range(repeats):
        for name, solver in solvers.items():
            seconds[name].append([moment for moment, _ in path(deq, solver, batches[0])])
    distances: dict[str, list[Tensor]] = {name: [] for name in solvers}
    scores: dict[str, list[list[float]]] = {name: [] for name in solvers}
    for index, (x, goal) in enumerate(zip(batches, goals, strict=True)):
        for name, solver in solvers.items():
            states = [z for _, z in path(deq, solver, x)]
            distances[name].append(torch.stack([relative(z, goal) for z in states]))
            for sample in zip(*(quality(index, z) for z in states), strict=True):
                scores[name].append(list(sample))
    points = []
    for name in solvers:
        every = torch.cat(distances[name], dim=1)
        for k in range(EVALUATIONS + 1):
            points.append(
                Point(
                    problem,
                    name,
                    k,
                    float(every[k].mean()),
                    float(every[k].median()),
                    float(every[k].max()),
                    statistics.fmean(sample[k] for sample in scores[name]),
                    statistics.median(moments[k] for moments in seconds[name]),
                )
            )
    return points


def path(deq: DEQ, solver: Solver, x: Tensor) -> list[tuple[float, Tensor]]:
    """The states after 0 .. `EVALUATIONS` evaluations, each with the seconds that led to it."""
    found: list[tuple[float, Tensor]] = []
    started = time.perf_counter()

    copying = 0.0

    def f(z: Tensor, x: Tensor) -> Tensor:
        nonlocal copying
        now = time.perf_counter()
        found.append((now - started - copying, z.clone()))  # whose memory the solver may use again
        copying += time.perf_counter() - now
        return deq.f(z, x)

    with torch.inference_mode():
        start = deq.with_solver(solver).initial_state(x)
        solution = fixed_point(
            f, start, (x,), solver=solver, tol=None, max_steps=EVALUATIONS, final="last"
        )
    found.append((time.perf_counter() - started - copying, solution.z))
    return found


def relative(z: Tensor, goal: Tensor) -> Tensor:
    """(B,) ``||z - z*|| / ||z*||``."""
    return (z - goal).flatten(1).norm(dim=1) / goal.flatten(1).norm(dim=1)


def verdict(points: Sequence[Point], problem: str, learned: str) -> list[str]:
    """The two promises of the issue, as sentences with numbers."""
    table = {(p.solver, p.evaluations): p for p in points if p.problem == problem}
    lines = []
    for k in (1, 2, 3):
        ours, theirs = table[learned, k], table["Anderson", 2 * k]
        word = "met" if ours.distance <= theirs.distance else "MISSED"
        lines.append(
            f"{problem}, {learned}: after {k} evaluations {ours.distance:.1e} (worst "
            f"{ours.distance_worst:.1e}), Anderson after {2 * k} {theirs.distance:.1e} (worst "
            f"{theirs.distance_worst:.1e}): {word}"
        )
    ratios = {
        k: max(table[learned, k].distance, FLOOR) / max(table["Anderson", k].distance, FLOOR)
        for k in range(1, EVALUATIONS + 1)
    }
    worst = max(ratios, key=lambda k: ratios[k])
    word = "met" if ratios[worst] <= 1 else "MISSED"
    lines.append(
        f"{problem}, {learned}: largest distance relative to Anderson's at equal evaluations up to "
        f"{EVALUATIONS}: {ratios[worst]:.2f} (at {worst}): {word}"
    )
    return lines


def read(file: Path) -> list[Point]:
    """The points of a CSV file that `write` wrote."""
    text = {"problem": str, "solver": str, "evaluations": int}
    with open(file, newline="") as lines:
        rows = list(csv.DictReader(lines))
    return [Point(**{key: text.get(key, float)(row[key]) for key in row}) for row in rows]


def write(points: Sequence[Point], out: Path, name: str, quality: str) -> None:
    """``name.csv`` and ``name.png``: a row of panels a problem."""
    out.mkdir(parents=True, exist_ok=True)
    with open(out / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, [field.name for field in fields(Point)])
        writer.writeheader()
        for point in points:
            row = asdict(point)
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    problems = list(dict.fromkeys(point.problem for point in points))
    panels = [
        ("evaluations", "distance", "evaluations of f", "mean distance to z*"),
        ("evaluations", "distance_worst", "evaluations of f", "worst distance to z*"),
        ("seconds", "distance", "seconds a batch", "mean distance to z*"),
        ("evaluations", "quality", "evaluations of f", quality),
    ]
    figure = Figure(figsize=(4.6 * len(panels), 3.6 * len(problems)), layout="constrained")
    axes = figure.subplots(len(problems), len(panels), squeeze=False)
    for row, problem in zip(axes, problems, strict=True):
        for axis, (x, y, x_label, y_label) in zip(row, panels, strict=True):
            own = [point for point in points if point.problem == problem]
            for solver in dict.fromkeys(point.solver for point in own):
                line = [point for point in own if point.solver == solver and point.evaluations]
                axis.plot(
                    [getattr(point, x) for point in line],
                    [getattr(point, y) for point in line],
                    marker=".",
                    label=solver,
                )
            if y != "quality":
                axis.set_yscale("log")
            axis.set(xlabel=x_label, ylabel=y_label, title=problem)
            axis.grid(alpha=0.3)
    axes[0][0].legend(fontsize=6)
    figure.savefig(out / f"{name}.png", dpi=80)
