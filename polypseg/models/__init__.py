"""The networks: pure modules, built from the configuration by one factory."""

from __future__ import annotations

from deqsolvers import Anderson, Broyden, HyperSolver, Picard, Solver
from polypseg.config import CLASSIC_SOLVERS, MODELS, HyperConfig, ModelConfig
from polypseg.models.mit import MixTransformer, load_encoder_weights
from polypseg.models.polypdeq import PolypDEQ, Prediction


def build_model(config: ModelConfig) -> PolypDEQ:
    """The network that ``config`` names, with random weights.

    Raises:
        ValueError: an unknown name, encoder or injection.
    """
    if config.name not in MODELS:
        raise ValueError(f"model must be one of {', '.join(MODELS)}, got {config.name!r}")
    return PolypDEQ(config.encoder, config.name.removeprefix("polypdeq-"), config.classes)


def build_solver(name: str, memory: int) -> Solver:
    """A classic solver by name; Picard has no memory.

    Raises:
        ValueError: an unknown name.
    """
    if name not in CLASSIC_SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(CLASSIC_SOLVERS)}, got {name!r}")
    if name == "picard":
        return Picard()
    # The Jacobian regulariser makes f contract, so plain steps are a safe way out.
    return Broyden(memory) if name == "broyden" else Anderson(memory, safeguard=1)


def build_hypersolver(model: PolypDEQ, config: HyperConfig) -> HyperSolver:
    """An untrained HyperSolver for the model's state (B, C, H/4, W/4)."""
    channels = model.encoder.channels[0]
    return HyperSolver.for_images(
        channels, memory=config.memory, width=config.width, rank=config.rank
    )


__all__ = [
    "MixTransformer",
    "PolypDEQ",
    "Prediction",
    "build_hypersolver",
    "build_model",
    "build_solver",
    "load_encoder_weights",
]
