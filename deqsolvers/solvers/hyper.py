"""HyperSolver: Anderson's update with a learned start and learned alpha and beta."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from deqsolvers.hypersolver.initializers import ImageInitializer, VectorInitializer
from deqsolvers.hypersolver.network import AlphaBetaNetwork, pool_images, pool_vectors
from deqsolvers.solvers.base import History, Memory, Solver
from deqsolvers.state import Layout


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
    `fit_hypersolver`.

    Args:
        initializer: called with f's inputs; returns a state.
        network: maps a series of pooled residuals (B, k, features) to alpha (B, k) and beta (B, 1).
        pool: maps a residual, in the structure of the state, to (B, features).
        memory: m, past pairs kept beside the current one, at least 1.
    """

    def __init__(
        self,
        initializer: nn.Module,
        network: AlphaBetaNetwork,
        pool: Callable[[Any], Tensor],
    ):
        super().__init__()
        self.initializer = initializer
        self.network = network
        self.pool = pool
        self.memory = network.memory

    @staticmethod
    def for_images(
        channels: int, *, inputs: int | None = None, memory: int = 5, width: int = 64
    ) -> HyperSolver:
        """For states (B, channels, H, W) and a first input (B, inputs, H, W) of the same size."""
        return HyperSolver(
            ImageInitializer(inputs or channels, channels),
            AlphaBetaNetwork(channels, memory, width),
            pool_images,
        )

    @staticmethod
    def for_vectors(
        features: int, *, inputs: int | None = None, memory: int = 5, width: int = 64
    ) -> HyperSolver:
        """For states (B, features) and a first input (B, inputs)."""
        return HyperSolver(
            VectorInitializer(inputs or features, features),
            AlphaBetaNetwork(features, memory, width),
            pool_vectors,
        )

    def start(self, *inputs: Any) -> Any:
        return self.initializer(*inputs)

    def init(self, z: Tensor, layout: Layout) -> _HyperMemory:
        return _HyperMemory(
            layout=layout,
            z=History(self.memory + 1, z),
            g=History(self.memory + 1, z),
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
        memory.mixed = memory.g.combine(alpha)
        return memory.z.add_to(beta.to(z.dtype) * memory.mixed, alpha)
