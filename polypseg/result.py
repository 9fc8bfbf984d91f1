"""What a prediction says about one image."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from polypseg.metrics import THRESHOLD

EXPLICIT = "EXPLICIT"
NON_FINITE = "NON_FINITE"
DISCLAIMER = "Research use only, not a medical device."


@dataclass(frozen=True)
class Result:
    """The prediction for one image.

    Attributes:
        probabilities: (K, H, W) float32 at the image's own size. With K = 1, how likely each pixel
            is polyp; with more, of each class, background first, adding up to 1.
        native: (K, size, size) float32, the same at the size that the network works at.
        steps: solver updates that led to the state that was read out.
        evaluations: evaluations of f that this took.
        residual: relative residual of that state; NaN where it was not measured: after an explicit
            pass, and after a fixed number of steps unless asked for.
        status: name of the `deqsolvers.Status`, or "EXPLICIT" for one pass without a solver;
            "NON_FINITE" where the network returned NaN or infinity, and nothing is marked as polyp.
        seconds: time in the network, from the resized image on its device to the logits. Reading,
            resizing and the copy to the device are not in it.
    """

    probabilities: np.ndarray
    native: np.ndarray
    steps: int
    evaluations: int
    residual: float
    status: str
    seconds: float

    @property
    def probability(self) -> np.ndarray:
        """(H, W) float32: how likely each pixel is polyp, of whatever class."""
        return polyp_probability(self.probabilities)

    @property
    def labels(self) -> np.ndarray:
        """(H, W) uint8: 0 for background, else the number of the polyp's class (see `labels`)."""
        return labels(self.probabilities)

    @property
    def mask(self) -> np.ndarray:
        """(H, W) bool: where a polyp of any class is marked."""
        return self.labels > 0

    def as_row(self) -> dict[str, Any]:
        """What the tables of images and of frames both say: the mask, and how it was solved."""
        mask = self.mask
        return {
            "polyp_pixels": int(mask.sum()),
            "polyp_share": float(mask.mean()),
            "max_probability": float(self.probability.max()),
            "steps": self.steps,
            "evaluations": self.evaluations,
            "residual": self.residual,
            "status": self.status,
            "seconds": self.seconds,
        }


@dataclass(frozen=True)
class Frame:
    """The prediction for a video's frame, and the state to start the next one from."""

    result: Result
    state: Any


def polyp_probability(probabilities: np.ndarray) -> np.ndarray:
    """How likely each pixel is polyp, of whatever class: (H, W) of probabilities (K, H, W)."""
    return probabilities[0] if len(probabilities) == 1 else 1 - probabilities[0]


def labels(probabilities: np.ndarray) -> np.ndarray:
    """Class numbers (H, W) uint8 of probabilities (K, H, W), as `Result` has them.

    With one class, 1 where the probability is above 0.5; with more, the likeliest class, where 0 is
    the background.
    """
    if len(probabilities) == 1:
        return (probabilities[0] > THRESHOLD).astype(np.uint8)
    return probabilities.argmax(axis=0).astype(np.uint8)
