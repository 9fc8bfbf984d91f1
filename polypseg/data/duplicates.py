"""Images that occur twice: the same pixels, or nearly the same picture."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations
from typing import Literal

import numpy as np
from PIL import Image

# Cells of the grid whose neighbours are compared, on a side.
HASH_SIDE = 16
HASH_BITS = 2 * HASH_SIDE**2
# Chosen on the field's 1450 training images: of their 1,045,288 pairs that are not of one video,
# four are this close, copies of one picture all; the next differ in 83 bits. Of the pairs of
# neighbouring frames 14 % are: what is found is nearly the same picture, which is less than "of the
# same video". Copies that were cropped by 2 % on every side differ in 61 bits at most.
NEAR_BITS = 72
ROWS_AT_ONCE = 1024
Kind = Literal["exact", "near"]
Place = tuple[str, int]  # group and position


@dataclass(frozen=True)
class Fingerprint:
    """What duplicates are found by: a digest of the decoded pixels, and a perceptual hash.

    Attributes:
        digest: SHA-256 of size and pixels, so that a file saved anew without loss keeps it.
        bits: (64,) uint8, the 512 bits of the hash.
    """

    digest: bytes
    bits: np.ndarray


@dataclass(frozen=True)
class Duplicate:
    """Two images, by (group, position) each, that are the same or nearly so.

    Attributes:
        kind: "exact" if all pixels agree, "near" if the perceptual hashes do.
        distance: share of the hash's bits that differ, 0 to 1.
    """

    first: Place
    second: Place
    kind: Kind
    distance: float


@dataclass(frozen=True)
class Alike:
    """Images each of which is the same as each other, or nearly so.

    Attributes:
        kind: "exact" if all pixels of all agree.
        distance: the largest of two of them.
    """

    places: list[Place]
    kind: Kind
    distance: float


def fingerprint(image: np.ndarray) -> Fingerprint:
    """Fingerprint an image (H, W, 3) uint8.

    The perceptual hash is Krawetz's difference hash, taken in both directions: whether the mean
    grey rises from each cell of a coarse grid to the next, along the rows and down the columns.
    Scale, compression, brightness and contrast hardly change it.
    """
    height, width = image.shape[:2]
    digest = hashlib.sha256(f"{height}x{width}".encode())
    digest.update(image.tobytes())
    grey = Image.fromarray(image).convert("L")
    along = np.asarray(grey.resize((HASH_SIDE + 1, HASH_SIDE), Image.Resampling.BOX))
    down = np.asarray(grey.resize((HASH_SIDE, HASH_SIDE + 1), Image.Resampling.BOX))
    rises = np.stack([along[:, 1:] > along[:, :-1], down[1:] > down[:-1]])
    return Fingerprint(digest.digest(), np.packbits(rises))


def find_duplicates(groups: Mapping[str, Sequence[Fingerprint | None]]) -> list[Duplicate]:
    """Find equal and nearly equal images within and across groups of fingerprints.

    Args:
        groups: fingerprints by the name of their group; None where an image could not be read.

    Returns:
        Every such pair once, in the order of the groups; closest first for each first image.
    """
    places = [
        (group, index)
        for group, prints in groups.items()
        for index, found in enumerate(prints)
        if found is not None
    ]
    prints = [found for group in groups.values() for found in group if found is not None]
    if not prints:
        return []
    words = np.stack([found.bits for found in prints]).view(np.uint64)
    duplicates = []
    for start in range(0, len(words), ROWS_AT_ONCE):
        # Only what comes later: each pair once. One word at a time keeps the table small.
        rows = words[start : start + ROWS_AT_ONCE]
        distance = np.zeros((len(rows), len(words)), np.uint16)
        for column in range(words.shape[1]):
            distance += np.bitwise_count(rows[:, None, column] ^ words[None, :, column])
        for row, other in np.argwhere(distance <= NEAR_BITS).tolist():
            first = start + row
            if other > first:
                same = prints[first].digest == prints[other].digest
                share = float(distance[row, other]) / HASH_BITS
                kind: Kind = "exact" if same else "near"
                duplicates.append(Duplicate(places[first], places[other], kind, share))
    order = {place: number for number, place in enumerate(places)}
    return sorted(duplicates, key=lambda found: (order[found.first], found.distance))


def group_duplicates(duplicates: Sequence[Duplicate]) -> list[Alike]:
    """Say the same with few words: of fifty black frames 1225 pairs are alike.

    Returns:
        Groups that together hold every pair, and no pair that is none; exact ones first. To be
        nearly the same is not transitive: an image may be in several groups.
    """
    distances = {frozenset((one.first, one.second)): one.distance for one in duplicates}
    groups = []
    kinds: tuple[Kind, ...] = ("exact", "near")
    for kind in kinds:
        alike: dict[Place, set[Place]] = defaultdict(set)
        for found in duplicates:
            if kind in ("near", found.kind):  # what is the same is nearly the same, too
                alike[found.first].add(found.second)
                alike[found.second].add(found.first)
        told: set[frozenset[Place]] = set()
        for found in duplicates:
            if found.kind != kind or frozenset((found.first, found.second)) in told:
                continue
            places = [found.first, found.second]
            for place in sorted(alike[found.first] & alike[found.second]):
                if alike[place].issuperset(places):
                    places.append(place)
            pairs = [frozenset(pair) for pair in combinations(places, 2)]
            told.update(pairs)
            groups.append(Alike(places, kind, max(distances[pair] for pair in pairs)))
    return groups
