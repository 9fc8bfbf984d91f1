"""When to fit the HyperSolver: once after the DEQ has converged, or in turns with its training.

``python results/hypersolver/strategies.py`` trains a small vector DEQ by each strategy with the
same numbers of updates of DEQ and HyperSolver, from several seeds, and writes strategies.csv.

- after: classic solver throughout, then one fit (HyperPolypDEQ, section 4.2).
- alternating: fits in between; between them the DEQ trains on what `STEPS` steps of the HyperSolver
  return (Bai, Koltun & Kolter, ICLR 2022).
- alternating, handing over: the same, but each solve goes on with Anderson to the tolerance. It is
  what ``hyper.alternate`` of polypseg-train does.
"""

from __future__ import annotations

import argparse
import csv
import math
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from curves import measure
from small import hypersolvers
from small_problems import VectorModel
from torch import Tensor, nn

from deqsolvers import Anderson, HandOver, HyperSolver, Solver, fit_hypersolver, spectral_radius
from deqsolvers.hypersolver.targets import Teacher

UPDATES, BATCH, STEPS = 400, 64, 6
CYCLES, FIT_BATCHES = 4, 40  # DEQ updates fall into so many parts, with a fit after each


class _Aside(Solver):
    """Keeps the HyperSolver's weights out of the DEQ's parameters."""

    def __init__(self, solver: Solver):
        self.start, self.solver = solver.start, solver  # type: ignore[method-assign]

    def init(self, z: Tensor, layout: object) -> object:
        return self.solver.init(z, layout)  # type: ignore[arg-type]

    def step(self, memory: object, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        return self.solver.step(memory, z, fz, g)


def learn(strategy: str, seed: int, quick: bool) -> dict[str, object]:
    """One training; what it cost, and what DEQ and HyperSolver can do at its end."""
    torch.manual_seed(seed)
    model = VectorModel()
    classic = model.deq
    hyper = hypersolvers("vector")["HyperSolver"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(seed + 1)
    updates = UPDATES // (20 if quick else 1)
    part = updates // CYCLES
    solves: list[float] = []
    seconds = {"deq": 0.0, "hyper": 0.0}

    for cycle in range(CYCLES):
        started = time.process_time()
        if cycle and strategy != "after":
            hyper.requires_grad_(False)
            if strategy == "alternating":
                model.deq = classic.with_solver(_Aside(hyper), tol=None, max_steps=STEPS)
            else:
                model.deq = classic.with_solver(_Aside(HandOver(hyper, Anderson())))
        for update in range(cycle * part, (cycle + 1) * part):
            for group in optimizer.param_groups:
                warm = min(1.0, (update + 1) / 40)
                group["lr"] = 1e-3 * warm * (1 + math.cos(math.pi * update / updates)) / 2
            x, y = model.data(BATCH, generator)
            z, solution = model.deq(model.features(x))
            optimizer.zero_grad()
            model.loss(z, y).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            solves.append(float(solution.evaluations.float().mean()))
        seconds["deq"] += time.process_time() - started
        started = time.process_time()
        last = cycle == CYCLES - 1
        model.deq = classic
        if strategy != "after" or last:
            batches = FIT_BATCHES * (CYCLES if strategy == "after" else 1) // (10 if quick else 1)
            fit(hyper.requires_grad_(True), model, list(_features(model, batches, seed + cycle)))
        seconds["hyper"] += time.process_time() - started

    model.eval().requires_grad_(False)
    x, y = model.data(256, torch.Generator().manual_seed(99))
    e = model.features(x)
    solution = Teacher(model.deq, tol=1e-6, max_steps=300).deq.solve(e)
    points = measure(
        "",
        model.deq,
        [e],
        {"Anderson": Anderson(), "HyperSolver": hyper},
        lambda _, z: model.quality(z, y),
        [solution.z],
        repeats=1,
    )
    row: dict[str, object] = {
        "strategy": strategy,
        "seed": seed,
        "evaluations a training solve": sum(solves) / len(solves),
        "DEQ CPU seconds": seconds["deq"],
        "HyperSolver CPU seconds": seconds["hyper"],
        "loss on z*": float(model.loss(solution.z, y)),
        "accuracy on z*": sum(model.quality(solution.z, y)) / len(y),
        "spectral radius": float(spectral_radius(model.deq.f, solution.z, (e,)).mean()),
        "residual of z*": float(solution.residual.max()),
    }
    for name in ("HyperSolver", "Anderson"):
        for k in (1, 2, 3, 6, 12):
            (point,) = (p for p in points if (p.solver, p.evaluations) == (name, k))
            row[f"{name}, distance after {k}"] = point.distance
    return row


def fit(hyper: HyperSolver, model: VectorModel, batches: list[Tensor]) -> None:
    training = model.training
    fit_hypersolver(hyper, model.deq, batches, epochs=1, steps=STEPS, lr=1e-2, teacher_tol=1e-5)
    model.train(training)


def _features(model: VectorModel, count: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(1000 + seed)
    with torch.no_grad():
        for _ in range(count):
            yield model.features(model.data(BATCH, generator)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--quick", action="store_true", help="a check of the script, no result")
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    rows: list[dict[str, object]] = []
    for seed in range(arguments.seeds):
        for strategy in ("after", "alternating", "alternating, handing over"):
            rows.append(learn(strategy, seed, arguments.quick))
            print(rows[-1], flush=True)
            with open(arguments.out / "strategies.csv", "w", newline="") as file:
                writer = csv.DictWriter(file, list(rows[0]))
                writer.writeheader()
                for row in rows:
                    writer.writerow(
                        {k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()}
                    )


if __name__ == "__main__":
    main()
