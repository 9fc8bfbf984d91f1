"""Any image file becomes plain RGB, any mask zeros and ones, or an error names the file."""

import struct
import zlib
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image, ImageFilter

from polypseg.data.faults import DataError
from polypseg.data.folders import Pair
from polypseg.data.reading import read_image, read_mask, read_pair

ORIENTATION = 0x0112


@pytest.fixture
def colours() -> np.ndarray:
    """An image (6, 8, 3) of which no two pixels are alike."""
    return np.random.default_rng(1).integers(0, 256, (6, 8, 3), dtype=np.uint8)


def test_rgb_is_read_as_it_is(tmp_path: Path, colours: np.ndarray) -> None:
    Image.fromarray(colours).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colours)


def test_alpha_is_dropped(tmp_path: Path, colours: np.ndarray) -> None:
    alpha = np.full((6, 8, 1), 7, np.uint8)
    Image.fromarray(np.concatenate([colours, alpha], axis=2)).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colours)


def test_grey_fills_three_channels(tmp_path: Path, colours: np.ndarray) -> None:
    Image.fromarray(colours[..., 0]).save(tmp_path / "a.png")
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colours[..., [0, 0, 0]])


def test_palette(tmp_path: Path) -> None:
    indices = Image.fromarray(np.array([[0, 1], [2, 1]], np.uint8), mode="P")
    indices.putpalette([10, 20, 30, 200, 100, 50, 1, 2, 3])
    indices.save(tmp_path / "a.png")
    expected = [[[10, 20, 30], [200, 100, 50]], [[1, 2, 3], [200, 100, 50]]]
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), expected)


def test_cmyk(tmp_path: Path) -> None:
    Image.new("CMYK", (3, 2), (0, 255, 255, 0)).save(tmp_path / "a.tif")
    np.testing.assert_array_equal(read_image(tmp_path / "a.tif"), np.full((2, 3, 3), [255, 0, 0]))


@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_sixteen_bits_are_scaled_not_clipped(tmp_path: Path, suffix: str) -> None:
    values = np.array([[0, 256, 257, 32768, 65535]], np.uint16)
    Image.fromarray(values).save(tmp_path / f"a.{suffix}")
    expected = values.astype(int) * 255 // 65535
    np.testing.assert_array_equal(read_image(tmp_path / f"a.{suffix}")[..., 0], expected)


@pytest.mark.parametrize("bits", [10, 12, 14, 15, 16])
def test_files_of_fewer_than_sixteen_bits_are_scaled_by_their_depth(
    tmp_path: Path, bits: int
) -> None:
    white = 2**bits - 1
    values = np.array([[0, white // 3, white // 2, white - 1, white]], np.uint16)
    Image.fromarray(values).save(tmp_path / "a.png")
    expected = np.floor(values / white * 255)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png")[..., 0], expected)
    np.testing.assert_array_equal(read_mask(tmp_path / "a.png"), [[0, 0, 0, 1, 1]])


@pytest.mark.parametrize("bits", [8, 10, 12, 14, 15, 16])
@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("alpha", [False, True])
def test_sixteen_bit_colours_are_scaled_by_their_depth(
    tmp_path: Path, bits: int, suffix: str, alpha: bool
) -> None:
    """As OpenCV writes them; Pillow alone sees the upper byte, which is 0 of an 8-bit picture."""
    white = 2**bits - 1
    values = np.random.default_rng(1).integers(0, white + 1, (6, 8, 3)).astype(np.uint16)
    values[0, 0, 2] = white
    opaque = np.full((6, 8, 1), 65535, np.uint16)
    stored = np.concatenate([values[..., ::-1], opaque], axis=2) if alpha else values[..., ::-1]
    path = tmp_path / f"a.{suffix}"
    assert cv2.imwrite(str(path), stored)
    np.testing.assert_array_equal(read_image(path), values.astype(int) * 255 // white)


def test_sixteen_bit_colours_of_eight_bits_depth_twice_are_those_eight_bits(
    tmp_path: Path, colours: np.ndarray
) -> None:
    colours[0, 0] = 255
    assert cv2.imwrite(str(tmp_path / "a.png"), colours[..., ::-1].astype(np.uint16) * 257)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), colours)


def test_sixteen_bit_colours_are_turned_as_exif_says(tmp_path: Path, colours: np.ndarray) -> None:
    colours[0, 0] = 255
    exif = Image.Exif()
    exif[ORIENTATION] = 6
    held = b"eXIf" + exif.tobytes().removeprefix(b"Exif\0\0")
    chunk = struct.pack(">I", len(held) - 4) + held + struct.pack(">I", zlib.crc32(held))
    _, png = cv2.imencode(".png", colours[..., ::-1].astype(np.uint16) * 257)
    head = 33  # bytes: signature and IHDR
    (tmp_path / "a.png").write_bytes(png.tobytes()[:head] + chunk + png.tobytes()[head:])
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(colours, -1))


@pytest.mark.parametrize("white", [1, 255, 4095, 65535])
@pytest.mark.parametrize("suffix", ["png", "tif"])
def test_a_mask_of_sixteen_bit_colours_is_not_read_as_empty(
    tmp_path: Path, white: int, suffix: str
) -> None:
    truth = np.random.default_rng(2).random((9, 7)) > 0.6
    path = tmp_path / f"m.{suffix}"
    assert cv2.imwrite(str(path), (truth[..., None] * np.full(3, white)).astype(np.uint16))
    np.testing.assert_array_equal(read_mask(path), truth)


def test_sixteen_bit_colours_that_two_decoders_read_differently_are_refused(
    tmp_path: Path, colours: np.ndarray, monkeypatch: pytest.MonkeyPatch
) -> None:
    deep = colours.astype(np.uint16) * 257
    assert cv2.imwrite(str(tmp_path / "a.png"), deep)
    for other in (None, colours, deep[::-1]):
        monkeypatch.setattr(cv2, "imdecode", lambda *_, other=other: other)
        with pytest.raises(DataError, match=r"a\.png: cannot .* all 16 bits .*; save it with 8"):
            read_image(tmp_path / "a.png")


@pytest.mark.parametrize("white", [256, 257, 1000, 4095, 32767, 32768, 65535])
def test_sixteen_bit_mask_of_two_values_needs_no_depth(tmp_path: Path, white: int) -> None:
    truth = np.random.default_rng(2).random((9, 7)) > 0.6
    for name, polyp in (("m.png", truth), ("m.tif", truth), ("full.png", np.ones((9, 7), bool))):
        Image.fromarray(polyp.astype(np.uint16) * np.uint16(white)).save(tmp_path / name)
        np.testing.assert_array_equal(read_mask(tmp_path / name), polyp)


@pytest.mark.parametrize("brightest", [2, 3, 32, 33, 100, 127])
@pytest.mark.parametrize("kind", [np.uint8, np.uint16])
def test_mask_of_small_values_is_refused(tmp_path: Path, brightest: int, kind: type) -> None:
    Image.fromarray(np.array([[0, 1, brightest]], kind)).save(tmp_path / "m.png")
    held = rf"m\.png: mask .* holds the values 0, 1 and {brightest}; .*0 and 255, or 0 and 1"
    with pytest.raises(DataError, match=rf"{held}.*model\.classes=3"):
        read_mask(tmp_path / "m.png")


@pytest.mark.parametrize("suffix", ["bmp", "tif"])
def test_other_lossless_masks_of_small_values_are_refused(tmp_path: Path, suffix: str) -> None:
    values = np.tile(np.arange(20, dtype=np.uint8), (4, 1))
    path = tmp_path / f"m.{suffix}"
    Image.fromarray(values).save(path)
    with pytest.raises(DataError, match=rf"m\.{suffix}: .* holds 20 values from 0 to 19;"):
        read_mask(path)


def test_sixteen_bit_mask_without_white_is_refused_by_its_stored_values(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 150, 300]], np.uint16)).save(tmp_path / "m.png")
    with pytest.raises(DataError, match="holds the values 0, 150 and 300"):
        read_mask(tmp_path / "m.png")


@pytest.mark.parametrize("suffix", ["jpg", "tif", "webp"])
def test_noise_of_compression_in_an_empty_mask_is_no_fault(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"m.{suffix}"
    options = {"compression": "jpeg"} if suffix == "tif" else {}
    Image.fromarray(np.full((16, 16), 5, np.uint8)).save(path, **options)
    assert 1 < np.asarray(Image.open(path)).max() < 128
    assert not read_mask(path).any()


def two_lesions(value: int) -> np.ndarray:
    """A mask (50, 80) with a white lesion and one, on 4 %, of another value."""
    values = np.zeros((50, 80), np.uint8)
    values[5:25, 10:40] = 255
    values[30:40, 50:66] = value
    return values


@pytest.mark.parametrize("value", [1, 20, 33, 100, 200, 222])
@pytest.mark.parametrize("form", ["grey", "rgb", "palette"])
def test_lesion_of_a_value_between_black_and_white_is_refused(
    tmp_path: Path, value: int, form: str
) -> None:
    picture = Image.fromarray(two_lesions(value))
    if form == "palette":
        picture = picture.convert("P")  # the grey values stay
        picture.putpalette([level for level in range(256) for _ in range(3)])
    picture.convert("RGB" if form == "rgb" else picture.mode).save(tmp_path / "m.png")
    named = rf"m\.png: mask is not black and white: 4\.00% .* the value {value} alone; save it with"
    with pytest.raises(DataError, match=named):
        read_mask(tmp_path / "m.png")


def test_lesion_between_black_and_white_is_named_by_its_stored_values(tmp_path: Path) -> None:
    deep = two_lesions(100).astype(np.uint16) * 257
    deep[35:40, 50:66] = 40_000
    Image.fromarray(deep).save(tmp_path / "m.png")
    with pytest.raises(DataError, match=r"4\.00% of it .* the values 25700 and 40000;"):
        read_mask(tmp_path / "m.png")


@pytest.mark.parametrize("quality", [30, 60, 95])
def test_grey_lesion_in_a_jpeg_is_refused(tmp_path: Path, quality: int) -> None:
    large = Image.fromarray(two_lesions(100)).resize((320, 200), Image.Resampling.NEAREST)
    large.save(tmp_path / "m.jpg", quality=quality)
    with pytest.raises(
        DataError, match=r"m\.jpg: mask is not black and white: [34]\.[0-9]+% of it"
    ):
        read_mask(tmp_path / "m.jpg")


def test_soft_borders_are_cut_and_not_refused(tmp_path: Path) -> None:
    hard = Image.fromarray(two_lesions(255))
    hard.putpixel((70, 10), 255)
    for times in (2, 4, 8):
        soft = hard.resize((80 * times, 50 * times), Image.Resampling.BICUBIC)
        soft.save(tmp_path / "m.png")
        np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), np.asarray(soft) >= 128)
        for radius in (1, 2, 4):
            blurred = soft.filter(ImageFilter.GaussianBlur(radius))
            blurred.save(tmp_path / "m.png")
            np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), np.asarray(blurred) >= 128)
        for quality in (10, 30, 75):
            soft.save(tmp_path / "m.jpg", quality=quality)
            compressed = Image.open(tmp_path / "m.jpg")
            np.testing.assert_array_equal(
                read_mask(tmp_path / "m.jpg"), np.asarray(compressed) >= 128
            )
            # A lossless copy of it holds the same values.
            compressed.save(tmp_path / "m.png")
            read_mask(tmp_path / "m.png")


def test_black_and_white_of_video_are_no_grey(tmp_path: Path) -> None:
    truth = two_lesions(255) > 0
    Image.fromarray(np.where(truth, 235, 16).astype(np.uint8)).save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), truth)


def test_exif_orientation_turns_image_and_mask_alike(tmp_path: Path, colours: np.ndarray) -> None:
    exif = Image.Exif()
    exif[ORIENTATION] = 6  # the viewer turns it by 90 degrees clockwise
    grey = np.where(colours[..., 0] > 127, 255, 0).astype(np.uint8)
    Image.fromarray(colours).save(tmp_path / "a.png", exif=exif)
    Image.fromarray(grey).save(tmp_path / "m.png", exif=exif)
    np.testing.assert_array_equal(read_image(tmp_path / "a.png"), np.rot90(colours, -1))
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), np.rot90(grey > 0, -1))


def test_mask_threshold_is_128(tmp_path: Path) -> None:
    Image.fromarray(np.array([[0, 1, 127, 128, 255]], np.uint8)).save(tmp_path / "m.png")
    mask = read_mask(tmp_path / "m.png")
    assert mask.dtype == np.uint8
    np.testing.assert_array_equal(mask, [[0, 0, 0, 1, 1]])


@pytest.mark.parametrize("mode", ["one-bit", "zero-one", "sixteen-bit", "rgb", "palette"])
def test_mask_encodings_agree(tmp_path: Path, mode: str) -> None:
    truth = np.random.default_rng(2).random((9, 7)) > 0.6
    picture = {
        "one-bit": lambda: Image.fromarray(truth),
        "zero-one": lambda: Image.fromarray(truth.astype(np.uint8)),
        "sixteen-bit": lambda: Image.fromarray(truth.astype(np.uint16) * 65535),
        "rgb": lambda: Image.fromarray((truth[..., None] * np.full(3, 255)).astype(np.uint8)),
        "palette": lambda: Image.fromarray(truth).convert("P"),
    }[mode]()
    picture.save(tmp_path / "m.png")
    np.testing.assert_array_equal(read_mask(tmp_path / "m.png"), truth)


def test_coloured_mask_is_refused_but_jpeg_noise_is_not(tmp_path: Path) -> None:
    truth = np.zeros((64, 64), bool)
    truth[13:45, 22:51] = True
    white = (truth[..., None] * np.full(3, 255)).astype(np.uint8)
    Image.fromarray(white).save(tmp_path / "white.jpg", quality=75)
    assert (read_mask(tmp_path / "white.jpg") == truth).mean() > 0.99
    blue = white * np.array([0, 0, 1], np.uint8)
    Image.fromarray(blue).save(tmp_path / "blue.png")
    with pytest.raises(
        DataError, match=r"blue\.png.*\(0, 0, 255\).*white on black, or red and green"
    ):
        read_mask(tmp_path / "blue.png")


@pytest.mark.parametrize("suffix", ["jpg", "png", "bmp", "tif", "webp"])
@pytest.mark.filterwarnings("ignore:Corrupt EXIF data")  # Pillow's own word on the cut TIFF
def test_truncated_file_is_named(tmp_path: Path, suffix: str) -> None:
    path = tmp_path / f"a.{suffix}"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    whole = path.read_bytes()
    for kept in (0, 10, len(whole) // 2):
        path.write_bytes(whole[:kept])
        with pytest.raises(DataError, match=rf"a\.{suffix}: cannot be decoded"):
            read_image(path)


def test_damaged_bytes_raise_nothing_but_data_error(tmp_path: Path) -> None:
    rng = np.random.default_rng(3)
    Image.fromarray(rng.integers(0, 256, (16, 16, 3), np.uint8)).save(tmp_path / "whole.png")
    whole = (tmp_path / "whole.png").read_bytes()
    refused = 0
    for _ in range(200):
        damaged = bytearray(whole)
        for place in rng.integers(0, len(whole), 3):
            damaged[place] = rng.integers(256)
        (tmp_path / "a.png").write_bytes(damaged)
        try:
            assert read_image(tmp_path / "a.png").ndim == 3
        except DataError:
            refused += 1
    assert refused > 100


def test_missing_file_text_file_and_float_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="there is no such file"):
        read_image(tmp_path / "nothing.png")
    (tmp_path / "text.png").write_text("not an image")
    with pytest.raises(DataError, match="cannot be decoded"):
        read_image(tmp_path / "text.png")
    Image.fromarray(np.zeros((2, 2), np.float32)).save(tmp_path / "float.tif")
    with pytest.raises(DataError, match="floating-point"):
        read_image(tmp_path / "float.tif")


def test_image_of_too_many_pixels_is_not_called_damaged(tmp_path: Path) -> None:
    path = tmp_path / "slide.png"
    Image.new("1", (14_000, 13_500)).save(path)  # 189 megapixels
    for read in (read_image, read_mask):
        with pytest.raises(DataError, match=r"slide\.png: cannot be decoded") as caught:
            read(path)
        assert "189000000 pixels" in str(caught.value)
        (fault,) = caught.value.faults
        assert fault.remedy == "make it smaller, at most 178956970 pixels"


def test_pair_names_both_bad_files_and_a_size_mismatch(tmp_path: Path) -> None:
    pair = Pair("a", tmp_path / "a.jpg", tmp_path / "a.png")
    with pytest.raises(DataError) as caught:
        read_pair(pair)
    assert [fault.path for fault in caught.value.faults] == [pair.image, pair.mask]
    Image.new("RGB", (30, 20)).save(pair.image)
    Image.new("L", (30, 21)).save(pair.mask)
    with pytest.raises(DataError, match=r"30 x 21 pixels but its image a\.jpg is 30 x 20"):
        read_pair(pair)
