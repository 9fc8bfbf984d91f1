"""How fast solvers approach z*: distances and times after every number of evaluations."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor

from benchmarks.problems import Problem
from benchmarks.results import Results, Value
from benchmarks.settings import Settings
from benchmarks.timing import Effort, paired
from deqsolvers import Anderson, Broyden, Picard, Solver, fixed_point
from deqsolvers.precision import precision_floor

EVALUATIONS = (1, 2, 3, 4, 6, 8, 12)
ANDERSON = "Anderson"
CLASSIC = ("Picard", ANDERSON, "Broyden")
_LONGEST = 40  # evaluations within which a classic solver must get as close


@dataclass(frozen=True)
class Approach:
    """A solver and where it starts; ``start`` None is the solver's own initializer."""

    solver: Solver
    start: Callable[[], Tensor | None] | None

    def run(self, problem: Problem, evaluations: int, **options: Any) -> Tensor:
        """The state after exactly so many evaluations of f."""
        return fixed_point(
            problem.f,
            None if self.start is None else self.start(),
            (problem.x,),
            solver=self.solver,
            tol=None,
            max_steps=evaluations,
            final="last",
            **options,
        ).z

    def distances(self, problem: Problem, evaluations: int) -> Tensor:
        """(evaluations, B) relative distances to z* after 1, 2, ... evaluations."""
        states: list[Tensor] = []
        last = self.run(problem, evaluations, callback=lambda info: states.append(info.z))
        exact = problem.exact.flatten(1)
        return torch.stack(
            [
                (z.flatten(1).double() - exact).norm(dim=1) / exact.norm(dim=1)
                for z in [*states[1:], last]
            ]
        )


def classic(problem: Problem, anderson: Solver) -> dict[str, Approach]:
    def zeros() -> Tensor:
        return problem.z0

    return {
        name: Approach(solver, zeros)
        for name, solver in zip(CLASSIC, (Picard(), anderson, Broyden()), strict=True)
    }


def measure(
    problem: Problem,
    hypers: Mapping[str, Solver],
    settings: Settings,
    results: Results,
    effort: Effort,
    anderson: Solver | None = None,
) -> None:
    """Rows of the tables hypersolver and equal-distance, and the goals on distances.

    Args:
        hypers: fitted HyperSolvers, or solvers that begin with one, by name; Anderson also starts
            from the first one's guess, if it has an initializer. Else all start from zero.
        anderson: the rival; `Anderson` with its defaults if None.
    """
    anderson = anderson or Anderson()
    first = next(iter(hypers.values()))

    @torch.no_grad()
    def guess() -> Tensor | None:
        return first.start(problem.x)

    chosen = classic(problem, anderson)
    begin = None
    if guess() is None:
        begin = chosen[ANDERSON].start
    else:
        chosen["Anderson with our initializer"] = Approach(anderson, guess)
    chosen.update({name: Approach(hyper, begin) for name, hyper in hypers.items()})
    distances = {
        name: each.distances(problem, _LONGEST if name in CLASSIC else EVALUATIONS[-1])
        for name, each in chosen.items()
    }
    for count in EVALUATIONS:
        runs = {name: partial(each.run, problem, count) for name, each in chosen.items()}
        timings = paired(runs, settings.device, effort, warm=True)
        for name in chosen:
            results.add(
                "hypersolver",
                {"problem": problem.name, "method": name, "evaluations": count},
                {
                    "mean distance": float(distances[name][count - 1].mean()),
                    "worst distance": float(distances[name][count - 1].max()),
                    "time [ms]": timings.of(name).scaled(1e3),
                },
            )
    for name in hypers:
        for count in EVALUATIONS[: 3 if settings.quick else 5]:
            _equal_distance(problem, chosen, distances, name, count, settings, results, effort)
        _goals(problem, distances, name, results)


def _equal_distance(
    problem: Problem,
    chosen: Mapping[str, Approach],
    distances: Mapping[str, Tensor],
    hyper: str,
    count: int,
    settings: Settings,
    results: Results,
    effort: Effort,
) -> None:
    """A row: how long the classic solvers take to a mean distance as small as the HyperSolver's."""
    reached = float(distances[hyper][count - 1].mean())
    needed = {}
    for name in CLASSIC:
        close = (distances[name].mean(1) <= reached).nonzero()
        if len(close):
            needed[name] = int(close[0]) + 1
    runs = {name: partial(chosen[name].run, problem, times) for name, times in needed.items()}
    runs[hyper] = partial(chosen[hyper].run, problem, count)
    timings = paired(runs, settings.device, effort, warm=True)
    values: dict[str, Value] = {
        "mean distance": reached,
        "time [ms]": timings.of(hyper).scaled(1e3),
    }
    for name in CLASSIC:
        values[f"{name}'s evaluations"] = needed.get(name)
        values[f"{name} / time"] = timings.ratio(name, hyper) if name in needed else None
    key = {"problem": problem.name, "method": hyper, "its evaluations": count}
    results.add("equal-distance", key, values)


def _goals(problem: Problem, distances: Mapping[str, Tensor], name: str, results: Results) -> None:
    hyper, anderson = distances[name].mean(1), distances[ANDERSON].mean(1)
    doubled = torch.stack([anderson[2 * k - 1] / hyper[k - 1] for k in (1, 2, 3)])
    results.goal(
        f"{problem.name}, {name}: distance of Anderson at 2K / ours at K = 1..3, least",
        float(doubled.min()),
        ">=",
        1,
        f"K = {int(doubled.argmin()) + 1}",
    )
    rounding = 10 * precision_floor(problem.x.dtype)  # below it lies what f itself rounds by
    equal = anderson[:12].clamp_min(rounding) / hyper[:12].clamp_min(rounding)
    results.goal(
        f"{problem.name}, {name}: distance of Anderson / ours at equal K = 1..12, least",
        float(equal.min()),
        ">=",
        1,
        f"K = {int(equal.argmin()) + 1}",
    )
