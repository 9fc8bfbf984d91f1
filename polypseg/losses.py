"""The segmentation loss of the polyp field."""

from __future__ import annotations

import torch
from torch.nn import functional

WINDOW = 31
EDGE_WEIGHT = 5.0


def structure_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weighted binary cross-entropy plus weighted IoU loss per image, averaged over the batch.

    A pixel weighs w = 1 + 5 |avgpool31(mask) - mask|: most at the polyp's border (outside of the
    picture counts as background). Cross-entropy is kept per pixel until it has been weighted: in
    the widespread code that reduces it to a scalar first, w cancels.

    Args:
        logits: (B, 1, H, W), before the sigmoid; half precision is computed in float32.
        mask: (B, 1, H, W), values 0 to 1.

    Returns:
        A scalar.

    Raises:
        ValueError: the shapes differ or are not (B, 1, H, W).

    Source: Fan et al., "PraNet: Parallel Reverse Attention Network for Polyp Segmentation", MICCAI
    2020 (its loss function), after the pixel position aware loss of Wei et al., "F3Net", AAAI 2020.
    """
    if logits.ndim != 4 or logits.shape[1] != 1 or logits.shape != mask.shape:
        raise ValueError(
            "logits and mask must both be (B, 1, H, W), "
            f"got {tuple(logits.shape)} and {tuple(mask.shape)}"
        )
    dtype = torch.promote_types(logits.dtype, torch.float32)  # half precision loses the sums
    logits, mask = logits.to(dtype), mask.to(dtype)
    local_mean = functional.avg_pool2d(mask, WINDOW, stride=1, padding=WINDOW // 2)
    weight = 1 + EDGE_WEIGHT * (local_mean - mask).abs()

    pixels = (1, 2, 3)
    entropy = functional.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    weighted_entropy = (weight * entropy).sum(pixels) / weight.sum(pixels)

    probability = logits.sigmoid()
    intersection = (weight * probability * mask).sum(pixels)
    union = (weight * (probability + mask)).sum(pixels) - intersection
    weighted_iou = 1 - (intersection + 1) / (union + 1)
    return (weighted_entropy + weighted_iou).mean()
