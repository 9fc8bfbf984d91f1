"""Training in three phases: explicit, implicit, HyperSolver; it reads top to bottom."""

from __future__ import annotations

import argparse
import json
import logging
import math
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn
from tqdm import tqdm

from deqsolvers import Backward, FitEpoch, Phantom, fit_hypersolver, jacobian_regularizer
from deqsolvers.backward import get_backward
from polypseg.checkpoint import (
    LAST,
    load_into,
    load_latest,
    save_state,
    save_weights,
    write_atomic,
)
from polypseg.config import (
    Config,
    ConfigError,
    ImplicitConfig,
    PhaseConfig,
    load_config,
    make_config,
)
from polypseg.data import (
    DataError,
    Pair,
    PolypDataset,
    Split,
    audit_pairs,
    batches,
    make_synthetic,
    split_for,
)
from polypseg.losses import structure_loss
from polypseg.models import (
    PolypDEQ,
    build_hypersolver,
    build_model,
    build_solver,
    load_encoder_weights,
)
from polypseg.models.polypdeq import STRIDE
from polypseg.runs import ResultsCsv, plot_curves, setup_log, versions
from polypseg.validation import Validation

PHASES = ("explicit", "implicit", "hyper")
FIELDS = [
    "phase",
    "epoch",
    "seconds",
    "lr",
    "loss",
    "jacobian",
    "skipped",
    "val_dice",
    "val_iou",
    "val_dice_one_step",
    "val_residual",
    "val_converged",
    "val_evaluations",
    "distance_start",
    "distance_end",
]
# So many updates in a row without a finite gradient mean that the training is lost.
MAX_SKIPPED = 20


@dataclass
class Run:
    """What the phases share."""

    folder: Path
    config: Config
    split: Split
    validation: Validation
    device: torch.device
    results: ResultsCsv
    log: logging.Logger

    def weights(self, phase: str) -> Path:
        return self.folder / f"{phase}.safetensors"

    def report(self, row: dict[str, Any]) -> None:
        """Add an epoch to results.csv, the log and the curves."""
        self.results.append(row)
        numbers = ", ".join(
            f"{key} {value:.4g}" for key, value in row.items() if isinstance(value, float)
        )
        self.log.info("%s epoch %d: %s", row["phase"], row["epoch"], numbers)
        plot_curves(self.results.path, self.folder / "curves.png")


def train_explicit(run: Run, encoder_weights: Path | None) -> None:
    """Phase 1: the model as an ordinary network, f evaluated once from z = 0."""
    torch.manual_seed(run.config.seed)
    model = build_model(run.config.model).to(run.device)
    if encoder_weights is not None:
        load_encoder_weights(model.encoder, encoder_weights)
        run.log.info("encoder weights from %s", encoder_weights)
    else:
        run.log.info("the encoder starts from random weights (no --encoder-weights)")
    train_network(run, "explicit", model, run.config.explicit)


def train_implicit(run: Run) -> None:
    """Phase 2: from the explicit weights, predict on the fixed point."""
    model = build_model(run.config.model).to(run.device)
    load_into(model, run.weights("explicit"), what=f"model {run.config.model.name}")
    train_network(run, "implicit", model, run.config.implicit)


def train_network(run: Run, phase: str, model: PolypDEQ, settings: PhaseConfig) -> None:
    """Train all weights; an unfinished phase goes on after its last complete epoch."""
    implicit = settings if isinstance(settings, ImplicitConfig) else None
    if implicit is not None:
        solving = {"tol": implicit.tol, "max_steps": implicit.max_steps}
        solver = build_solver(implicit.solver, implicit.memory)
        model.deq = model.deq.with_solver(solver, backward=_backward(implicit), **solving)
    average = AveragedModel(
        model, multi_avg_fn=get_ema_multi_avg_fn(settings.ema), use_buffers=True
    )
    optimizer = torch.optim.AdamW(_groups(model, settings.weight_decay), lr=settings.lr)
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
        run.log.info("%s: resuming after epoch %d of %d", phase, first, settings.epochs)
    run.results.truncate_from(phase, first + 1)

    in_a_row = 0
    for epoch in range(first, settings.epochs):
        # Everything random in an epoch follows from these numbers, so a resumed run repeats it
        # exactly.
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
            lr = _learning_rate(settings, (epoch * per_epoch + index) / total)
            for group in optimizer.param_groups:
                group["lr"] = lr
            images, masks = _rescale(batch, run.config.data.scales, run.device)

            if not solves:
                loss = objective = structure_loss(model.explicit(images).logits, masks)
            else:
                assert implicit is not None
                e = model.features(images)
                z, solution = model.deq(e)
                loss = objective = structure_loss(model.read_out(z), masks)
                if torch.rand(()).item() < implicit.jacobian_share:
                    # Fused attention has no second derivative on the CPU.
                    with sdpa_kernel(SDPBackend.MATH):
                        jacobian = jacobian_regularizer(model.deq.f, solution.z, (e,))
                    objective = loss + implicit.jacobian * jacobian
                    jacobians.append(jacobian.item())
                bar.set_postfix(calls=solution.calls, residual=f"{solution.residual.max():.1e}")

            optimizer.zero_grad(set_to_none=True)
            objective.backward()
            norm = nn.utils.clip_grad_norm_(model.parameters(), settings.clip)
            if not torch.isfinite(norm):
                skipped += 1
                in_a_row += 1
                if in_a_row >= MAX_SKIPPED:
                    raise FloatingPointError(
                        f"{in_a_row} updates in a row had no finite gradient (phase {phase}, epoch "
                        f"{epoch + 1}); lower {phase}.lr, or raise implicit.jacobian"
                    )
                continue
            in_a_row = 0
            optimizer.step()
            average.update_parameters(model)
            losses.append(loss.item())
            bar.set_postfix(loss=f"{losses[-1]:.3f}", refresh=False)

        averaged = cast(PolypDEQ, average.module)
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
        save_state(
            run.folder / LAST,
            {
                "phase": phase,
                "epoch": epoch + 1,
                "model": model.state_dict(),
                "average": average.state_dict(),
                "optimizer": optimizer.state_dict(),
            },
            keep_previous=True,
        )
        run.report(row)
    _save(run, phase, average.module)


def fit_hyper(run: Run) -> None:
    """Phase 3: a HyperSolver for the trained model, which stays as it is."""
    settings = run.config.hyper
    torch.manual_seed(run.config.seed)
    model = build_model(run.config.model).to(run.device)
    load_into(model, run.weights("implicit"), what=f"model {run.config.model.name}")
    model.eval()
    hyper = build_hypersolver(model, settings).to(run.device)
    run.results.truncate_from("hyper", 1)
    dataset = PolypDataset(run.split.train, run.config.data.size, train=True, seed=run.config.seed)
    features = FeatureBatches(model, dataset, settings.batch, run.config.seed, run.device)
    bar = tqdm(total=settings.epochs * len(features), desc="hyper", dynamic_ncols=True)
    started = time.perf_counter()

    def on_batch(update: int, loss: float) -> None:
        bar.update()
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def on_epoch(fitted: FitEpoch) -> None:
        hyper.eval()
        fast = model.deq.with_solver(
            hyper, tol=None, max_steps=run.config.solve.hyper_steps, final="last"
        )
        model.deq, slow = fast, model.deq
        scores = run.validation.measure(model, run.device)
        model.deq = slow
        hyper.train()
        run.report(
            {
                "phase": "hyper",
                "epoch": fitted.epoch,
                "seconds": time.perf_counter() - started,
                "loss": fitted.loss,
                "skipped": fitted.skipped,
                "val_dice": scores["dice"],
                "val_iou": scores["iou"],
                "val_evaluations": scores["evaluations"],
                "distance_start": fitted.distances[0],
                "distance_end": fitted.distances[-1],
            }
        )

    fit_hypersolver(
        hyper,
        model.deq,
        features,
        epochs=settings.epochs,
        steps=settings.steps,
        lr=settings.lr,
        final_lr=settings.final_lr,
        teacher_tol=settings.tol,
        teacher_steps=settings.max_steps,
        on_batch=on_batch,
        on_epoch=on_epoch,
    )
    bar.close()
    _save(run, "hyper", hyper)


class FeatureBatches:
    """What f takes beside z, for the training images; every pass is augmented anew."""

    def __init__(
        self, model: PolypDEQ, dataset: PolypDataset, batch: int, seed: int, device: torch.device
    ):
        self.model, self.dataset, self.seed, self.device = model, dataset, seed, device
        self.batch = min(batch, len(dataset))
        self.epoch = 0

    def __len__(self) -> int:
        return len(self.dataset) // self.batch

    def __iter__(self) -> Iterator[Tensor]:
        loader = batches(self.dataset, self.batch, True, self.seed, self.epoch, drop_last=True)
        self.epoch += 1
        for batch in loader:
            with torch.no_grad():
                yield self.model.features(batch["image"].to(self.device))


def _backward(settings: ImplicitConfig) -> Backward:
    if settings.backward == "phantom":
        return Phantom(settings.backward_steps, damping=1.0)
    return get_backward(settings.backward)


def _groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights with decay; biases and normalisation, which it would only distort, without."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def _learning_rate(settings: PhaseConfig, done: float) -> float:
    """Linear warm-up, then cosine decay; ``done`` is the share of the updates that are over."""
    if done < settings.warmup:
        return settings.lr * max(done, 1e-3) / settings.warmup
    left = (done - settings.warmup) / max(1e-9, 1 - settings.warmup)
    swing = (1 + math.cos(math.pi * min(1.0, left))) / 2
    return settings.final_lr + (settings.lr - settings.final_lr) * swing


def _rescale(
    batch: dict[str, Any], scales: tuple[float, ...], device: torch.device
) -> tuple[Tensor, Tensor]:
    """Images and masks of a batch at one of the scales, sides rounded to what the model takes."""
    images, masks = batch["image"].to(device), batch["mask"].to(device)
    scale = scales[int(torch.randint(len(scales), ()))]
    side = max(STRIDE, round(images.shape[-1] * scale / STRIDE) * STRIDE)
    if side == images.shape[-1]:
        return images, masks
    images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return images, F.interpolate(masks, size=(side, side), mode="nearest-exact")


def _validate(run: Run, model: PolypDEQ, solves: bool) -> dict[str, float]:
    model.eval()
    scores = run.validation.measure(model.explicit, run.device)
    if not solves:
        return {"val_dice": scores["dice"], "val_iou": scores["iou"]}
    one_step = scores["dice"]
    solve = run.config.solve
    training, model.deq = (
        model.deq,
        model.deq.with_solver(
            build_solver("anderson", 5), tol=solve.tol, max_steps=solve.max_steps
        ),
    )
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


def _save(run: Run, phase: str, module: nn.Module) -> None:
    metadata = {"phase": phase, "config": run.config.to_yaml(), "versions": json.dumps(versions())}
    save_weights(run.weights(phase), module.state_dict(), metadata)
    run.log.info("%s: finished, weights in %s", phase, run.weights(phase))


def main(argv: list[str] | None = None) -> int:
    """`polypseg-train`: train what is not yet trained, evaluate, and write the report."""
    arguments = _parser().parse_intermixed_args(argv)
    folder: Path = arguments.run
    config = _config(arguments)
    data = _data(arguments)
    split = split_for(data, config.seed)
    _refuse_bad_files([*split.train, *split.val])
    if arguments.encoder_weights is not None:
        # A wrong file is an error before anything is written.
        load_encoder_weights(build_model(config.model).encoder, arguments.encoder_weights)

    folder.mkdir(parents=True, exist_ok=True)
    log = setup_log(folder / "train.log")
    write_atomic(folder / "config.yaml", config.to_yaml().encode())
    write_atomic(folder / "versions.json", json.dumps(versions(), indent=2).encode())
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    log.info(
        "%d training and %d validation images of %s (%s); device %s, %d threads",
        *(len(split.train), len(split.val), data, split.rule, device, torch.get_num_threads()),
    )
    run = Run(
        folder,
        config,
        split,
        Validation(split.val, config.data.size, config.hyper.batch),
        device,
        ResultsCsv(folder / "results.csv", FIELDS),
        log,
    )
    for phase in arguments.phases:
        if run.weights(phase).exists():
            log.info("%s: already trained", phase)
        elif phase == "explicit":
            train_explicit(run, arguments.encoder_weights)
        elif phase == "implicit":
            train_implicit(run)
        else:
            fit_hyper(run)
    return 0


def _config(arguments: argparse.Namespace) -> Config:
    """The run's own configuration if it has one, else that of the arguments."""
    stored = arguments.run / "config.yaml"
    if arguments.config is not None:
        config = load_config(arguments.config, arguments.set)
    elif arguments.demo:
        config = load_config(Path(__file__).with_name("demo.yaml"), arguments.set)
    elif stored.exists():
        config = load_config(stored, arguments.set)
    else:
        config = make_config({}, arguments.set)
    if stored.exists() and load_config(stored) != config:
        raise ConfigError(
            f"{arguments.run}: this run was started with other settings ({stored}); give the same "
            "ones to resume it, or another run directory"
        )
    return config


def _data(arguments: argparse.Namespace) -> Path:
    if arguments.data is not None:
        return Path(arguments.data)
    if not arguments.demo:
        raise ConfigError("--data DIR is needed (or --demo, which draws synthetic images)")
    data = Path(arguments.run) / "data"
    if not data.exists():
        make_synthetic(data, train=160, test=24, size=128, seed=0)
    return data


def _refuse_bad_files(pairs: list[Pair]) -> None:
    faults = [fault for fault in audit_pairs(pairs) if fault.severity == "error"]
    if faults:
        raise DataError(faults)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polypseg-train",
        description="Train a polyp-segmentation DEQ: explicit, then implicit, then its "
        "HyperSolver. Repeating the command resumes an unfinished run.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, made if needed")
    parser.add_argument("set", nargs="*", metavar="KEY=VALUE", help="settings, e.g. data.size=192")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="holds TrainDataset/ or images/ and masks/"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file of settings that differ from the defaults",
    )
    parser.add_argument(
        "--encoder-weights",
        type=Path,
        metavar="FILE",
        help="SegFormer encoder, .safetensors or .pth",
    )
    parser.add_argument(
        "--phases",
        type=_phases,
        default=PHASES,
        help="comma-separated; default: explicit,implicit,hyper",
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help="small quick settings and, without --data, synthetic images",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    return parser


def _phases(text: str) -> tuple[str, ...]:
    wanted = text.split(",")
    unknown = [phase for phase in wanted if phase not in PHASES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown phase {', '.join(unknown)}; choose from {', '.join(PHASES)}"
        )
    return tuple(phase for phase in PHASES if phase in wanted)
