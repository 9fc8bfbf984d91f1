"""The distance of borders against brute force and by hand."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from polypseg.boundary import hausdorff95

masks = arrays(bool, (9, 12), elements=st.booleans())


def border(mask: np.ndarray) -> np.ndarray:
    padded = np.pad(mask, 1)
    inner = padded[:-2, 1:-1] & padded[2:, 1:-1] & padded[1:-1, :-2] & padded[1:-1, 2:]
    return np.argwhere(mask & ~inner)


@given(masks, masks)
def test_brute_force_agrees(prediction, truth):
    if not prediction.any() or not truth.any():
        return
    a, b = border(prediction), border(truth)
    distances = np.linalg.norm(a[:, None] - b[None], axis=2)
    expected = max(np.percentile(distances.min(1), 95), np.percentile(distances.min(0), 95))
    assert hausdorff95(prediction, truth) == pytest.approx(expected)
    assert hausdorff95(truth, prediction) == pytest.approx(expected)


def test_a_shift_is_its_own_length():
    truth = np.zeros((60, 60), bool)
    truth[20, 20] = True
    assert hausdorff95(np.roll(truth, (3, 4), (0, 1)), truth) == 5
    assert hausdorff95(truth, truth) == 0


def test_an_empty_mask_is_the_diagonal_away_from_any_other():
    empty, full = np.zeros((30, 40), bool), np.ones((30, 40), bool)
    assert hausdorff95(empty, empty) == 0
    assert hausdorff95(empty, full) == hausdorff95(full, empty) == math.hypot(30, 40)
