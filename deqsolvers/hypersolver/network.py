"""The network s_xi that predicts alpha and beta from a short history of residuals."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from deqsolvers.solvers.base import check_count


class AlphaBetaNetwork(nn.Module):
    """Predicts one raw alpha per past residual and one beta for the step.

    The residuals come pooled to ``features`` numbers each, as a time series of at most ``memory +
    1`` entries. A 1-D convolution over time, group normalisation and ReLU mix them, a linear layer
    reads alpha and beta (HyperPolypDEQ, section 3.3 and figure 3).

    Where the papers are silent: the series is scaled to unit root mean square, so that the network
    sees the same at every residual size; the outputs are deviations from a plain step (all weight
    on the newest pair, beta = 1), which the untrained network takes exactly.

    Args:
        features: numbers each residual is pooled to.
        memory: m, past residuals beside the current one.
        width: channels of the convolution.
        kernel_size: odd size of the convolution over time.
        groups: of the group normalisation; must divide ``width``.
    """

    def __init__(
        self, features: int, memory: int = 5, width: int = 64, kernel_size: int = 3, groups: int = 8
    ):
        super().__init__()
        if groups < 1 or width % groups:
            raise ValueError(
                f"groups must divide width={width}, got {groups} (8 by default): choose another "
                "width"
            )
        if kernel_size < 1 or kernel_size % 2 == 0:
            raise ValueError(f"kernel_size must be odd, got {kernel_size}")
        self.memory = check_count("memory", memory)
        self.features = features
        self.arguments = {
            "features": features,
            "memory": memory,
            "width": width,
            "kernel_size": kernel_size,
            "groups": groups,
        }
        self.mix = nn.Sequential(
            nn.Conv1d(features, width, kernel_size, padding=kernel_size // 2),
            nn.GroupNorm(groups, width),
            nn.ReLU(),
        )
        self.read = nn.Linear(width * (memory + 1), memory + 2)
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)

    def forward(self, series: Tensor) -> tuple[Tensor, Tensor]:
        """Alpha (B, k), which sums to 1 and may be negative, and beta (B, 1).

        ``series`` is (B, k, features), oldest residual first, k at most m + 1.
        """
        batch, length, features = series.shape
        if features != self.features:
            raise ValueError(
                f"the residuals are pooled to {features} numbers, and this HyperSolver was made "
                f"for {self.features}: give it as many features (or channels) as the state has"
            )
        power = series.square().mean(dim=(1, 2), keepdim=True)
        series = series * torch.where(power > 0, power, 1.0).rsqrt()
        # As in the paper, residuals that do not exist yet are zeros after those that do.
        padding = series.new_zeros(batch, self.memory + 1 - length, features)
        mixed = self.mix(torch.cat([series, padding], dim=1).transpose(1, 2))
        out = self.read(mixed.flatten(1))
        newest = torch.zeros_like(out[:, :length])
        newest[:, -1] = 1
        raw = out[:, :length] + newest
        alpha = raw + (1 - raw.sum(dim=1, keepdim=True)) / length
        return alpha, 1 + out[:, -1:]


def pool_vectors(residual: Tensor) -> Tensor:
    """Vectors (B, C) are as small as they need be."""
    return _real(residual, "vectors", "(B, features)", 2)


def pool_sequences(residual: Tensor) -> Tensor:
    """Mean over time, (B, T, C) -> (B, C)."""
    return _real(residual, "sequences", "(B, T, features)", 3).mean(dim=1)


def pool_images(residual: Tensor) -> Tensor:
    """Global average pool, (B, C, H, W) -> (B, C)."""
    return _real(residual, "images", "(B, channels, H, W)", 4).mean(dim=(2, 3))


def pool_scales(residual: Sequence[Tensor]) -> Tensor:
    """Global average pool of each scale, side by side: (B, sum of channels)."""
    if isinstance(residual, Tensor):
        raise ValueError(
            "a HyperSolver made for scales solves tuples of images, and this state is one tensor: "
            "use for_images"
        )
    return torch.cat([pool_images(scale) for scale in residual], dim=1)


def _real(residual: Any, kind: str, shape: str, dims: int) -> Tensor:
    """``residual`` if it is of such a state; ValueError or TypeError otherwise."""
    if not isinstance(residual, Tensor) or residual.dim() != dims:
        got = tuple(residual.shape) if isinstance(residual, Tensor) else type(residual).__name__
        raise ValueError(
            f"a HyperSolver made for {kind} solves states {shape}, and this one is {got}: use "
            "for_vectors, for_sequences, for_images or for_scales, as the state is, or a pool of "
            "your own"
        )
    if residual.is_complex():
        raise TypeError(
            f"the networks of a HyperSolver are real, and this state is {residual.dtype}: keep the "
            "state as real and imaginary channels (torch.view_as_real), or give the HyperSolver a "
            "pool that returns both parts side by side"
        )
    return residual
