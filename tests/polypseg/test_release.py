"""Releasing a run: what is written, what it holds, and what is refused."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polypseg import model_card, released
from polypseg.checkpoint import CheckpointError, load_weights, save_weights
from polypseg.cli import predict
from polypseg.config import make_config
from polypseg.data import DataError
from polypseg.data.splits import stems_digest
from polypseg.inference import load_model
from polypseg.lineage import Lineage, Origin, read_lineage, write_lineage
from polypseg.models import build_hypersolver, build_model
from polypseg.predictor import Predictor
from polypseg.release import main, write_release


def check_sums(folder):
    for line in (folder / "SHA256SUMS").read_text().splitlines():
        digest, name = line.split()
        assert hashlib.sha256((folder / name).read_bytes()).hexdigest() == digest


def test_the_models_of_the_repository_are_whole_and_small():
    models = Path(__file__).parents[2] / "models"
    folders = [path.parent for path in models.glob("*/config.yaml")]
    assert folders
    for folder in folders:
        check_sums(folder)
        assert load_model(folder, "hyper")
        files = json.loads((folder / "evaluation" / "summary.json").read_text())["files"]
        assert all((folder / "evaluation" / name).is_file() for name in files)
    assert sum(path.stat().st_size for path in models.rglob("*") if path.is_file()) <= 20e6


def test_weights_are_the_runs_in_half_precision_with_true_checksums(tiny_run, tmp_path):
    out = tmp_path / "release"
    write_release(tiny_run, out)
    check_sums(out)
    own, _ = load_weights(tiny_run / "implicit.safetensors")
    stored, _ = load_weights(out / "implicit.safetensors")
    assert own.keys() == stored.keys()
    for key, value in own.items():
        torch.testing.assert_close(stored[key].to(value.dtype), value, rtol=1e-3, atol=1e-6)


def test_a_release_predicts_like_its_run(tiny_run, tmp_path):
    write_release(tiny_run, tmp_path / "release")
    image = np.random.default_rng(0).integers(0, 256, (80, 80, 3), dtype=np.uint8)
    predictions = [
        Predictor.from_run(folder, "hyper").predict(image).probability
        for folder in (tiny_run, tmp_path / "release")
    ]
    assert abs(predictions[0] - predictions[1]).max() < 1e-2


def test_weights_beyond_half_precision_are_refused(copy_run, tmp_path):
    broken = copy_run()
    weights, metadata = load_weights(broken / "implicit.safetensors")
    name = next(iter(weights))
    weights[name] = torch.full_like(weights[name], 1e6)
    save_weights(broken / "implicit.safetensors", weights, metadata)
    with pytest.raises(CheckpointError, match=f"{name} of implicit do not fit"):
        write_release(broken, tmp_path / "release")
    assert not (tmp_path / "release").exists()


def test_without_a_released_model_predict_says_what_to_give(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(released, "RELEASED", tmp_path)
    assert predict(["x.png"]) == 1
    assert "name a run directory with --run" in capsys.readouterr().err


def release(run, out, data, *more):
    assert main([str(run), str(out), "--data", str(data), "--trained-on", "my images", *more]) == 0
    return (out / "README.md").read_text()


def snapshot(folder):
    return {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_the_card_of_a_run_without_a_record_holds_what_is_given_and_no_more(
    tiny_run, synthetic_data, tmp_path, capsys
):
    out = tmp_path / "mine"
    with pytest.raises(SystemExit):
        release(tiny_run, out, synthetic_data)
    assert "--pretraining TEXT is needed" in capsys.readouterr().err
    assert not out.exists()

    card = release(tiny_run, out, synthetic_data, "--pretraining", "on my cats")
    for told in (
        "(MiT-B0 encoder, UNet decoder)", "Data: my images", "Pretraining: on my cats",
        "does not tell kinds of polyps apart", "| Synthetic | hyper | pranet | 6 |",
        "polypseg-predict IMAGE --run mine",
    ):  # fmt: skip
        assert told in card
    for unknown in ("ImageNet", "ADE20K", "Kvasir", "ClinicDB", "two sources", "None"):
        assert unknown not in card
    check_sums(out)
    assert {path.name for path in out.iterdir()} == {
        "README.md", "SHA256SUMS", "config.yaml", "evaluation", "hyper.safetensors",
        "implicit.safetensors", "versions.json",
    }  # fmt: skip
    record = json.loads((out / "evaluation" / "summary.json").read_text())
    assert record["run"] == str(out)
    held = {path.name for path in (out / "evaluation").iterdir()}
    assert held == {"summary.json", *record["files"]}


def test_a_record_is_told_and_goes_with_the_release(
    copy_run, synthetic_data, tmp_path, monkeypatch
):
    run, out = copy_run(), tmp_path / "mine"
    digests = {f"{i}": [f"i{i}", f"m{i}"] for i in range(4)}
    train, val = {key: digests[key] for key in "012"}, {"3": digests["3"]}
    parent = Lineage(Origin("mit.safetensors", "ab12"), train, val)
    second = Lineage(Origin("explicit.safetensors", "cd34", "first", parent), train, val)
    start = Origin("implicit.safetensors", "ef56", "second", second)
    write_lineage(run, Lineage(start, {"0": digests["0"]}, val))
    card = release(run, out, synthetic_data)
    for told in (
        "1 for training and 1 for validation",
        "- Start: the network from `implicit.safetensors` (SHA-256 ef56) of `second`, trained on 3",
        "- Before that, `second`: Start: the network from `explicit.safetensors` (SHA-256 cd34) of "
        "`first`, trained on 3 images.",
        "- Before that, `first`: Start: the encoder from `mit.safetensors` (SHA-256 ab12)",
        "NVIDIA's SegFormer encoders carry a non-commercial licence",
    ):
        assert told in card
    assert "Kvasir" not in card
    assert read_lineage(out) == read_lineage(run)
    own = out / "evaluation" / "reader-study.csv"
    own.write_text("by hand")

    standard = Lineage(None, train, val)
    tuned = Lineage(Origin("explicit.safetensors", "cd34", "first", standard), {}, {})
    monkeypatch.setattr(model_card, "TRAIN_DIGEST", stems_digest(list("0123")))
    for lineage in (standard, tuned):
        write_lineage(run, lineage)
        card = release(run, out, synthetic_data)
        assert "Start: random weights" in card
        assert "NVIDIA" not in card
        assert "Kvasir-SEG is also part of" in card  # by the stems of the field's training set
    assert {path.name for path in own.parent.iterdir()} == {
        "summary.csv", "summary.json", own.name
    }  # fmt: skip

    write_lineage(run, Lineage(Origin("explicit.safetensors", "cd34", "first"), train, val))
    with pytest.raises(SystemExit):  # nobody knows what the first run started from
        release(run, out, synthetic_data)


@pytest.mark.parametrize(
    ("settings", "network"),
    [
        (["model.name=mdeq"], "by a multi-scale deep equilibrium model (MDEQ) with"),
        (["model.encoder=b1"], "(MiT-B1 encoder, UNet decoder)"),
    ],
)
def test_the_card_names_the_network(settings, network):
    config = make_config(overrides=settings)
    facts = model_card.Facts(config, None, {}, "images", "cats", "", [], [])
    assert network in model_card.model_card(facts, "SHA256SUMS")


def test_a_network_of_three_classes_is_released(copy_run, tmp_path):
    run, data = copy_run(), tmp_path / "Neo"
    settings = ["data.size=64", "solve.max_steps=2", "model.classes=3"]
    config = make_config(overrides=settings)
    (run / "config.yaml").write_text(config.to_yaml())
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = build_model(config.model)
        hyper = build_hypersolver(model, config.hyper)
    save_weights(run / "implicit.safetensors", model.state_dict(), {})
    save_weights(run / "hyper.safetensors", hyper.state_dict(), {})
    (run / "explicit.safetensors").unlink()
    mask = np.zeros((70, 90, 3), np.uint8)
    mask[10:40, 5:30, 0] = mask[30:60, 50:80, 1] = 255
    for part, pixels in (("images", mask + 40), ("masks", mask)):
        (data / part).mkdir(parents=True)
        Image.fromarray(pixels).save(data / part / "0.png")
    card = release(run, tmp_path / "out", data, "--pretraining", "none")
    assert "pixels as one of neoplastic, non-neoplastic;" in card
    assert "does not tell kinds" not in card
    assert "| Neo | hyper | paper | non_neoplastic | 1 |" in card
    assert "pranet" not in card


def test_whatever_goes_wrong_leaves_the_folder_as_it_was(
    tiny_run, copy_run, synthetic_data, tmp_path
):
    out, bad = tmp_path / "out", tmp_path / "bad"
    for part in ("images", "masks"):
        (bad / part).mkdir(parents=True)
        (bad / part / "0.png").write_bytes(b"no picture")
    known = ["--pretraining", "none"]
    with pytest.raises(DataError, match="cannot be decoded"):
        release(tiny_run, out, bad, *known)
    assert not out.exists()
    release(tiny_run, out, synthetic_data, *known)
    before, other = snapshot(out), copy_run()
    weights, metadata = load_weights(other / "implicit.safetensors")
    changed = {key: value + 1 for key, value in weights.items()}
    save_weights(other / "implicit.safetensors", changed, metadata)
    with pytest.raises(DataError, match="cannot be decoded"):
        release(other, out, bad, *known)
    assert snapshot(out) == before
    with pytest.raises(CheckpointError, match="is a file"):
        release(tiny_run, out / "README.md", synthetic_data, *known)
