"""SegFormer: the Mix Transformer with an all-MLP head, an explicit network to compare with."""

from __future__ import annotations

from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polypseg.models.base import Prediction, SegmentationModel, check_sides
from polypseg.models.mit import MixTransformer


class SegFormer(SegmentationModel):
    """SegFormer (Xie et al., NeurIPS 2021): every stage is projected, upsampled, and mixed.

    Args:
        encoder: size of the Mix Transformer, "b0" ... "b5".
        classes: output channels; 1 is a binary logit.
    """

    def __init__(self, encoder: str = "b0", classes: int = 1):
        super().__init__()
        self.encoder = MixTransformer(encoder)
        width = 256 if encoder in ("b0", "b1") else 768
        self.project = nn.ModuleList(nn.Conv2d(each, width, 1) for each in self.encoder.channels)
        self.head = nn.Sequential(
            nn.Conv2d(4 * width, width, 1, bias=False),
            nn.BatchNorm2d(width),
            nn.ReLU(),
            nn.Dropout2d(0.1),
            nn.Conv2d(width, classes, 1),
        )

    def explicit(self, images: Tensor) -> Prediction:
        """Predict for normalised images (B, 3, H, W)."""
        check_sides(images)
        mixed = self._mix(self.encoder(images))
        logits = self.head[1:](mixed)
        scaled = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
        return Prediction(scaled, None)

    def _mix(self, maps: Sequence[Tensor]) -> Tensor:
        """Project the maps, interpolate to the finest, concatenate, apply the first head layer.

        All of that is linear in every map, and 1x1 convolutions commute with interpolation, whose
        weights sum to 1. So projection and its slice of the head become one convolution at the
        map's own size: in f32 the same up to rounding, for a thirtieth of the multiplications.
        """
        head = cast(nn.Conv2d, self.head[0])
        slices = head.weight.flatten(1).chunk(len(maps), dim=1)
        size = maps[0].shape[-2:]
        total: Tensor | None = None
        # The head's input is concatenated coarse to fine.
        for x, project, part in zip(maps, self.project, reversed(slices), strict=True):
            project = cast(nn.Conv2d, project)
            with torch.autocast(x.device.type, enabled=False):
                weight = (part @ project.weight.flatten(1))[..., None, None]
                bias = part @ cast(Tensor, project.bias)
            y = F.conv2d(x, weight, bias)
            if total is None:
                total = y
                continue
            # On a CPU autocast would interpolate in float32: a quarter of a training step, and its
            # result is not more precise than the convolution's.
            with torch.autocast(x.device.type, enabled=False):
                total = total + F.interpolate(y, size, mode="bilinear", align_corners=False)
        return cast(Tensor, total)
