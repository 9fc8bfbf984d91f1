"""The audit of data folders: all faults at once, as text and JSON."""

import hashlib
import json
import shutil
from bisect import bisect_left
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageEnhance

from polypseg import cli
from polypseg.check import check_folders
from polypseg.data import audit_folder, make_synthetic, read_image
from polypseg.data.duplicates import find_duplicates, fingerprint
from polypseg.data.splits import CLINIC_SEQUENCE_ENDS, split_for


@pytest.fixture
def data(tmp_path) -> Path:
    make_synthetic(tmp_path / "data", train=4, test=3, size=80)
    return tmp_path / "data"


def digests(folder: Path) -> dict[Path, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_sound_data_exit_with_0_and_are_described(data, capsys):
    before = digests(data)
    assert cli.check([str(data)]) == 0
    text = capsys.readouterr().out
    assert "TrainDataset: 4 pairs, 80 x 80 to 80 x 80 pixels" in text
    assert "TestDataset/Synthetic: 3 pairs" in text
    assert text.endswith("0 errors, 0 warnings\n")
    assert digests(data) == before


def test_every_fault_of_every_folder_is_named_at_once(data, tmp_path, capsys):
    train, test = data / "TrainDataset", data / "TestDataset" / "Synthetic"
    files = sorted((train / "images").iterdir())
    stems = [path.stem for path in files]
    (train / "masks" / f"{stems[0]}.png").unlink()
    files[1].write_bytes(files[1].read_bytes()[:500])
    Image.new("L", (80, 80)).save(train / "masks" / f"{stems[2]}.png")
    first = sorted((test / "images").iterdir())[0]
    Image.new("L", (40, 80), 255).save(test / "masks" / f"{first.stem}.png")
    assert cli.check([str(data), str(tmp_path / "nowhere"), "--json", str(tmp_path / "a.json")])
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "a.json").read_text())
    wanted = [
        (files[0], "error", "image without mask"),
        (files[1], "error", "cannot be decoded"),
        (train / "masks" / f"{stems[2]}.png", "warning", "mask is empty"),
        (test / "masks" / f"{first.stem}.png", "error", "40 x 80 pixels but its image"),
        (test / "masks" / f"{first.stem}.png", "warning", "mask is full"),
        (tmp_path / "nowhere", "error", "no such folder"),
    ]
    assert len(record["faults"]) == len(wanted)
    for path, severity, problem in wanted:
        (fault,) = [
            f for f in record["faults"] if f["path"] == str(path) and problem in f["problem"]
        ]
        assert fault["severity"] == severity
        assert f"{severity}: {path}: {fault['problem']}; {fault['remedy']}" in text
    assert (record["sound"], record["errors"], record["warnings"]) == (False, 4, 2)
    assert record["groups"]["TrainDataset"]["empty_masks"] == 1


def test_a_test_folder_that_cannot_be_used_hides_no_other(data):
    train, test = data / "TrainDataset", data / "TestDataset"
    first = sorted((train / "masks").iterdir())[0]
    first.unlink()
    for name in ("Early", "Late"):
        (test / name / "images").mkdir(parents=True)
    check = check_folders([data])
    assert list(check.inspections) == ["TrainDataset", "TestDataset/Synthetic"]
    assert [(fault.path, fault.problem) for fault in check.faults] == [
        (test / "Early", "holds no `masks` or `mask` folder"),
        (test / "Late", "holds no `masks` or `mask` folder"),
        (train / "images" / f"{first.stem}.jpg", "image without mask"),
    ]


def test_pairs_of_unknown_types_are_a_warning_and_no_silence(data, capsys):
    folder = data / "TrainDataset"
    shutil.copy(next((folder / "images").iterdir()), folder / "images" / "late.jp2")
    shutil.copy(next((folder / "masks").iterdir()), folder / "masks" / "late.gif")
    assert cli.check([str(data)]) == 0
    text = capsys.readouterr().out
    assert f"warning: {folder / 'images'}: 1 files are left out" in text
    assert "(late.gif)" in text
    assert text.endswith("0 errors, 2 warnings\n")
    problems = [fault.problem for fault in audit_folder(folder)]  # what a training logs
    assert [problem[-10:] for problem in problems] == ["(late.jp2)", "(late.gif)"]


def test_inverted_masks_are_a_warning_of_their_folder(data, capsys):
    train = data / "TrainDataset"
    for path in (train / "masks").iterdir():
        Image.fromarray(255 - np.asarray(Image.open(path))).save(path)
    assert cli.check([str(data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "inverted" in line]
    assert line.startswith(f"warning: {train}: polyp on ")
    assert line.endswith("make sure that polyps are white, or coloured, and all else black")


def test_json_alone_goes_to_standard_output(data, capsys):
    assert cli.check([str(data), "--json", "-"]) == 0
    record = json.loads(capsys.readouterr().out)
    assert record["groups"]["TestDataset/Synthetic"]["pairs"] == 3


def test_duplicates_within_and_across_train_and_test(data, capsys):
    train, test = data / "TrainDataset", data / "TestDataset" / "Synthetic"
    a, b = sorted((train / "images").iterdir())[:2]
    for source, target in ((a, test), (b, train)):
        # Saved anew, so that the bytes differ and the pixels do not.
        Image.open(source).save(target / "images" / "copy.png")
        shutil.copy(train / "masks" / f"{source.stem}.png", target / "masks" / "copy.png")
    assert cli.check([str(data)]) == 1
    text = capsys.readouterr().out
    copy = test / "images" / "copy.png"
    assert f"error: {a}: has the same pixels as {copy}, one being a training" in text
    assert "warning: " in text
    assert "2 pairs of images are the same or nearly so; 1 test images have a twin" in text
    check = check_folders([data])
    assert check.errors == 1
    assert [(found.kind, found.distance) for found in check.duplicates] == [("exact", 0.0)] * 2


def test_frames_that_are_all_alike_are_told_on_one_line(data, capsys):
    train, test = data / "TrainDataset", data / "TestDataset" / "Synthetic"
    mask = sorted((train / "masks").iterdir())[0]
    for number in range(24):  # hardly a pixel is not black, and no two are the same
        frame = np.zeros((80, 80, 3), np.uint8)
        frame[0, number] = 1
        folder = test if number == 23 else train
        Image.fromarray(frame).save(folder / "images" / f"black_{number}.png")
        shutil.copy(mask, folder / "masks" / f"black_{number}.png")
    assert cli.check([str(data)]) == 0
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "looks nearly the same" in line]
    begin = f"warning: {train / 'images' / 'black_0.png'}: looks nearly the same (100% of its hash"
    assert line.startswith(f"{begin} or more) as {test / 'images' / 'black_23.png'}, {train}")
    assert "black_9.png and 13 more, all of them alike, some being training and some test" in line
    Image.fromarray(np.zeros((80, 80, 3), np.uint8)).save(test / "images" / "black_23.png")
    for number in range(23):
        shutil.copy(test / "images" / "black_23.png", train / "images" / f"black_{number}.png")
    assert cli.check([str(data)]) == 1
    lines = capsys.readouterr().out.splitlines()
    (line,) = [line for line in lines if "has the same pixels as" in line]
    assert line.startswith(f"error: {train / 'images' / 'black_0.png'}: has the same pixels as ")
    assert f"{test / 'images' / 'black_23.png'}, " in line


def copy_pair(source: Path, target: Path, stem: str) -> None:
    for kind, suffix in (("images", "jpg"), ("masks", "png")):
        (target / kind).mkdir(parents=True, exist_ok=True)
        shutil.copy(source / kind / f"{stem}.{suffix}", target / kind)


@pytest.mark.parametrize("name", ["TrainDataset", "mine"])
def test_near_twins_on_both_sides_of_a_random_split_are_counted(tmp_path, name):
    make_synthetic(tmp_path / "data", train=20, test=1, size=80)
    folder = (tmp_path / "data" / "TrainDataset").rename(tmp_path / name)
    assert check_folders([folder]).faults == []
    split = split_for(folder)
    for held_out, trained in zip(split.val, split.train, strict=False):
        Image.open(held_out.image).save(trained.image, quality=60)
    *_, fault = check_folders([folder]).faults
    assert (fault.path, fault.severity) == (folder, "warning")
    counted = "with seed 0, 2 of 2 validation images have a near-twin in training"
    assert counted in fault.problem
    assert f"{split.val[0].image.name} of {split.train[0].image.name}" in fault.problem


def test_training_images_of_two_roots_are_no_test_images(data, tmp_path, capsys):
    train = data / "TrainDataset"
    stems = sorted(path.stem for path in (train / "images").iterdir())
    other = tmp_path / "other" / "TrainDataset"
    copy_pair(train, other, stems[0])
    assert cli.check([str(data), str(other.parent), "--json", str(tmp_path / "a.json")]) == 0
    text = capsys.readouterr().out
    assert "one being a training" not in text
    assert "; 0 test images have a twin among the training images" in text
    record = json.loads((tmp_path / "a.json").read_text())
    roles = [group["role"] for group in record["groups"].values()]
    assert roles == ["training", "test", "training"]
    # One of the test images lies in the second training set.
    test = data / "TestDataset" / "Synthetic"
    stem = sorted(path.stem for path in (test / "images").iterdir())[0]
    copy_pair(test, other, stem)
    assert cli.check([str(data), str(other.parent)]) == 1
    text = capsys.readouterr().out
    assert f"{stem}.jpg, one being a training and one a test image" in text
    assert "; 1 test images have a twin among the training images" in text


def test_the_role_of_a_lone_folder_is_told_by_its_name_or_not_at_all(data, tmp_path, capsys):
    train, test = data / "TrainDataset", data / "TestDataset" / "Synthetic"
    stem = sorted(path.stem for path in (train / "images").iterdir())[0]
    copy_pair(train, test, stem)
    assert cli.check([str(train), str(test)]) == 1
    assert "; 1 test images have a twin among the training" in capsys.readouterr().out
    one, two = (Path(shutil.copytree(f, tmp_path / n)) for f, n in ((train, "tr"), (test, "te")))
    assert cli.check([str(one), str(two)]) == 0
    text = capsys.readouterr().out
    assert "have a twin" not in text
    assert "unknown whether tr, te are for training or for test" in text


def test_copies_that_were_scaled_compressed_or_brightened_are_near(real_data):
    folder = real_data / "TestDataset" / "Kvasir" / "images"
    images = [read_image(path) for path in sorted(folder.iterdir())[:12]]
    for original in images[:4]:
        picture = Image.fromarray(original)
        changed = [
            picture.resize((300, 260)),
            ImageEnhance.Brightness(picture).enhance(0.8),
            picture.crop((2, 2, picture.width - 2, picture.height - 2)),
        ]
        for copy in changed:
            groups = {
                "all": [fingerprint(image) for image in images],
                "copy": [None, fingerprint(np.asarray(copy))],
            }
            (found,) = find_duplicates(groups)
            assert found.kind == "near"
            assert found.second == ("copy", 1)
            np.testing.assert_array_equal(images[found.first[1]], original)


# The test frames whose grey, averaged to 64 x 64 cells, correlates by more than 0.98 with that of a
# training frame, which is named. Two of the 16 have no training frame within the hash's threshold.
TWINS = {31: 30, 42: 40, 50: 48, 89: 90, 100: 99, 179: 193, 181: 180, 353: 354, 374: 378, 381: 382,
         429: 436, 474: 475, 481: 480, 483: 482}  # fmt: skip
MISSED = {185: 186, 251: 250}


def test_frames_of_one_video_are_near_and_frames_of_different_videos_are_not(real_data):
    train = real_data / "TrainDataset" / "images"
    test = real_data / "TestDataset"
    numbers = sorted({**TWINS, **MISSED}.values())
    clinic = sorted((test / "CVC-ClinicDB" / "images").iterdir())
    groups = {
        "train": [fingerprint(read_image(train / f"clinic_{n}.jpg")) for n in numbers],
        "test": [fingerprint(read_image(path)) for path in clinic],
        "Kvasir": [fingerprint(read_image(path)) for path in (test / "Kvasir/images").iterdir()],
    }
    found = {
        (int(clinic[pair.second[1]].stem[len("clinic_") :]), numbers[pair.first[1]])
        for pair in find_duplicates(groups)
        if pair.first[0] == "train" and pair.second[0] == "test"
    }
    assert found >= set(TWINS.items())
    for pair in find_duplicates(groups):
        assert "Kvasir" not in (pair.first[0], pair.second[0])
    videos = [[bisect_left(CLINIC_SEQUENCE_ENDS, number) for number in pair] for pair in found]
    assert all(one == other for one, other in videos)


def test_the_hash_says_where_the_grey_rises():
    coarse = Image.fromarray(np.random.default_rng(0).integers(0, 256, (9, 9, 3), np.uint8))
    image = np.asarray(coarse.resize((32 * 17, 32 * 17), Image.Resampling.BICUBIC))
    grey = np.asarray(Image.fromarray(image).convert("L")).astype(float)
    along = grey.reshape(16, 34, 17, 32).mean((1, 3))
    down = grey.reshape(17, 32, 16, 34).mean((1, 3))
    expected = [*(np.diff(along) > 0).ravel(), *(np.diff(down, axis=0) > 0).ravel()]
    differing = np.unpackbits(fingerprint(image).bits) != expected
    assert differing.sum() <= 8  # cells that are equal but for the rounding to whole greys


def test_data_without_images_give_no_duplicates():
    assert find_duplicates({"a": [None], "b": []}) == []
