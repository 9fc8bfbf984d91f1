"""Decoding images and masks, with Pillow, into plain NumPy arrays."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from polypseg.data.classes import class_numbers
from polypseg.data.faults import DataError, Fault
from polypseg.data.folders import Pair

# JPEG's chroma subsampling tints the border of a black-and-white mask a little; a painted class
# differs by far more.
COLOUR_DIFFERENCE = 64
COLOUR_FRACTION = 0.001


def read_image(path: Path | str) -> np.ndarray:
    """Read an image as RGB.

    Grey, palette, CMYK, RGBA (alpha dropped) and 16-bit files (scaled to 8 bits) are converted; the
    EXIF orientation is applied, so the array is what a viewer shows.

    Args:
        path: the image file.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: the file is missing, truncated, or not an image; the message names it.
    """
    return np.array(_decode(Path(path)).convert("RGB"))


def read_mask(path: Path | str, classes: int = 1) -> np.ndarray:
    """Read a polyp mask as class numbers.

    With one class, a 1-bit mask is taken as it is, a mask whose largest value is 1 counts anything
    above 0 as polyp, any other is cut at 128 of 255. With three, see `class_numbers`. The mask's
    own EXIF orientation is applied, by the same rule as for images.

    Args:
        path: the mask file.
        classes: 1 (polyp) or 3 (background, neoplastic, non-neoplastic).

    Returns:
        (H, W) uint8; 1 = polyp, or 0, 1 and 2 with three classes.

    Raises:
        DataError: the file is missing, truncated, not an image, or painted in other colours than
            its classes have.
    """
    if classes == 1:
        return binarize(read_grey_mask(path))
    path = Path(path)
    return class_numbers(_decode(path), path)


def read_grey_mask(path: Path | str) -> np.ndarray:
    """Read a mask as the grey values it is stored with, (H, W) uint8; errors as `read_mask`."""
    path = Path(path)
    picture = _decode(path)
    if picture.mode in ("1", "L", "LA"):
        return np.array(picture.convert("L"))
    # Red or green would fall under the grey threshold and be lost in silence.
    rgb = np.array(picture.convert("RGB")).astype(np.int16)
    spread = rgb.max(axis=2) - rgb.min(axis=2)
    if (spread > COLOUR_DIFFERENCE).mean() > COLOUR_FRACTION:
        raise DataError(
            [
                Fault(
                    path,
                    "mask is painted in colours",
                    "a polyp mask is black and white, one class; for black, red and green masks "
                    "set model.classes=3",
                )
            ]
        )
    return np.array(picture.convert("L"))


def binarize(grey: np.ndarray) -> np.ndarray:
    """Turn grey mask values (uint8) into zeros and ones (uint8), by the rule of `read_mask`."""
    threshold = 1 if grey.max(initial=0) <= 1 else 128
    return (grey >= threshold).astype(np.uint8)


def read_pair(pair: Pair, classes: int = 1) -> tuple[np.ndarray, np.ndarray]:
    """Read an image (H, W, 3) uint8 and its mask (H, W) uint8 of class numbers (`read_mask`).

    Raises:
        DataError: either cannot be read (both are named if both), or they differ in size.
    """
    faults: list[Fault] = []
    arrays: list[np.ndarray] = []
    for read, path in ((read_image, pair.image), (partial(read_mask, classes=classes), pair.mask)):
        try:
            arrays.append(read(path))
        except DataError as error:
            faults.extend(error.faults)
    if faults:
        raise DataError(faults)
    image, mask = arrays
    if image.shape[:2] != mask.shape:
        raise DataError([size_fault(pair, image.shape[:2], mask.shape)])
    return image, mask


def size_fault(pair: Pair, image_size: tuple[int, ...], mask_size: tuple[int, ...]) -> Fault:
    """The fault of a mask whose (height, width) is not its image's."""
    problem = (
        f"mask is {mask_size[1]} x {mask_size[0]} pixels but its image {pair.image.name} is "
        f"{image_size[1]} x {image_size[0]}"
    )
    return Fault(
        pair.mask, problem, "give the mask the size of its image (EXIF orientation applied)"
    )


def _decode(path: Path) -> Image.Image:
    """Decode all of a file, upright, in a mode that `convert` turns into 8 bits unclipped."""
    if not path.is_file():
        raise DataError([Fault(path, "there is no such file", "check the path")])
    try:
        with Image.open(path) as opened:
            picture = ImageOps.exif_transpose(opened)
            picture.load()
    except Exception as error:  # on damaged bytes decoders raise almost anything, even SyntaxError
        problem = f"cannot be decoded ({type(error).__name__}: {error})"
        raise DataError([Fault(path, problem, "replace it by an intact image file")]) from error
    if picture.mode == "F":
        raise DataError(
            [
                Fault(
                    path,
                    "holds floating-point values of unknown range",
                    "save it with 8 bits per channel",
                )
            ]
        )
    return _to_eight_bits(picture) if picture.mode.startswith("I") else picture


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    # Pillow's own conversion clips 16-bit values at 255 instead of scaling them. Values that fit 8
    # bits are left alone: writers often store an 8-bit mask in a 16-bit file.
    values = np.asarray(picture).astype(np.int64)
    if values.max(initial=0) > 255:
        values = values // 257
    return Image.fromarray(np.clip(values, 0, 255).astype(np.uint8))
