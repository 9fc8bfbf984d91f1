"""SegFormer: the Mix Transformer with an all-MLP head, an explicit network to compare with."""

from __future__ import annotations

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
        maps = [project(x) for project, x in zip(self.project, self.encoder(images), strict=True)]
        size = maps[0].shape[-2:]
        same = [F.interpolate(x, size, mode="bilinear", align_corners=False) for x in maps]
        logits = self.head(torch.cat(same[::-1], dim=1))
        scaled = F.interpolate(logits, scale_factor=4, mode="bilinear", align_corners=False)
        return Prediction(scaled, None)
