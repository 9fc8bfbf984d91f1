"""MDEQ: a multi-scale equilibrium network, the implicit baseline of the papers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deqsolvers import DEQ
from polypseg.models.base import ImplicitModel, check_sides

CHANNELS = (32, 64, 128, 256)
State = tuple[Tensor, ...]


def _norm(channels: int) -> nn.GroupNorm:
    return nn.GroupNorm(8, channels)


class _Block(nn.Module):
    """A basic residual block; the features are injected before its second addition."""

    def __init__(self, channels: int):
        super().__init__()
        self.first = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.first_norm = _norm(channels)
        self.second = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.second_norm = _norm(channels)
        self.out_norm = _norm(channels)

    def forward(self, z: Tensor, e: Tensor | None) -> Tensor:
        out = self.second_norm(self.second(self.first_norm(self.first(z)).relu()))
        if e is not None:
            out = out + e
        return self.out_norm((out + z).relu())


def _resample(source: int, target: int, channels: Sequence[int]) -> nn.Sequential:
    """From the map of one scale to the channels, and for a coarser one to the size, of another."""
    if source > target:
        return nn.Sequential(
            nn.Conv2d(channels[source], channels[target], 1, bias=False), _norm(channels[target])
        )
    layers: list[nn.Module] = []
    for step in range(source, target):
        last = step == target - 1
        width = channels[target] if last else channels[source]
        layers += [
            nn.Conv2d(channels[source], width, 3, stride=2, padding=1, bias=False),
            _norm(width),
        ]
        if not last:
            layers.append(nn.ReLU())
    return nn.Sequential(*layers)


class MultiScaleF(nn.Module):
    """The iterated map: a residual block at each resolution, then every scale sums up all scales.

    State and result are a tuple of (B, channels[i], H / 2^i, W / 2^i) for features (B, channels[0],
    H, W), which are injected at the finest scale. Source: Bai, Koltun & Kolter, "Multiscale deep
    equilibrium models" (NeurIPS 2020), figure 2; group normalisation as there.
    """

    def __init__(self, channels: Sequence[int] = CHANNELS):
        super().__init__()
        scales = range(len(channels))
        self.blocks = nn.ModuleList(_Block(each) for each in channels)
        self.fuse = nn.ModuleList(
            nn.ModuleList(
                nn.Identity() if source == target else _resample(source, target, channels)
                for source in scales
            )
            for target in scales
        )
        self.post = nn.ModuleList(
            nn.Sequential(nn.ReLU(), nn.Conv2d(each, each, 1, bias=False), _norm(each))
            for each in channels
        )
        for post in self.post:
            norm = cast(nn.GroupNorm, cast(nn.Sequential, post)[2])
            # Normalised, z is scale-free and nothing makes f contract. States that vary little
            # about a constant let every solver converge before any training.
            nn.init.constant_(norm.weight, 0.3)
            nn.init.normal_(norm.bias)

    def forward(self, z: State, e: Tensor) -> State:
        maps = [
            block(scale, e if index == 0 else None)
            for index, (block, scale) in enumerate(zip(self.blocks, z, strict=True))
        ]
        fused = []
        for target, (paths, post) in enumerate(zip(self.fuse, self.post, strict=True)):
            size = maps[target].shape[-2:]
            total = maps[target]
            for source, path in enumerate(cast(nn.ModuleList, paths)):
                if source != target:
                    part = path(maps[source])
                    if source > target:
                        part = F.interpolate(part, size, mode="bilinear", align_corners=False)
                    total = total + part
            fused.append(post(total))
        return tuple(fused)


class MDEQ(ImplicitModel):
    """A convolutional stem gives e; four scales are solved together; a head reads all of them.

    Small, 2.5 million parameters, and without pretrained weights.

    Args:
        classes: output channels; 1 is a binary logit.
    """

    def __init__(self, classes: int = 1):
        super().__init__()
        width = CHANNELS[0]
        # Outside f batch statistics do no harm.
        self.stem = nn.Sequential(
            nn.Conv2d(3, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Conv2d(width, width, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
        )
        self.deq = DEQ(MultiScaleF(), z0=self.zero_state)
        total = sum(CHANNELS)
        self.head = nn.Sequential(
            nn.Conv2d(total, total // 4, 1, bias=False),
            nn.BatchNorm2d(total // 4),
            nn.ReLU(),
            nn.Conv2d(total // 4, classes, 1),
        )

    def features(self, images: Tensor) -> Tensor:
        """Features e (B, 32, H/4, W/4) of normalised images (B, 3, H, W)."""
        check_sides(images)
        return self.stem(images)

    def zero_state(self, e: Tensor) -> State:
        """Zeros, (B, 32 * 2^i, H / 2^i, W / 2^i) for i = 0 .. 3, for e (B, 32, H, W)."""
        batch, _, height, width = e.shape
        return tuple(
            e.new_zeros(batch, channels, height >> scale, width >> scale)
            for scale, channels in enumerate(CHANNELS)
        )

    def read_out(self, z: State) -> Tensor:
        """Logits (B, classes, H, W) from the four scales."""
        size = z[0].shape[-2:]
        maps = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in z]
        logits = self.head(torch.cat(maps, dim=1))
        return F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
