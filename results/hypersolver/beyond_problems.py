"""What the trials of beyond.py are made on: a DEQ, its fixed points, a HyperSolver to change."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from small import REGULARISED, UPDATES, hypersolvers
from small_problems import VectorModel, train
from torch import Tensor

from deqsolvers import DEQ, Anderson, HyperSolver, Solver
from deqsolvers.hypersolver.losses import Unroll
from deqsolvers.hypersolver.targets import Target, Teacher
from polypseg.data import Pair, PolypDataset, batches, split_for
from polypseg.inference import load_model
from polypseg.models import PolypDEQ, build_hypersolver, build_solver


@dataclass(frozen=True)
class Problem:
    """A frozen DEQ with fixed points to learn from and others to measure on.

    ``read_out`` maps a state to what the application predicts; ``make`` returns the library's
    HyperSolver, not yet fitted.
    """

    name: str
    deq: DEQ
    training: list[Target]
    held_out: list[Target]
    read_out: Callable[[Tensor], Tensor]
    make: Callable[[], HyperSolver]
    classic: Solver
    images: bool
    steps: int
    epochs: int
    lr: float
    mode: Unroll


def vector(seed: int) -> Problem:
    torch.manual_seed(seed)
    model = VectorModel()
    updates, batch = UPDATES["vector"]
    train(model, REGULARISED["weakly"], updates, batch)
    teacher = Teacher(model.deq, tol=1e-6, max_steps=300)

    def targets(count: int, seed: int) -> list[Target]:
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            inputs = [model.features(model.data(batch, generator)[0]) for _ in range(count)]
        return [teacher.target(x) for x in inputs]

    return Problem(
        "vector, weakly regularised",
        model.deq,
        targets(40, 11 + seed),
        targets(4, 1012 + seed),
        model.head,
        lambda: hypersolvers("vector")["HyperSolver"],
        Anderson(5),
        images=False,
        steps=6,
        epochs=4,
        lr=1e-2,
        mode="full",
    )


def polypdeq(run: Path, data: Path, every: int) -> Problem:
    """Every ``every``-th training image, augmented once; every fourth validation image."""
    model, config = load_model(run, "anderson")
    assert isinstance(model, PolypDEQ)
    model.requires_grad_(False)
    teacher = Teacher(model.deq, tol=config.hyper.tol)
    split = split_for(data, config.seed)

    def targets(pairs: list[Pair], augmented: bool) -> list[Target]:
        dataset = PolypDataset(pairs, config.data.size, train=augmented, seed=config.seed)
        found = []
        for each in batches(dataset, config.hyper.batch, False, 0, 0):
            with torch.no_grad():
                found.append(teacher.target(model.features(each["image"])))
        return found

    return Problem(
        f"PolypDEQ {run.resolve().name}",
        model.deq,
        targets(split.train[::every], True),
        targets(split.val[::4], False),
        model.read_out,
        lambda: build_hypersolver(model, config.hyper),
        build_solver("anderson", config.solve.anderson_memory),
        images=True,
        steps=config.hyper.steps,
        epochs=4,
        lr=config.hyper.lr,
        mode=config.hyper.mode,
    )
