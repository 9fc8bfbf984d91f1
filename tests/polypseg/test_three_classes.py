"""NeoPolyp's classes through evaluation, prediction and the check."""

import csv
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polypseg import cli
from polypseg.checkpoint import save_weights
from polypseg.config import make_config
from polypseg.data import read_image, read_mask
from polypseg.data.classes import CLASS_COLOURS
from polypseg.models import build_model
from polypseg.predictor import Predictor
from polypseg.testsets import find_test_sets

TARGETS = ("polyp", "neoplastic", "non_neoplastic")


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("classes") / "run"
    folder.mkdir()
    config = make_config(overrides=["data.size=64", "model.classes=3"])
    (folder / "config.yaml").write_text(config.to_yaml())
    (folder / "versions.json").write_text("{}")
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = build_model(config.model)
    save_weights(folder / "explicit.safetensors", model.state_dict(), {})
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Three images; the last shows no non-neoplastic polyp."""
    root = tmp_path_factory.mktemp("data") / "Neo"
    rng = np.random.default_rng(0)
    for name in ("images", "masks"):
        (root / name).mkdir(parents=True)
    for number in range(3):
        coarse = Image.fromarray(rng.integers(0, 256, (5, 6, 3), dtype=np.uint8))
        coarse.resize((90, 70), Image.Resampling.BICUBIC).save(root / "images" / f"{number}.jpg")
        mask = np.zeros((70, 90, 3), np.uint8)
        mask[10:40, 5:30, 0] = 255
        if number < 2:
            mask[30:60, 50:80, 1] = 255
        Image.fromarray(mask).save(root / "masks" / f"{number}.png")
    return root


def test_each_class_and_all_as_one_are_scored(run, folder, tmp_path, capsys):
    out = tmp_path / "out"
    arguments = [str(run), "--data", str(folder), "--protocols", "default,paper"]
    assert cli.evaluate([*arguments, "--out", str(out)]) == 0
    assert "non_neoplastic" in capsys.readouterr().out
    with open(out / "Neo-explicit.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3 * 2 * 3
    predictor = Predictor.from_run(run, "explicit")
    for row in (row for row in rows if row["protocol"] == "default"):
        predicted = predictor.predict(read_image(folder / "images" / f"{row['stem']}.jpg")).labels
        truth = read_mask(folder / "masks" / f"{row['stem']}.png", classes=3)
        number = TARGETS.index(row["target"])
        a, b = (labels > 0 if number == 0 else labels == number for labels in (predicted, truth))
        assert [int(row[name]) for name in ("tp", "fp", "fn")] == [
            (a & b).sum(), (a & ~b).sum(), (~a & b).sum(),
        ]  # fmt: skip
    with open(out / "summary.csv", newline="") as file:
        summary = list(csv.DictReader(file))
    assert [(row["protocol"], row["target"]) for row in summary] == [
        (protocol, target) for protocol in ("default", "paper") for target in TARGETS
    ]


def test_a_report_is_written_and_pranets_protocol_is_refused(run, folder, capsys):
    arguments = [str(run), "--data", str(folder)]
    assert cli.evaluate(arguments) == 0
    assert "neoplastic" in (run / "report.html").read_text()
    assert cli.evaluate([*arguments, "--protocols", "pranet"]) == 1
    assert "the pranet protocol knows one class" in capsys.readouterr().err


def test_predicted_masks_have_the_classes_colours(run, folder, tmp_path):
    out = tmp_path / "out"
    assert cli.predict([str(folder / "images"), "--run", str(run), "--out", str(out)]) == 0
    predictor = Predictor.from_run(run, "explicit")
    for number in range(3):
        path = out / "masks" / f"{number}.png"
        labels = predictor.predict(read_image(folder / "images" / f"{number}.jpg")).labels
        np.testing.assert_array_equal(
            np.asarray(Image.open(path).convert("RGB")), np.array(CLASS_COLOURS, np.uint8)[labels]
        )
        np.testing.assert_array_equal(read_mask(path, classes=3), labels)


def test_the_check_reads_coloured_masks_when_told_to(folder, capsys):
    assert cli.check([str(folder), "--classes", "3"]) == 0
    capsys.readouterr()
    assert cli.check([str(folder)]) == 0
    out = capsys.readouterr().out
    assert "3 of 3 masks are red or green, and read as polyp or none" in out
    assert "0 errors, 1 warning" in out


def test_a_network_of_one_class_is_scored_on_polyps_of_either(folder, tmp_path):
    binary, run = tmp_path / "Neo", tmp_path / "run"
    shutil.copytree(folder / "images", binary / "images")
    (binary / "masks").mkdir()
    for path in (folder / "masks").iterdir():
        polyp = np.asarray(Image.open(path)).max(axis=2)
        Image.fromarray(polyp).save(binary / "masks" / path.name)
    run.mkdir()
    config = make_config(overrides=["data.size=64"])
    (run / "config.yaml").write_text(config.to_yaml())
    (run / "versions.json").write_text("{}")
    save_weights(run / "explicit.safetensors", build_model(config.model).state_dict(), {})
    rows = []
    for number, data in enumerate((folder, binary)):
        out = tmp_path / str(number)
        assert cli.evaluate([str(run), "--data", str(data), "--out", str(out)]) == 0
        with open(out / "Neo-explicit.csv", newline="") as file:
            rows.append(
                [[row[name] for name in ("tp", "fp", "fn")] for row in csv.DictReader(file)]
            )
    assert rows[0] == rows[1]
    assert len(rows[0]) == 3


def test_of_neopolyp_only_the_held_out_images_are_tested(real_data):
    sets = find_test_sets([real_data / "NeoPolyp-Small"], classes=3)
    assert {name: len(pairs) for name, pairs in sets.items()} == {"NeoPolyp-Small": 200}
