"""Fitting a HyperSolver to a trained DEQ: f frozen, no labels, three losses."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sized
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import Tensor

from deqsolvers.deq import DEQ
from deqsolvers.hypersolver.losses import (
    UNROLLS,
    LossWeights,
    Unroll,
    get_weights,
    unroll,
    weighted_loss,
)
from deqsolvers.hypersolver.progress import Bar
from deqsolvers.hypersolver.record import FitEpoch, FitState
from deqsolvers.hypersolver.targets import RELIABLE, Target, Teacher, fingerprint
from deqsolvers.modules import modules_of
from deqsolvers.solvers import Solver
from deqsolvers.solvers.base import check_count
from deqsolvers.solvers.hyper import FittedOn, HyperSolver

_NOTHING = "batches is empty: there is nothing to fit the HyperSolver on"
_WITH_THEM = "; with drop_converged=False one such sample takes its whole batch with it"
_TRIAL = 64  # so many samples are enough to refuse a DEQ by

Batches = Iterable[Any] | Callable[[int], Iterable[Any]]


def fit_hypersolver(
    hyper: HyperSolver,
    deq: DEQ,
    batches: Batches,
    *,
    epochs: int = 8,
    steps: int = 6,
    lr: float = 1e-3,
    final_lr: float = 1e-6,
    weights: LossWeights | str | None = None,
    mode: Unroll = "full",
    teacher: Solver | None = None,
    teacher_tol: float = 1e-4,
    teacher_steps: int = 100,
    cache: bool | str | Path = False,
    validation: Batches | None = None,
    patience: int | None = None,
    resume: str | Path | None = None,
    seed: int = 0,
    progress: bool = False,
    on_batch: Callable[[int, float], None] | None = None,
    on_epoch: Callable[[FitEpoch], None] | None = None,
) -> list[FitEpoch]:
    """Train ``hyper`` to solve ``deq``, whose f stays as it is.

    For every batch a classic solver finds z*; the HyperSolver then runs ``steps`` unrolled steps,
    and Adam (cosine decay from ``lr`` to ``final_lr``) minimises, with every distance relative to
    ``||z*||``,

    - convergence: ``sum_k w_k ||z_k - z*||``, w_k proportional to k, sum 1;
    - initializer: ``||z_0 - z*||``;
    - alpha: ``sum_k ||G_k alpha_k||``, whose weight falls linearly.

    Samples whose z* is unreliable (residual above 1e-2) or zero are left out. Where the layer has
    ``drop_converged=False``, f may couple samples: one unreliable z* then leaves out its batch.

    Args:
        hyper: trained in place.
        deq: provides f; it is put into evaluation mode and left so only while fitting, and with
            it the modules that f calls where it is a function (`cached_weights` says which).
        batches: iterated once an epoch; every item is f's inputs, one tensor, or a tuple or list of
            them (as a DataLoader makes). Or a function of the epoch, 0 first, that returns such an
            iterable: a resumed fit then repeats exactly what it would have seen. A list is shuffled
            every epoch. What has no length (a DataLoader of an IterableDataset) is read into a list
            to count it.
        epochs: passes over ``batches``.
        steps: K, unrolled steps.
        lr, final_lr: learning rate at the first update, and where it has come to after the last.
        weights: of the three losses, or a name in `PUBLISHED_WEIGHTS`; the defaults of
            `LossWeights` if None.
        mode: "full" unrolling; "checkpoint" evaluates f again in the backward pass, so that memory
            does not grow with f's activations; "truncate" passes no gradient from a step to those
            before it, so that f has no backward pass at all: about half the time, and a little
            less far.
        teacher: the classic solver; `Anderson` with memory 10 if None.
        teacher_tol, teacher_steps: its relative tolerance and limit; ``stall_after`` and
            ``drop_converged`` are the DEQ's own.
        cache: keep z* of batches that come again: True in memory up to a gibibyte, or a folder,
            which later fits to the same f use too. Augmented batches never come again.
        validation: like ``batches``; measured after every epoch.
        patience: stop after so many epochs without a smaller validation loss (the convergence loss
            on ``validation``) and keep the best weights; None runs all epochs and keeps the last.
        resume: a file that is written after every epoch; where it exists, the fit goes on from it.
        seed: of the order of a list.
        progress: show a bar (with tqdm installed) or a line an epoch, on standard error.
        on_batch: called with the number of updates so far and the loss.
        on_epoch: called with each `FitEpoch` as it ends, before ``resume`` is written: a fit that
            is killed in between calls it again with the same epoch rather than never.

    Returns:
        One `FitEpoch` an epoch, those of a resumed fit included.

    Raises:
        ValueError: ``batches`` is empty, an option is out of range, ``resume`` holds another fit
            (other settings, another f or HyperSolver), or z* is unreliable (residual above 1e-2)
            for most of the first samples: train the DEQ better before its solver.
    """
    weights = get_weights(weights)
    check_count("epochs", epochs)
    check_count("steps", steps)
    if not isinstance(hyper, HyperSolver):
        raise TypeError(f"hyper must be a HyperSolver, got {type(hyper).__name__}")
    if not isinstance(deq, DEQ):
        raise TypeError(f"deq must be a DEQ, such as DEQ(f), got a {type(deq).__name__}")
    if isinstance(teacher_tol, bool) or not (isinstance(teacher_tol, Real) and teacher_tol >= 0):
        raise ValueError(f"teacher_tol must be a number of at least 0, got {teacher_tol!r}")
    if mode not in UNROLLS:
        raise ValueError(f"mode must be one of {', '.join(UNROLLS)}, got {mode!r}")
    if patience is not None:
        check_count("patience", patience)
        if validation is None:
            raise ValueError("patience needs validation batches to judge by")
    epoch_batches = _by_epoch(batches, seed)
    if callable(validation):
        validation = validation(0)
    if validation is not None and not isinstance(validation, Sized):
        validation = list(validation)
    per_epoch = len(epoch_batches(0))
    if per_epoch == 0:
        raise ValueError(_NOTHING)
    parameters = [p for p in hyper.parameters() if p.requires_grad]
    if not parameters:
        raise ValueError(
            "hyper is frozen: nothing in it requires gradients; hyper.requires_grad_()"
        )
    optimizer = torch.optim.Adam(parameters, lr=lr)
    fit = FitState(hyper, optimizer, None if resume is None else Path(resume))
    fit.load(
        {
            "epochs": epochs,
            "per_epoch": per_epoch,
            "steps": steps,
            "lr": lr,
            "final_lr": final_lr,
            "seed": seed,
            "mode": mode,
            "weights": asdict(weights),
            "teacher": f"{teacher!r} {teacher_tol:g} {teacher_steps}",
            "f": fingerprint(deq.f),
        }
    )
    frozen = torch.nn.ModuleList([deq, *modules_of(deq.f)])  # those that a function calls too
    modes = {module: module.training for module in frozen.modules()}
    frozen.eval()
    hyper.train()
    teach = Teacher(deq, teacher, teacher_tol, teacher_steps, cache)
    bar = Bar(epochs * per_epoch, fit.updates, progress)
    try:
        for epoch in range(len(fit.history) + 1, epochs + 1):
            if patience is not None and fit.epochs_since_best() >= patience:
                break
            losses, distances, seen, skipped = [], [], 0, 0
            items = epoch_batches(epoch - 1)
            length = len(items)
            bar.expect(fit.updates + (epochs - epoch + 1) * length)
            for index, batch in enumerate(items):
                # Epochs count the same, whatever their lengths, which a DataLoader may only guess.
                done = (epoch - 1 + min(index / max(length, 1), 1.0)) / epochs
                for group in optimizer.param_groups:
                    group["lr"] = final_lr + (lr - final_lr) * (1 + math.cos(math.pi * done)) / 2
                target = teach.target(batch)
                seen += target.samples
                skipped += target.skipped
                if epoch == 1 and seen >= _TRIAL and 2 * skipped > seen:
                    raise _unreliable(skipped, seen, teach)
                fit.updates += 1
                if len(target.goal) == 0:
                    continue
                with torch.enable_grad():
                    way = unroll(hyper, deq, target, steps, mode)
                    loss = weighted_loss(way.distances, way.mixed, weights, done)
                optimizer.zero_grad()
                loss.backward(inputs=parameters)
                torch.nn.utils.clip_grad_norm_(parameters, 1.0)
                optimizer.step()
                losses.append(loss.detach())
                distances.append(way.distances.detach())
                if on_batch is not None:
                    on_batch(fit.updates, float(losses[-1]))
                bar.update(losses[-1])
            if seen == 0:
                raise ValueError(_NOTHING)
            if 2 * skipped > seen:
                raise _unreliable(skipped, seen, teach)
            if validation is not None:
                hyper.eval()  # as it will be used: an initializer may hold dropout or statistics
                distances = measure_distances(hyper, deq, validation, steps, teacher=teach)
                hyper.train()
            every = torch.cat(distances, dim=1)
            record = FitEpoch(
                epoch,
                float(torch.stack(losses).mean()),
                tuple(every.mean(1).tolist()),
                tuple(every.amax(1).tolist()),
                skipped / seen,
            )
            hyper.fitted_on = _fitted_on(deq, target, seen - skipped, epoch, record)
            bar.epoch(record)
            if on_epoch is not None:
                on_epoch(record)
            fit.add(record)
    finally:
        bar.close()
        for module, training in modes.items():
            module.train(training)
        hyper.eval()
    if patience is not None:
        fit.restore_best()
    return fit.history


def measure_distances(
    solver: Solver,
    deq: DEQ,
    batches: Iterable[Any],
    steps: int,
    *,
    teacher: Teacher | None = None,
) -> list[Tensor]:
    """``||z_k - z*|| / ||z*||`` after k = 0 .. steps updates, a (steps + 1, B) a batch."""
    teacher = teacher or Teacher(deq)
    distances = []
    for batch in batches:
        target = teacher.target(batch)
        if len(target.goal):
            with torch.no_grad():
                distances.append(unroll(solver, deq, target, steps).distances)
    if not distances:
        raise ValueError(f"no sample has a reliable z* (residual of at most {RELIABLE:g})")
    return distances


class _Epoch(Protocol):
    def __iter__(self) -> Iterator[Any]: ...
    def __len__(self) -> int: ...


def _by_epoch(batches: Batches, seed: int) -> Callable[[int], _Epoch]:
    """A function of the epoch that returns what to iterate, with a length."""

    if callable(batches):
        return lambda epoch: _sized(batches(epoch))
    if not isinstance(batches, (list, tuple, Iterator)):
        return lambda epoch: _sized(batches)
    items = list(batches)

    def shuffled(epoch: int) -> list[Any]:
        generator = torch.Generator().manual_seed(seed + epoch)
        return [items[i] for i in torch.randperm(len(items), generator=generator).tolist()]

    return shuffled


def _sized(items: Iterable[Any]) -> _Epoch:
    """``items``, or a list of them where they have no length."""
    try:
        len(cast(_Epoch, items))
    except TypeError:  # from the __len__ of a DataLoader, too
        return list(items)
    return cast(_Epoch, items)


def _unreliable(skipped: int, seen: int, teacher: Teacher) -> ValueError:
    return ValueError(
        f"z* is unreliable for {skipped} of {seen} samples (residual above {RELIABLE:g} after "
        f"{teacher.max_steps} steps of {teacher.solver!r}, or zero"
        f"{_WITH_THEM if teacher.whole else ''}); a HyperSolver would learn noise. Train the DEQ "
        "longer or with a Jacobian regulariser first"
    )


def _fitted_on(deq: DEQ, target: Target, samples: int, epoch: int, record: FitEpoch) -> FittedOn:
    weights = deq.f.parameters() if isinstance(deq.f, torch.nn.Module) else ()
    return FittedOn(
        f=getattr(deq.f, "__name__", type(deq.f).__name__),
        parameters=sum(p.numel() for p in weights),
        state=tuple(tuple(shape) for shape in target.layout.shapes),
        samples=samples,
        epochs=epoch,
        steps=len(record.distances) - 1,
        distances=record.distances,
    )
