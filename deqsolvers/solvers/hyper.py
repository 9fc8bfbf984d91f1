"""HyperSolver: Anderson's update with a learned start and learned alpha and beta."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deqsolvers.hypersolver.initializers import (
    DeepImageInitializer,
    ImageInitializer,
    MultiScaleInitializer,
    SequenceInitializer,
    VectorInitializer,
)
from deqsolvers.hypersolver.network import (
    AlphaBetaNetwork,
    pool_images,
    pool_scales,
    pool_sequences,
    pool_vectors,
)
from deqsolvers.hypersolver.preconditioners import (
    ImagePreconditioner,
    VectorPreconditioner,
    precondition,
)
from deqsolvers.solvers.base import Memory, Solver
from deqsolvers.solvers.history import History
from deqsolvers.state import Layout


@dataclass(frozen=True)
class FittedOn:
    """What a HyperSolver was last fitted on; see `fit_hypersolver`.

    Attributes:
        f: class of the DEQ's f.
        parameters: how many f has; 0 where f is no nn.Module.
        state: shape of each tensor of the state, without the batch.
        samples: training samples of the last epoch that had a reliable z*.
        epochs: after how many the weights were taken: all, or those up to the best (``patience``).
        steps: K, unrolled steps.
        distances: mean relative distance to z* after 0 .. K steps, with these weights.
    """

    f: str
    parameters: int
    state: tuple[tuple[int, ...], ...]
    samples: int
    epochs: int
    steps: int
    distances: tuple[float, ...]

    @classmethod
    def from_record(cls, record: Mapping[str, Any]) -> FittedOn:
        """Undo `dataclasses.asdict`, also where a file has turned tuples into lists."""
        state = tuple(tuple(shape) for shape in record["state"])
        return cls(**{**record, "state": state, "distances": tuple(record["distances"])})

    def __str__(self) -> str:
        shapes = ", ".join(str(shape) for shape in self.state)
        return (
            f"{self.f} ({self.parameters} parameters), state {shapes}, {self.samples} samples, "
            f"{self.epochs} epochs, {self.steps} steps: distance to z* {self.distances[0]:.1e} at "
            f"the start, {self.distances[-1]:.1e} at the end"
        )


@dataclass
class _HyperMemory(Memory):
    layout: Layout
    z: History
    g: History
    series: Tensor  # (B, k, features) pooled residuals, oldest first
    mixed: Tensor | None = None  # sum_i alpha_i g_i of the last step, which the alpha loss needs


class HyperSolver(nn.Module, Solver):
    """A learned solver for one DEQ (Bai, Koltun & Kolter, ICLR 2022; HyperPolypDEQ, section 3.3).

    The initializer guesses z0 from the inputs; every step is
    ``z <- sum_i alpha_i z_i + beta sum_i alpha_i g_i`` over the last ``memory + 1`` pairs, with
    alpha (sum 1, possibly negative) and beta predicted by a small network from the pooled
    residuals. There is no least-squares problem, and the network's cost does not depend on the
    state's width.

    An untrained HyperSolver is plain fixed-point iteration from an untrained guess; train it with
    `fit_hypersolver`. Past the steps that it was fitted for it may stall: `HandOver` then gives the
    rest to a classic solver.

    Args:
        initializer: called with f's inputs; returns a state. None starts where the layer does
            (``z0`` of `DEQ` or `fixed_point`), which is beyond the papers: the first residual then
            says more about the sample, and nothing is spent on a guess.
        network: maps a series of pooled residuals (B, k, features) to alpha (B, k) and beta (B, 1);
            its ``memory`` is m, the past pairs kept beside the current one.
        pool: maps a residual, in the structure of the state, to (B, features).
        preconditioner: beyond the paper: a linear map of the mixed residual, in the structure of
            the state, before beta scales it; None leaves it as it is.

    Attributes:
        fitted_on: a `FittedOn`, None before a fit.
    """

    def __init__(
        self,
        initializer: nn.Module | None,
        network: nn.Module,
        pool: Callable[[Any], Tensor],
        preconditioner: nn.Module | None = None,
    ):
        super().__init__()
        if not (initializer is None or isinstance(initializer, nn.Module)):
            raise TypeError(
                f"initializer must be an nn.Module or None, got a {type(initializer).__name__}"
            )
        self.initializer = initializer
        self.network = network
        self.pool = pool
        self.preconditioner = preconditioner
        self.memory: int = network.memory  # type: ignore[assignment]
        self.fitted_on: FittedOn | None = None

    def extra_repr(self) -> str:
        return f"fitted on {self.fitted_on}" if self.fitted_on else "not fitted"

    @staticmethod
    def for_vectors(
        features: int,
        *,
        inputs: int | None = None,
        memory: int = 5,
        width: int = 64,
        initializer: nn.Module | bool = True,
        initializer_width: int = 100,
        rank: int = 0,
    ) -> HyperSolver:
        """For states (B, features) and a first input (B, inputs).

        Args:
            features: of the state.
            inputs: features of the first input; as the state if None.
            memory: m, past pairs beside the current one.
            width: of the alpha/beta network, a multiple of 8.
            initializer: False starts where the layer does instead of from a learned guess; a module
                takes the place of the usual one.
            initializer_width: inner width of the initializer.
            rank: of a `VectorPreconditioner`; 0 for none, as in the paper.
        """
        return HyperSolver(
            _choose(
                initializer,
                lambda: VectorInitializer(inputs or features, features, initializer_width),
            ),
            AlphaBetaNetwork(features, memory, width),
            pool_vectors,
            VectorPreconditioner(features, rank) if rank else None,
        )

    @staticmethod
    def for_sequences(
        features: int,
        *,
        inputs: int | None = None,
        memory: int = 5,
        width: int = 64,
        initializer: nn.Module | bool = True,
        initializer_width: int = 100,
        causal: bool = False,
        rank: int = 0,
    ) -> HyperSolver:
        """For states (B, T, features) and a first input (B, T, inputs); see `for_vectors`.

        ``causal`` keeps later inputs out of the initializer.
        """
        return HyperSolver(
            _choose(
                initializer,
                lambda: SequenceInitializer(
                    inputs or features, features, initializer_width, causal=causal
                ),
            ),
            AlphaBetaNetwork(features, memory, width),
            pool_sequences,
            VectorPreconditioner(features, rank) if rank else None,
        )

    @staticmethod
    def for_images(
        channels: int,
        *,
        inputs: int | None = None,
        memory: int = 5,
        width: int = 64,
        initializer: nn.Module | bool = True,
        deep: bool = False,
        rank: int = 0,
    ) -> HyperSolver:
        """For states (B, channels, H, W) and a first input (B, inputs, H, W); see `for_vectors`.

        ``deep`` takes a `DeepImageInitializer` instead of the papers' one convolution.
        """
        kind = DeepImageInitializer if deep else ImageInitializer
        return HyperSolver(
            _choose(initializer, lambda: kind(inputs or channels, channels)),
            AlphaBetaNetwork(channels, memory, width),
            pool_images,
            ImagePreconditioner(channels, rank) if rank else None,
        )

    @staticmethod
    def for_scales(
        channels: Sequence[int],
        *,
        inputs: int | None = None,
        memory: int = 5,
        width: int = 64,
        initializer: nn.Module | bool = True,
        strides: Sequence[int] | None = None,
    ) -> HyperSolver:
        """For multi-scale states, a tuple of (B, channels[i], H_i, W_i); they share alpha and beta.

        The first input is (B, inputs, H, W), with ``channels[0]`` channels if ``inputs`` is None;
        for the sizes and ``strides`` of the scales see `MultiScaleInitializer`.
        """
        return HyperSolver(
            _choose(
                initializer,
                lambda: MultiScaleInitializer(inputs or channels[0], channels, strides=strides),
            ),
            AlphaBetaNetwork(sum(channels), memory, width),
            pool_scales,
        )

    def start(self, *inputs: Any) -> Any | None:
        return None if self.initializer is None else self.initializer(*inputs)

    def init(self, z: Tensor, layout: Layout) -> _HyperMemory:
        size = self.memory + 1
        states, residuals = self.workspace.history((2, size, *z.shape), z)
        return _HyperMemory(
            layout=layout,
            z=History(size, z, states),
            g=History(size, z, residuals),
            series=z.new_empty(z.shape[0], 0, 0),
        )

    def step(self, memory: _HyperMemory, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        memory.z.push(z)
        memory.g.push(g)
        pooled = self.pool(memory.layout.unflatten(g)).unsqueeze(1)
        parameter = next(self.network.parameters())
        pooled = pooled.to(parameter.dtype)
        if memory.series.shape[1]:
            pooled = torch.cat([memory.series[:, -self.memory :], pooled], dim=1)
        memory.series = pooled
        alpha, beta = self.network(pooled)
        # From time order, oldest first, to the order of the ring's slots.
        alpha = alpha.flip(1)[:, memory.z.ages()].to(z.dtype)
        memory.mixed = direction = memory.g.combine(alpha, out=self.workspace.like(g))
        if self.preconditioner is not None:
            direction = precondition(self.preconditioner, memory.layout, direction)
        scaled = torch.mul(beta.to(z.dtype), direction, out=self.workspace.like(z))
        return memory.z.add_to(scaled, alpha, out=self.workspace.like(z))


def _choose(given: nn.Module | bool, usual: Callable[[], nn.Module]) -> nn.Module | None:
    """The initializer that a factory was asked for."""
    if isinstance(given, nn.Module):
        return given
    if not isinstance(given, bool):
        raise TypeError(f"initializer must be True, False or an nn.Module, got {given!r}")
    return usual() if given else None
