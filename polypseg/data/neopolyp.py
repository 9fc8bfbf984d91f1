"""How the committed split of NeoPolyp-Small was made: near-duplicates stay on one side.

`python -m polypseg.data.neopolyp DIR` writes both lists into the current folder.
"""

from __future__ import annotations

import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from PIL import Image

from polypseg.checkpoint import write_atomic
from polypseg.data.folders import Pair, find_pairs, natural_key
from polypseg.data.reading import read_image
from polypseg.data.splits import (
    NEOPOLYP_TEST_LIST,
    NEOPOLYP_VALIDATION_LIST,
    list_head,
    shuffled,
)

SEED = 0
TEST, VALIDATION = 200, 80
THUMBNAIL = 24
# Grey thumbnails with this correlation show one scene; what else passes only makes groups larger.
ALIKE = 0.95


def make_lists(pairs: Sequence[Pair], seed: int = SEED) -> tuple[list[str], list[str]]:
    """Choose the stems that test and those that validate.

    Images are grouped with their near-duplicates. The groups, in a seeded order, go to the test
    images while they fit into 200, then to the validation images while they fit into 80.
    """
    groups = near_duplicates(pairs)
    chosen: list[list[str]] = [[], []]
    for leader in shuffled(list(groups), seed):
        for stems, size in zip(chosen, (TEST, VALIDATION), strict=True):
            if len(stems) + len(groups[leader]) <= size:
                stems.extend(groups[leader])
                break
    test, validation = (sorted(stems, key=natural_key) for stems in chosen)
    return test, validation


def near_duplicates(pairs: Sequence[Pair]) -> dict[str, list[str]]:
    """All stems in groups of images that look alike, by the first stem of each group."""
    thumbnails = np.stack([_thumbnail(pair.image) for pair in pairs])
    leader = list(range(len(pairs)))
    for first, second in np.argwhere(np.triu(thumbnails @ thumbnails.T > ALIKE, k=1)):
        old, new = leader[second], leader[first]
        leader = [min(old, new) if one in (old, new) else one for one in leader]
    groups = defaultdict(list)
    for pair, index in zip(pairs, leader, strict=True):
        groups[pairs[index].stem].append(pair.stem)
    return dict(groups)


def _thumbnail(path: Path) -> np.ndarray:
    grey = Image.fromarray(read_image(path)).convert("L")
    small = grey.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.BILINEAR)
    values = np.asarray(small, dtype=np.float64).ravel()
    values -= values.mean()
    return values / max(float(np.linalg.norm(values)), 1e-9)


if __name__ == "__main__":
    test, validation = make_lists(find_pairs(Path(sys.argv[1])))
    for name, stems in ((NEOPOLYP_TEST_LIST, test), (NEOPOLYP_VALIDATION_LIST, validation)):
        write_atomic(Path(name), "\n".join([list_head(stems), *stems, ""]).encode())
