"""Phase 3: fitting a HyperSolver to the trained network."""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch
from torch import Tensor
from tqdm import tqdm

from deqsolvers import FitEpoch, fit_hypersolver
from polypseg.checkpoint import load_into
from polypseg.data import PolypDataset, batches
from polypseg.models import PolypDEQ, build_hypersolver, build_model
from polypseg.training_run import Run


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
        nonlocal started
        hyper.eval()
        fast = model.deq.with_solver(
            hyper, tol=None, max_steps=run.config.solve.hyper_steps, final="last"
        )
        model.deq, slow = fast, model.deq
        scores = run.validation.measure(model, run.device)
        model.deq = slow
        hyper.train()
        seconds, started = time.perf_counter() - started, time.perf_counter()
        run.report(
            {
                "phase": "hyper",
                "epoch": fitted.epoch,
                "seconds": seconds,
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
    run.save("hyper", hyper)


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
