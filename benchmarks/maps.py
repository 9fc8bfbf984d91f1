"""The insides f(z, x) of deep-equilibrium layers of the usual kinds, with fixed random weights."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class LinearMap(nn.Module):
    """``A z + x`` with a symmetric A whose eigenvalues fill [-radius / 2, radius]."""

    def __init__(self, features: int, radius: float):
        super().__init__()
        basis = torch.linalg.qr(torch.randn(features, features, dtype=torch.float64))[0]
        spectrum = radius * torch.linspace(-0.5, 1, features, dtype=torch.float64)
        self.matrix = nn.Parameter((basis * spectrum) @ basis.T)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.addmm(x, z, self.matrix)


class PerceptronMap(nn.Module):
    """A residual perceptron: ``tanh(x + z A + gelu(z B) C)``, z and x (B, features)."""

    def __init__(self, features: int, scale: float):
        super().__init__()
        self.skip = nn.Linear(features, features, bias=False)
        self.up = nn.Linear(features, 2 * features)
        self.down = nn.Linear(2 * features, features, bias=False)
        self.scale = scale

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(x + self.scale * (self.skip(z) + self.down(F.gelu(self.up(z)))))


class ConvolutionMap(nn.Module):
    """The cell of a multiscale DEQ at one scale: two convolutions, group norms, injection.

    z and x are (B, channels, H, W). Source: Bai, Koltun & Kolter 2020, figure 2.
    """

    def __init__(self, channels: int, scale: float):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norms = nn.ModuleList(nn.GroupNorm(4, channels) for _ in range(3))
        self.scale = scale

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        y = self.norms[0](F.relu(self.first(z)))
        y = self.norms[1](self.scale * z + self.second(y) + x)
        return self.norms[2](F.relu(self.scale * z + y))


class AttentionMap(nn.Module):
    """A transformer block with the input injected: z and x are (B, T, channels)."""

    def __init__(self, channels: int, heads: int, scale: float):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(channels, 3 * channels)
        self.out = nn.Linear(channels, channels)
        self.up = nn.Linear(channels, 2 * channels)
        self.down = nn.Linear(2 * channels, channels)
        self.norms = nn.ModuleList(nn.LayerNorm(channels) for _ in range(2))
        self.scale = scale

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        batch, tokens, channels = z.shape
        split = (batch, tokens, 3, self.heads, channels // self.heads)
        q, k, v = self.qkv(z).view(split).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(z.shape)
        y = self.norms[0](x + self.scale * (z + self.out(mixed)))
        return self.norms[1](y + self.down(F.gelu(self.up(y))))
