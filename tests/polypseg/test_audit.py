"""The audit names everything wrong with a set of pairs in one pass."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polypseg.data.audit import audit_pairs
from polypseg.data.folders import find_pairs


def save_mask(root: Path, stem: str, values: np.ndarray) -> None:
    Image.fromarray(values.astype(np.uint8)).save(root / "masks" / f"{stem}.png")


def test_sound_pairs_have_no_faults_and_progress_counts_up(
    write_pairs: Callable[..., Path],
) -> None:
    pairs = find_pairs(write_pairs(["a", "b", "c"]))
    calls: list[tuple[int, int]] = []
    assert audit_pairs(pairs, lambda done, total: calls.append((done, total))) == []
    assert calls == [(1, 3), (2, 3), (3, 3)]


def test_every_fault_is_found_at_once(write_pairs: Callable[..., Path]) -> None:
    stems = ["cut", "size", "grey", "dim", "empty", "full", "sound", "both"]
    root = write_pairs(stems)
    whole = (root / "images" / "cut.jpg").read_bytes()
    (root / "images" / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    save_mask(root, "size", 255 * np.eye(40))
    save_mask(root, "grey", np.tile(np.linspace(0, 255, 60), (40, 1)))
    dim = np.zeros((40, 60))
    dim[:5, :5] = 38
    save_mask(root, "dim", dim)
    save_mask(root, "empty", np.zeros((40, 60)))
    save_mask(root, "full", np.full((40, 60), 255))
    for path in (root / "images" / "both.jpg", root / "masks" / "both.png"):
        path.write_bytes(b"rubbish")

    faults = audit_pairs(find_pairs(root))
    found = [(fault.path.name, fault.severity) for fault in faults]
    assert sorted(found) == [
        ("both.jpg", "error"),
        ("both.png", "error"),
        ("cut.jpg", "error"),
        ("dim.png", "error"),
        ("empty.png", "warning"),
        ("full.png", "warning"),
        ("grey.png", "error"),
        ("size.png", "error"),
    ]


def test_masks_of_class_numbers_and_of_sixteen_bits(write_pairs: Callable[..., Path]) -> None:
    root = write_pairs(["numbers", "deep"])
    save_mask(root, "numbers", np.tile([0, 0, 1, 2], (40, 15)))
    path = root / "masks" / "deep.png"
    Image.fromarray((np.asarray(Image.open(path)) > 0) * np.uint16(4095)).save(path)
    (fault,) = audit_pairs(find_pairs(root))
    assert (fault.path.name, fault.severity) == ("numbers.png", "error")
    assert "the values 0, 1 and 2" in fault.problem
    assert audit_pairs(find_pairs(root)[1:], classes=3) == []  # the remedy that it names


def test_grey_lesion_beside_a_white_one_is_an_error(write_pairs: Callable[..., Path]) -> None:
    root = write_pairs(["a"], size=(50, 80))
    values = np.zeros((50, 80))
    values[5:25, 10:40], values[30:40, 50:66] = 255, 100
    save_mask(root, "a", values)
    (fault,) = audit_pairs(find_pairs(root))
    assert (fault.path.name, fault.severity) == ("a.png", "error")
    assert "4.00% of it is painted with the value 100 alone" in fault.problem


@pytest.mark.parametrize("encoding", ["one-bit", "zero-one", "jpeg"])
def test_valid_mask_encodings_pass(write_pairs: Callable[..., Path], encoding: str) -> None:
    root = write_pairs(["a"])
    png = root / "masks" / "a.png"
    truth = np.asarray(Image.open(png)) > 0
    png.unlink()
    if encoding == "jpeg":
        Image.fromarray(truth.astype(np.uint8) * 255).save(png.with_suffix(".jpg"), quality=90)
    else:
        Image.fromarray(truth if encoding == "one-bit" else truth.astype(np.uint8)).save(png)
    assert audit_pairs(find_pairs(root)) == []


def test_orientation_of_the_image_alone_is_a_warning(write_pairs: Callable[..., Path]) -> None:
    root = write_pairs(["a"])
    exif = Image.Exif()
    exif[0x0112] = 3  # half a turn, which the sizes cannot give away
    image = root / "images" / "a.jpg"
    Image.open(image).save(image, exif=exif)
    faults = audit_pairs(find_pairs(root))
    assert [(fault.path, fault.severity) for fault in faults] == [(image, "warning")]


def test_real_test_sets_are_sound(real_data: Path) -> None:
    pairs = find_pairs(real_data / "TestDataset" / "CVC-ClinicDB")
    assert len(pairs) == 62
    assert audit_pairs(pairs) == []


@pytest.mark.parametrize("form", ["TIFF", "PNG"])
def test_pages_that_are_not_read_are_a_warning(write_pairs: Callable[..., Path], form: str) -> None:
    root = write_pairs(["a", "b"])
    for name in ("images/a.jpg", "masks/a.png"):
        with Image.open(root / name) as first:
            pages = [first.convert("L"), Image.new("L", first.size)]
        (root / name).unlink()
        path = (root / name).with_suffix(f".{form.lower()}")
        pages[0].save(path, form, save_all=True, append_images=pages[1:])
    faults = audit_pairs(find_pairs(root))
    names = [fault.path.relative_to(root).as_posix() for fault in faults]
    assert names == [f"images/a.{form.lower()}", f"masks/a.{form.lower()}"]
    for fault in faults:
        assert fault.severity == "warning"
        assert fault.problem == "holds several pages, of which only the first is read"


def test_what_a_camera_puts_behind_a_photograph_is_no_page(
    write_pairs: Callable[..., Path],
) -> None:
    root = write_pairs(["a"])
    path = root / "images" / "a.jpg"
    with Image.open(path) as opened:
        picture = opened.convert("RGB")
    picture.save(path, "MPO", save_all=True, append_images=[picture])
    with Image.open(path) as opened:
        assert opened.is_animated
    assert audit_pairs(find_pairs(root)) == []
