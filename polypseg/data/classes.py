"""The classes of NeoPolyp: how masks paint them, and class numbers from any such mask."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image

from polypseg.data.faults import DataError, Fault
from polypseg.data.regions import even_regions

CLASS_NAMES = ("background", "neoplastic", "non_neoplastic")
CLASS_COLOURS = ((0, 0, 0), (255, 0, 0), (0, 255, 0))

# JPEG blurs the colours at a border and moves them slightly elsewhere; a fourth class would be
# further away, and on more pixels or evenly.
_FAR = 128
_FAR_FRACTION = 0.02
_NEAR = 64


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
    nearest = distances.min(axis=0)
    foreign = nearest > _NEAR**2
    if foreign.any():
        strange = nearest > _FAR**2
        if strange.mean() <= _FAR_FRACTION:
            strange = even_regions(rgb, foreign)
        if strange.any():
            raise DataError([_colour_fault(path, rgb, strange)])
    return distances.argmin(axis=0).astype(np.uint8)


def _colour_fault(path: Path, rgb: np.ndarray, strange: np.ndarray) -> Fault:
    colours, counts = np.unique(rgb[strange], axis=0, return_counts=True)
    example = tuple(colours[counts.argmax()].tolist())
    return Fault(
        path,
        f"{strange.mean():.2%} of the mask is neither black, red nor green, for example "
        f"RGB {example}",
        "paint the background (0, 0, 0), neoplastic polyps (255, 0, 0) and "
        "non-neoplastic ones (0, 255, 0), or store the class numbers 0, 1 and 2",
    )


def _uses_class_colours(picture: Image.Image) -> bool:
    """Whether a mask with a palette shows red or green, so that its indices say nothing."""
    if picture.mode != "P":
        return False
    shown = picture.convert("RGB").getcolors(256) or []  # no palette holds more
    return any(colour in CLASS_COLOURS[1:] for _, colour in shown)
