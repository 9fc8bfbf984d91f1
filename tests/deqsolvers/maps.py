"""Small trainable maps f(z, x), the insides of deep-equilibrium layers for the tests."""

from __future__ import annotations

import torch
from torch import Tensor, nn


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    """Standard normal numbers that depend on nothing but the seed."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


class TanhMap(nn.Module):
    """``tanh(W z + U x + b)`` with ``||W|| = norm``, a contraction for norms below 1."""

    def __init__(
        self, size: int, norm: float = 0.9, seed: int = 0, dtype: torch.dtype = torch.float64
    ):
        super().__init__()
        weight = normal(size, size, seed=seed)
        self.weight = nn.Parameter((norm * weight / torch.linalg.matrix_norm(weight, 2)).to(dtype))
        self.inject = nn.Parameter(normal(size, size, seed=seed + 1, dtype=dtype) / size**0.5)
        self.bias = nn.Parameter(normal(size, seed=seed + 2, dtype=dtype))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.weight.T + x @ self.inject.T + self.bias)


class LinearMap(nn.Module):
    """``tanh(W z + U x)`` out of torch's own layers, in single precision, as autocast wants it."""

    def __init__(self, size: int = 32, norm: float = 0.75):
        super().__init__()
        self.recur, self.inject = nn.Linear(size, size), nn.Linear(size, size)
        with torch.no_grad():
            for seed, parameter in enumerate(self.parameters()):
                parameter.copy_(normal(*parameter.shape, seed=seed) / size**0.5)
            self.recur.weight.mul_(norm / torch.linalg.matrix_norm(self.recur.weight, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(self.recur(z) + self.inject(x))


class PerceptronMap(nn.Module):
    """A two-layer perceptron on (z, x) whose Jacobian in z has spectral norm below 1."""

    def __init__(self, size: int, hidden: int):
        super().__init__()
        inner, outer = normal(hidden, size, seed=0), normal(size, hidden, seed=1)
        self.inner = nn.Parameter(inner / torch.linalg.matrix_norm(inner, 2))
        # The slope of GELU is at most 1.13.
        self.outer = nn.Parameter(0.8 * outer / torch.linalg.matrix_norm(outer, 2))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return nn.functional.gelu((z + x) @ self.inner.T) @ self.outer.T + x


class ConvolutionMap(nn.Module):
    """``tanh(conv(z) + x)``, the shape of an image DEQ."""

    def __init__(self, channels: int, norm: float = 0.9, dtype: torch.dtype = torch.float64):
        super().__init__()
        kernel = normal(channels, channels, 3, 3)
        # The sum of absolute weights bounds the maximum norm of the convolution.
        bound = kernel.abs().sum(dim=(1, 2, 3)).max()
        self.kernel = nn.Parameter((norm * kernel / bound).to(dtype))

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(nn.functional.conv2d(z, self.kernel, padding=1) + x)
