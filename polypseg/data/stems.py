"""Stems, by which files are paired: when two are the same, and by which slips they are not."""

from __future__ import annotations

import re
import unicodedata
from collections import defaultdict
from collections.abc import Collection
from pathlib import Path

# A number at the end tells images apart; a word is what people name masks by.
_WORD = re.compile(r"\D*[^\W\d_]{2}\D*")


def file_stem(path: Path) -> str:
    """The stem of a file in Unicode's composed form (NFC); macOS decomposes accents (NFD)."""
    return unicodedata.normalize("NFC", path.stem)


def find_slips(images: Collection[str], masks: Collection[str]) -> dict[str, dict[str, str]]:
    """Find one slip that explains why stems of masks are not those of images.

    Args:
        images: stems of images without a mask.
        masks: stems of masks without an image.

    Returns:
        What masks do wrong ("seem to end in _mask", "differ from ..."), with the stem of the image
        by that of the mask. Each mask occurs once at most.
    """
    slips = {}
    folded = {stem.casefold(): stem for stem in images}
    case = {mask: folded[mask.casefold()] for mask in masks if mask.casefold() in folded}
    if case:
        slips["differ from their images in upper and lower case alone"] = case
    endings: dict[str, dict[str, str]] = defaultdict(dict)
    for mask in masks:
        for length in range(1, len(mask)):
            image, ending = mask[:length], mask[length:]
            if image in images and _WORD.fullmatch(ending):
                endings[ending][mask] = image
    if endings:
        ending, renamed = max(endings.items(), key=lambda item: (len(item[1]), item[0]))
        slips[f"seem to end in {ending}"] = renamed
    return slips
