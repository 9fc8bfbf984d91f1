"""Phase 3: fitting a HyperSolver to the trained network."""

from __future__ import annotations

import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from deqsolvers import FitEpoch, fit_hypersolver
from deqsolvers.hypersolver.saving import hypersolver_metadata
from polypseg.checkpoint import load_into
from polypseg.data import PolypDataset, batches
from polypseg.inference import hyper_options
from polypseg.models import ImplicitModel, build_hypersolver, build_implicit_model
from polypseg.training_run import Run

VALIDATION_IMAGES = 32  # whose distances to z* are measured after every epoch


def fit_hyper(run: Run) -> None:
    """Phase 3: a HyperSolver for the trained model, which stays as it is.

    An unfinished fit goes on after its last complete epoch.
    """
    settings = run.config.hyper
    torch.manual_seed(run.config.seed)
    model = build_implicit_model(run.config.model).to(run.device)
    load_into(model, run.weights("implicit"), what=f"model {run.config.model.name}")
    model.eval()
    hyper = build_hypersolver(model, settings).to(run.device)
    if settings.alternate and alternating_weights(run).exists():
        load_into(hyper, alternating_weights(run), what="HyperSolver")
    training = TrainingFeatures(run, model)
    samples = training.length * training.batch
    bar = tqdm(total=settings.epochs * len(training(0)), desc="hyper", dynamic_ncols=True)
    started = time.perf_counter()

    def on_batch(update: int, loss: float) -> None:
        bar.update(update - bar.n)
        bar.set_postfix(loss=f"{loss:.4f}", refresh=False)

    def on_epoch(fitted: FitEpoch) -> None:
        nonlocal started
        hyper.eval()
        fast = model.deq.with_solver(hyper, **hyper_options(run.config.solve))
        model.deq, slow = fast, model.deq
        scores = run.validation.measure(model, run.device)
        model.deq = slow
        hyper.train()
        seconds, started = time.perf_counter() - started, time.perf_counter()
        skipped = round(fitted.skipped * samples)
        if skipped:
            run.log.warning(
                "hyper epoch %d: %d of %d images skipped, because their z* is unreliable",
                *(fitted.epoch, skipped, samples),
            )
        run.results.truncate_from("hyper", fitted.epoch)
        run.report(
            {
                "phase": "hyper",
                "epoch": fitted.epoch,
                "seconds": seconds,
                "loss": fitted.loss,
                "skipped": skipped,
                **{
                    f"val_{key}": value
                    for key, value in scores.items()
                    if key.startswith(("dice", "iou", "evaluations"))
                },
                "distance_start": fitted.distances[0],
                "distance_end": fitted.distances[-1],
            }
        )

    unfinished = run.folder / "hyper.pt"
    fit_hypersolver(
        hyper,
        model.deq,
        training,
        epochs=settings.epochs,
        validation=validation_features(run, model),
        resume=unfinished,
        on_batch=on_batch,
        on_epoch=on_epoch,
        **fit_options(run),
    )
    bar.close()
    run.save("hyper", hyper, hypersolver_metadata(hyper))
    unfinished.unlink(missing_ok=True)


def alternating_weights(run: Run) -> Path:
    """Where the alternating strategy leaves its HyperSolver, which phase 3 then starts from."""
    return run.folder / "alternating.safetensors"


def fit_options(run: Run) -> dict[str, Any]:
    """What every fit of a run shares."""
    settings = run.config.hyper
    return {
        "steps": settings.steps,
        "lr": settings.lr,
        "final_lr": settings.final_lr,
        "mode": settings.mode,
        "teacher_tol": settings.tol,
        "teacher_steps": settings.max_steps,
        "seed": run.config.seed,
    }


class TrainingFeatures:
    """What f takes beside z, for the training images: called with an epoch, iterated once.

    Args:
        limit: most batches an epoch; None for all images.
    """

    def __init__(self, run: Run, model: ImplicitModel, limit: int | None = None):
        config = run.config
        self.model, self.device, self.seed = model, run.device, config.seed
        self.dataset = run.training_data()
        self.batch = min(config.hyper.batch, len(self.dataset))
        self.length = min(len(self.dataset) // self.batch, limit or len(self.dataset))

    def __call__(self, epoch: int) -> _Epoch:
        return _Epoch(self, epoch)


class _Epoch:
    """The training images of one epoch, augmented as that epoch's number says."""

    def __init__(self, features: TrainingFeatures, epoch: int):
        self.features, self.epoch = features, epoch

    def __len__(self) -> int:
        return self.features.length

    def __iter__(self) -> Iterator[Tensor]:
        all_of = self.features
        loader = batches(
            all_of.dataset, all_of.batch, True, all_of.seed, self.epoch, drop_last=True
        )
        for batch, _ in zip(loader, range(all_of.length), strict=False):
            with torch.no_grad():
                yield all_of.model.features(batch["image"].to(all_of.device))


def validation_features(run: Run, model: ImplicitModel) -> list[Tensor]:
    """What f takes beside z, for some validation images from all over the list."""
    pairs = run.split.val[:: max(1, len(run.split.val) // VALIDATION_IMAGES)]
    dataset = PolypDataset(
        pairs, run.config.data.size, train=False, seed=0, classes=run.config.model.classes
    )
    with torch.no_grad():
        return [
            model.features(batch["image"].to(run.device))
            for batch in batches(dataset, run.config.hyper.batch, False, 0, 0)
        ]
