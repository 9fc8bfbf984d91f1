"""The UNet decoder of PolypDEQ."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_block(inputs: int, outputs: int) -> nn.Sequential:
    """3x3 convolution, group normalisation and ReLU.

    Group normalisation, because batch statistics inside a fixed point differ between training and
    evaluation, and with them the fixed point itself.
    """
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, padding=1, bias=False),
        nn.GroupNorm(min(8, outputs // 4), outputs),
        nn.ReLU(),
    )


class UNetDecoder(nn.Module):
    """From coarse to fine: interpolate to the next map's size, concatenate, convolve.

    Args:
        channels: widths of the feature maps, fine to coarse.
        limit: widest intermediate map; the decoder stays lighter than the encoder.

    ``forward`` takes the maps (B, channels[i], H_i, W_i) and returns (B, channels[0], H_0, W_0).
    """

    def __init__(self, channels: Sequence[int], limit: int = 128):
        super().__init__()
        blocks = []
        coarse = channels[-1]
        for fine in reversed(channels[:-1]):
            width = min(fine, limit)
            blocks.append(conv_block(coarse + fine, width))
            coarse = width
        self.blocks = nn.ModuleList(blocks)

    def forward(self, maps: Sequence[Tensor]) -> Tensor:
        x = maps[-1]
        for block, skip in zip(self.blocks, reversed(maps[:-1]), strict=True):
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = block(torch.cat([x, skip], dim=1))
        return x
