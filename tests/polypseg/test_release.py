"""Releasing a run: what is written, what it holds, and what is refused."""

import hashlib
from pathlib import Path

import numpy as np
import pytest
import torch

from polypseg import released
from polypseg.checkpoint import CheckpointError, load_weights, save_weights
from polypseg.cli import predict
from polypseg.inference import load_model
from polypseg.predictor import Predictor
from polypseg.release import write_release


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
