"""Random augmentation of training pairs. The only module that knows albumentations."""

from __future__ import annotations

import os
import random

import numpy as np

# albumentations asks a package registry for its newest version on import unless told not to.
os.environ["NO_ALBUMENTATIONS_UPDATE"] = "1"

import albumentations as A
import cv2

MAX_ROTATION_DEGREES = 29
SCALE_RANGE = (0.8, 1.25)


class TrainTransform:
    """Flips, transposition, rotation, scaling and colour jitter of one image and its mask.

    The result is a function of the arguments alone: all random numbers come from the seed given
    with the call. They are drawn from one shared stream, because `Compose.set_random_seed` gives
    every step the same seed of its own, which makes their decisions move together (all flips
    happen, or none).

    Args:
        size: side of the square result in pixels.

    Attributes:
        source_size: side that a square source should have, so that the most enlarged view is sharp.
    """

    def __init__(self, size: int) -> None:
        self.source_size = round(SCALE_RANGE[1] * size)
        self._compose = A.Compose(
            [
                A.D4(p=1.0),
                A.Affine(
                    scale=SCALE_RANGE,
                    rotate=(-MAX_ROTATION_DEGREES, MAX_ROTATION_DEGREES),
                    keep_ratio=True,
                    p=0.8,
                ),
                # INTER_NEAREST rounds down here, though not in Affine's warp, and would move a mask
                # away from its image.
                A.Resize(
                    size,
                    size,
                    mask_interpolation=cv2.INTER_NEAREST_EXACT,
                    area_for_downscale="image",
                ),
                A.ColorJitter(
                    brightness=(0.7, 1.3),
                    contrast=(0.7, 1.3),
                    saturation=(0.7, 1.3),
                    hue=(-0.03, 0.03),
                    p=0.8,
                ),
            ]
        )

    def __call__(
        self, image: np.ndarray, mask: np.ndarray, seed: tuple[int, ...]
    ) -> tuple[np.ndarray, np.ndarray]:
        """Augment an image (H, W, 3) uint8 and its mask (H, W) uint8.

        Args:
            seed: non-negative integers that together name the draw, for example (run seed, epoch,
                index).

        Returns:
            Image (size, size, 3) uint8 and mask (size, size) uint8; the mask is resampled to the
            nearest pixel.
        """
        sequence = np.random.SeedSequence(seed)
        python_seed = int(sequence.generate_state(1, np.uint64)[0])
        self._compose.set_random_state(np.random.default_rng(sequence), random.Random(python_seed))
        out = self._compose(image=image, mask=mask)
        return out["image"], out["mask"]
