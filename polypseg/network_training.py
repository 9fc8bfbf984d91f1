"""Phases 1 and 2: training the network, explicit and then implicit; it reads top to bottom."""

from __future__ import annotations

import contextlib
import time
from typing import Any, cast

import numpy as np
import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from polypseg.alternating import alternating_solver
from polypseg.checkpoint import LAST, PREVIOUS, CheckpointError, load_into, load_latest, save_state
from polypseg.config import ConfigError, ImplicitConfig, PhaseConfig
from polypseg.data import batches
from polypseg.distributed import share_batch_statistics
from polypseg.memory import explain_lack_of_memory
from polypseg.models import (
    ImplicitModel,
    SegmentationModel,
    build_implicit_model,
    build_model,
    build_solver,
)
from polypseg.objective import Objective, Outcome
from polypseg.schedule import autocast, learning_rate, parameter_groups, rescale
from polypseg.starting import Start
from polypseg.training_run import PHASES, Run

# So many updates in a row without a finite gradient mean that the training is lost.
MAX_SKIPPED = 20


def train_explicit(run: Run, start: Start) -> None:
    """Phase 1: the model as an ordinary network, f evaluated once from z = 0."""
    torch.manual_seed(run.config.seed)
    model = build_model(run.config.model).to(run.device)
    begins = start.load(model, run.config.model)
    train_network(run, "explicit", model, run.config.explicit, begins)


def train_implicit(run: Run) -> None:
    """Phase 2: from the explicit weights, predict on the fixed point."""
    model = build_implicit_model(run.config.model).to(run.device)
    load_into(model, run.weights("explicit"), what=f"model {run.config.model.name}")
    train_network(run, "implicit", model, run.config.implicit)


def train_network(
    run: Run, phase: str, model: SegmentationModel, settings: PhaseConfig, begins: str = ""
) -> None:
    """Train all weights; an unfinished phase goes on after its last complete epoch.

    ``begins`` is what to log where the phase does begin.
    """
    with explain_lack_of_memory(run, phase):
        _train_network(run, phase, model, settings, begins)


def _train_network(
    run: Run, phase: str, model: SegmentationModel, settings: PhaseConfig, begins: str
) -> None:
    config, processes = run.config, run.processes
    implicit = settings if isinstance(settings, ImplicitConfig) else None
    objective: nn.Module = Objective(model, settings)
    if processes.world > 1:
        share_batch_statistics(model)
        objective = DistributedDataParallel(objective)
    # Gradients of fp16 underflow unless they are scaled; the others need no scale.
    scaler = torch.amp.GradScaler(run.device.type, enabled=settings.precision == "fp16")
    average = WeightAverage(model, settings.ema)
    averaged = cast(SegmentationModel, average.module)
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=settings.lr)
    dataset = run.training_data()
    parts = settings.accumulate
    batch_size = _batch_size(run, phase, settings, len(dataset))
    per_epoch = len(dataset) // batch_size
    total = settings.epochs * per_epoch

    parties: dict[str, Any] = {
        "model": model,
        "average": average,
        "optimizer": optimizer,
        "scaler": scaler,
    }
    first = _resume(run, phase, parties)
    if first == 0 and begins:
        run.log.info(begins)
    if processes.first:
        run.results.truncate_from(phase, first + 1)

    in_a_row = 0
    for epoch in range(first, settings.epochs):
        solves = implicit is not None and epoch >= implicit.warm_epochs
        if solves:
            learned = alternating_solver(run, cast(ImplicitModel, model), epoch)
            if learned is not None:
                implicit_model = cast(ImplicitModel, model)
                implicit_model.deq = implicit_model.deq.with_solver(learned)
        # Everything random in an epoch follows from these numbers, so that a resumed run repeats
        # it exactly. What is drawn from `common` is the same in all processes.
        seeds = (config.seed, PHASES.index(phase), epoch)
        torch.manual_seed(_seed(*seeds, 1 + processes.rank))
        common = torch.Generator().manual_seed(_seed(*seeds, 0))
        objective.train()
        started, losses, jacobians, skipped = time.perf_counter(), [], [], 0
        loader = iter(
            batches(
                dataset,
                batch_size,
                True,
                config.seed,
                epoch,
                workers=run.workers,
                drop_last=True,
                parts=parts,
                rank=processes.rank,
                world=processes.world,
            )
        )
        bar = tqdm(
            range(per_epoch),
            desc=f"{phase} {epoch + 1}/{settings.epochs}",
            dynamic_ncols=True,
            disable=not processes.first,
        )
        for index in bar:
            lr = learning_rate(settings, (epoch * per_epoch + index) / total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            scales = config.data.scales
            scale = scales[int(torch.randint(len(scales), (), generator=common))]
            chance = torch.rand((), generator=common).item()
            regularized = implicit is not None and solves and chance < implicit.jacobian_share
            early = early_step(implicit, common) if implicit is not None and solves else 0
            # A batch that ends in NaN must not leave it in the batch statistics.
            buffers = [buffer.clone() for buffer in model.buffers()]

            optimizer.zero_grad(set_to_none=True)
            outcomes: list[Outcome] = []
            for part in range(parts):
                images, masks = rescale(next(loader), scale, run.device)
                with _synchronised(objective, last=part == parts - 1):
                    with autocast(settings.precision, run.device):
                        outcome = objective(images, masks, solves, regularized, early)
                    scaler.scale(outcome.objective / parts).backward()
                outcomes.append(outcome)
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            if not torch.isfinite(norm):
                skipped += 1
                in_a_row += 1
                scaler.update()
                for buffer, before in zip(model.buffers(), buffers, strict=True):
                    buffer.copy_(before)
                if in_a_row >= MAX_SKIPPED:
                    raise FloatingPointError(
                        f"{in_a_row} updates in a row had no finite gradient (phase {phase}, epoch "
                        f"{epoch + 1}); lower {phase}.lr, or raise implicit.jacobian"
                    )
                continue
            in_a_row = 0
            scaler.step(optimizer)
            scaler.update()
            average.update_parameters(model)
            losses.append(sum(outcome.loss.item() for outcome in outcomes) / parts)
            jacobians += [o.jacobian.item() for o in outcomes if o.jacobian is not None]
            shown: dict[str, Any] = {}
            if outcome.solution is not None:
                residual = outcome.solution.residual.max()
                shown = {"calls": outcome.solution.calls, "residual": f"{residual:.1e}"}
            bar.set_postfix(loss=f"{losses[-1]:.3f}", **shown, refresh=False)

        if skipped:
            run.log.warning(
                "%s epoch %d: %d of %d updates skipped, because their gradient was not finite",
                *(phase, epoch + 1, skipped, per_epoch),
            )
        if processes.first:
            row: dict[str, Any] = {
                "phase": phase,
                "epoch": epoch + 1,
                "lr": lr,
                "loss": sum(losses) / len(losses) if losses else float("nan"),
                "skipped": skipped,
            }
            if jacobians:
                row["jacobian"] = sum(jacobians) / len(jacobians)
            row.update(_validate(run, averaged, solves))
            row["seconds"] = time.perf_counter() - started
            # Before the checkpoint: a row without one is dropped on resuming, a lost row stays
            # lost.
            run.report(row)
            state = {name: party.state_dict() for name, party in parties.items()}
            place = {"phase": phase, "epoch": epoch + 1}
            save_state(run.folder / LAST, {**place, **state}, keep_previous=True)
        processes.wait()
    if processes.first:
        run.save(phase, averaged)
    processes.wait()


class WeightAverage(AveragedModel):
    """The running average of a model's weights and buffers, with a warm-up.

    The first update is copied. A later one decays what was averaged before it by ``ema``, but by no
    more than (1 + n) / (10 + n) after n updates, so that a short training does not end near its
    start.
    """

    def __init__(self, model: nn.Module, ema: float):
        super().__init__(model, use_buffers=True)
        self.ema = ema

    def update_parameters(self, model: nn.Module) -> None:
        # The count is on the CPU, whatever the device, and part of the state: a resumed training
        # goes on with the same decay.
        n = int(self.n_averaged)
        self.multi_avg_fn = get_ema_multi_avg_fn(min(self.ema, (1 + n) / (10 + n)))
        super().update_parameters(model)


def early_step(settings: ImplicitConfig, generator: torch.Generator) -> int:
    """The iterate that an update scores beside the fixed point, drawn anew for each; 0: none."""
    if settings.correction == 0:
        return 0
    return int(torch.randint(1, settings.correction_steps + 1, (), generator=generator))


def _seed(*numbers: int) -> int:
    return int(np.random.SeedSequence(numbers).generate_state(1, np.uint64)[0] >> 1)


def _synchronised(objective: nn.Module, last: bool) -> contextlib.AbstractContextManager[None]:
    """Let processes add up their gradients with the last part of an update only."""
    if isinstance(objective, DistributedDataParallel) and not last:
        return objective.no_sync()
    return contextlib.nullcontext()


def _batch_size(run: Run, phase: str, settings: PhaseConfig, images: int) -> int:
    """Images of an update: as configured, or all where there are fewer, shared evenly."""
    share = settings.accumulate * run.processes.world
    if settings.batch % share:
        raise ConfigError(
            f"{phase}.batch must be a multiple of {phase}.accumulate x processes "
            f"({settings.accumulate} x {run.processes.world}), got {settings.batch}"
        )
    size = min(settings.batch, images - images % share)
    if size == 0:
        raise ConfigError(
            f"{images} training images are too few for {settings.accumulate} parts x "
            f"{run.processes.world} processes; lower {phase}.accumulate"
        )
    return size


def _resume(run: Run, phase: str, parties: dict[str, Any]) -> int:
    """Set everything to the last checkpoint of this phase; the number of epochs that are over."""
    # A kill between the two renames of a checkpoint leaves the previous one alone.
    if not any((run.folder / name).exists() for name in (LAST, PREVIOUS)):
        return 0
    state = load_latest(run.folder)
    if state.get("phase") != phase:
        return 0
    try:
        for name, party in parties.items():
            party.load_state_dict(state[name])
    except (KeyError, RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{run.folder / LAST}: this checkpoint does not fit the {run.config.model.name} of "
            "this run; it may come from another run or an older version. Move last.pt and "
            f"previous.pt away to start the {phase} phase again"
        ) from error
    run.log.info("%s: resuming after epoch %d", phase, state["epoch"])
    return int(state["epoch"])


def _validate(run: Run, model: SegmentationModel, solves: bool) -> dict[str, float]:
    model.eval()
    scores = run.validation.measure(model.explicit, run.device)
    if solves and isinstance(model, ImplicitModel):
        one_step = scores["dice"]
        solve = run.config.solve
        training = model.deq
        anderson = build_solver("anderson", solve.anderson_memory)
        model.deq = training.with_solver(anderson, tol=solve.tol, max_steps=solve.max_steps)
        scores = run.validation.measure(model, run.device)
        scores["dice_one_step"] = one_step
        scores["spectral_radius"] = run.validation.spectral_radius(model, run.device)
        model.deq = training
    return {f"val_{key}": value for key, value in scores.items()}
