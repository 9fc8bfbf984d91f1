"""The networks: pure modules, built from the configuration by one factory."""

from __future__ import annotations

from pathlib import Path

from torch import nn

from deqsolvers import Anderson, Broyden, HandOver, HyperSolver, Picard, Solver
from polypseg.config import HyperConfig, ModelConfig
from polypseg.config_limits import CLASSIC_SOLVERS, MODELS
from polypseg.models.base import STRIDE, ImplicitModel, Prediction, SegmentationModel
from polypseg.models.mdeq import CHANNELS, MDEQ
from polypseg.models.mit import MixTransformer, load_encoder_weights
from polypseg.models.polypdeq import PolypDEQ
from polypseg.models.segformer import SegFormer


def build_model(config: ModelConfig) -> SegmentationModel:
    """The network that ``config`` names, with random weights.

    Raises:
        ValueError: an unknown name or encoder.
    """
    name, classes = config.name, config.classes
    if name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {name!r}")
    if name == "mdeq":
        return MDEQ(classes)
    if name.startswith("segformer-"):
        return SegFormer(name.removeprefix("segformer-"), classes)
    return PolypDEQ(config.encoder, name.removeprefix("polypdeq-"), classes)


def build_implicit_model(config: ModelConfig) -> ImplicitModel:
    """`build_model` for whatever needs a fixed point.

    Raises:
        ValueError: as `build_model`, or the network is explicit only.
    """
    model = build_model(config)
    if not isinstance(model, ImplicitModel):
        raise ValueError(f"{config.name} is an explicit network: it has no fixed point to solve")
    return model


def load_pretrained(model: SegmentationModel, path: Path) -> None:
    """Load encoder weights into a network; see `load_encoder_weights`.

    Raises:
        ValueError: the network has no Mix Transformer.
        CheckpointError: the weights cannot be read or do not fit.
    """
    if not isinstance(model, (PolypDEQ, SegFormer)):
        raise ValueError(
            f"{path}: {type(model).__name__} has no Mix Transformer; leave out --encoder-weights"
        )
    load_encoder_weights(model.encoder, path)


def build_solver(name: str, memory: int) -> Solver:
    """A classic solver by name; Picard has no memory.

    Raises:
        ValueError: an unknown name.
    """
    if name not in CLASSIC_SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(CLASSIC_SOLVERS)}, got {name!r}")
    if name == "picard":
        return Picard()
    return Broyden(memory) if name == "broyden" else _anderson(memory)


def build_hand_over(hyper: HyperSolver, memory: int, steps: int) -> HandOver:
    """``hyper`` for the ``steps`` it was fitted for at most, then Anderson with what it learned."""
    return HandOver(hyper, _anderson(memory, hyper.preconditioner), after=steps)


def _anderson(memory: int, preconditioner: nn.Module | None = None) -> Anderson:
    # The Jacobian regulariser makes f contract, so plain steps are a safe way out.
    return Anderson(memory, safeguard=1, preconditioner=preconditioner)


def build_hypersolver(model: ImplicitModel, config: HyperConfig) -> HyperSolver:
    """An untrained HyperSolver for the model's state: one map of PolypDEQ, four of MDEQ.

    ``config.rank`` and the kind of learned initializer count for PolypDEQ only.
    """
    learned = config.initializer != "zero"
    if isinstance(model, PolypDEQ):
        return HyperSolver.for_images(
            model.encoder.channels[0],
            memory=config.memory,
            width=config.width,
            initializer=learned,
            deep=config.initializer == "deep",
            rank=config.rank,
        )
    return HyperSolver.for_scales(
        CHANNELS, memory=config.memory, width=config.width, initializer=learned
    )


__all__ = [
    "MDEQ",
    "STRIDE",
    "ImplicitModel",
    "MixTransformer",
    "PolypDEQ",
    "Prediction",
    "SegFormer",
    "SegmentationModel",
    "build_hand_over",
    "build_hypersolver",
    "build_implicit_model",
    "build_model",
    "build_solver",
    "load_encoder_weights",
    "load_pretrained",
]
