"""Pairs are found by stem, and every fault of a folder is named at once."""

import pickle
from pathlib import Path

import pytest

from polypseg.data.faults import MAX_PRINTED_FAULTS, DataError, Fault
from polypseg.data.folders import find_pairs, left_out_faults, list_images


def touch(folder: Path, *names: str) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).touch()


def test_pairs_by_stem_in_natural_order(tmp_path: Path) -> None:
    touch(tmp_path / "images", "clinic_10.jpg", "clinic_9.jpg", "b.TIFF", "a.webp")
    touch(tmp_path / "masks", "a.png", "clinic_9.bmp", "b.png", "clinic_10.PNG")
    pairs = find_pairs(tmp_path)
    assert [pair.stem for pair in pairs] == ["a", "b", "clinic_9", "clinic_10"]
    assert all(pair.image.stem == pair.stem == pair.mask.stem for pair in pairs)
    assert {pair.mask.parent.name for pair in pairs} == {"masks"}


@pytest.mark.parametrize(
    ("images", "masks"), [("image", "mask"), ("Images", "MASKS"), ("image", "masks")]
)
def test_folder_names_of_the_field(tmp_path: Path, images: str, masks: str) -> None:
    touch(tmp_path / images, "a.jpg")
    touch(tmp_path / masks, "a.png")
    assert len(find_pairs(tmp_path)) == 1


def test_what_is_no_image_is_passed_over(tmp_path: Path) -> None:
    touch(tmp_path / "images", "a.jpg", "._a.jpg", "Thumbs.db", "notes.txt")
    (tmp_path / "images" / "folder.jpg").mkdir()
    touch(tmp_path / "masks", "a.png", ".DS_Store")
    assert [pair.stem for pair in find_pairs(tmp_path)] == ["a"]


def test_what_is_passed_over_is_told(tmp_path: Path) -> None:
    touch(tmp_path / "images", "a.jpg", "b.jp2", "notes.txt", ".hidden")
    touch(tmp_path / "masks", "a.png", "b.gif")
    (tmp_path / "images" / "folder").mkdir()
    (tmp_path / "masks" / "c.png").symlink_to(tmp_path / "unmounted.png")
    images, masks = left_out_faults(tmp_path)
    assert images.path == tmp_path / "images"
    assert images.problem.endswith("nothing (b.jp2, notes.txt)")
    assert masks.problem == (
        "2 files are left out, as no image by name or links to nothing (b.gif, c.png)"
    )
    assert {images.severity, masks.severity} == {"warning"}
    assert left_out_faults(tmp_path / "nowhere") == []


def test_all_faults_are_told_together(tmp_path: Path) -> None:
    touch(tmp_path / "images", "a.jpg", "b.jpg", "b.png", "c.jpg")
    touch(tmp_path / "masks", "b.png", "c.png", "d.png")
    with pytest.raises(DataError) as caught:
        find_pairs(tmp_path)
    problems = {fault.path.name: fault.problem for fault in caught.value.faults}
    assert problems.keys() == {"a.jpg", "b.jpg", "d.png"}
    assert problems["a.jpg"] == "image without mask"
    assert "b.png" in problems["b.jpg"]
    assert problems["d.png"] == "mask without image"
    assert len(str(caught.value).splitlines()) == 3
    assert "add masks/a.png" in str(caught.value)


def test_images_in_subfolders_are_a_fault_beside_others(tmp_path: Path) -> None:
    touch(tmp_path / "images", "a.jpg", "b.jpg")
    touch(tmp_path / "images" / "late", "c.jpg", "d.JPG", "notes.txt")
    touch(tmp_path / "images" / "early" / "deep", "e.png")
    touch(tmp_path / "images" / ".cache" / "x", "a.jpg")
    touch(tmp_path / "masks" / "late", "c.png")
    with pytest.raises(DataError) as caught:
        find_pairs(tmp_path)
    found = {fault.path.name: fault for fault in caught.value.faults}
    assert found.keys() == {"images", "masks", "a.jpg", "b.jpg"}
    assert str(found["images"]).endswith(
        "images: holds 3 images in subfolders (early/deep, late), which are not searched; "
        "move them up into images, or out of it"
    )
    assert found["masks"].problem.startswith("holds 1 images in subfolders (late)")
    assert all(fault.severity == "error" for fault in found.values())


@pytest.mark.parametrize("ending", ["_mask", "_seg", "_gt", "-mask", " Mask", "_polyp.mask"])
def test_masks_with_a_common_ending_are_one_fault(tmp_path: Path, ending: str) -> None:
    stems = ["a", "b1", "b10"]
    touch(tmp_path / "images", *(f"{stem}.png" for stem in stems), "c.png", "alone.png")
    touch(tmp_path / "masks", *(f"{stem}{ending}.png" for stem in stems), "c.png")
    with pytest.raises(DataError) as caught:
        find_pairs(tmp_path)
    slip, other = caught.value.faults
    assert slip.path == tmp_path / "masks"
    assert slip.problem == f"3 masks seem to end in {ending}, as a{ending}.png of a.png"
    assert slip.remedy == "rename them to the images' names"
    assert other.path.name == "alone.png"


def test_masks_that_differ_in_case_are_one_fault(tmp_path: Path) -> None:
    touch(tmp_path / "images", "A1.jpg", "A2.jpg", "x1.jpg")
    touch(tmp_path / "masks", "a1.png", "a2.png", "x10.png")  # 10 is another image than 1
    with pytest.raises(DataError) as caught:
        find_pairs(tmp_path)
    assert [str(fault.path.name) for fault in caught.value.faults] == ["masks", "x1.jpg", "x10.png"]
    problem = "2 masks differ from their images in upper and lower case alone, as a1.png of A1.jpg"
    assert caught.value.faults[0].problem == problem


def test_composed_and_decomposed_accents_are_one_stem(tmp_path: Path) -> None:
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    touch(tmp_path / "images", f"{decomposed}.png")
    touch(tmp_path / "masks", f"{composed}.png")
    (pair,) = find_pairs(tmp_path)
    assert pair.stem == composed
    assert pair.image.is_file()
    assert pair.mask.is_file()
    touch(tmp_path / "images", f"{composed}.jpg")
    with pytest.raises(DataError, match="shares its stem with"):
        find_pairs(tmp_path)


@pytest.mark.parametrize(
    ("folders", "expected"),
    [
        ({}, ["no `images` or `image`", "no `masks` or `mask`"]),
        ({"images": ["a.jpg"]}, ["no `masks` or `mask`"]),
        ({"images": [], "masks": []}, ["no image files", "no image files"]),
        ({"images": ["a.jpg"], "image": ["a.jpg"], "masks": ["a.png"]}, ["several folders"]),
    ],
)
def test_missing_empty_and_doubled_folders(
    tmp_path: Path, folders: dict[str, list[str]], expected: list[str]
) -> None:
    for name, files in folders.items():
        touch(tmp_path / name, *files)
    with pytest.raises(DataError) as caught:
        find_pairs(tmp_path)
    problems = [fault.problem for fault in caught.value.faults]
    assert len(problems) == len(expected)
    assert all(part in problem for part, problem in zip(expected, problems, strict=True))


def test_root_that_is_no_folder(tmp_path: Path) -> None:
    touch(tmp_path, "file")
    with pytest.raises(DataError, match="is a file, not a folder"):
        find_pairs(tmp_path / "file")
    with pytest.raises(DataError, match="there is no such folder"):
        find_pairs(tmp_path / "nowhere")


def test_long_reports_are_cut_when_printed_but_kept(tmp_path: Path) -> None:
    touch(tmp_path / "images", *(f"{i}.jpg" for i in range(60)))
    touch(tmp_path / "masks", "0.png")
    with pytest.raises(DataError) as caught:
        find_pairs(tmp_path)
    lines = str(caught.value).splitlines()
    assert len(caught.value.faults) == 59
    assert len(lines) == MAX_PRINTED_FAULTS + 1
    assert lines[-1] == "... and 9 more"


def test_error_survives_pickling_but_not_an_empty_or_text_list() -> None:
    error = DataError([Fault(Path("a"), "bad", "mend it")])
    copy = pickle.loads(pickle.dumps(error))
    assert copy.faults == error.faults
    assert str(copy) == "a: bad; mend it"
    for wrong in ([], "text"):
        with pytest.raises(TypeError):
            DataError(wrong)  # type: ignore[arg-type]


def test_list_images_takes_file_folder_and_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "f10.png", "f9.jpg", "notes.txt")
    touch(tmp_path / "deeper", "x.png")
    assert list_images(tmp_path / "f9.jpg") == [tmp_path / "f9.jpg"]
    assert [file.name for file in list_images(tmp_path)] == ["f9.jpg", "f10.png"]
    assert [file.name for file in list_images(f"{tmp_path}/f*")] == ["f9.jpg", "f10.png"]
    assert [file.name for file in list_images(f"{tmp_path}/**/x.*")] == ["x.png"]


def test_list_images_names_the_subfolders_of_a_folder_without_images(tmp_path: Path) -> None:
    for number in range(7):
        touch(tmp_path / f"clip{number}", "a.png", "b.png")
    named = "clip0, clip1, clip2, clip3, clip4, ..."
    with pytest.raises(DataError, match=rf"holds 14 images in subfolders \({named}\), which"):
        list_images(tmp_path)


def test_file_with_brackets_in_its_name_is_no_pattern(tmp_path: Path) -> None:
    touch(tmp_path, "f[1].png", "f1.png")
    assert [file.name for file in list_images(tmp_path / "f[1].png")] == ["f[1].png"]


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("notes.txt", "not an image file"),
        ("empty", "holds no images"),
        ("*.gif", "no such file or folder"),
    ],
)
def test_list_images_says_what_is_wrong(tmp_path: Path, source: str, message: str) -> None:
    touch(tmp_path, "notes.txt")
    touch(tmp_path / "empty")
    with pytest.raises(DataError, match=message):
        list_images(tmp_path / source)
