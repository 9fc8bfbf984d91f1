"""Masks drawn on images."""

import io

import numpy as np
import pytest
from PIL import Image
from scipy.ndimage import binary_erosion

from polypseg.drawing import PREDICTION, TRUTH, draw_contour, encode, fit, overlay

GREY = np.full((60, 100, 3), 100, np.uint8)


def ring() -> np.ndarray:
    """A disc with a hole, and a second piece that touches the edge of the picture."""
    y, x = np.mgrid[:60, :100]
    distance = np.hypot(y - 30, x - 40)
    return ((distance < 20) & (distance > 8)) | ((x > 90) & (y < 10))


def test_a_contour_is_the_border_of_the_mask_holes_included():
    mask = ring()
    drawn = (draw_contour(GREY, mask, TRUTH) == TRUTH).all(axis=2)
    border = mask & ~binary_erosion(mask)  # pixels with a 4-neighbour outside, or off the picture
    # A hole is traced along its own 8-connected rim, which may lie a pixel aside.
    near = np.zeros_like(border)
    for dy in (-1, 0, 1):
        for dx in (-1, 0, 1):
            near |= np.roll(border, (dy, dx), (0, 1))
    assert drawn[near].sum() == drawn.sum()
    assert (drawn & border).sum() >= 0.9 * border.sum()
    assert drawn[30, 48:50].any()  # the rim of the hole
    assert drawn[0, 95]
    assert not drawn[30, 40]
    assert (draw_contour(GREY, mask, TRUTH)[~drawn] == 100).all()


def test_lines_grow_with_the_picture():
    def line_pixels(scale: int) -> int:
        mask = np.zeros((60 * scale, 100 * scale), bool)
        mask[10 * scale : 50 * scale, 20 * scale : 80 * scale] = True
        image = np.zeros((*mask.shape, 3), np.uint8)
        row = draw_contour(image, mask, TRUTH)[30 * scale]
        return int((row == TRUTH).all(axis=1).sum())

    assert line_pixels(1) == 2  # two sides of one pixel
    assert line_pixels(10) >= 8


def test_an_overlay_tints_what_the_mask_covers_and_nothing_else():
    mask = ring()
    picture = overlay(GREY, mask)
    line = (picture == PREDICTION).all(axis=2)
    inside = mask & ~line
    np.testing.assert_array_equal(np.unique(picture[inside], axis=0), [[131, 126, 80]])
    np.testing.assert_array_equal(picture[~mask & ~line], 100)
    assert (GREY == 100).all()  # not drawn into the argument


def test_empty_and_full_masks_are_drawn():
    empty = np.zeros((60, 100), bool)
    np.testing.assert_array_equal(overlay(GREY, empty), GREY)
    full = (overlay(GREY, ~empty) == PREDICTION).all(axis=2)
    assert full[0].all()
    assert full[:, -1].all()
    assert not full[1:-1, 1:-1].any()


@pytest.mark.parametrize(
    ("image", "mask"),
    [(GREY, np.zeros((60, 99), bool)), (GREY, np.zeros((60, 100), np.uint8)), (GREY / 2, ring())],
)
def test_other_kinds_of_image_and_mask_are_refused(image, mask):
    with pytest.raises(ValueError, match="must be"):
        overlay(image, mask)
    with pytest.raises(ValueError, match="must be"):
        draw_contour(image, mask, TRUTH)


def test_fit_keeps_the_aspect_and_masks_stay_boolean():
    assert fit(GREY, 50, 50).shape == (30, 50, 3)
    assert fit(GREY, 400, 30).shape == (30, 50, 3)
    mask = fit(ring(), 50, 50)
    assert mask.dtype == bool
    assert mask.shape == (30, 50)
    assert mask.mean() == pytest.approx(ring().mean(), abs=0.02)
    assert fit(np.zeros((1, 900, 3), np.uint8), 90, 90).shape == (1, 90, 3)


def test_encoded_pictures_can_be_read():
    picture = overlay(GREY, ring())
    np.testing.assert_array_equal(Image.open(io.BytesIO(encode(picture, "PNG"))), picture)
    jpeg = Image.open(io.BytesIO(encode(picture, "JPEG")))
    assert (jpeg.format, jpeg.size) == ("JPEG", (100, 60))
