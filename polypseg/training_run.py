"""What the phases of one training share."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polypseg.checkpoint import save_weights
from polypseg.config import Config
from polypseg.data import PolypDataset, Split
from polypseg.distributed import Processes
from polypseg.runs import ResultsCsv, plot_curves, versions
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
    "val_spectral_radius",
    "distance_start",
    "distance_end",
]
CLASS_FIELDS = ["val_dice_neoplastic", "val_dice_non_neoplastic", "val_dice_polyp"]


def fields(config: Config) -> list[str]:
    """The columns of results.csv."""
    return FIELDS + (CLASS_FIELDS if config.model.classes > 1 else [])


def summary_writer() -> Any:
    """The class that writes for TensorBoard.

    Raises:
        ValueError: the package is not installed.
    """
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ModuleNotFoundError as error:
        raise ValueError("--tensorboard needs a package: pip install tensorboard") from error
    return SummaryWriter


@dataclass
class Run:
    """What the phases share.

    Of several processes the first one alone reports and saves.
    """

    folder: Path
    config: Config
    split: Split
    validation: Validation
    device: torch.device
    results: ResultsCsv
    log: logging.Logger
    processes: Processes = field(default_factory=Processes)
    board: Any = None  # a TensorBoard SummaryWriter

    @property
    def workers(self) -> int:
        """Processes that load images for this one."""
        wanted = self.config.data.workers
        if wanted >= 0:
            return wanted
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
        return min(8, (cores or 1) // self.processes.world) if self.device.type == "cuda" else 0

    def training_data(self) -> PolypDataset:
        """The training images, augmented."""
        config = self.config
        return PolypDataset(
            self.split.train,
            config.data.size,
            train=True,
            seed=config.seed,
            classes=config.model.classes,
        )

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
        if self.board is not None:
            for key, value in row.items():
                if isinstance(value, float):
                    self.board.add_scalar(f"{row['phase']}/{key}", value, row["epoch"])
            self.board.flush()

    def save(self, phase: str, module: nn.Module, more: Mapping[str, str] | None = None) -> None:
        """Write the weights of a finished phase; ``more`` is added to the file's metadata."""
        metadata = {
            **(more or {}),
            "phase": phase,
            "model": self.config.model.name,
            "config": self.config.to_yaml(),
            "versions": json.dumps(versions()),
        }
        save_weights(self.weights(phase), module.state_dict(), metadata)
        self.log.info("%s: finished, weights in %s", phase, self.weights(phase))
