"""How far a predicted border lies from the true one."""

from __future__ import annotations

import math

import numpy as np
from scipy.ndimage import binary_erosion
from scipy.spatial import cKDTree

PERCENTILE = 95


def hausdorff95(prediction: np.ndarray, truth: np.ndarray) -> float:
    """95 % Hausdorff distance between the borders of two masks, in pixels.

    From every border pixel of one mask the distance to the nearest border pixel of the other is
    taken; the result is the larger of the two 95th percentiles, one for each direction (as MONAI
    computes it). Border pixels belong to the mask and touch, by a side, something outside of it or
    the edge of the image.

    Two empty masks are 0 apart. If only one is empty, there is no distance; the diagonal of the
    image stands in, so that missing a polyp never improves a mean.

    Args:
        prediction, truth: (H, W) bool, of one size.
    """
    if not prediction.any() or not truth.any():
        return 0.0 if prediction.any() == truth.any() else math.hypot(*truth.shape)
    borders = [np.argwhere(mask & ~binary_erosion(mask)) for mask in (prediction, truth)]
    trees = [cKDTree(border) for border in borders]
    return max(
        float(np.percentile(tree.query(border)[0], PERCENTILE))
        for tree, border in zip(trees, reversed(borders), strict=True)
    )
