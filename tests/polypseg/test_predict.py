"""Segmenting a person's own images."""

import csv
import errno
import hashlib
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from polypseg import cli, predict
from polypseg.checkpoint import OutOfSpaceError
from polypseg.data import DataError, read_image
from polypseg.drawing import overlay
from polypseg.predict import predict_files
from polypseg.predictor import Predictor
from polypseg.sources import find_sources


@pytest.fixture
def images(tmp_path) -> Path:
    """A folder of three images: a photograph, a grey one, and one that a camera turned."""
    folder = tmp_path / "images"
    folder.mkdir()
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (5, 7, 3), dtype=np.uint8))
    picture = coarse.resize((120, 90), Image.Resampling.BICUBIC)
    picture.save(folder / "a photo.jpg")
    picture.convert("L").save(folder / "grey.png")
    exif = Image.Exif()
    exif[0x0112] = 6  # to be shown turned by a quarter: 90 wide, 120 high
    picture.save(folder / "turned.jpg", exif=exif)
    return folder


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def digests(folder: Path) -> dict[Path, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def test_the_residual_of_a_hypersolver_is_measured(tiny_run, images, tmp_path):
    """Its fixed number of steps leaves it unknown, and the table is there to tell."""
    out = tmp_path / "out"
    assert cli.predict([str(images), "--run", str(tiny_run), "--out", str(out)]) == 0
    for row in read_csv(out / "predictions.csv"):
        assert row["status"] == "FIXED_STEPS"
        assert 0 < float(row["residual"]) < 1
        assert int(row["evaluations"]) == int(row["steps"])


def test_masks_overlays_and_the_table_agree(tiny_run, images, tmp_path, capsys):
    before = digests(images)
    out = tmp_path / "out"
    arguments = [str(images), "--run", str(tiny_run), "--out", str(out), "--solver", "anderson"]
    assert cli.predict(arguments) == 0
    assert "Images: 3, with a polyp marked: 3 (solver anderson)" in capsys.readouterr().out
    assert digests(images) == before

    rows = {Path(row["file"]).name: row for row in read_csv(out / "predictions.csv")}
    assert list(rows) == ["a photo.jpg", "grey.png", "turned.jpg"]
    predictor = Predictor.from_run(tiny_run, "anderson")
    for name, row in rows.items():
        result = predictor.predict(read_image(images / name))
        mask = np.asarray(Image.open(out / "masks" / f"{Path(name).stem}.png"))
        assert mask.dtype == np.uint8
        np.testing.assert_array_equal(mask, np.where(result.probability > 0.5, 255, 0))
        assert (int(row["height"]), int(row["width"])) == mask.shape
        assert int(row["polyp_pixels"]) == (mask == 255).sum()
        assert float(row["polyp_share"]) == pytest.approx((mask == 255).mean())
        assert float(row["max_probability"]) == pytest.approx(result.probability.max())
        assert int(row["steps"]) == result.steps
        assert float(row["residual"]) == pytest.approx(result.residual)
        assert row["status"] == result.status

        drawn = np.asarray(Image.open(out / "overlays" / f"{Path(name).stem}.jpg")).astype(int)
        assert drawn.shape[:2] == mask.shape
        image = read_image(images / name)
        loss = abs(drawn - overlay(image, mask > 0)).mean()  # JPEG's
        assert loss < 0.3 * abs(drawn - image).mean()
    assert rows["turned.jpg"]["width"] == "90"


@pytest.mark.parametrize(
    ("solver", "phases"),
    [("explicit", ["explicit"]), ("picard", ["implicit"]), ("hyper", ["implicit", "hyper"])],
)
def test_the_record_says_what_made_the_masks(solver, phases, tiny_run, images, tmp_path):
    out = tmp_path / "out"
    arguments = [str(images / "a photo.jpg"), "--run", str(tiny_run), "--out", str(out)]
    assert cli.predict([*arguments, "--solver", solver]) == 0
    record = json.loads((out / "predictions.json").read_text())
    command = shlex.split(record["command"])
    assert command == ["polypseg-predict", *arguments, "--solver", solver]
    assert (record["run"], record["solver"]) == (str(tiny_run), solver)
    files = [tiny_run / f"{phase}.safetensors" for phase in phases]
    assert record["weights_sha256"] == {
        file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files
    }
    assert record["notice"] == "Research use only, not a medical device."


def test_the_default_solver_is_the_runs_best(tiny_run, images, tmp_path, capsys):
    assert cli.predict([str(images), "--run", str(tiny_run), "--out", str(tmp_path / "out")]) == 0
    assert "(solver hyper)" in capsys.readouterr().out


def test_sources_may_be_patterns_and_may_overlap(tiny_run, images, tmp_path):
    predictor = Predictor.from_run(tiny_run, "explicit")
    sources = [images / "grey.png", f"{images}/*.png", images]
    rows = predict_files(predictor, sources, tmp_path / "out").images
    assert sorted(Path(row.file).name for row in rows) == ["a photo.jpg", "grey.png", "turned.jpg"]


def test_every_link_to_one_image_is_predicted(tiny_run, images, tmp_path):
    folder = tmp_path / "links"
    folder.mkdir()
    for name in ("one.png", "two.png"):
        (folder / name).symlink_to(images / "grey.png")
    predictor = Predictor.from_run(tiny_run, "explicit")
    sources = [folder, folder / ".." / "links" / "one.png"]
    rows = predict_files(predictor, sources, tmp_path / "out").images
    assert [Path(row.file).name for row in rows] == ["one.png", "two.png"]
    masks = {path.name: path.read_bytes() for path in (tmp_path / "out" / "masks").iterdir()}
    assert masks["one.png"] == masks["two.png"]


def test_what_is_left_out_of_a_folder_is_named_on_one_line(tiny_run, images, tmp_path, capsys):
    Image.new("L", (8, 8)).save(images / "skipped.gif")
    (images / "scan.dcm").write_bytes(b"DICM")
    (images / "gone.png").symlink_to(tmp_path / "nowhere.png")
    (images / ".hidden").write_bytes(b"")
    (images / "folder.png").mkdir()
    arguments = [str(images), f"{images}/*g*", "--run", str(tiny_run), "--out"]
    assert cli.predict([*arguments, str(tmp_path / "out")]) == 0
    captured = capsys.readouterr()
    assert "Images: 3," in captured.out
    (line,) = [line for line in captured.err.splitlines() if line.startswith("warning:")]
    names = ", ".join(str(images / name) for name in ("gone.png", "scan.dcm", "skipped.gif"))
    assert line.endswith(f": {names}")


def test_subfolders_are_named_unless_they_are_sources_too(images, tmp_path, capsys):
    for folder in ("early", "late"):
        (images / folder).mkdir()
        Image.new("RGB", (8, 8)).save(images / folder / f"{folder}.png")
    files, _ = find_sources([images, images / "early"], tmp_path / "out")
    assert {file.name for file in files} == {"a photo.jpg", "early.png", "grey.png", "turned.jpg"}
    (line,) = [line for line in capsys.readouterr().err.splitlines() if "warning" in line]
    told = "holds 1 images or videos in subfolders (late), which are not searched"
    assert line == f"warning: {images}: {told}; name each of these folders"


def test_composed_and_decomposed_accents_would_have_one_result(tmp_path):
    for name in ("caf\u00e9.png", "cafe\u0301.png"):
        Image.new("RGB", (8, 8)).save(tmp_path / name)
    with pytest.raises(DataError, match="shares its stem with"):
        find_sources([tmp_path], tmp_path / "out")


def test_all_that_is_wrong_is_named_and_nothing_is_written(tiny_run, images, tmp_path, capsys):
    (images / "broken.png").write_bytes(b"no picture")
    (images / "short.jpg").write_bytes((images / "a photo.jpg").read_bytes()[:400])
    (images / "GREY.jpg").write_bytes((images / "a photo.jpg").read_bytes())
    out = tmp_path / "out"
    nothing = str(tmp_path / "nothing*.png")
    assert cli.predict([str(images), nothing, "--run", str(tiny_run), "--out", str(out)]) == 1
    message = capsys.readouterr().err
    assert message.startswith("polypseg-predict: error: ")
    assert "broken.png: cannot be decoded" in message
    assert "short.jpg: cannot be decoded" in message
    assert "shares its stem with" in message
    assert f"{images / 'grey.png'}" in message
    assert f"{images / 'GREY.jpg'}" in message
    assert "nothing*.png: there is no such file or folder" in message
    assert "Traceback" not in message
    assert not out.exists()


@pytest.fixture
def during(monkeypatch):
    """Do something as an image's turn comes, after all of them have been read once."""

    def arrange(name, action):
        def read(path):
            if Path(path).name == name:
                action(Path(path))
            return read_image(path)

        monkeypatch.setattr(predict, "read_image", read)

    return arrange


def test_a_file_that_vanishes_meanwhile_costs_no_other(tiny_run, images, tmp_path, during, capsys):
    during("grey.png", Path.unlink)
    out = tmp_path / "out"
    assert cli.predict([str(images), "--run", str(tiny_run), "--out", str(out)]) == 1
    message = capsys.readouterr().err
    assert f"1 of 3 files are missing in {out}" in message
    assert f"error: {images / 'grey.png'}: there is no such file" in message
    names = [Path(row["file"]).name for row in read_csv(out / "predictions.csv")]
    assert names == ["a photo.jpg", "turned.jpg"]
    record = json.loads((out / "predictions.json").read_text())
    assert [Path(row["file"]).name for row in record["images"]] == names
    assert record["missing"] == [str(images / "grey.png")]


@pytest.mark.parametrize(
    ("error", "code"), [(OutOfSpaceError(errno.ENOSPC, "no room"), 1), (KeyboardInterrupt(), 130)]
)
def test_what_is_done_is_in_the_tables_whatever_ends_the_work(
    tiny_run, images, tmp_path, during, error, code
):
    def fail(path):
        raise error

    during("grey.png", fail)
    out = tmp_path / "out"
    assert cli.predict([str(images), "--run", str(tiny_run), "--out", str(out)]) == code
    (row,) = read_csv(out / "predictions.csv")
    assert row["file"] == str(images / "a photo.jpg")
    record = json.loads((out / "predictions.json").read_text())
    assert record["missing"] == [str(images / name) for name in ("grey.png", "turned.jpg")]


def test_a_failure_before_the_first_result_writes_nothing(tiny_run, images, tmp_path, during):
    during("grey.png", Path.unlink)
    arguments = [str(images / "grey.png"), "--run", str(tiny_run), "--out", str(tmp_path / "out")]
    assert cli.predict(arguments) == 1
    assert not (tmp_path / "out").exists()


def test_images_of_one_name_in_two_folders_are_refused(tiny_run, images, tmp_path):
    other = Path(shutil.copytree(images, tmp_path / "other"))
    predictor = Predictor.from_run(tiny_run, "explicit")
    with pytest.raises(DataError) as caught:
        predict_files(predictor, [images, other], tmp_path / "out")
    assert len(caught.value.faults) == 3
    assert f"{images / 'grey.png'}: shares its stem with {other / 'grey.png'}" in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_masks_that_lie_in_the_output_folder_are_never_overwritten(
    tiny_run, synthetic_data, tmp_path, capsys
):
    folder = Path(shutil.copytree(synthetic_data / "TestDataset" / "Synthetic", tmp_path / "set"))
    before = digests(folder)
    source = str(folder / "images")
    for out in (folder, folder / "images", folder / "images" / "synthetic_0001.jpg"):
        assert cli.predict([source, "--run", str(tiny_run), "--out", str(out)]) == 1
        assert f"{out}: exists and is not an empty folder" in capsys.readouterr().err
        assert digests(folder) == before


def test_a_run_or_solver_that_is_not_there_is_refused(tiny_run, images, tmp_path, capsys):
    for arguments, message in (
        (["--run", str(tmp_path / "nowhere")], "nowhere: there is no such folder"),
        (["--run", str(images)], "holds no trained weights"),
        (["--run", str(tiny_run), "--solver", "newton"], "got 'newton'"),
        (["--run", str(tiny_run), "--device", "warp"], "device 'warp' cannot be used"),
    ):
        assert cli.predict([str(images), "--out", str(tmp_path / "out"), *arguments]) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tol", ["inf", "nan", "1", "-1e-3"])
@pytest.mark.parametrize("solver", ["anderson", "hyper"])
def test_a_tolerance_that_the_start_meets_is_refused(
    tiny_run, images, tmp_path, capsys, tol, solver
):
    out = tmp_path / "out"
    arguments = [str(images), "--run", str(tiny_run), "--out", str(out), "--solver", solver]
    assert cli.predict([*arguments, f"--tol={tol}"]) == 1
    message = capsys.readouterr().err
    assert "tol must be at least 0 and below 1" in message
    assert message.endswith(f"got {float(tol)}\n")
    assert not out.exists()


def test_solver_options_of_the_explicit_pass_are_refused(tiny_run, images, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(images), "--run", str(tiny_run), "--out", str(out), "--solver", "explicit"]
    for given, named in (
        (["--tol", "1e-3"], "tol cannot"),
        (["--max-steps", "9"], "max_steps cannot"),
        (["--tol", "1e-3", "--max-steps", "9"], "tol and max_steps cannot"),
    ):
        assert cli.predict([*arguments, *given]) == 1
        assert f"error: {named} be set here: the explicit pass" in capsys.readouterr().err
    assert not out.exists()


def test_weights_of_another_network_are_refused(copy_run, images, tmp_path, capsys):
    run = copy_run()
    shutil.copy(run / "hyper.safetensors", run / "implicit.safetensors")
    arguments = [str(images), "--run", str(run), "--out", str(tmp_path / "out")]
    assert cli.predict(arguments) == 1
    assert "implicit.safetensors: these weights do not fit the model" in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
