"""Phases 1 and 2: training the network, explicit and then implicit; it reads top to bottom."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any, cast

import torch
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from deqsolvers import Backward, Phantom, jacobian_regularizer
from deqsolvers.backward import get_backward
from polypseg.alternating import alternating_solver
from polypseg.checkpoint import LAST, load_into, load_latest, save_state
from polypseg.config import ImplicitConfig, PhaseConfig
from polypseg.data import PolypDataset, batches
from polypseg.losses import segmentation_loss
from polypseg.models import (
    ImplicitModel,
    SegmentationModel,
    build_implicit_model,
    build_model,
    build_solver,
    load_pretrained,
)
from polypseg.schedule import autocast, learning_rate, parameter_groups, rescale
from polypseg.training_run import PHASES, Run

# So many updates in a row without a finite gradient mean that the training is lost.
MAX_SKIPPED = 20


def train_explicit(run: Run, encoder_weights: Path | None) -> None:
    """Phase 1: the model as an ordinary network, f evaluated once from z = 0."""
    torch.manual_seed(run.config.seed)
    model = build_model(run.config.model).to(run.device)
    if encoder_weights is not None:
        load_pretrained(model, encoder_weights)
        run.log.info("encoder weights from %s", encoder_weights)
    else:
        run.log.info("the encoder starts from random weights (no --encoder-weights)")
    train_network(run, "explicit", model, run.config.explicit)


def train_implicit(run: Run) -> None:
    """Phase 2: from the explicit weights, predict on the fixed point."""
    model = build_implicit_model(run.config.model).to(run.device)
    load_into(model, run.weights("explicit"), what=f"model {run.config.model.name}")
    train_network(run, "implicit", model, run.config.implicit)


def train_network(run: Run, phase: str, model: SegmentationModel, settings: PhaseConfig) -> None:
    """Train all weights; an unfinished phase goes on after its last complete epoch."""
    implicit = settings if isinstance(settings, ImplicitConfig) else None
    if implicit is not None:
        assert isinstance(model, ImplicitModel)
        solving = {"tol": implicit.tol, "max_steps": implicit.max_steps}
        solver = build_solver(implicit.solver, implicit.memory)
        model.deq = model.deq.with_solver(solver, backward=_backward(implicit), **solving)
    # Gradients of fp16 underflow unless they are scaled; the others need no scale.
    scaler = torch.amp.GradScaler(run.device.type, enabled=settings.precision == "fp16")
    average = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True
    )
    optimizer = torch.optim.AdamW(parameter_groups(model, settings.weight_decay), lr=settings.lr)
    dataset = PolypDataset(run.split.train, run.config.data.size, train=True, seed=run.config.seed)
    drop_last = len(dataset) > settings.batch
    per_epoch = len(dataset) // settings.batch if drop_last else 1
    total = settings.epochs * per_epoch

    first = 0
    state = _saved_state(run, phase)
    if state is not None:
        first = state["epoch"]
        model.load_state_dict(state["model"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
        scaler.load_state_dict(state["scaler"])
        run.log.info("%s: resuming after epoch %d of %d", phase, first, settings.epochs)
    run.results.truncate_from(phase, first + 1)

    in_a_row = 0
    for epoch in range(first, settings.epochs):
        # Everything random in an epoch follows from these numbers, so a resumed run repeats it
        # exactly.
        if implicit is not None and epoch >= implicit.warm_epochs:
            assert isinstance(model, ImplicitModel)
            learned = alternating_solver(run, model, epoch)
            if learned is not None:
                model.deq = model.deq.with_solver(learned)
        torch.manual_seed(hash((run.config.seed, PHASES.index(phase), epoch)) % 2**63)
        solves = implicit is not None and epoch >= implicit.warm_epochs
        model.train()
        started, losses, jacobians, skipped = time.perf_counter(), [], [], 0
        workers = run.config.data.workers
        loader = batches(
            dataset,
            settings.batch,
            True,
            run.config.seed,
            epoch,
            workers=workers,
            drop_last=drop_last,
        )
        bar = tqdm(loader, desc=f"{phase} {epoch + 1}/{settings.epochs}", dynamic_ncols=True)
        for index, batch in enumerate(bar):
            lr = learning_rate(settings, (epoch * per_epoch + index) / total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            images, masks = rescale(batch, run.config.data.scales, run.device)
            shown: dict[str, Any] = {}

            optimizer.zero_grad(set_to_none=True)
            with autocast(settings.precision, run.device):
                if not solves:
                    loss = objective = segmentation_loss(model.explicit(images).logits, masks)
                else:
                    assert implicit is not None
                    assert isinstance(model, ImplicitModel)
                    e = model.features(images)
                    z, solution = model.deq(e)
                    loss = objective = segmentation_loss(model.read_out(z), masks)
                    if torch.rand(()).item() < implicit.jacobian_share:
                        # Fused attention has no second derivative on the CPU.
                        with sdpa_kernel(SDPBackend.MATH):
                            jacobian = jacobian_regularizer(model.deq.f, solution.z, (e,))
                        objective = loss + implicit.jacobian * jacobian
                        jacobians.append(jacobian.item())
                    shown = {"calls": solution.calls, "residual": f"{solution.residual.max():.1e}"}
            scaler.scale(objective).backward()
            scaler.unscale_(optimizer)
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            if not torch.isfinite(norm):
                skipped += 1
                in_a_row += 1
                scaler.update()
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
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", **shown, refresh=False)

        averaged = cast(SegmentationModel, average.module)
        row: dict[str, Any] = {
            "phase": phase,
            "epoch": epoch + 1,
            "lr": lr,
            "loss": sum(losses) / max(1, len(losses)),
            "skipped": skipped,
        }
        if jacobians:
            row["jacobian"] = sum(jacobians) / len(jacobians)
        row.update(_validate(run, averaged, solves))
        row["seconds"] = time.perf_counter() - started
        # Before the checkpoint: a row without one is dropped on resuming, a lost row stays lost.
        run.report(row)
        save_state(
            run.folder / LAST,
            {
                "phase": phase,
                "epoch": epoch + 1,
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
                "scaler": scaler.state_dict(),
            },
            keep_previous=True,
        )
    run.save(phase, average.module)


def _backward(settings: ImplicitConfig) -> Backward:
    if settings.backward == "phantom":
        return Phantom(settings.backward_steps, damping=1.0)
    return get_backward(settings.backward)


def _validate(run: Run, model: SegmentationModel, solves: bool) -> dict[str, float]:
    model.eval()
    scores = run.validation.measure(model.explicit, run.device)
    if not solves or not isinstance(model, ImplicitModel):
        return {"val_dice": scores["dice"], "val_iou": scores["iou"]}
    one_step = scores["dice"]
    solve = run.config.solve
    training = model.deq
    anderson = build_solver("anderson", solve.anderson_memory)
    model.deq = training.with_solver(anderson, tol=solve.tol, max_steps=solve.max_steps)
    scores = run.validation.measure(model, run.device)
    model.deq = training
    return {
        "val_dice": scores["dice"],
        "val_iou": scores["iou"],
        "val_dice_one_step": one_step,
        "val_residual": scores["residual"],
        "val_converged": scores["converged"],
        "val_evaluations": scores["evaluations"],
    }


def _saved_state(run: Run, phase: str) -> dict[str, Any] | None:
    if not (run.folder / LAST).exists():
        return None
    state = load_latest(run.folder)
    return state if state["phase"] == phase else None
