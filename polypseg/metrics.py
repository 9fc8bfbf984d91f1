"""Scores of an image from its pixel counts, and their means over images."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch.nn import functional

Mask = np.ndarray | torch.Tensor

THRESHOLD = 0.5  # of a probability, above which a pixel counts as polyp


@dataclass(frozen=True)
class Confusion:
    """Pixel counts of one image: true positives, false positives, false negatives, true negatives.

    Where neither the truth nor the prediction holds a polyp pixel, every score is 1: saying "no
    polyp" was right. Where only one of the two holds some, every score is 0, also those whose
    formula is 0 / 0 then: precision of an empty prediction, recall of an empty truth.
    """

    tp: int
    fp: int
    fn: int
    tn: int

    @classmethod
    def from_masks(cls, prediction: Mask, truth: Mask) -> Confusion:
        """Count the pixels of two boolean masks (H, W), NumPy or torch.

        Raises:
            ValueError: a mask is not boolean or not 2-D, or the two differ in size.
        """
        predicted = torch.as_tensor(prediction)
        actual = torch.as_tensor(truth, device=predicted.device)
        for name, mask in (("prediction", predicted), ("truth", actual)):
            if mask.dtype != torch.bool or mask.ndim != 2:
                raise ValueError(
                    f"{name} must be a boolean (H, W) mask, got {tuple(mask.shape)} {mask.dtype}"
                )
        if predicted.shape != actual.shape:
            raise ValueError(
                f"prediction is {tuple(predicted.shape)} but truth is {tuple(actual.shape)}; "
                "resize the logits to the truth's size before the threshold (resize_logits)"
            )
        tp = int((predicted & actual).sum())
        fp = int(predicted.sum()) - tp
        fn = int(actual.sum()) - tp
        return cls(tp, fp, fn, actual.numel() - tp - fp - fn)

    @property
    def dice(self) -> float:
        """2 TP / (2 TP + FP + FN)."""
        return _ratio(2 * self.tp, 2 * self.tp + self.fp + self.fn)

    @property
    def iou(self) -> float:
        """TP / (TP + FP + FN)."""
        return _ratio(self.tp, self.tp + self.fp + self.fn)

    @property
    def precision(self) -> float:
        """TP / (TP + FP)."""
        return _ratio(self.tp, self.tp + self.fp or self.fn)

    @property
    def recall(self) -> float:
        """TP / (TP + FN), also called sensitivity."""
        return _ratio(self.tp, self.tp + self.fn or self.fp)


@dataclass(frozen=True)
class ImageScore:
    """Dice, IoU and pixel counts of one image."""

    dice: float
    iou: float
    confusion: Confusion


def score_masks(prediction: Mask, truth: Mask) -> ImageScore:
    """Score a predicted mask by the true one, both boolean (H, W), as `Confusion.from_masks`."""
    confusion = Confusion.from_masks(prediction, truth)
    return ImageScore(confusion.dice, confusion.iou, confusion)


def mean_scores(scores: Sequence[ImageScore]) -> dict[str, float]:
    """Return "mDice" and "mIoU": the mean over images of each image's score, 0 to 1."""
    if not scores:
        raise ValueError("scores is empty; a mean needs at least one image")
    return {
        "mDice": float(np.mean([score.dice for score in scores])),
        "mIoU": float(np.mean([score.iou for score in scores])),
    }


def resize_logits(logits: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Resize logits (K, h, w) to (K, H, W), the resolution of the true mask: bilinear, in float32.

    Logits are resized and not the thresholded mask, so that the border is placed between pixels.
    """
    if logits.ndim != 3:
        raise ValueError(f"logits must be (K, h, w), got {tuple(logits.shape)}")
    resized = functional.interpolate(
        logits.float()[None], size=size, mode="bilinear", align_corners=False
    )
    return resized[0]


def _ratio(numerator: int, denominator: int) -> float:
    return numerator / denominator if denominator else 1.0
