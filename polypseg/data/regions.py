"""Regions of a mask that are painted evenly, which a soft border is not."""

from __future__ import annotations

from functools import reduce

import numpy as np

SIDE = 5  # pixels; of the smallest region that is found
# Largest difference of the values in a region; JPEG leaves the inside of one nearly even. Of the
# field's masks, blurred by 2 to 8 pixels, enlarged 4 or 8 times or saved as JPEG of quality 5 to
# 75, no border is as even on SIDE x SIDE pixels; with 16 some are.
EVEN = 8


def even_regions(values: np.ndarray, wanted: np.ndarray, difference: int = EVEN) -> np.ndarray:
    """Which pixels lie in a window of SIDE x SIDE wanted pixels of nearly one value.

    Args:
        values: (H, W), or (H, W, channels), which are compared channel by channel.
        wanted: (H, W) bool.
        difference: the largest one between values of such a window.

    Returns:
        (H, W) bool.
    """
    # Most masks hold too few such pixels, or on a thin line alone, and need no closer look.
    nothing = np.zeros_like(wanted)
    if min(wanted.shape) < SIDE or np.count_nonzero(wanted) < SIDE**2:
        return nothing
    found = _over_windows(wanted, np.logical_and)
    if not found.any():
        return nothing
    spread = _over_windows(values, np.maximum) - _over_windows(values, np.minimum)
    found &= spread <= difference if values.ndim == 2 else (spread <= difference).all(axis=2)
    # From windows back to all of their pixels.
    return _over_windows(np.pad(found, SIDE - 1), np.logical_or)


def _over_windows(values: np.ndarray, combine: np.ufunc) -> np.ndarray:
    """Combine the values of every window; the result is SIDE - 1 pixels shorter and narrower."""
    # Whole shifted arrays, and rows and columns apart: much faster than a general filter.
    for _ in range(2):
        count = len(values) - SIDE + 1
        values = reduce(combine, [values[first : first + count] for first in range(SIDE)])
        values = values.swapaxes(0, 1)
    return values
