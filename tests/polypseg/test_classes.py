"""Three-class masks: any encoding of NeoPolyp's colours gives the same class numbers."""

import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polypseg.data import DataError, PolypDataset, audit_folder, find_pairs, read_mask, resize_mask

COLOURS = np.array([[0, 0, 0], [255, 0, 0], [0, 255, 0]], np.uint8)


@pytest.fixture
def truth() -> np.ndarray:
    numbers = np.zeros((64, 96), np.uint8)
    numbers[10:30, 8:40] = 1
    numbers[20:50, 60:90] = 2
    numbers[20:30, 33:40] = 2  # the two classes touch
    return numbers


def indexed(numbers: np.ndarray, order: list[int]) -> Image.Image:
    """A palette image whose colour number i is that of class ``order[i]``."""
    picture = Image.fromarray(np.argsort(order)[numbers].astype(np.uint8), mode="P")
    picture.putpalette(COLOURS[order].ravel().tolist())
    return picture


@pytest.mark.parametrize("encoding", ["rgb", "rgba", "palette", "other palette", "numbers", "grey"])
def test_encodings_agree(tmp_path: Path, truth: np.ndarray, encoding: str) -> None:
    grey_palette = Image.fromarray(truth, mode="P")
    grey_palette.putpalette([value for i in range(256) for value in (i, i, i)])
    picture = {
        "rgb": lambda: Image.fromarray(COLOURS[truth]),
        "rgba": lambda: Image.fromarray(COLOURS[truth]).convert("RGBA"),
        "palette": lambda: indexed(truth, [0, 1, 2]),
        "other palette": lambda: indexed(truth, [2, 0, 1]),
        "numbers": lambda: Image.fromarray(truth),
        "grey": lambda: grey_palette,
    }[encoding]()
    picture.save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png", classes=3)
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, truth)


@pytest.mark.parametrize("encoding", ["rgb", "palette", "other palette", "JPEG"])
def test_one_class_is_polyps_of_either_colour(
    tmp_path: Path, truth: np.ndarray, encoding: str
) -> None:
    orders = {"palette": [0, 1, 2], "other palette": [2, 0, 1]}
    picture = (
        indexed(truth, orders[encoding]) if encoding in orders else Image.fromarray(COLOURS[truth])
    )
    path = tmp_path / ("m.jpg" if encoding == "JPEG" else "m.png")
    picture.save(path)
    wrong = read_mask(path) != (truth > 0)
    assert wrong.mean() < 0.02 if encoding == "JPEG" else not wrong.any()


def test_colours_of_other_palettes_are_no_polyps(tmp_path: Path, truth: np.ndarray) -> None:
    # Its numbers are 0, 1 and 2 too, but who knows what they stand for.
    picture = Image.fromarray(truth, mode="P")
    picture.putpalette([0, 0, 0, 0, 0, 200, 200, 200, 0])
    picture.save(tmp_path / "m.png")
    with pytest.raises(DataError, match="neither black, red nor green"):
        read_mask(tmp_path / "m.png")


@pytest.mark.parametrize("quality", [50, 75, 95])
def test_jpeg_masks_are_read_but_for_the_border(
    tmp_path: Path, truth: np.ndarray, quality: int
) -> None:
    Image.fromarray(COLOURS[truth]).save(tmp_path / "m.jpg", quality=quality)
    mask = read_mask(tmp_path / "m.jpg", classes=3)
    assert set(np.unique(mask)) == {0, 1, 2}
    assert (mask != truth).mean() < 0.02
    inside = np.zeros_like(truth, bool)
    inside[13:27, 11:29] = inside[24:46, 64:86] = True
    np.testing.assert_array_equal(mask[inside], truth[inside])


@pytest.mark.parametrize("mode", ["blue", "white", "one-bit"])
def test_other_colours_are_refused_and_named(tmp_path: Path, truth: np.ndarray, mode: str) -> None:
    picture = {
        "blue": lambda: Image.fromarray((COLOURS * [0, 1, 0] + [[0] * 3, [0, 0, 255], [0] * 3])
                                        .astype(np.uint8)[truth]),
        "white": lambda: Image.fromarray((truth > 0).astype(np.uint8) * np.uint8(255)),
        "one-bit": lambda: Image.fromarray(truth > 0),
    }[mode]()  # fmt: skip
    picture.save(tmp_path / "m.png")
    named = r"RGB \(0, 0, 255\)" if mode == "blue" else r"RGB \(255, 255, 255\)"
    with pytest.raises(DataError, match=rf"m\.png.*{named}.*class numbers 0, 1 and 2"):
        read_mask(tmp_path / "m.png", classes=3)


@pytest.mark.parametrize("colour", [(0, 0, 255), (255, 255, 255), (100, 0, 0), (255, 255, 0)])
def test_a_small_region_of_another_colour_is_refused(
    tmp_path: Path, truth: np.ndarray, colour: tuple[int, int, int]
) -> None:
    painted = COLOURS[truth]
    painted[52:60, 3:16] = colour  # 1.7 %
    Image.fromarray(painted).save(tmp_path / "m.png")
    named = re.escape(
        f"1.69% of the mask is neither black, red nor green, for example RGB {colour}"
    )
    with pytest.raises(DataError, match=named):
        read_mask(tmp_path / "m.png", classes=3)


def test_soft_borders_of_colours_are_not_refused(tmp_path: Path, truth: np.ndarray) -> None:
    for times in (2, 4, 8):
        size = (96 * times, 64 * times)
        Image.fromarray(COLOURS[truth]).resize(size, Image.Resampling.BILINEAR).save(
            tmp_path / "m.png"
        )
        mask = read_mask(tmp_path / "m.png", classes=3)
        assert (mask != truth.repeat(times, 0).repeat(times, 1)).mean() < 0.02


def test_resizing_takes_the_class_that_covers_most() -> None:
    mask = np.zeros((60, 60), np.uint8)
    mask[:, 20:40] = 1
    mask[:, 40:] = 2
    small = resize_mask(mask, 30)
    np.testing.assert_array_equal(small, np.repeat([0, 1, 2], 10)[None].repeat(30, axis=0))
    # Averaging the numbers themselves would put a stripe of 1 between 0 and 2.
    mask[mask == 1] = 0
    assert set(np.unique(resize_mask(mask, 47))) == {0, 2}


def test_items_and_audit_of_three_classes(write_pairs: Callable[..., Path]) -> None:
    root = write_pairs(["a", "b", "c"])
    for stem, number in (("a", 1), ("b", 2)):
        grey = np.asarray(Image.open(root / "masks" / f"{stem}.png")) > 0
        Image.fromarray(COLOURS[grey * number]).save(root / "masks" / f"{stem}.png")
    faults = audit_folder(root, classes=3)
    assert [fault.path.name for fault in faults] == ["c.png"]  # is white
    (warning,) = audit_folder(root)
    assert (warning.path, warning.severity) == (root, "warning")
    assert warning.problem == "2 of 3 masks are red or green, and read as polyp or none"
    pairs = find_pairs(root)[:2]
    for train in (False, True):
        dataset = PolypDataset(pairs, 32, train=train, seed=0, classes=3)
        found = [set(dataset[i]["mask"].unique().tolist()) for i in (0, 1)]
        assert found == [{0.0, 1.0}, {0.0, 2.0}]


def test_real_masks_hold_the_classes_of_their_colours(real_data: Path) -> None:
    for pair in find_pairs(real_data / "NeoPolyp-Small")[:20]:
        rgb = np.asarray(Image.open(pair.mask).convert("RGB"))
        mask = read_mask(pair.mask, classes=3)
        np.testing.assert_array_equal(mask == 1, rgb[..., 0] == 255)
        np.testing.assert_array_equal(mask == 2, rgb[..., 1] == 255)
