"""Synthetic data looks like the field's folders, is reproducible, and overwrites nothing."""

from pathlib import Path

import numpy as np
import pytest
from scipy.ndimage import binary_dilation, label

from polypseg.data.audit import audit_pairs
from polypseg.data.faults import DataError
from polypseg.data.folders import find_pairs
from polypseg.data.reading import read_pair
from polypseg.data.splits import split_for, test_folders
from polypseg.data.synthetic import draw_pair, make_synthetic


def test_layout_is_what_training_and_evaluation_read(tmp_path: Path) -> None:
    make_synthetic(tmp_path / "new" / "data", train=10, test=3, size=64)
    split = split_for(tmp_path / "new" / "data")
    folders = test_folders(tmp_path / "new" / "data")
    assert (len(split.train), len(split.val)) == (9, 1)
    assert list(folders) == ["Synthetic"]
    test_pairs = find_pairs(folders["Synthetic"])
    assert len(test_pairs) == 3
    assert audit_pairs(split.train + split.val + test_pairs) == []
    image, mask = read_pair(test_pairs[0])
    assert image.shape == (64, 64, 3)
    assert mask.shape == (64, 64)


def files(root: Path) -> dict[str, bytes]:
    return {str(f.relative_to(root)): f.read_bytes() for f in root.rglob("*") if f.is_file()}


def test_same_seed_same_files_whatever_the_numbers(tmp_path: Path) -> None:
    for name, train, seed in (("a", 3, 1), ("b", 5, 1), ("c", 3, 2)):
        make_synthetic(tmp_path / name, train=train, test=1, size=32, seed=seed)
    a, b, c = (files(tmp_path / name) for name in "abc")
    assert len(a) == 8
    assert len(b) == 12
    assert a == {name: b[name] for name in a}
    assert all(a[name] != c[name] for name in a)
    assert len(set(b.values())) == 12  # no image twice, training and test included


def test_refuses_a_folder_with_content_and_a_file(tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("kept")
    (tmp_path / "file").write_text("kept")
    for name in ("full", "file"):
        with pytest.raises(DataError, match="not an empty folder"):
            make_synthetic(tmp_path / name, train=1, test=1, size=32)
    assert files(tmp_path) == {"full/precious.txt": b"kept", "file": b"kept"}


@pytest.mark.parametrize("wrong", [{"train": 0}, {"test": 0}, {"size": 31}, {"seed": -1}])
def test_numbers_out_of_range(tmp_path: Path, wrong: dict[str, int]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        make_synthetic(tmp_path / "new", **wrong)
    assert not (tmp_path / "new").exists()


def test_polyps_differ_from_their_surroundings_but_not_trivially() -> None:
    separations = []
    for index in range(40):
        image, mask = draw_pair(np.random.default_rng(index), 96)
        assert 1 <= label(mask)[1] <= 3
        assert 0.002 < mask.mean() < 0.5
        ring = binary_dilation(mask, iterations=6) & ~binary_dilation(mask, iterations=2)
        inside, outside = image[mask].astype(float), image[ring].astype(float)
        distance = np.abs(inside.mean(axis=0) - outside.mean(axis=0)) / outside.std(axis=0)
        separations.append(distance.max())
    # One grey level for all would leave nothing to learn; equal means would leave nothing to see.
    assert np.median(separations) > 0.5
    assert np.quantile(separations, 0.25) < 3
