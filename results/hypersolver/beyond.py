"""Trials beyond the papers' HyperSolver: ``python results/hypersolver/beyond.py``.

Each variant changes one thing of the library's HyperSolver and is fitted like it, to the weakly
regularised vector DEQ of small.py or, with ``--run RUN --data DATA``, to a trained PolypDEQ, whose
HyperSolver starts from the deep initializer. beyond.csv gets a row a problem, variant and seed;
rows that it already holds are not measured again.

Columns: mean distance ``||z_K - z*|| / ||z*||`` on held-out inputs after K evaluations of f, the
worst after 3, and the mean relative distance of the prediction from that on z*. Two variants stop
each sample by a residual instead of after K steps; their K is the mean.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from beyond_problems import Problem, polypdeq, vector
from beyond_variants import (
    ByStep,
    CoarseStart,
    PerGroup,
    fit_next_residual,
    stopped,
    with_larger_initializer,
)
from curves import relative
from torch import Tensor

from deqsolvers import HyperSolver, Solver
from deqsolvers.hypersolver.losses import LossWeights, convergence, unroll, weighted_loss
from deqsolvers.hypersolver.targets import Target

SHOWN = (1, 2, 3, 6, 12)
FIELDS = [
    "problem",
    "variant",
    "seed",
    "parameters",
    "fit CPU seconds",
    *(f"distance {k}" for k in (0, *SHOWN)),
    "worst distance 3",
    *(f"prediction {k}" for k in SHOWN[:3]),
]


@dataclass(frozen=True)
class Variant:
    """Which modules, how many unrolled steps (drawn, inclusive), and what the loss compares."""

    build: Callable[[HyperSolver, Problem], HyperSolver] = lambda hyper, problem: hyper
    steps: Callable[[int], tuple[int, int]] = lambda usual: (usual, usual)
    states: bool = True
    predictions: bool = False
    images: bool = False  # for states that are images only


VARIANTS = {
    "none": Variant(),
    "start from a coarse evaluation": Variant(build=CoarseStart.of, images=True),
    "larger deep initializer": Variant(build=with_larger_initializer, images=True),
    "K drawn in every update": Variant(steps=lambda usual: (1, 2 * usual - 1)),
    "twice as many steps": Variant(steps=lambda usual: (2 * usual, 2 * usual)),
    "predictions": Variant(states=False, predictions=True),
    "states and predictions": Variant(predictions=True),
    "step index": Variant(build=ByStep.of),
    "alpha and beta per group": Variant(build=PerGroup.of),
}


def predicted(problem: Problem, target: Target, states: Sequence[Tensor]) -> Tensor:
    """(K, B) distances of the predictions on ``states`` from that on z*."""
    read = [problem.read_out(target.layout.unflatten(z)) for z in (*states, target.goal)]
    return torch.stack([relative(each, read[-1]) for each in read[:-1]])


def fit(hyper: HyperSolver, problem: Problem, variant: Variant, seed: int) -> float:
    """CPU seconds of what `fit_hypersolver` does, with the variant's loss."""
    generator = torch.Generator().manual_seed(seed)
    parameters = list(hyper.parameters())
    optimizer = torch.optim.Adam(parameters, lr=problem.lr)
    weights = LossWeights()
    low, high = variant.steps(problem.steps)
    total, update = problem.epochs * len(problem.training), 0
    started = time.process_time()
    hyper.train()
    for _ in range(problem.epochs):
        for index in torch.randperm(len(problem.training), generator=generator).tolist():
            target = problem.training[index]
            steps = int(torch.randint(low, high + 1, (), generator=generator))
            done = update / total
            for group in optimizer.param_groups:
                group["lr"] = 1e-6 + (problem.lr - 1e-6) * (1 + math.cos(math.pi * done)) / 2
            way = unroll(hyper, problem.deq, target, steps, problem.mode)
            loss = weights.initializer * way.distances[0].mean()
            if variant.states:
                loss = weighted_loss(way.distances, way.mixed, weights, done)
            if variant.predictions:
                read = predicted(problem, target, way.states)
                loss = loss + weights.convergence * convergence(read.mean(1))
            optimizer.zero_grad()
            loss.backward(inputs=parameters)
            torch.nn.utils.clip_grad_norm_(parameters, 1.0)
            optimizer.step()
            update += 1
    hyper.eval()
    return time.process_time() - started


@torch.no_grad()
def measure(
    solver: Solver, problem: Problem, targets: list[Target]
) -> tuple[Tensor, Tensor, Tensor]:
    """Distances (13, N), logarithms of residuals (12, N), distances of predictions (3, N)."""
    distances, logs, predictions = [], [], []
    for target in targets:
        way = unroll(solver, problem.deq, target, SHOWN[-1])
        distances.append(way.distances)
        logs.append(way.residuals.log())
        predictions.append(predicted(problem, target, [way.states[k] for k in SHOWN[:3]]))
    return torch.cat(distances, 1), torch.cat(logs, 1), torch.cat(predictions, 1)


def columns(distances: Tensor, predictions: Tensor) -> dict[str, float]:
    return {
        **{f"distance {k}": float(distances[k].mean()) for k in (0, *SHOWN)},
        "worst distance 3": float(distances[3].max()),
        **{f"prediction {k}": float(each.mean()) for k, each in enumerate(predictions, 1)},
    }


def run(problem: Problem, seed: int, rows: Rows) -> None:
    key: dict[str, Any] = {"problem": problem.name, "seed": seed}
    if not rows.has(problem.name, "Anderson", seed):
        distances, _, predictions = measure(problem.classic, problem, problem.held_out)
        rows.add({**key, "variant": "Anderson", **columns(distances, predictions)})
    for name, variant in VARIANTS.items():
        if rows.has(problem.name, name, seed) or (variant.images and not problem.images):
            continue
        torch.manual_seed(seed)
        hyper = variant.build(problem.make(), problem)
        key["parameters"] = sum(p.numel() for p in hyper.parameters())
        key["fit CPU seconds"] = fit(hyper, problem, variant, seed)
        distances, logs, predictions = measure(hyper, problem, problem.held_out)
        rows.add({**key, "variant": name, **columns(distances, predictions)})
        if name == "none":
            for rule, found in adaptive(hyper, problem, distances, logs).items():
                rows.add({**key, "variant": rule, **found})


def adaptive(
    hyper: HyperSolver, problem: Problem, distances: Tensor, logs: Tensor
) -> dict[str, dict[str, float]]:
    """What stopping by a residual gives on the held-out inputs, at mean numbers of evaluations."""
    network = fit_next_residual(measure(hyper, problem, problem.training)[1])
    rules = {
        "stop by the last residual": logs,
        "stop by a predicted residual": torch.cat([network(logs).detach(), logs[-1:]]),
    }
    found = {}
    for rule, indicator in rules.items():
        chosen = {k: stopped(indicator, distances, k) for k in (2, 3, 6)}
        found[rule] = {f"distance {k}": float(each.mean()) for k, each in chosen.items()}
        found[rule]["worst distance 3"] = float(chosen[3].max())
    return found


class Rows:
    """beyond.csv."""

    def __init__(self, file: Path):
        self.file = file
        self.rows: list[dict[str, Any]] = []
        if file.exists():
            with open(file, newline="") as lines:
                self.rows = list(csv.DictReader(lines))

    def has(self, problem: str, variant: str, seed: int) -> bool:
        key = (problem, variant, str(seed))
        return any((row["problem"], row["variant"], str(row["seed"])) == key for row in self.rows)

    def add(self, row: dict[str, Any]) -> None:
        self.rows.append({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
        print(self.rows[-1], flush=True)
        with open(self.file, "w", newline="") as lines:
            writer = csv.DictWriter(lines, FIELDS)
            writer.writeheader()
            writer.writerows(self.rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--run", type=Path, help="a trained PolypDEQ, instead of the vector DEQ")
    parser.add_argument("--data", type=Path, help="its images")
    parser.add_argument("--every", type=int, default=6, help="fit on every n-th training image")
    arguments = parser.parse_args()
    rows = Rows(arguments.out / "beyond.csv")
    if arguments.run is not None:
        run(polypdeq(arguments.run, arguments.data, arguments.every), 0, rows)
        return
    for seed in range(arguments.seeds):
        run(vector(seed), seed, rows)


if __name__ == "__main__":
    main()
