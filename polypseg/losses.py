"""The segmentation loss of the polyp field, and its form for several classes."""

from __future__ import annotations

import torch
from torch.nn import functional

WINDOW = 31
EDGE_WEIGHT = 5.0


def structure_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Weighted binary cross-entropy plus weighted IoU loss per image, averaged over the batch.

    A pixel weighs ``w = 1 + 5 |avgpool31(mask) - mask|``: most at the polyp's border (outside of
    the picture counts as background). Cross-entropy is kept per pixel until it has been weighted:
    in the widespread code that reduces it to a scalar first, w cancels.

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
    weight = _border_weight(mask)
    entropy = functional.binary_cross_entropy_with_logits(logits, mask, reduction="none")
    return (_mean(entropy, weight) + _iou_loss(logits.sigmoid(), mask, weight)).mean()


def class_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`structure_loss` for several classes, of which the first is the background.

    Weighted cross-entropy plus the weighted IoU losses of the foreground classes, averaged; a pixel
    weighs as much as it does for the class whose border is nearest. With two classes and logits
    (0, x) this is the structure loss of x.

    Args:
        logits: (B, K, H, W), before the softmax; half precision is computed in float32.
        mask: (B, 1, H, W), class numbers 0 to K - 1.

    Returns:
        A scalar.

    Raises:
        ValueError: K is below 2, or the shapes do not fit together.
    """
    if logits.ndim != 4 or logits.shape[1] < 2 or mask.shape != logits[:, :1].shape:
        raise ValueError(
            "logits must be (B, K, H, W) with K at least 2 and mask (B, 1, H, W), "
            f"got {tuple(logits.shape)} and {tuple(mask.shape)}"
        )
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    numbers = mask[:, 0].long()
    foreground = torch.arange(1, logits.shape[1], device=logits.device)
    truth = (numbers[:, None] == foreground[:, None, None]).to(logits.dtype)
    weight = _border_weight(truth).amax(dim=1, keepdim=True)
    log_probability = logits.log_softmax(dim=1)
    entropy = functional.nll_loss(log_probability, numbers, reduction="none").unsqueeze(1)
    iou = _iou_loss(log_probability[:, 1:].exp(), truth, weight)
    return (_mean(entropy, weight) + iou.mean(dim=1, keepdim=True)).mean()


def segmentation_loss(logits: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """`structure_loss` of one class (B, 1, H, W), `class_loss` of several."""
    return (structure_loss if logits.shape[1] == 1 else class_loss)(logits, mask)


def _border_weight(mask: torch.Tensor) -> torch.Tensor:
    # Differences of running sums: 4 additions a pixel instead of the 961 of an average pooling,
    # which took a quarter of a training step on a CPU. Exact for the integer sums of a mask.
    half = WINDOW // 2
    local = mask
    for dim, padding in ((3, (half + 1, half)), (2, (0, 0, half + 1, half))):
        sums = functional.pad(local, padding).cumsum(dim)
        size = mask.shape[dim]
        local = sums.narrow(dim, WINDOW, size) - sums.narrow(dim, 0, size)
    return 1 + EDGE_WEIGHT * (local / WINDOW**2 - mask).abs()


def _mean(entropy: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B, 1) weighted means over the pixels."""
    return (weight * entropy).sum((2, 3)) / weight.sum((2, 3))


def _iou_loss(probability: torch.Tensor, mask: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """(B, C) weighted IoU losses."""
    intersection = (weight * probability * mask).sum((2, 3))
    union = (weight * (probability + mask)).sum((2, 3)) - intersection
    return 1 - (intersection + 1) / (union + 1)
