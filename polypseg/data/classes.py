"""The classes of NeoPolyp: how masks paint them, and class numbers from any such mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from polypseg.data.faults import DataError, Fault

CLASS_NAMES = ("background", "neoplastic", "non_neoplastic")
CLASS_COLOURS = ((0, 0, 0), (255, 0, 0), (0, 255, 0))

# JPEG blurs the colours at a border and moves them slightly elsewhere; a fourth class would be
# further away, and on more pixels.
_FAR = 128
_FAR_FRACTION = 0.02


def class_numbers(picture: Image.Image, path: Path) -> np.ndarray:
    """The class of every pixel of a decoded mask, as (H, W) uint8 of 0, 1 and 2.

    A mask may be painted black, red (neoplastic) and green (non-neoplastic), with a palette or
    without, and may have been through JPEG: each pixel takes the nearest of the three colours. A
    grey mask, or one with a palette of other colours, may hold the numbers 0, 1 and 2 themselves.

    Args:
        picture: the mask, of 8 bits a channel.
        path: named in errors.

    Raises:
        DataError: the mask holds something else.
    """
    if picture.mode in ("P", "L", "1"):
        numbers = np.array(picture if picture.mode == "P" else picture.convert("L"))
        if numbers.max(initial=0) < len(CLASS_NAMES) and not _uses_class_colours(picture):
            return numbers
    rgb = np.asarray(picture.convert("RGB")).astype(np.int32)
    distances = np.stack(
        [np.square(rgb - np.array(colour)).sum(axis=2) for colour in CLASS_COLOURS]
    )
    far = float((distances.min(axis=0) > _FAR**2).mean())
    if far > _FAR_FRACTION:
        colours, counts = np.unique(rgb.reshape(-1, 3), axis=0, return_counts=True)
        known = {tuple(colour) for colour in CLASS_COLOURS}
        strange = next(
            tuple(colours[i].tolist())
            for i in np.argsort(-counts)
            if tuple(colours[i].tolist()) not in known
        )
        raise DataError(
            [
                Fault(
                    path,
                    f"{far:.0%} of the mask is neither black, red nor green, for example "
                    f"RGB {strange}",
                    "paint the background (0, 0, 0), neoplastic polyps (255, 0, 0) and "
                    "non-neoplastic ones (0, 255, 0), or store the class numbers 0, 1 and 2",
                )
            ]
        )
    return distances.argmin(axis=0).astype(np.uint8)


def _uses_class_colours(picture: Image.Image) -> bool:
    """Whether a mask with a palette shows red or green, so that its indices say nothing."""
    if picture.mode != "P":
        return False
    shown = picture.convert("RGB").getcolors(256) or []  # no palette holds more
    return any(colour in CLASS_COLOURS[1:] for _, colour in shown)
