"""Decoding images and masks, with Pillow (16-bit colours with OpenCV), into plain NumPy arrays."""

from __future__ import annotations

import re
from functools import partial
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageOps

from polypseg.data.classes import class_numbers
from polypseg.data.faults import DataError, Fault
from polypseg.data.folders import Pair
from polypseg.data.regions import even_regions

# JPEG's chroma subsampling tints the border of a black-and-white mask a little; a painted class
# differs by far more.
COLOUR_DIFFERENCE = 64
COLOUR_FRACTION = 0.001
# JPEG moves the values next to a mask's border; values further than this from black and white are
# no such noise.
NOISE = 32
# Of the depths that cameras and microscopes have, for files of more than 8 bits.
LARGEST_VALUES = tuple(2**bits - 1 for bits in (8, 10, 12, 14, 15, 16))
LOSSY_FORMATS = ("JPEG", "MPO", "JPEG2000", "WEBP")
LOSSY_COMPRESSIONS = ("jpeg", "tiff_jpeg", "webp")  # within a TIFF file
LISTED_VALUES = 8
# Pillow's names of colours with 16 bits each, of which it decodes the upper 8 alone. (Its BGR;16
# has 16 bits for all three.)
DEEP_COLOURS = re.compile("(LA|RGB|RGBA|RGBX|RGBa);16[BLN]")


def read_image(path: Path | str) -> np.ndarray:
    """Read an image as RGB.

    Grey, palette, CMYK, RGBA (alpha dropped) and 16-bit files are converted; the EXIF orientation
    is applied, so the array is what a viewer shows. A 16-bit file, grey or RGB, is scaled to 8 bits
    from the smallest depth of 8, 10, 12, 14, 15 and 16 bits that holds its largest value.

    Args:
        path: the image file.

    Returns:
        (H, W, 3) uint8.

    Raises:
        DataError: the file is missing, truncated, too large, or not an image; the message names
            it.
    """
    return np.array(_to_eight_bits(_decode(Path(path))).convert("RGB"))


def read_mask(path: Path | str, classes: int = 1) -> np.ndarray:
    """Read a polyp mask as class numbers.

    With one class, a 1-bit mask is taken as it is, a mask whose largest value is 1 counts anything
    above 0 as polyp, any other is cut at 128 of 255. A 16-bit mask is scaled as `read_image` does;
    if it holds one value above 255 and else only 0, that value is polyp. Of a mask painted black,
    red and green, as for three classes, either colour is polyp. With three classes, see
    `class_numbers`. The mask's own EXIF orientation is applied, by the same rule as for images.

    Args:
        path: the mask file.
        classes: 1 (polyp) or 3 (background, neoplastic, non-neoplastic).

    Returns:
        (H, W) uint8; 1 = polyp, or 0, 1 and 2 with three classes.

    Raises:
        DataError: the file is missing, truncated, too large, not an image, painted in other colours
            than its classes have, or, with one class, a region of it is neither black nor white
            (grey along a border is no region). Unless it is a JPEG or its like, also if it has
            neither a white pixel nor 1 for its largest value, though it is not all 0.
    """
    if classes == 1:
        return binarize(read_one_class(path)[0])
    path = Path(path)
    return class_numbers(_to_eight_bits(_decode(path)), path)


def read_one_class(path: Path | str) -> tuple[np.ndarray, bool]:
    """Read a mask of one class as it is stored; errors as `read_mask`.

    Returns:
        Grey values (H, W) uint8, and whether these are the red and green of three classes, made
        white.
    """
    path = Path(path)
    picture = _decode(path)
    if _is_coloured(picture):
        return _any_class(picture, path), True
    grey = _grey(picture)
    if picture.mode == "1":
        return grey, False
    stored = np.asarray(picture) if picture.mode.startswith("I") else grey
    # Any of these would be cut away as black. JPEG puts such values into an empty mask.
    if 1 < grey.max(initial=0) < 128 and not _is_lossy(path):
        raise DataError([_value_fault(path, "it holds", stored)])
    between = _regions_between(grey, path)
    if between.any():
        painted = f"{between.mean():.2%} of it is painted with"
        raise DataError([_value_fault(path, painted, stored[between])])
    return grey, False


def _regions_between(grey: np.ndarray, path: Path) -> np.ndarray:
    """Which pixels (H, W) lie in regions, not in soft borders, that are neither black nor white."""
    between = even_regions(grey, (grey > NOISE) & (grey < 255 - NOISE))
    if between.any() or grey.max(initial=0) <= 1:
        return between
    # Class numbers beside white. Where black is stored as 16, say, it is the darkest value.
    numbers = even_regions(grey, (grey > grey.min(initial=255)) & (grey <= NOISE), difference=0)
    return between if numbers.any() and _is_lossy(path) else numbers


def _value_fault(path: Path, holds: str, values: np.ndarray) -> Fault:
    return Fault(
        path,
        f"mask is not black and white: {holds} {_listed(np.unique(values).tolist())}",
        "save it with the values 0 and 255, or 0 and 1; for masks of three classes "
        "set model.classes=3",
    )


def _is_coloured(picture: Image.Image) -> bool:
    if picture.mode.startswith("I") or picture.mode in ("1", "L", "LA"):
        return False
    rgb = np.array(picture.convert("RGB")).astype(np.int16)
    spread = rgb.max(axis=2) - rgb.min(axis=2)
    return bool((spread > COLOUR_DIFFERENCE).mean() > COLOUR_FRACTION)


def _any_class(picture: Image.Image, path: Path) -> np.ndarray:
    """White (255) where a picture is red or green, whatever numbers its palette gives them."""
    try:
        numbers = class_numbers(picture.convert("RGB"), path)
    except DataError as error:
        remedy = "paint polyps white on black, or red and green as for three classes"
        raise DataError([Fault(path, error.faults[0].problem, remedy)]) from error
    return np.where(numbers > 0, 255, 0).astype(np.uint8)


def _grey(picture: Image.Image) -> np.ndarray:
    if picture.mode.startswith("I"):
        values = np.asarray(picture)
        white = int(values.max(initial=0))
        if white > 255 and np.isin(values, (0, white)).all():
            # Whatever the depth of such a mask is taken for, its one value is white.
            return np.where(values == white, 255, 0).astype(np.uint8)
        picture = _to_eight_bits(picture)
    return np.array(picture.convert("L"))


def _listed(values: list[int]) -> str:
    if len(values) > LISTED_VALUES:
        return f"{len(values)} values from {values[0]} to {values[-1]}"
    if len(values) == 1:
        return f"the value {values[0]} alone"
    return f"the values {', '.join(map(str, values[:-1]))} and {values[-1]}"


def _is_lossy(path: Path) -> bool:
    with Image.open(path) as opened:
        compression = opened.info.get("compression")
        return opened.format in LOSSY_FORMATS or compression in LOSSY_COMPRESSIONS


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
    """Decode all of a file, upright; `_to_eight_bits` has to come before `convert`."""
    if not path.is_file():
        raise DataError([Fault(path, "there is no such file", "check the path")])
    try:
        with Image.open(path) as opened:
            deep = any(DEEP_COLOURS.search(str(tile)) for tile in opened.tile)
            picture = ImageOps.exif_transpose(opened)
            picture.load()
    except Exception as error:  # on damaged bytes decoders raise almost anything, even SyntaxError
        remedy = "replace it by an intact image file"
        if isinstance(error, Image.DecompressionBombError):
            # Pillow refuses what has more than twice its limit.
            remedy = f"make it smaller, at most {2 * (Image.MAX_IMAGE_PIXELS or 0)} pixels"
        problem = f"cannot be decoded ({type(error).__name__}: {error})"
        raise DataError([Fault(path, problem, remedy)]) from error
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
    return _deep_colours(path, picture.convert("RGB")) if deep else picture


def _deep_colours(path: Path, upper: Image.Image) -> Image.Image:
    """A file of 16-bit colours as 8-bit RGB; ``upper`` has the upper bits of each, upright."""
    content = np.frombuffer(path.read_bytes(), np.uint8)
    values = cv2.imdecode(content, cv2.IMREAD_COLOR | cv2.IMREAD_ANYDEPTH)
    # Two decoders have to agree, on the orientation too: not every OpenCV reads each kind of file.
    if (
        values is None
        or values.dtype != np.uint16
        or not np.array_equal(values[..., ::-1] // 256, np.asarray(upper))
    ):
        problem = "cannot be decoded with all 16 bits of its colours"
        raise DataError([Fault(path, problem, "save it with 8 bits per channel")])
    return Image.fromarray(_scale(values[..., ::-1]))


def _to_eight_bits(picture: Image.Image) -> Image.Image:
    """Scale a picture of more than 8 bits from the smallest known depth that holds its values."""
    if not picture.mode.startswith("I"):
        return picture
    # Pillow's own conversion clips 16-bit values at 255 instead of scaling them.
    return Image.fromarray(_scale(np.asarray(picture)))


def _scale(values: np.ndarray) -> np.ndarray:
    """Values of more than 8 bits as uint8. Those that fit 8 bits are left alone: writers often
    store an 8-bit mask in a 16-bit file."""
    brightest = int(values.max(initial=0))
    largest = next((value for value in LARGEST_VALUES if brightest <= value), LARGEST_VALUES[-1])
    return np.clip(values.astype(np.int64) * 255 // largest, 0, 255).astype(np.uint8)
