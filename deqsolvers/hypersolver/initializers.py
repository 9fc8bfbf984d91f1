"""Initializers h_phi: a first guess of the fixed point from the inputs of f."""

from __future__ import annotations

from torch import Tensor, nn


class ImageInitializer(nn.Module):
    """One 2-D convolution and ReLU on the injected features (HyperPolypDEQ, figure 2).

    Args:
        inputs: channels of f's first input (B, inputs, H, W).
        channels: channels of the state (B, channels, H, W).
        kernel_size: odd size of the convolution.
    """

    def __init__(self, inputs: int, channels: int, kernel_size: int = 3):
        super().__init__()
        self.convolution = nn.Conv2d(inputs, channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.convolution(x).relu()


class VectorInitializer(nn.Module):
    """``ReLU(A x) W`` with a small inner width, for states (B, features).

    Args:
        inputs: features of f's first input (B, inputs).
        features: features of the state.
        width: inner width; Bai, Koltun & Kolter (ICLR 2022) use about 100 on sequences.
    """

    def __init__(self, inputs: int, features: int, width: int = 100):
        super().__init__()
        self.layers = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, features, bias=False)
        )

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        return self.layers(x)
