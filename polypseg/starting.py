"""What the explicit phase starts from: random weights, a pretrained encoder, or another run."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from polypseg.checkpoint import CheckpointError, load_into
from polypseg.config import ConfigError, ModelConfig
from polypseg.models import SegmentationModel, load_pretrained
from polypseg.run_config import load_run_config
from polypseg.training_run import PHASES


@dataclass(frozen=True)
class Start:
    """Where a network takes its first weights from; by default they are random.

    Attributes:
        encoder_weights: file of a SegFormer encoder; the rest of the network stays random.
        run: run directory, or a released model, of the same network, to fine-tune: all weights of
            its explicit phase or, where it lacks those, of its implicit one. With another number of
            classes the last layer is made over to tell polyp from none as before.
    """

    encoder_weights: Path | None = None
    run: Path | None = None

    def file(self) -> Path | None:
        """The weights file that is read; None where the weights are random, or the run has none."""
        if self.run is None:
            return self.encoder_weights
        files = [self.run / f"{phase}.safetensors" for phase in PHASES[:2]]
        return next((file for file in files if file.is_file()), None)

    def load(self, model: SegmentationModel, config: ModelConfig) -> str:
        """Load the first weights into a network of ``config``; returns what was done, for a log.

        Raises:
            ConfigError: the run's configuration is missing or cannot be read.
            CheckpointError: weights cannot be read or do not fit; nothing is loaded.
            ValueError: encoder weights are given to a network without that encoder.
        """
        if self.encoder_weights is not None:
            load_pretrained(model, self.encoder_weights)
            return f"encoder weights from {self.encoder_weights}"
        if self.run is not None:
            return self._load_run(self.run, model, config)
        return "the network starts from random weights (neither --encoder-weights nor --start-from)"

    def _load_run(self, run: Path, model: SegmentationModel, config: ModelConfig) -> str:
        if not (run / "config.yaml").is_file():
            raise ConfigError(f"--start-from {run}: not a run directory; it has no config.yaml")
        theirs = load_run_config(run / "config.yaml").model
        if (theirs.name, theirs.encoder) != (config.name, config.encoder):
            raise CheckpointError(
                f"--start-from {run}: it holds a {theirs.name} with encoder {theirs.encoder}, and "
                f"{config.name} with encoder {config.encoder} is to be trained; give "
                f"model.name={theirs.name} model.encoder={theirs.encoder}"
            )
        found = self.file()
        if found is None:
            raise CheckpointError(
                f"--start-from {run}: it has neither {PHASES[0]}.safetensors nor "
                f"{PHASES[1]}.safetensors; train its explicit phase first"
            )
        what = f"model {config.name}"
        if theirs.classes == config.classes:
            load_into(model, found, what=what)
            return f"the network starts from {found}"
        last = f"head.{len(model.head) - 1}."

        def adapt(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
            return {
                key: _with_classes(value, config.classes) if key.startswith(last) else value
                for key, value in tensors.items()
            }

        load_into(model, found, what=what, adapt=adapt)
        return (
            f"the network starts from {found}; its last layer tells {config.classes} classes as it "
            f"told {theirs.classes}: the same pixels are polyp"
        )


def network_of(run: Path | None) -> dict[str, Any]:
    """The settings by which a network is that of a run to start from; none without such a run.

    Raises:
        ConfigError: the run's configuration cannot be read.
    """
    if run is None or not (run / "config.yaml").is_file():  # of the latter `Start.load` tells
        return {}
    model = load_run_config(run / "config.yaml").model
    return {"model": {"name": model.name, "encoder": model.encoder}}


def _with_classes(weights: Tensor, classes: int) -> Tensor:
    """Weight or bias (classes, ...) of a last layer, made from one for another number of classes.

    One class has the logit of polyp against none; three have background, whose logit becomes 0, and
    two kinds of polyp, which get that logit each, so that the network marks what it marked and
    learns the kinds from there. (Random weights would take longer to learn than the rest of a
    fine-tuning.)
    """
    if classes == 1:
        return weights[1:].mean(0, keepdim=True) - weights[:1]
    return torch.cat([torch.zeros_like(weights), weights.expand(classes - 1, *weights.shape[1:])])
