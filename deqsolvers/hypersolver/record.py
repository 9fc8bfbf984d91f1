"""What a fit has reached, and the file from which it goes on."""

from __future__ import annotations

import copy
import pickle
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from deqsolvers.hypersolver.losses import convergence
from deqsolvers.hypersolver.saving import check_fit
from deqsolvers.hypersolver.targets import write_whole
from deqsolvers.solvers.hyper import FittedOn, HyperSolver


@dataclass(frozen=True)
class FitEpoch:
    """One epoch of `fit_hypersolver`.

    Attributes:
        epoch: counted from 1.
        loss: mean weighted training loss.
        distances: mean ``||z_k - z*|| / ||z*||`` after k = 0 .. steps updates, on the validation
            batches if there are any, else on the training batches of this epoch.
        worst: the largest of any sample instead of the mean.
        skipped: share of training samples without a reliable z*.
    """

    epoch: int
    loss: float
    distances: tuple[float, ...]
    worst: tuple[float, ...]
    skipped: float


class FitState:
    """What a fit has reached: its history, its best weights, and the file that it resumes from."""

    def __init__(self, hyper: HyperSolver, optimizer: torch.optim.Optimizer, file: Path | None):
        self.hyper, self.optimizer, self.file = hyper, optimizer, file
        self.history: list[FitEpoch] = []
        self.updates = 0  # batches so far
        self.best: dict[str, Tensor] = {}
        self.settings: dict[str, Any] = {}

    def load(self, settings: dict[str, Any]) -> None:
        self.settings = settings
        if self.file is None or not self.file.exists():
            return
        try:
            state = torch.load(self.file, map_location="cpu", weights_only=True)
        except (RuntimeError, EOFError, pickle.UnpicklingError) as error:
            raise ValueError(
                f"resume: {self.file} is damaged or no file of a fit; delete it to start again"
            ) from error
        stored = state["settings"]
        other = [key for key in settings if stored.get(key) != settings[key]]
        if other:
            raise ValueError(
                f"resume: {self.file} holds another fit: "
                + "; ".join(f"{key} was {stored.get(key)}, now {settings[key]}" for key in other)
                + ". Repeat the first call's arguments, or give another file"
            )
        try:
            check_fit(self.hyper, state["hyper"])
        except ValueError as error:
            raise ValueError(f"resume: {self.file} is of another HyperSolver: {error}") from None
        self.hyper.load_state_dict(state["hyper"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.best = state["best"]
        # Files of before hold fits of equal epochs.
        self.updates = state.get("updates", len(state["history"]) * settings["per_epoch"])
        fitted = state["fitted_on"]
        self.hyper.fitted_on = None if fitted is None else FittedOn.from_record(fitted)
        for record in state["history"]:
            lists = {key: tuple(record[key]) for key in ("distances", "worst")}
            self.history.append(FitEpoch(**{**record, **lists}))

    def add(self, record: FitEpoch) -> None:
        self.history.append(record)
        if self.epochs_since_best() == 0:
            self.best = copy.deepcopy(self.hyper.state_dict())
        if self.file is not None:
            state = {
                "settings": self.settings,
                "hyper": self.hyper.state_dict(),
                "optimizer": self.optimizer.state_dict(),
                "best": self.best,
                "fitted_on": self.hyper.fitted_on and asdict(self.hyper.fitted_on),
                "updates": self.updates,
                "history": [asdict(each) for each in self.history],
            }
            self.file.parent.mkdir(parents=True, exist_ok=True)
            write_whole(self.file, state)

    def epochs_since_best(self) -> int:
        scores = [float(convergence(torch.tensor(each.distances))) for each in self.history]
        return len(scores) - 1 - scores.index(min(scores)) if scores else 0

    def restore_best(self) -> None:
        self.hyper.load_state_dict(self.best)
        best = self.history[-1 - self.epochs_since_best()]
        assert self.hyper.fitted_on is not None
        self.hyper.fitted_on = replace(
            self.hyper.fitted_on, epochs=best.epoch, distances=best.distances
        )
