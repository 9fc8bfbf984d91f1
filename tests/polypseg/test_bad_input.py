"""Whatever people feed in: correct work or a clear error, nothing lost, nothing executed.

Kinds of image files one by one are in test_reading.py; archives are not read anywhere.
"""

import csv
import pickle
import shutil
import warnings

import numpy as np
import pytest
import torch
from PIL import Image

from polypseg import cli
from polypseg.checkpoint import save_weights
from polypseg.config import make_config
from polypseg.models import build_model, load_encoder_weights


def smooth(height: int, width: int) -> Image.Image:
    coarse = np.random.default_rng(0).integers(0, 256, (4, 5, 3), dtype=np.uint8)
    return Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)


def test_images_of_every_mode_and_size_get_masks_of_their_own_size(tiny_run, tmp_path):
    folder = tmp_path / "in"
    folder.mkdir()
    picture = smooth(60, 80)
    exif = Image.Exif()
    exif[0x0112] = 8  # to be shown turned by a quarter
    picture.save(folder / "turned.jpg", exif=exif)
    picture.convert("L").save(folder / "grey.png")
    picture.convert("RGBA").save(folder / "alpha.png")
    picture.convert("CMYK").save(folder / "cmyk.jpg")
    picture.convert("P").save(folder / "palette.png")
    deep = np.asarray(picture.convert("L")).astype(np.uint16) * 257
    Image.fromarray(deep).save(folder / "deep.png")
    picture.resize((1, 1)).save(folder / "dot.png")
    picture.resize((1, 500)).save(folder / "line.png")
    out = tmp_path / "out"
    arguments = [str(folder), "--run", str(tiny_run), "--out", str(out), "--solver", "explicit"]
    assert cli.predict(arguments) == 0
    with open(out / "predictions.csv", newline="") as file:
        sizes = {
            row["file"].rpartition("/")[2]: (int(row["width"]), int(row["height"]))
            for row in csv.DictReader(file)
        }
    assert sizes == {
        **dict.fromkeys(("grey.png", "alpha.png", "cmyk.jpg", "palette.png", "deep.png"), (80, 60)),
        "turned.jpg": (60, 80), "dot.png": (1, 1), "line.png": (1, 500),
    }  # fmt: skip
    masks = {path.stem: np.asarray(Image.open(path)) for path in (out / "masks").iterdir()}
    np.testing.assert_array_equal(masks["grey"], masks["deep"])  # 16 bits are scaled, not cut
    assert {path.stem for path in (out / "overlays").iterdir()} == set(masks)


def test_an_image_of_8000_by_6000_pixels_is_segmented(tiny_run, tmp_path):
    smooth(6000, 8000).save(tmp_path / "large.jpg", quality=50)
    out = tmp_path / "out"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # Pillow warns of decompression bombs
        arguments = ["--run", str(tiny_run), "--out", str(out), "--solver", "explicit"]
        assert cli.predict([str(tmp_path / "large.jpg"), *arguments]) == 0
    with Image.open(out / "masks" / "large.png") as mask:
        assert mask.size == (8000, 6000)


def test_a_decompression_bomb_is_refused(tiny_run, tmp_path, capsys, monkeypatch):
    """Pillow's limit, lowered so that the test needs no gigabyte."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 1000)
    smooth(60, 80).save(tmp_path / "bomb.png")
    arguments = ["--run", str(tiny_run), "--out", str(tmp_path / "out")]
    assert cli.predict([str(tmp_path / "bomb.png"), *arguments]) == 1
    assert "bomb.png: cannot be decoded (DecompressionBombError" in capsys.readouterr().err


class Bomb:
    """Unpickled carelessly, it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


@pytest.mark.parametrize("how", ["pickle", "torch.save"])
def test_a_pickle_bomb_as_weights_does_not_go_off(copy_run, tmp_path, capsys, how):
    mark = tmp_path / "executed"
    run, out = copy_run(), tmp_path / "out"
    picture = tmp_path / "a.png"
    smooth(40, 40).save(picture)
    for name in ("explicit.safetensors", "implicit.safetensors", "hyper.safetensors"):
        if how == "pickle":
            (run / name).write_bytes(pickle.dumps(Bomb(mark), protocol=2))
        else:
            torch.save({"weights": Bomb(mark)}, run / name)
    before = {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()}
    for solver in ("explicit", "hyper"):
        arguments = [str(picture), "--run", str(run), "--out", str(out), "--solver", solver]
        assert cli.predict(arguments) == 1
        assert "not a complete safetensors file" in capsys.readouterr().err
    encoder = tmp_path / "encoder.pth"
    encoder.write_bytes((run / "explicit.safetensors").read_bytes())
    with pytest.raises(RuntimeError, match="not a file of plain weights"):
        load_encoder_weights(build_model(make_config().model).encoder, encoder)
    assert not mark.exists()
    assert not out.exists()
    assert {path.name: path.read_bytes() for path in run.iterdir() if path.is_file()} == before


def test_weights_of_another_model_are_refused_by_name(copy_run, synthetic_data, capsys):
    run = copy_run()
    other = build_model(make_config(overrides=["model.name=polypdeq-res"]).model)
    save_weights(run / "explicit.safetensors", other.state_dict(), {})
    assert cli.evaluate([str(run), "--data", str(synthetic_data)]) == 1
    message = capsys.readouterr().err
    assert "explicit.safetensors: these weights do not fit the model polypdeq-add" in message
    assert "unknown to the model" in message
    assert not (run / "evaluation").exists()


def test_empty_masks_are_scored_by_the_rule_that_is_said(tiny_run, synthetic_data, tmp_path):
    folder = tmp_path / "Empty"
    shutil.copytree(synthetic_data / "TestDataset" / "Synthetic", folder)
    for mask in (folder / "masks").iterdir():
        Image.new("L", (80, 80)).save(mask)
    out = tmp_path / "out"
    arguments = [str(tiny_run), "--data", str(folder), "--out", str(out), "--solvers", "explicit"]
    assert cli.evaluate(arguments) == 0
    with open(out / "Empty-explicit.csv", newline="") as file:
        for row in csv.DictReader(file):
            predicted = int(row["fp"]) > 0
            assert float(row["dice"]) == float(row["iou"]) == (0.0 if predicted else 1.0)
            assert float(row["hd95"]) == pytest.approx(80 * 2**0.5 if predicted else 0)
