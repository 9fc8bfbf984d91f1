"""Fitting a HyperSolver to a trained DEQ: f frozen, no labels, three losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sized
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from deqsolvers.deq import DEQ
from deqsolvers.fixed_point import StepInfo, iterate
from deqsolvers.options import Options
from deqsolvers.solvers import Anderson, Solver
from deqsolvers.solvers.base import check_count
from deqsolvers.solvers.hyper import HyperSolver
from deqsolvers.state import Layout, map_rows


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three losses; the defaults are the ICLR paper's for images (table 2)."""

    convergence: float = 0.1
    initializer: float = 0.02
    alpha: float = 1e-5


@dataclass(frozen=True)
class FitEpoch:
    """One epoch of `fit_hypersolver`.

    Attributes:
        epoch: counted from 1.
        loss: mean weighted training loss.
        distances: mean ``||z_k - z*|| / ||z*||`` after k = 0 .. steps updates, on the validation
            batches if there are any, else on the training batches of this epoch.
        skipped: share of training samples without a reliable z*.
    """

    epoch: int
    loss: float
    distances: tuple[float, ...]
    skipped: float


# A z* whose own residual is above this is no target; a DEQ most of whose samples are like that is
# refused.
_RELIABLE = 1e-2
_TRIAL = 64  # so many samples are enough to refuse by

_TEACHER_OPTIONS = Options(tol=1e-4, max_steps=100)


def fit_hypersolver(
    hyper: HyperSolver,
    deq: DEQ,
    batches: Iterable[Any],
    *,
    epochs: int = 8,
    steps: int = 6,
    lr: float = 1e-3,
    final_lr: float = 1e-6,
    weights: LossWeights | None = None,
    teacher: Solver | None = None,
    teacher_tol: float = 1e-4,
    teacher_steps: int = 100,
    validation: Iterable[Any] | None = None,
    on_batch: Callable[[int, float], None] | None = None,
    on_epoch: Callable[[FitEpoch], None] | None = None,
) -> list[FitEpoch]:
    """Train ``hyper`` to solve ``deq``, whose f stays as it is.

    For every batch a classic solver finds z*; the HyperSolver then runs ``steps`` unrolled steps,
    and Adam (cosine decay from ``lr`` to ``final_lr``) minimises, with every distance relative to
    ``||z*||``,

    - convergence: ``sum_k w_k ||z_k - z*||``, w_k proportional to k, sum 1;
    - initializer: ``||z_0 - z*||``;
    - alpha: ``sum_k ||G_k alpha_k||``, whose weight falls linearly to zero over the first half.

    Args:
        hyper: trained in place.
        deq: provides f; it is put into evaluation mode and left so only while fitting.
        batches: iterated once an epoch; every item is f's inputs, one tensor or a tuple.
        epochs: passes over ``batches``.
        steps: K, unrolled steps; memory grows with it.
        lr, final_lr: learning rate at the first and last update.
        weights: of the three losses; the defaults of `LossWeights` if None.
        teacher: the classic solver; `Anderson` with memory 10 if None.
        teacher_tol, teacher_steps: its relative tolerance and limit.
        validation: like ``batches``; measured after every epoch.
        on_batch: called with the number of updates so far and the loss.
        on_epoch: called with each `FitEpoch` as it ends.

    Returns:
        One `FitEpoch` an epoch.

    Raises:
        ValueError: ``batches`` is empty, or z* is unreliable (residual above 1e-2) for most of the
            first samples: train the DEQ better before its solver.
    """
    weights = weights or LossWeights()
    check_count("epochs", epochs)
    check_count("steps", steps)
    if not isinstance(batches, Sized):
        batches = list(batches)
    if validation is not None and not isinstance(validation, Sized):
        validation = list(validation)
    total = epochs * len(batches)
    if total == 0:
        raise ValueError("batches is empty: there is nothing to fit the HyperSolver on")
    parameters = [p for p in hyper.parameters() if p.requires_grad]
    optimizer = torch.optim.Adam(parameters, lr=lr)
    teacher = teacher or Anderson(memory=10)
    target_options = Options(teacher_tol, teacher_steps)
    modes = {module: module.training for module in deq.modules()}
    deq.eval()
    hyper.train()
    history: list[FitEpoch] = []
    update = 0
    try:
        for epoch in range(1, epochs + 1):
            losses, distances, seen, skipped = [], [], 0, 0
            for batch in batches:
                done = update / total
                for group in optimizer.param_groups:
                    group["lr"] = final_lr + (lr - final_lr) * (1 + math.cos(math.pi * done)) / 2
                decayed = LossWeights(
                    weights.convergence, weights.initializer, weights.alpha * max(0.0, 1 - 2 * done)
                )
                inputs, goal, left_out = _target(deq, batch, teacher, target_options)
                seen += len(goal) + left_out
                skipped += left_out
                if epoch == 1 and seen >= _TRIAL and 2 * skipped > seen:
                    raise _unreliable(skipped, seen, teacher, teacher_steps)
                update += 1
                if len(goal) == 0:
                    continue
                loss, distance = _loss(hyper, deq, inputs, goal, steps, decayed)
                optimizer.zero_grad()
                loss.backward(inputs=parameters)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                losses.append(loss.detach())
                distances.append(distance)
                if on_batch is not None:
                    on_batch(update, float(losses[-1]))
            if epoch == 1 and 2 * skipped > seen:
                raise _unreliable(skipped, seen, teacher, teacher_steps)
            if validation is not None:
                distances = measure_distances(
                    hyper, deq, validation, steps, teacher=teacher, options=target_options
                )
            record = FitEpoch(
                epoch,
                float(torch.stack(losses).mean()),
                tuple(torch.stack(distances).mean(0).tolist()),
                skipped / seen,
            )
            history.append(record)
            if on_epoch is not None:
                on_epoch(record)
    finally:
        for module, training in modes.items():
            module.train(training)
        hyper.eval()
    return history


def _unreliable(skipped: int, seen: int, teacher: Solver, steps: int) -> ValueError:
    return ValueError(
        f"z* is unreliable for {skipped} of {seen} samples (residual above {_RELIABLE:g} after "
        f"{steps} steps of {teacher!r}); a HyperSolver would learn noise. Train the DEQ longer or "
        "with a Jacobian regulariser first"
    )


def measure_distances(
    solver: Solver,
    deq: DEQ,
    batches: Iterable[Any],
    steps: int,
    *,
    teacher: Solver | None = None,
    options: Options = _TEACHER_OPTIONS,
) -> list[Tensor]:
    """Mean ``||z_k - z*|| / ||z*||`` after k = 0 .. steps updates, a (steps + 1,) a batch."""
    distances = []
    for batch in batches:
        inputs, goal, _ = _target(deq, batch, teacher or Anderson(memory=10), options)
        if len(goal) == 0:
            continue
        with torch.no_grad():
            path, _ = _unroll(solver, deq, inputs, goal, steps)
        distances.append(path.mean(1))
    if not distances:
        raise ValueError(f"no sample has a reliable z* (residual of at most {_RELIABLE:g})")
    return distances


def _target(
    deq: DEQ, batch: Any, teacher: Solver, options: Options
) -> tuple[tuple[Any, ...], Tensor, int]:
    """Inputs and z* (rows, features) of the samples with a reliable z*, and how many have none.

    The others leave the batch here: a weight of zero would not keep their NaN out of the gradient.
    """
    inputs = batch if isinstance(batch, tuple) else (batch,)
    high_precision = deq.with_solver(teacher, raise_on_failure=False, **asdict(options))
    solution = high_precision.solve(*inputs)
    with torch.no_grad():
        goal = Layout.of(solution.z).flatten(solution.z)
        rows = (solution.residual <= _RELIABLE).nonzero().squeeze(1)
        inputs = map_rows(lambda leaf: leaf[rows], inputs, len(goal))
        return inputs, goal[rows], len(goal) - len(rows)


def _loss(
    hyper: HyperSolver,
    deq: DEQ,
    inputs: tuple[Any, ...],
    goal: Tensor,
    steps: int,
    weights: LossWeights,
) -> tuple[Tensor, Tensor]:
    with torch.enable_grad():
        distances, mixed = (each.mean(1) for each in _unroll(hyper, deq, inputs, goal, steps))
        ramp = torch.arange(1, steps + 1, device=distances.device, dtype=distances.dtype)
        loss = (
            weights.convergence * (ramp / ramp.sum() * distances[1:]).sum()
            + weights.initializer * distances[0]
            + weights.alpha * mixed.sum()
        )
    return loss, distances.detach()


def _unroll(
    solver: Solver, deq: DEQ, inputs: tuple[Any, ...], goal: Tensor, steps: int
) -> tuple[Tensor, Tensor]:
    """(steps + 1, B) distances to z*, and (steps, B) norms of mixed residuals (0 if unknown)."""
    start = solver.start(*inputs)
    if start is None:
        start = deq.initial_state(*inputs)
    layout = Layout.of(start)
    scale = torch.linalg.vector_norm(goal, dim=1).clamp_min(torch.finfo(goal.dtype).tiny)
    distances, mixed = [], []
    memories: list[Any] = []

    def norm(matrix: Tensor) -> Tensor:
        return torch.linalg.vector_norm(matrix, dim=1) / scale

    def note_mixed() -> None:
        last = getattr(memories[-1], "mixed", None)
        mixed.append(torch.zeros_like(scale) if last is None else norm(last))

    def watch(info: StepInfo) -> None:
        if memories:
            note_mixed()
        memories.append(info.memory)
        distances.append(norm(layout.flatten(info.z) - goal))

    options = Options(tol=None, max_steps=steps, final="last", drop_converged=False)
    solution = iterate(deq.f, start, inputs, solver, options, callback=watch)
    note_mixed()
    distances.append(norm(layout.flatten(solution.z) - goal))
    return torch.stack(distances), torch.stack(mixed)
