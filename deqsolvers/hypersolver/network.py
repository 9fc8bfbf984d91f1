"""The network s_xi that predicts alpha and beta from a short history of residuals."""

from __future__ import annotations

from collections.abc import Sequence

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
    return residual


def pool_sequences(residual: Tensor) -> Tensor:
    """Mean over time, (B, T, C) -> (B, C)."""
    return residual.mean(dim=1)


def pool_images(residual: Tensor) -> Tensor:
    """Global average pool, (B, C, H, W) -> (B, C)."""
    return residual.mean(dim=(2, 3))


def pool_scales(residual: Sequence[Tensor]) -> Tensor:
    """Global average pool of each scale, side by side: (B, sum of channels)."""
    return torch.cat([pool_images(scale) for scale in residual], dim=1)
