"""Duplicates among made fingerprints, against every pair looked at on its own."""

from itertools import combinations

import numpy as np
import pytest

from polypseg.data import duplicates
from polypseg.data.duplicates import Duplicate, Fingerprint, find_duplicates, group_duplicates


def flipped(bits: np.ndarray, count: int) -> np.ndarray:
    """The 512 bits with the first ``count`` of them turned."""
    changed = np.unpackbits(bits)
    changed[:count] ^= 1
    return np.packbits(changed)


@pytest.mark.parametrize("rows", [1, 2, 3, 1024])
def test_every_pair_is_found_once(rows: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many rows are compared at once."""
    monkeypatch.setattr(duplicates, "ROWS_AT_ONCE", rows)
    one, other = np.random.default_rng(0).integers(0, 256, (2, 64), dtype=np.uint8)
    groups = {
        "train": [Fingerprint(b"a", one), None, Fingerprint(b"b", other)],
        "test": [
            Fingerprint(b"c", flipped(one, 72)),  # of 512; the most that count as near
            Fingerprint(b"b", other),
            Fingerprint(b"d", flipped(other, 73)),
        ],
    }
    assert [vars(found) for found in find_duplicates(groups)] == [
        {"first": ("train", 0), "second": ("test", 0), "kind": "near", "distance": 72 / 512},
        {"first": ("train", 2), "second": ("test", 1), "kind": "exact", "distance": 0},
    ]


def found_among(prints: list[Fingerprint]) -> list[Duplicate]:
    return find_duplicates({"train": prints[::2], "test": prints[1::2]})


def test_fifty_frames_that_are_all_alike_are_few_groups() -> None:
    """Half of them the same pixels, as of a camera that was covered."""
    black = np.zeros(64, np.uint8)
    prints = [Fingerprint(b"black" if i < 25 else b"%d" % i, black) for i in range(50)]
    found = found_among(prints)
    assert len(found) == 50 * 49 / 2
    exact, near = group_duplicates(found)
    assert (exact.kind, len(exact.places), near.kind, len(near.places)) == ("exact", 25, "near", 50)


def test_groups_hold_every_pair_that_is_alike_and_no_other() -> None:
    """Prints on a line, each the neighbour of some: being alike is not transitive."""
    rng = np.random.default_rng(0)
    flips = rng.integers(0, 300, 40)
    prints = [Fingerprint(b"%d" % n, flipped(np.zeros(64, np.uint8), n)) for n in flips]
    found = found_among(prints)
    groups = group_duplicates(found)
    expected = {frozenset((one.first, one.second)): one for one in found}
    within = [frozenset(pair) for group in groups for pair in combinations(group.places, 2)]
    assert set(within) == expected.keys()
    assert len(groups) < len(found) / 3
    for group in groups:
        pairs = [expected[frozenset(pair)] for pair in combinations(group.places, 2)]
        assert group.distance == max(pair.distance for pair in pairs)
        assert (group.kind == "exact") == all(pair.kind == "exact" for pair in pairs)
