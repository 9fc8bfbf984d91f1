"""Each protocol against its definition, worked out the slow way."""

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from polypseg.boundary import hausdorff95
from polypseg.metrics import resize_logits
from polypseg.protocols import PROTOCOLS, check_protocols, score_result
from polypseg.result import Result


def made(logits: torch.Tensor, height: int, width: int) -> Result:
    """A result as the predictor makes it, from logits (1, size, size)."""
    return Result(
        resize_logits(logits, (height, width)).sigmoid().numpy(),
        logits.sigmoid().numpy(), 1, 1, 0.0, "EXPLICIT", 0.0,
    )  # fmt: skip


@pytest.fixture
def case() -> tuple[Result, np.ndarray]:
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 1, 6, 6, generator=generator)
    logits = interpolate(coarse, size=(32, 32), mode="bicubic")[0]
    truth = np.zeros((70, 50), np.uint8)
    truth[20:60, 10:30] = 1
    return made(logits, 70, 50), truth


def dice_iou(prediction: np.ndarray, truth: np.ndarray) -> tuple[float, float]:
    both, either = (prediction & truth).sum(), (prediction | truth).sum()
    return 2 * both / (prediction.sum() + truth.sum()), both / either


def test_default_counts_at_the_size_of_the_mask(case):
    result, truth = case
    (scored,) = score_result(result, truth, "default").values()
    prediction = result.probability > 0.5
    assert (scored.dice, scored.iou) == pytest.approx(dice_iou(prediction, truth > 0))
    assert scored.confusion.tp == (prediction & (truth > 0)).sum()
    assert scored.mae == pytest.approx(np.abs(result.probability.astype(float) - truth).mean())
    assert sum(vars(scored.confusion).values()) == 70 * 50
    assert scored.hd95 == hausdorff95(prediction, truth > 0) > 0


def test_paper_counts_at_the_size_of_the_network(case):
    result, truth = case
    (scored,) = score_result(result, truth, "paper").values()
    # An area average is what half of a pixel's area means.
    soft = interpolate(torch.from_numpy(truth)[None, None].float(), size=(32, 32), mode="area")
    small = soft[0, 0].numpy() >= 0.5
    assert scored.dice == pytest.approx(dice_iou(result.native[0] > 0.5, small)[0], abs=0.02)
    assert sum(vars(scored.confusion).values()) == 32 * 32
    assert scored.mae == pytest.approx(np.abs(result.native[0] - small).mean(), abs=0.01)


def test_pranet_is_the_mean_over_256_thresholds_of_the_stretched_map(case):
    result, truth = case
    p = result.probability.astype(float)
    levels = np.round((p - p.min()) / (p.max() - p.min() + 1e-8) * 255) / 255
    scores = [dice_iou(levels >= t / 255 - 1e-9, truth > 0) for t in range(256)]
    (scored,) = score_result(result, truth, "pranet").values()
    assert (scored.dice, scored.iou) == pytest.approx(tuple(np.mean(scores, axis=0)))
    stretched = (p - p.min()) / (p.max() - p.min())
    assert scored.mae == pytest.approx(np.abs(stretched - truth).mean())
    middle = levels >= 128 / 255 - 1e-9
    assert (scored.confusion.tp, scored.confusion.fp) == (
        (middle & (truth > 0)).sum(),
        (middle & (truth == 0)).sum(),
    )
    assert scored.hd95 == hausdorff95(middle, truth > 0) > 0


def test_the_stretch_hides_what_the_threshold_shows():
    """The field's known trap: nothing is above 0.5, and yet PraNet's protocol is content."""
    truth = np.zeros((32, 32), np.uint8)
    truth[8:24, 8:24] = 1
    logits = torch.full((1, 32, 32), -6.0)
    logits[0, 8:24, 8:24] = -0.4  # a probability of 0.4
    result = made(logits, 32, 32)
    assert score_result(result, truth, "default")["polyp"].dice == 0
    assert score_result(result, truth, "pranet")["polyp"].dice > 0.9


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_empty_masks_and_flat_maps_have_scores(protocol):
    empty = np.zeros((20, 20), np.uint8)
    for logit in (-4.0, 4.0):
        result = made(torch.full((1, 32, 32), logit), 20, 20)
        scored = score_result(result, empty, protocol)["polyp"]
        assert np.isfinite([scored.dice, scored.iou, scored.hd95]).all()
        if protocol != "pranet":
            assert scored.dice == (logit < 0)


def test_classes_are_scored_one_by_one_and_together():
    probabilities = np.full((3, 4, 6), 0.1, np.float32)
    predicted = np.array([[0, 0, 1, 1, 2, 2]] * 4)
    np.put_along_axis(probabilities, predicted[None], 0.8, axis=0)
    truth = np.array([[0, 1, 1, 2, 2, 0]] * 4, np.uint8)
    result = Result(probabilities, probabilities, 1, 1, 0.0, "EXPLICIT", 0.0)
    scored = score_result(result, truth, "default", ("neoplastic", "non_neoplastic"))
    assert {name: one.dice for name, one in scored.items()} == pytest.approx(
        {"polyp": 6 / 8, "neoplastic": 1 / 2, "non_neoplastic": 1 / 2}
    )
    with pytest.raises(ValueError, match="knows one class"):
        score_result(result, truth, "pranet", ("neoplastic", "non_neoplastic"))


def test_unknown_protocols_are_refused():
    with pytest.raises(ValueError, match="one of default, pranet, paper, got 'other'"):
        check_protocols(["default", "other"], 1)
