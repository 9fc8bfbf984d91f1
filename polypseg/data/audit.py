"""Checking every image and mask before a run is started on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
from PIL import ExifTags, Image

from polypseg.data.faults import DataError, Fault
from polypseg.data.folders import Pair, scan_pairs
from polypseg.data.reading import binarize, read_grey_mask, read_image, size_fault

AUDIT_THREADS = 4
# JPEG moves the values next to a mask's border; values further than this from black and white are
# no such noise.
NOISE = 32
GREY_FRACTION = 0.05


def audit_folder(root: Path) -> list[Fault]:
    """All that is wrong with a folder: what cannot be paired, and `audit_pairs` of the rest."""
    pairs, faults = scan_pairs(root)
    return [*faults, *audit_pairs(pairs)]


def audit_pairs(
    pairs: Sequence[Pair], progress: Callable[[int, int], None] | None = None
) -> list[Fault]:
    """Decode every image and mask in full and report all that is wrong with them.

    Args:
        pairs: the files, as `find_pairs` gives them.
        progress: called with (pairs done, pairs in all) after each pair, from the calling thread.

    Returns:
        In the order of the pairs. Severity "error": a file that cannot be decoded, a mask of
        another size than its image, a mask that is grey or coloured instead of black and white.
        Severity "warning": an empty or a full mask, an EXIF orientation on one file of a pair that
        the other lacks.
    """
    faults: list[Fault] = []
    with ThreadPoolExecutor(AUDIT_THREADS) as pool:
        for done, found in enumerate(pool.map(_audit_pair, pairs), start=1):
            faults.extend(found)
            if progress is not None:
                progress(done, len(pairs))
    return faults


def _audit_pair(pair: Pair) -> list[Fault]:
    faults: list[Fault] = []
    arrays: list[np.ndarray] = []
    for read, path in ((read_image, pair.image), (read_grey_mask, pair.mask)):
        try:
            arrays.append(read(path))
        except DataError as error:
            faults.extend(error.faults)
    if faults:
        return faults
    image, grey = arrays
    if image.shape[:2] != grey.shape:
        faults.append(size_fault(pair, image.shape[:2], grey.shape))
    faults.extend(_mask_values(pair.mask, grey))
    if _orientation(pair.image) != _orientation(pair.mask):
        remedy = "check that the mask lies on the polyp, then rotate the pixels and drop the tag"
        problem = f"EXIF orientation differs from that of its mask {pair.mask.name}"
        faults.append(Fault(pair.image, problem, remedy, "warning"))
    return faults


def _mask_values(path: Path, grey: np.ndarray) -> list[Fault]:
    brightest = int(grey.max())
    between = float(((grey > NOISE) & (grey < 255 - NOISE)).mean())
    remedy = "save the mask in black (0) and white (255), or as 0 and 1"
    if between > GREY_FRACTION:
        return [Fault(path, f"mask is not black and white: {between:.0%} of it is grey", remedy)]
    if NOISE < brightest < 128:
        problem = f"mask has no white pixel, its brightest is {brightest} of 255"
        return [Fault(path, problem, remedy)]
    polyp = binarize(grey)
    if not polyp.any():
        return [Fault(path, "mask is empty", "make sure the image shows no polyp", "warning")]
    if polyp.all():
        return [Fault(path, "mask is full", "make sure all of the image is polyp", "warning")]
    return []


def _orientation(path: Path) -> int:
    with Image.open(path) as opened:
        return opened.getexif().get(ExifTags.Base.Orientation, 1)
