"""The structure loss against an independent recomputation in NumPy and SciPy."""

import math

import numpy as np
import pytest
import torch
from scipy.ndimage import uniform_filter
from scipy.special import expit, softmax
from torch.nn import functional

from polypseg.losses import class_loss, segmentation_loss, structure_loss


def blob_mask(size: int = 48) -> torch.Tensor:
    y, x = torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
    near_border = (y - 8) ** 2 + (x - 6) ** 2 < 100
    middle = (y - 30) ** 2 / 2 + (x - 28) ** 2 < 60
    return torch.stack([near_border, middle])[:, None].double()


def random_logits(mask: torch.Tensor, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return 3 * torch.randn(mask.shape, generator=generator, dtype=torch.double)


def pixel_weights(mask: np.ndarray) -> np.ndarray:
    # Zeros outside count in the average, as in a pooling with zero padding.
    return 1 + 5 * np.abs(uniform_filter(mask, size=31, mode="constant", cval=0.0) - mask)


def loss_by_numpy(logits: np.ndarray, mask: np.ndarray) -> float:
    p, w = expit(logits), pixel_weights(mask)
    entropy = -(mask * np.log(p) + (1 - mask) * np.log1p(-p))
    intersection, total = (w * p * mask).sum(), (w * (p + mask)).sum()
    iou_loss = 1 - (intersection + 1) / (total - intersection + 1)
    return (w * entropy).sum() / w.sum() + iou_loss


def test_agrees_with_numpy_and_is_a_mean_over_images() -> None:
    mask = blob_mask()
    logits = random_logits(mask)
    expected = [
        loss_by_numpy(z[0].numpy(), m[0].numpy()) for z, m in zip(logits, mask, strict=True)
    ]
    assert abs(expected[0] - expected[1]) > 0.01
    assert structure_loss(logits, mask).item() == pytest.approx(np.mean(expected), rel=1e-10)
    for one in range(2):
        alone = structure_loss(logits[one : one + 1], mask[one : one + 1])
        assert alone.item() == pytest.approx(expected[one], rel=1e-10)


def test_closed_form_without_a_polyp() -> None:
    pixels = 40 * 40
    loss = structure_loss(torch.zeros(1, 1, 40, 40), torch.zeros(1, 1, 40, 40))
    assert loss.item() == pytest.approx(math.log(2) + 1 - 1 / (0.5 * pixels + 1), rel=1e-5)


def test_the_reduced_form_would_lose_the_weighting() -> None:
    """With the cross-entropy reduced first, w cancels and errors cost the same everywhere."""
    mask = blob_mask()[1:]
    weight = torch.from_numpy(pixel_weights(mask[0, 0].numpy()))[None, None]
    right = torch.where(mask > 0, 6.0, -6.0).double()
    at_border, far_away = right.clone(), right.clone()
    background = mask[0, 0] == 0
    row, column = divmod(int((weight[0, 0] * background).argmax()), 48)
    at_border[0, 0, row, column] = 6.0
    far_away[0, 0, 47, 0] = 6.0

    def reduced_form(logits: torch.Tensor) -> float:
        entropy = functional.binary_cross_entropy_with_logits(logits, mask)
        return ((weight * entropy).sum() / weight.sum()).item()

    def entropy_term(logits: torch.Tensor) -> float:
        p = logits.sigmoid()
        inner, total = (weight * p * mask).sum(), (weight * (p + mask)).sum()
        iou_loss = 1 - (inner + 1) / (total - inner + 1)
        return (structure_loss(logits, mask) - iou_loss).item()

    assert weight[0, 0, row, column] > 2 * weight[0, 0, 47, 0]
    assert reduced_form(at_border) == pytest.approx(reduced_form(far_away), rel=1e-9)
    assert entropy_term(at_border) > 1.2 * entropy_term(far_away)
    assert entropy_term(at_border) > 1.1 * reduced_form(at_border)


def test_right_prediction_costs_almost_nothing_and_wrong_costs_much() -> None:
    mask = blob_mask().float()
    sure = torch.where(mask > 0, 20.0, -20.0)
    assert structure_loss(sure, mask).item() < 1e-4
    assert structure_loss(-sure, mask).item() > 10


def test_gradient_agrees_with_finite_differences() -> None:
    mask = blob_mask(12)
    logits = random_logits(mask).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: structure_loss(z, mask), logits)


def test_half_precision_is_summed_in_float32() -> None:
    mask = blob_mask()
    logits = random_logits(mask).bfloat16()
    loss = structure_loss(logits, mask.bfloat16())
    assert loss.dtype == torch.float32
    assert loss.item() == pytest.approx(structure_loss(logits.double(), mask).item(), rel=1e-5)


@pytest.mark.parametrize("shape", [(2, 2, 8, 8), (2, 8, 8), (2, 1, 8, 9)])
def test_wrong_shapes_are_refused(shape: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match=r"must both be \(B, 1, H, W\)"):
        structure_loss(torch.zeros(shape), torch.zeros(2, 1, 8, 8))


def test_two_classes_are_the_structure_loss() -> None:
    mask = blob_mask()
    logits = random_logits(mask)
    two = torch.cat([torch.zeros_like(logits), logits], dim=1) + 0.7  # a softmax ignores a shift
    torch.testing.assert_close(segmentation_loss(two, mask), structure_loss(logits, mask))
    torch.testing.assert_close(segmentation_loss(logits, mask), structure_loss(logits, mask))


def three_class_mask() -> torch.Tensor:
    mask = blob_mask()[1:]
    mask[..., 5:15, 25:40] = 2.0
    return mask


def test_three_classes_agree_with_numpy() -> None:
    mask = three_class_mask()
    logits = random_logits(mask.expand(1, 3, -1, -1))
    z, m = logits[0].numpy(), mask[0, 0].numpy()
    p = softmax(z, axis=0)
    w = np.maximum(pixel_weights((m == 1) * 1.0), pixel_weights((m == 2) * 1.0))
    right = np.choose(m.astype(int), p)
    expected = -(w * np.log(right)).sum() / w.sum()
    for number in (1, 2):
        truth = m == number
        intersection, total = (w * p[number] * truth).sum(), (w * (p[number] + truth)).sum()
        expected += (1 - (intersection + 1) / (total - intersection + 1)) / 2
    assert class_loss(logits, mask).item() == pytest.approx(expected, rel=1e-10)


def test_the_wrong_polyp_class_costs_more_than_the_right_one() -> None:
    mask = three_class_mask().float()
    right = 20 * functional.one_hot(mask[:, 0].long(), 3).permute(0, 3, 1, 2).float()
    swapped = right[:, [0, 2, 1]]
    assert class_loss(right, mask).item() < 1e-4
    assert class_loss(swapped, mask).item() > 2


def test_gradient_of_three_classes() -> None:
    mask = three_class_mask()[..., ::4, ::4]
    logits = random_logits(mask.expand(1, 3, -1, -1)).requires_grad_()
    assert torch.autograd.gradcheck(lambda z: class_loss(z, mask), logits)


@pytest.mark.parametrize(("logits", "mask"), [((2, 1, 8, 8), (2, 1, 8, 8)),
                                              ((2, 3, 8, 8), (2, 3, 8, 8)),
                                              ((2, 3, 8, 8), (2, 1, 8, 9))])  # fmt: skip
def test_wrong_shapes_of_classes_are_refused(logits: tuple, mask: tuple) -> None:
    with pytest.raises(ValueError, match=r"K at least 2 and mask \(B, 1, H, W\)"):
        class_loss(torch.zeros(logits), torch.zeros(mask))
