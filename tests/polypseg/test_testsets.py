"""What is said of a test set beside its figures is true."""

from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polypseg.data import (
    DataError,
    Pair,
    find_pairs,
    make_synthetic,
    published_split,
    read_image,
)
from polypseg.data.duplicates import NEAR_BITS, fingerprint
from polypseg.data.splits import CLINIC_PREFIX, clinic_sequence
from polypseg.testsets import NOTES, find_test_sets


@pytest.fixture(scope="module")
def test_frames(real_data: Path) -> list[Pair]:
    return find_pairs(real_data / "TestDataset" / "CVC-ClinicDB")


@pytest.fixture(scope="module")
def training(real_data: Path) -> dict[str, list[Pair]]:
    """ClinicDB's training frames: all, and those that are left where the others validate."""
    pairs = find_pairs(real_data / "TrainDataset")
    return {"all": of_clinic(pairs), "split": of_clinic(published_split(pairs).train)}


def of_clinic(pairs: Iterable[Pair]) -> list[Pair]:
    return [pair for pair in pairs if pair.stem.startswith(CLINIC_PREFIX)]


def frame(stem: str) -> int:
    return int(stem.removeprefix(CLINIC_PREFIX))


@pytest.mark.parametrize(("part", "count"), [("all", 62), ("split", 56)])
def test_so_many_clinicdb_frames_are_of_training_videos(part, count, test_frames, training):
    trained = {frame(pair.stem): clinic_sequence(pair.stem) for pair in training[part]}
    sequences = [(frame(pair.stem), clinic_sequence(pair.stem)) for pair in test_frames]
    assert len(sequences) == 62
    shared = [(number, video) for number, video in sequences if video in trained.values()]
    neighbours = [
        number
        for number, video in sequences
        if video in (trained.get(number - 1), trained.get(number + 1))
    ]
    assert len(shared) == len(neighbours) == count
    assert f"{count} " in NOTES["CVC-ClinicDB"]


@pytest.mark.slow
def test_two_measures_count_the_near_identical_frames(test_frames, training):
    """16 by their grey values, 21 by the hash of `polypseg-check`; see docs/polypseg/data.md."""
    tests = [read_image(pair.image) for pair in test_frames]
    trained = [read_image(pair.image) for pair in training["all"]]
    left = {pair.stem for pair in training["split"]}
    kept = np.array([pair.stem in left for pair in training["all"]])
    likeness = grey_cells(tests) @ grey_cells(trained).T
    bits = bits_apart(tests, trained)
    by_grey, by_hash = (likeness > 0.98), (bits <= NEAR_BITS)
    assert [int(found.any(1).sum()) for found in (by_grey, by_hash)] == [16, 21]
    assert [int(found[:, kept].any(1).sum()) for found in (by_grey, by_hash)] == [15, 19]
    assert (by_grey.any(1) & by_hash.any(1)).sum() == 14
    assert "16 are near-identical" in NOTES["CVC-ClinicDB"]


def grey_cells(images: list[np.ndarray]) -> np.ndarray:
    """Each image's grey in 64 x 64 cells, of mean 0 and norm 1, so that products correlate."""
    box = Image.Resampling.BOX
    grey = [Image.fromarray(image).convert("L").resize((64, 64), box) for image in images]
    cells = np.stack([np.asarray(one, float).ravel() for one in grey])
    cells -= cells.mean(axis=1, keepdims=True)
    return cells / np.linalg.norm(cells, axis=1, keepdims=True)


def bits_apart(first: list[np.ndarray], second: list[np.ndarray]) -> np.ndarray:
    words = [
        np.stack([fingerprint(image).bits for image in images]).view(np.uint64)
        for images in (first, second)
    ]
    return np.bitwise_count(words[0][:, None] ^ words[1][None]).sum(axis=2)


def test_the_faults_of_all_folders_of_a_root_are_reported_together(tmp_path):
    make_synthetic(tmp_path, train=2, test=2, size=64)
    tests = tmp_path / "TestDataset"
    sound = next(tests.iterdir())
    damaged = next((sound / "images").iterdir())
    damaged.write_bytes(b"no image")
    (tests / "Unsound" / "images").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        find_test_sets([tmp_path])
    named = {fault.path for fault in caught.value.faults}
    assert damaged in named
    assert any(path.is_relative_to(tests / "Unsound") for path in named)
