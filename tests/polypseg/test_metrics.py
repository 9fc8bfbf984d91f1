"""Dice and IoU against set arithmetic, and the resizing of logits against NumPy."""

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays

from polypseg.metrics import Confusion, mean_scores, resize_logits, score_masks

SHAPES = array_shapes(min_dims=2, max_dims=2, max_side=8)


@given(st.data())
def test_scores_agree_with_sets_of_pixels(data: st.DataObject) -> None:
    shape = data.draw(SHAPES)
    prediction = data.draw(arrays(bool, shape))
    truth = data.draw(arrays(bool, shape))
    p = set(zip(*np.nonzero(prediction), strict=True))
    t = set(zip(*np.nonzero(truth), strict=True))
    score = score_masks(prediction, truth)
    assert score.confusion == Confusion(
        tp=len(p & t), fp=len(p - t), fn=len(t - p), tn=truth.size - len(p | t)
    )
    if p | t:
        assert score.iou == pytest.approx(len(p & t) / len(p | t))
        assert score.dice == pytest.approx(2 * len(p & t) / (len(p) + len(t)))
        assert score.dice == pytest.approx(2 * score.iou / (1 + score.iou))
    if p and t:
        assert score.confusion.precision == pytest.approx(len(p & t) / len(p))
        assert score.confusion.recall == pytest.approx(len(p & t) / len(t))


def test_empty_policy() -> None:
    empty = np.zeros((4, 5), bool)
    one = empty.copy()
    one[1, 2] = True
    assert (score_masks(empty, empty).dice, score_masks(empty, empty).iou) == (1.0, 1.0)
    assert (score_masks(one, empty).dice, score_masks(one, empty).iou) == (0.0, 0.0)
    assert (score_masks(empty, one).dice, score_masks(empty, one).iou) == (0.0, 0.0)
    for prediction, truth, expected in ((empty, empty, 1), (one, empty, 0), (empty, one, 0)):
        confusion = score_masks(prediction, truth).confusion
        assert (confusion.precision, confusion.recall) == (expected, expected)


def test_torch_prediction_against_numpy_truth() -> None:
    prediction = torch.tensor([[True, True, False, False]])
    truth = np.array([[False, True, True, True]])
    score = score_masks(prediction, truth)
    assert score.confusion == Confusion(tp=1, fp=1, fn=2, tn=0)
    assert (score.dice, score.iou) == (2 / 5, 1 / 4)


def test_mean_is_over_images_and_not_over_pixels() -> None:
    full, empty = np.ones((10, 10), bool), np.zeros((10, 10), bool)
    one = empty.copy()
    one[0, 0] = True
    scores = [score_masks(full, full), score_masks(empty, one), score_masks(~one, full)]
    means = mean_scores(scores)
    assert means == {
        "mDice": pytest.approx((1 + 0 + 198 / 199) / 3),
        "mIoU": pytest.approx((1 + 0 + 99 / 100) / 3),
    }


def test_bad_input_is_named() -> None:
    good = np.zeros((4, 5), bool)
    with pytest.raises(ValueError, match="prediction must be a boolean"):
        score_masks(good.astype(np.uint8), good)
    with pytest.raises(ValueError, match="truth must be a boolean"):
        score_masks(good, good[None])
    with pytest.raises(ValueError, match=r"prediction is \(4, 5\) but truth is \(5, 4\)"):
        score_masks(good, good.T)
    with pytest.raises(ValueError, match="scores is empty"):
        mean_scores([])
    with pytest.raises(ValueError, match=r"logits must be \(K, h, w\)"):
        resize_logits(torch.zeros(4, 5), (8, 8))


def interpolate_axis(values: np.ndarray, size: int, axis: int) -> np.ndarray:
    """Linear interpolation between pixel centres, held constant outside of the outermost ones."""
    old = values.shape[axis]
    centres = (np.arange(size) + 0.5) * old / size - 0.5
    return np.apply_along_axis(lambda row: np.interp(centres, np.arange(old), row), axis, values)


@pytest.mark.parametrize("size", [(5, 7), (13, 21), (3, 4), (11, 2)])
def test_resize_logits_is_bilinear_between_pixel_centres(size: tuple[int, int]) -> None:
    logits = torch.randn(3, 5, 7, generator=torch.Generator().manual_seed(0))
    expected = interpolate_axis(interpolate_axis(logits.double().numpy(), size[0], 1), size[1], 2)
    np.testing.assert_allclose(resize_logits(logits, size).numpy(), expected, atol=1e-5)


def test_resize_logits_computes_half_precision_in_float32() -> None:
    logits = torch.randn(1, 4, 4, generator=torch.Generator().manual_seed(0)).bfloat16()
    torch.testing.assert_close(resize_logits(logits, (9, 9)), resize_logits(logits.float(), (9, 9)))
