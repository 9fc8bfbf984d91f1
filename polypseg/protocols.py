"""The ways in which the field turns a network's output and a true mask into scores of an image."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from polypseg.boundary import hausdorff95
from polypseg.data import resize_mask
from polypseg.metrics import Confusion, score_masks
from polypseg.result import Result, labels, polyp_probability

POLYP = "polyp"  # all classes of polyps as one
LEVELS = 256

# What each protocol does, in words that are printed beside its figures.
PROTOCOLS = {
    "default": "Dice and IoU per image at the mask's own resolution, threshold 0.5, then the mean "
    "over images; 1 where truth and prediction are both empty.",
    "pranet": "As PraNet's public evaluation: each probability map is stretched to 0..1 by its own "
    "minimum and maximum, rounded to 8 bits and thresholded at 256 levels; Dice and IoU are means "
    "over levels, then over images. The stretch lets a map that is below 0.5 everywhere score "
    "well, so these figures compare only with others made like this.",
    "paper": "Dice and IoU per image at the size that the network was trained at, the true mask "
    "resized to it, threshold 0.5, then the mean over images; 1 where both are empty. Our reading "
    "of the HyperPolypDEQ paper, which tells neither size nor threshold.",
}


@dataclass(frozen=True)
class Scored:
    """One target of one image under one protocol.

    Attributes:
        confusion: pixel counts; under "pranet" those at the level in the middle.
        dice, iou: 0 to 1; under "pranet" means over the levels.
        mae: mean over pixels of the absolute difference of probability and truth, 0 to 1; under
            "pranet" of the stretched map.
        hd95: 95 % Hausdorff distance of the borders (see `hausdorff95`) of the mask that is
            counted, in its pixels.
    """

    confusion: Confusion
    dice: float
    iou: float
    mae: float
    hd95: float


def score_result(
    result: Result, truth: np.ndarray, protocol: str, classes: tuple[str, ...] = ()
) -> dict[str, Scored]:
    """Score a prediction by the true mask.

    Args:
        result: of a network with one class or with background and `classes`.
        truth: (H, W) uint8 class numbers, 0 for background.
        protocol: one of `PROTOCOLS`.
        classes: names of the classes 1, 2, ... where there are several.

    Returns:
        By target: "polyp" (all classes as one), then every class by itself.

    Raises:
        ValueError: the protocol is unknown, or "pranet", which knows one class only, is asked for
            several.
    """
    check_protocols([protocol], len(classes) + 1)
    if protocol == "pranet":
        return {POLYP: _pranet(result.probability, truth > 0)}
    probabilities, predicted = result.probabilities, result.labels
    if protocol == "paper":
        probabilities, predicted = result.native, labels(result.native)
        truth = resize_mask(truth, predicted.shape[1])  # networks here see squares
    scored = {POLYP: _masks(polyp_probability(probabilities), predicted > 0, truth > 0)}
    for number, name in enumerate(classes, start=1):
        scored[name] = _masks(probabilities[number], predicted == number, truth == number)
    return scored


def check_protocols(protocols: list[str], classes: int) -> None:
    """Raise ValueError for an unknown protocol, or one that several classes cannot be scored by."""
    for protocol in protocols:
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol must be one of {', '.join(PROTOCOLS)}, got {protocol!r}")
        if protocol == "pranet" and classes > 1:
            raise ValueError("the pranet protocol knows one class, polyp; use default or paper")


def _masks(probability: np.ndarray, prediction: np.ndarray, truth: np.ndarray) -> Scored:
    found = score_masks(prediction, truth)
    mae, hd95 = _mean_error(probability, truth), hausdorff95(prediction, truth)
    return Scored(found.confusion, found.dice, found.iou, mae, hd95)


def _mean_error(probability: np.ndarray, truth: np.ndarray) -> float:
    return float(np.abs(probability - truth).mean(dtype=np.float64))


def _pranet(probability: np.ndarray, truth: np.ndarray) -> Scored:
    low, high = float(probability.min()), float(probability.max())
    stretched = (probability.astype(np.float64) - low) / (high - low + 1e-8)
    levels = np.round(stretched * (LEVELS - 1)).astype(np.uint8)
    # Pixels at or above a level, for all levels at once, from the two histograms.
    tp = np.bincount(levels[truth], minlength=LEVELS)[::-1].cumsum()
    fp = np.bincount(levels[~truth], minlength=LEVELS)[::-1].cumsum()
    polyp = int(truth.sum())
    middle = levels >= LEVELS // 2
    return Scored(
        Confusion.from_masks(middle, truth),
        # The lowest level marks every pixel, so no denominator of it is 0; others may be.
        float((2 * tp / np.maximum(tp + fp + polyp, 1)).mean()),
        float((tp / np.maximum(fp + polyp, 1)).mean()),
        _mean_error(stretched, truth),
        hausdorff95(middle, truth),
    )
