"""Initializers h_phi: a first guess of the fixed point from the inputs of f."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deqsolvers.precision import autocast_enabled


class VectorInitializer(nn.Module):
    """``ReLU(A x) W`` with a small inner width, for states (B, features).

    Args:
        inputs: features of f's first input (B, inputs).
        features: features of the state.
        width: inner width; Bai, Koltun & Kolter (ICLR 2022) use about 100 on sequences.
    """

    def __init__(self, inputs: int, features: int, width: int = 100):
        super().__init__()
        self.arguments = {"inputs": inputs, "features": features, "width": width}
        self.layers = nn.Sequential(
            nn.Linear(inputs, width), nn.ReLU(), nn.Linear(width, features, bias=False)
        )

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        _check_input(x, ("B", "inputs"), -1, cast(nn.Linear, self.layers[0]).weight)
        return self.layers(x)


class SequenceInitializer(nn.Module):
    """``ReLU(Conv1d(x)) W`` with a small inner width (Bai, Koltun & Kolter, ICLR 2022, section 4).

    Args:
        inputs: features of f's first input (B, T, inputs).
        features: features of the state (B, T, features).
        width: inner width.
        kernel_size: size of the convolution over time; odd unless causal.
        causal: let an output see no later input, as autoregressive models need. The alpha/beta
            network still pools over all of time.
    """

    def __init__(
        self,
        inputs: int,
        features: int,
        width: int = 100,
        kernel_size: int = 3,
        causal: bool = False,
    ):
        super().__init__()
        self.arguments = {
            "inputs": inputs,
            "features": features,
            "width": width,
            "kernel_size": kernel_size,
            "causal": causal,
        }
        past = kernel_size - 1 if causal else kernel_size // 2
        self.padding = (past, kernel_size - 1 - past)
        self.convolution = nn.Conv1d(inputs, width, kernel_size)
        self.read = nn.Linear(width, features, bias=False)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        _check_input(x, ("B", "T", "inputs"), 2, self.convolution.weight)
        inner = self.convolution(F.pad(x.transpose(1, 2), self.padding)).relu()
        return self.read(inner.transpose(1, 2))


class ImageInitializer(nn.Module):
    """One 2-D convolution and ReLU on the injected features (HyperPolypDEQ, figure 2).

    Args:
        inputs: channels of f's first input (B, inputs, H, W).
        channels: channels of the state (B, channels, H, W).
        kernel_size: odd size of the convolution.
    """

    def __init__(self, inputs: int, channels: int, kernel_size: int = 3):
        super().__init__()
        self.arguments = {"inputs": inputs, "channels": channels, "kernel_size": kernel_size}
        self.convolution = nn.Conv2d(inputs, channels, kernel_size, padding=kernel_size // 2)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        _check_input(x, ("B", "inputs", "H", "W"), 1, self.convolution.weight)
        return self.convolution(x).relu()


class DeepImageInitializer(nn.Module):
    """A small UNet whose outputs see most of the image; beyond the papers.

    One convolution cannot guess what a deep f finds in the whole image. This one adds, at a coarse
    resolution, residual blocks of dilated depthwise convolutions and a global mean.

    Args:
        inputs: channels of f's first input (B, inputs, H, W), H and W at least ``stride``.
        channels: channels of the state (B, channels, H, W).
        width: channels at the coarse resolution, a multiple of 4.
        stride: of the coarse resolution.
        blocks: residual blocks there; their dilations are 1, 2, 4, 1, 2, 4, ...
    """

    def __init__(
        self, inputs: int, channels: int, width: int = 48, stride: int = 4, blocks: int = 4
    ):
        super().__init__()
        self.arguments = {
            "inputs": inputs,
            "channels": channels,
            "width": width,
            "stride": stride,
            "blocks": blocks,
        }
        self.local = nn.Conv2d(inputs, channels, 3, padding=1)
        self.down = nn.Conv2d(inputs, width, stride, stride=stride)
        self.blocks = nn.ModuleList(_block(width, 2 ** (index % 3)) for index in range(blocks))
        self.everywhere = nn.Linear(width, width)
        self.up = nn.Conv2d(width, channels, 1)
        self.mix = nn.Conv2d(2 * channels, channels, 3, padding=1)
        self.out = nn.Conv2d(channels, channels, 1)

    def forward(self, x: Tensor, *others: Tensor) -> Tensor:
        _check_input(x, ("B", "inputs", "H", "W"), 1, self.down.weight)
        coarse = self.down(x)
        for block in self.blocks:
            coarse = coarse + block(coarse)
        coarse = coarse + self.everywhere(coarse.mean(dim=(2, 3)))[:, :, None, None]
        coarse = F.interpolate(
            self.up(coarse), size=x.shape[-2:], mode="bilinear", align_corners=False
        )
        return self.out(F.gelu(self.mix(torch.cat([coarse, self.local(x)], dim=1))))


def _block(width: int, dilation: int) -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(width, width, 3, padding=dilation, dilation=dilation, groups=width, bias=False),
        nn.Conv2d(width, width, 1),
        nn.GroupNorm(4, width),
        nn.GELU(),
    )


class MultiScaleInitializer(nn.Module):
    """One `ImageInitializer` a scale, on average-pooled features, for the states of an MDEQ.

    Args:
        inputs: channels of f's first input (B, inputs, H, W).
        channels: of each scale; scale i of the state is
            (B, channels[i], ceil(H / strides[i]), ceil(W / strides[i])).
        kernel_size: odd size of the convolutions.
        strides: of each scale relative to the input; 1, 2, 4, ... if None.
    """

    def __init__(
        self,
        inputs: int,
        channels: Sequence[int],
        kernel_size: int = 3,
        strides: Sequence[int] | None = None,
    ):
        super().__init__()
        strides = [2**scale for scale in range(len(channels))] if strides is None else strides
        if len(strides) != len(channels):
            raise ValueError(
                f"strides must have one entry a scale: {len(channels)} channels, {list(strides)}"
            )
        self.arguments = {
            "inputs": inputs,
            "channels": list(channels),
            "kernel_size": kernel_size,
            "strides": list(strides),
        }
        self.strides = tuple(strides)
        self.scales = nn.ModuleList(
            ImageInitializer(inputs, each, kernel_size) for each in channels
        )

    def forward(self, x: Tensor, *others: Tensor) -> tuple[Tensor, ...]:
        return tuple(
            scale(x if stride == 1 else F.avg_pool2d(x, stride, ceil_mode=True))
            for scale, stride in zip(self.scales, self.strides, strict=True)
        )


def _check_input(x: Any, shape: tuple[str, ...], place: int, weight: Tensor) -> None:
    """ValueError or TypeError unless the layer of ``weight`` can read f's first input ``x``.

    ``place`` is the dimension of its features; a negative one leaves it open how many others there
    are.
    """
    inputs = weight.shape[1]
    fits = isinstance(x, Tensor) and x.is_floating_point() and x.dim() >= 2
    fits = fits and (place < 0 or x.dim() == len(shape))
    if not fits or x.shape[place] != inputs:
        expected = ", ".join(str(inputs) if name == "inputs" else name for name in shape)
        got = f"{x.dtype} {tuple(x.shape)}" if isinstance(x, Tensor) else type(x).__name__
        raise ValueError(
            f"the initializer reads f's first input as real numbers ({expected}), and it is {got}: "
            "make the HyperSolver with inputs= as many features (or channels) as that has, with "
            "initializer=False, or with an initializer of your own"
        )
    if x.dtype != weight.dtype and not autocast_enabled(x.device.type):
        raise TypeError(
            f"the HyperSolver is of {weight.dtype} and f's first input of {x.dtype}; convert it "
            f"with hyper.to({x.dtype})"
        )
