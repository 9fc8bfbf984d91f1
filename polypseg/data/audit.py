"""Checking every image and mask before a run is started on them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import ExifTags, Image

from polypseg.data.duplicates import Fingerprint, fingerprint
from polypseg.data.faults import DataError, Fault
from polypseg.data.folders import Pair
from polypseg.data.reading import (
    NOISE,
    binarize,
    read_image,
    read_mask,
    read_one_class,
    size_fault,
)

_T = TypeVar("_T")

AUDIT_THREADS = 4
GREY_FRACTION = 0.05
EMPTY_MASK = "mask is empty"  # the problem of such a mask's fault


@dataclass(frozen=True)
class Inspection:
    """What was found out about one pair by decoding both of its files.

    Attributes:
        faults: all that is wrong with the pair.
        size: (height, width) of the image; None where it cannot be read.
        polyp_share: of the mask's pixels, 0 to 1; None where the mask cannot be read.
        painted: whether one class is read from a mask that is painted as of three.
        fingerprint: of the image, for `find_duplicates`; None where it cannot be read.
    """

    pair: Pair
    faults: list[Fault]
    size: tuple[int, int] | None = None
    polyp_share: float | None = None
    painted: bool = False
    fingerprint: Fingerprint | None = None


def audit_pairs(
    pairs: Sequence[Pair],
    progress: Callable[[int, int], None] | None = None,
    *,
    classes: int = 1,
) -> list[Fault]:
    """Decode every image and mask in full and report all that is wrong with them.

    Args:
        pairs: the files, as `find_pairs` gives them.
        progress: called with (pairs done, pairs in all) after each pair, from the calling thread.
        classes: of the masks: 1, or 3 for NeoPolyp's colours.

    Returns:
        In the order of the pairs. Severity "error": a file that cannot be decoded, a mask of
        another size than its image, a mask that is grey or of other colours instead of black and
        white, be it on a region alone.
        Severity "warning": an empty or a full mask, an EXIF orientation on one file of a pair that
        the other lacks, a file of several pages.
    """
    return [
        fault
        for inspection in inspect_pairs(pairs, progress, duplicates=False, classes=classes)
        for fault in inspection.faults
    ]


def inspect_pairs(
    pairs: Sequence[Pair],
    progress: Callable[[int, int], None] | None = None,
    *,
    duplicates: bool = True,
    classes: int = 1,
) -> list[Inspection]:
    """Decode every image and mask and say what each is like; arguments as `audit_pairs`.

    Args:
        duplicates: whether to take fingerprints too.
    """
    inspections = []
    with ThreadPoolExecutor(AUDIT_THREADS) as pool:
        results = pool.map(partial(_inspect, fingerprints=duplicates, classes=classes), pairs)
        for done, inspection in enumerate(results, start=1):
            inspections.append(inspection)
            if progress is not None:
                progress(done, len(pairs))
    return inspections


def _inspect(pair: Pair, fingerprints: bool, classes: int) -> Inspection:
    faults: list[Fault] = []
    image = _read(read_image, pair.image, faults)
    painted = False
    if classes == 1:
        read = _read(read_one_class, pair.mask, faults)
        stored, painted = (None, False) if read is None else read
    else:
        stored = _read(partial(read_mask, classes=classes), pair.mask, faults)
    polyp = stored if stored is None or classes > 1 else binarize(stored)
    if image is not None and stored is not None and polyp is not None:
        if image.shape[:2] != stored.shape:
            faults.append(size_fault(pair, image.shape[:2], stored.shape))
        values = _grey_values(pair.mask, stored) if classes == 1 else []
        # A mask of unknown values is neither empty nor full.
        faults.extend(values or _extent(pair.mask, polyp))
        if _orientation(pair.image) != _orientation(pair.mask):
            remedy = "check that the mask lies on the polyp, then rotate the pixels, drop the tag"
            problem = f"EXIF orientation differs from that of its mask {pair.mask.name}"
            faults.append(Fault(pair.image, problem, remedy, "warning"))
    for path, decoded in ((pair.image, image), (pair.mask, stored)):
        faults.extend([] if decoded is None else _further_pages(path))
    return Inspection(
        pair,
        faults,
        size=None if image is None else (image.shape[0], image.shape[1]),
        polyp_share=None if polyp is None else float((polyp > 0).mean()),
        painted=painted,
        fingerprint=fingerprint(image) if fingerprints and image is not None else None,
    )


def _read(read: Callable[[Path], _T], path: Path, faults: list[Fault]) -> _T | None:
    try:
        return read(path)
    except DataError as error:
        faults.extend(error.faults)
        return None


def _grey_values(path: Path, grey: np.ndarray) -> list[Fault]:
    brightest = int(grey.max())
    between = float(((grey > NOISE) & (grey < 255 - NOISE)).mean())
    remedy = "save the mask in black (0) and white (255), or as 0 and 1"
    if between > GREY_FRACTION:
        return [Fault(path, f"mask is not black and white: {between:.0%} of it is grey", remedy)]
    if NOISE < brightest < 128:
        problem = f"mask has no white pixel, its brightest is {brightest} of 255"
        return [Fault(path, problem, remedy)]
    return []


def _extent(path: Path, mask: np.ndarray) -> list[Fault]:
    if not mask.any():
        return [Fault(path, EMPTY_MASK, "make sure the image shows no polyp", "warning")]
    if mask.all():
        return [Fault(path, "mask is full", "make sure all of the image is polyp", "warning")]
    return []


def _orientation(path: Path) -> int:
    with Image.open(path) as opened:
        return opened.getexif().get(ExifTags.Base.Orientation, 1)


def _further_pages(path: Path) -> list[Fault]:
    with Image.open(path) as opened:
        # What cameras put behind a photograph (MPO) is a preview or the view of the other eye.
        several = opened.format != "MPO" and getattr(opened, "is_animated", False)
    if not several:
        return []
    problem = "holds several pages, of which only the first is read"
    remedy = "save those that count as files of their own, each with its mask"
    return [Fault(path, problem, remedy, "warning")]
