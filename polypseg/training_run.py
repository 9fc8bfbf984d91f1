"""What the phases of one training share."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from polypseg.checkpoint import save_weights
from polypseg.config import Config
from polypseg.data import Split
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
    "distance_start",
    "distance_end",
]


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

    def save(self, phase: str, module: nn.Module, more: Mapping[str, str] | None = None) -> None:
        """Write the weights of a finished phase; ``more`` is added to the file's metadata."""
        metadata = {
            **(more or {}),
            "phase": phase,
            "config": self.config.to_yaml(),
            "versions": json.dumps(versions()),
        }
        save_weights(self.weights(phase), module.state_dict(), metadata)
        self.log.info("%s: finished, weights in %s", phase, self.weights(phase))
