"""Duplicates among made fingerprints, against every pair looked at on its own."""

import numpy as np
import pytest

from polypseg.data import duplicates
from polypseg.data.duplicates import Fingerprint, find_duplicates


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
