"""Exported networks compute what the original computes."""

import json

import numpy as np
import onnxruntime
import pytest
import torch

from polypseg import cli
from polypseg.data import read_image, resize_image
from polypseg.export import export_run
from polypseg.predictor import Predictor
from polypseg.released import RELEASED


@pytest.fixture(scope="module")
def images(synthetic_data) -> np.ndarray:
    folder = synthetic_data / "TestDataset" / "Synthetic" / "images"
    return np.stack([resize_image(read_image(path), 64) for path in sorted(folder.iterdir())[:2]])


def as_input(image: np.ndarray) -> np.ndarray:
    return (image.transpose(2, 0, 1)[None] / 255).astype(np.float32)


def test_onnx_gives_the_predictors_probabilities(tiny_run, images, tmp_path, capsys):
    path = tmp_path / "model.onnx"
    assert cli.export([str(tiny_run), "--out", str(path)]) == 0  # hyper, two steps
    printed = capsys.readouterr().out
    assert printed.startswith(f"{path}: ONNX, 2 steps of hyper; differs")
    session = onnxruntime.InferenceSession(path)
    predictor = Predictor.from_run(tiny_run, "hyper")
    for image in images:
        (found,) = session.run(None, {"images": as_input(image)})
        np.testing.assert_allclose(found[0], predictor.predict(image).native, atol=1e-5)
    record = json.loads((tmp_path / "model.onnx.json").read_text())
    assert record["largest_difference"] < 1e-5
    assert "(1, 3, 64, 64) float32" in record["input"]
    assert sorted(file.name for file in tmp_path.iterdir()) == ["model.onnx", "model.onnx.json"]


@pytest.mark.parametrize("solver", ["explicit", "anderson"])
def test_torch_export_gives_the_predictors_probabilities(tiny_run, images, tmp_path, solver):
    path = tmp_path / "model.pt2"
    steps = None if solver == "explicit" else 2
    assert export_run(tiny_run, path, solver, steps)["largest_difference"] < 1e-5
    module = torch.export.load(path).module()
    # With a tolerance that is never reached, all steps are taken; the last state is the best here.
    predictor = Predictor.from_run(tiny_run, solver)
    if steps:
        deq = predictor.model.deq
        predictor.model.deq = deq.with_solver(deq.solver, tol=None, max_steps=steps, final="last")
    for image in images:
        found = module(torch.from_numpy(as_input(image))).detach().numpy()
        np.testing.assert_allclose(found[0], predictor.predict(image).native, atol=1e-5)


def test_a_network_that_differs_is_not_written(tiny_run, tmp_path, monkeypatch):
    # Exporting takes long; what comes after it is the matter here.
    monkeypatch.setattr("torch.export.export", lambda *a, **k: None)
    monkeypatch.setattr("torch.export.save", lambda program, path: path.write_bytes(b"export"))
    monkeypatch.setattr("polypseg.export._run", lambda path, images: np.zeros((1, 1, 64, 64)))
    path = tmp_path / "model.pt2"
    path.write_bytes(b"an older export")
    with pytest.raises(ValueError, match=r"differs from the original by .* nothing was written"):
        export_run(tiny_run, path, "explicit")
    assert path.read_bytes() == b"an older export"
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.skipif(not RELEASED.is_dir(), reason="not a clone")
def test_a_network_sees_polyps_in_the_images_of_the_check(tmp_path, monkeypatch):
    # Where it sees none, a step more or less hardly shows.
    monkeypatch.setattr("torch.export.export", lambda *a, **k: None)
    monkeypatch.setattr("torch.export.save", lambda program, path: path.write_bytes(b"export"))
    checked = []

    def run(path, images):
        checked.append(images)
        return np.zeros((1, 1, *images.shape[-2:]))

    monkeypatch.setattr("polypseg.export._run", run)
    with pytest.raises(ValueError, match="differs from the original"):
        export_run(RELEASED, tmp_path / "model.pt2")
    predictor = Predictor.from_run(RELEASED)
    assert len(checked) == 2
    for images in checked:
        image = (255 * images[0].permute(1, 2, 0)).round().to(torch.uint8).numpy()
        assert predictor.predict(image).native.max() > 0.5


def test_what_cannot_be_exported_is_refused_before_any_work(tiny_run, tmp_path, capsys):
    run, onnx = str(tiny_run), ["--out", str(tmp_path / "a.onnx")]
    for arguments, message in (
        ([run, "--out", str(tmp_path / "a.pth")], "out must end in .onnx or .pt2"),
        ([run, *onnx, "--solver", "picard"], "steps is needed for picard"),
        ([run, *onnx, "--steps", "0"], "steps must be at least 1, got 0"),
        ([run, *onnx, "--solver", "explicit", "--steps", "2"], "steps must be 1, got 2"),
        ([str(tmp_path / "nowhere"), *onnx], "nowhere: there is no such folder"),
    ):
        assert cli.export(arguments) == 1
        assert message in capsys.readouterr().err
    assert not list(tmp_path.iterdir())
