"""The sample images: few, small, sound, attributed, and segmented by the released model."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polypseg.cli import predict
from polypseg.data import audit_pairs, find_pairs, read_pair
from polypseg.metrics import score_masks
from polypseg.released import sample_images
from tests.docs.pages import ROOT

SAMPLES = ROOT / "samples"


def test_few_small_and_sound() -> None:
    pairs = find_pairs(SAMPLES)
    assert 6 <= len(pairs) <= 12
    assert [pair.image for pair in pairs] == sample_images()
    assert audit_pairs(pairs) == []
    for pair in pairs:
        assert pair.image.stat().st_size < 100_000
        assert 0 < read_pair(pair)[1].mean() < 1
        with Image.open(pair.image) as image:
            assert not image.getexif(), "says more than its pixels"


def test_each_is_a_different_image_that_nobody_trained_on() -> None:
    """The training set's stems are known through the committed validation list alone."""
    pairs = find_pairs(SAMPLES)
    assert len({hashlib.sha256(pair.image.read_bytes()).digest() for pair in pairs}) == len(pairs)
    held_out = (ROOT / "polypseg/data/lists/polyp_val.txt").read_text().split()
    assert not {pair.stem for pair in pairs} & set(held_out)


def test_attributed() -> None:
    page = (SAMPLES / "README.md").read_text()
    for words in ("Kvasir-SEG", "HyperKvasir", "creativecommons.org/licenses/by/4.0", "Changes:"):
        assert words in page


@pytest.mark.slow
def test_the_released_model_outlines_them(tmp_path: Path) -> None:
    """What the README promises of a fresh clone."""
    arguments = ["--out", str(tmp_path / "out"), "--device", "cpu"]
    assert predict([str(SAMPLES / "images"), *arguments]) == 0
    dice = []
    for pair in find_pairs(SAMPLES):
        found = np.array(Image.open(tmp_path / "out" / "masks" / f"{pair.stem}.png")) > 127
        dice.append(score_masks(found, read_pair(pair)[1].astype(bool)).dice)
    assert np.mean(dice) > 0.75, dice
