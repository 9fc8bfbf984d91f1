"""From an image to a polyp mask."""

import time

import numpy as np
import pytest
import torch
from PIL import Image
from torch import nn

from polypseg.checkpoint import CheckpointError
from polypseg.config import as_settings, make_config
from polypseg.inference import SOLVERS, load_model
from polypseg.models import Prediction
from polypseg.predictor import Predictor, available_solvers
from polypseg.run_config import load_run_config

IMAGE = np.random.default_rng(0).integers(0, 256, (50, 90, 3), dtype=np.uint8)


class Fixed(nn.Module):
    """Returns the same logits for every image, after a pause."""

    def __init__(self, logits: torch.Tensor, pause: float = 0.0):
        super().__init__()
        self.logits = nn.Parameter(logits)
        self.pause = pause

    def forward(self, images: torch.Tensor) -> Prediction:
        time.sleep(self.pause)
        return Prediction(self.logits[None, None], None)


def bilinear(values: np.ndarray, height: int, width: int) -> np.ndarray:
    """Bilinear interpolation between pixel centres, edges repeated."""

    def weights(size: int, new: int) -> np.ndarray:
        position = ((np.arange(new) + 0.5) * size / new - 0.5).clip(0, size - 1)
        below = np.floor(position).astype(int)
        matrix = np.zeros((new, size))
        matrix[np.arange(new), below] += 1 - (position - below)
        matrix[np.arange(new), np.minimum(below + 1, size - 1)] += position - below
        return matrix

    return weights(values.shape[0], height) @ values @ weights(values.shape[1], width).T


@pytest.mark.parametrize("solver", SOLVERS)
def test_the_probability_is_the_networks_at_the_size_of_the_image(tiny_run, solver):
    small = np.asarray(Image.fromarray(IMAGE).resize((64, 64), Image.Resampling.BILINEAR)) / 255
    normalised = (small - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    batch = torch.from_numpy(normalised.transpose(2, 0, 1)[None].astype(np.float32))
    model, _ = load_model(tiny_run, solver)
    with torch.no_grad():
        logits = model(batch).logits[0, 0].double().numpy()
    expected = 1 / (1 + np.exp(-bilinear(logits, 50, 90)))

    result = Predictor.from_run(tiny_run, solver, device="cpu").predict(IMAGE)
    assert result.probability.dtype == np.float32
    np.testing.assert_allclose(result.native[0], 1 / (1 + np.exp(-logits)), atol=2e-5)
    np.testing.assert_allclose(result.probability, expected, atol=2e-5)
    clear = abs(expected - 0.5) > 1e-4
    np.testing.assert_array_equal(result.mask[clear], expected[clear] > 0.5)
    assert 0 < result.mask.mean() < 1


@pytest.mark.parametrize("solver", ["picard", "anderson", "broyden", "hyper"])
def test_the_residual_is_that_of_the_state_that_was_read_out(tiny_run, solver):
    model, _ = load_model(tiny_run, solver)
    predictor = Predictor(model, 64)
    seen = []
    model.head.register_forward_hook(lambda module, inputs, output: seen.append(inputs[0]))
    with torch.no_grad():
        result = predictor.predict(IMAGE, measure=True)
        e = model.features(predictor._batch(IMAGE))
        fz, z = model.deq.f(seen[0], e).double().numpy(), seen[0].double().numpy()
    assert result.residual == pytest.approx(np.linalg.norm(fz - z) / np.linalg.norm(fz), rel=1e-4)


def test_a_fixed_number_of_steps_is_measured_only_when_asked_for(tiny_run):
    predictor = Predictor.from_run(tiny_run, "hyper", device="cpu")
    result = predictor.predict(IMAGE)
    assert (result.steps, result.evaluations, result.status) == (2, 2, "FIXED_STEPS")
    assert np.isnan(result.residual)
    measured = predictor.predict(IMAGE, measure=True)
    assert 0 < measured.residual < 1
    assert measured.evaluations == 2


def test_an_explicit_pass_is_one_evaluation_without_a_residual(tiny_run):
    result = Predictor.from_run(tiny_run, "explicit").predict(IMAGE, measure=True)
    assert (result.steps, result.evaluations, result.status) == (1, 1, "EXPLICIT")
    assert np.isnan(result.residual)


def test_the_hypersolver_stops_where_its_last_iterate_met_the_tolerance(copy_run):
    run = copy_run()

    def predict(steps, tol=0.0):
        config = load_run_config(run / "config.yaml")
        settings = [f"solve.hyper_steps={steps}", f"solve.hyper_tol={tol}"]
        text = make_config(as_settings(config), settings).to_yaml()
        (run / "config.yaml").write_text(text)
        return Predictor.from_run(run, "hyper").predict(IMAGE, measure=True)

    residuals = [predict(steps).residual for steps in (1, 2, 3)]
    assert residuals[0] > residuals[1]
    soon = predict(4, 1.01 * residuals[0])
    assert (soon.status, soon.steps, soon.evaluations) == ("CONVERGED", 2, 2)
    assert soon.residual == pytest.approx(residuals[1])
    later = predict(4, 0.99 * residuals[0])
    assert later.evaluations > 2
    hard = predict(2, 0.1 * min(residuals))
    assert (hard.status, hard.evaluations) == ("STEP_LIMIT", 2)
    assert hard.residual == pytest.approx(residuals[1])


def test_a_tolerance_lets_the_hypersolver_go_on_with_anderson(tiny_run):
    """Its random weights stall; the classic solver finishes what they cannot."""
    fixed = Predictor.from_run(tiny_run, "hyper").predict(IMAGE, measure=True)
    assert (fixed.status, fixed.evaluations) == ("FIXED_STEPS", 2)
    sure = Predictor.from_run(tiny_run, "hyper", tol=1e-4, max_steps=80).predict(IMAGE)
    assert sure.status == "CONVERGED"
    assert sure.residual <= 1e-4
    assert sure.evaluations > 2


def test_tol_and_max_steps_replace_those_of_the_run(tiny_run):
    exact = Predictor.from_run(tiny_run, "anderson", tol=1e-5, max_steps=60).predict(IMAGE)
    assert exact.status == "CONVERGED"
    assert exact.residual <= 1e-5
    short = Predictor.from_run(tiny_run, "anderson", tol=1e-5, max_steps=2).predict(IMAGE)
    assert (short.status, short.steps, short.evaluations) == ("STEP_LIMIT", 2, 3)


def test_residuals_are_those_of_the_plain_iteration(tiny_run):
    model, _ = load_model(tiny_run, "picard")
    predictor = Predictor(model, 64)
    with torch.no_grad():
        e = model.features(predictor._batch(IMAGE))
        z, expected = torch.zeros_like(e), []
        for _ in range(9):  # more than the run's max_steps
            fz = model.deq.f(z, e)
            expected.append(((fz - z).norm() / fz.norm()).item())
            z = fz
    np.testing.assert_allclose(predictor.residuals(IMAGE, 9), expected, rtol=1e-4)
    with pytest.raises(ValueError, match="explicit pass has no solver"):
        Predictor.from_run(tiny_run, "explicit").residuals(IMAGE, 9)


def test_a_pixel_is_polyp_where_the_probability_is_above_one_half():
    logits = torch.full((32, 32), -3.0)
    logits[:, 16:] = 3.0
    result = Predictor(Fixed(logits), 32).predict(np.zeros((32, 32, 3), np.uint8))
    np.testing.assert_array_equal(result.mask, logits.numpy() > 0)
    np.testing.assert_allclose(result.probability[0, [0, 31]], [0.04742587, 0.95257413], rtol=1e-5)
    undecided = Predictor(Fixed(torch.zeros(32, 32)), 32).predict(np.zeros((32, 32, 3), np.uint8))
    assert not undecided.mask.any()


def test_a_network_that_returns_nan_marks_nothing_and_says_so():
    logits = torch.full((32, 32), 3.0)
    logits[3, 4] = torch.nan
    result = Predictor(Fixed(logits), 32).predict(np.zeros((32, 32, 3), np.uint8))
    assert result.status == "NON_FINITE"
    assert not result.mask.any()


def test_seconds_are_those_of_the_network():
    result = Predictor(Fixed(torch.zeros(32, 32), pause=0.05), 32).predict(IMAGE)
    assert 0.05 <= result.seconds < 0.5


def test_prediction_leaves_the_image_alone(tiny_run):
    image = IMAGE.copy()
    Predictor.from_run(tiny_run).predict(image)
    np.testing.assert_array_equal(image, IMAGE)


@pytest.mark.parametrize(
    ("image", "message"),
    [
        ([[0, 0, 0]], "must be a NumPy array .* got list"),
        (torch.zeros(4, 4, 3), "must be a NumPy array .* got Tensor"),
        (IMAGE[..., 0], r"got the shape \(50, 90\); repeat a grey image"),
        (IMAGE[None], r"got the shape \(1, 50, 90, 3\); give one image at a time"),
        (IMAGE.transpose(2, 0, 1), r"got the shape \(3, 50, 90\); channels come last"),
        (np.zeros((5, 5, 4), np.uint8), "drop the alpha channel"),
        (IMAGE / 255, "uint8 values from 0 to 255, got float64"),
        (IMAGE[:0], "image is empty"),
    ],
)
def test_wrong_images_are_refused_in_plain_words(image, message):
    with pytest.raises(ValueError, match=message):
        Predictor(Fixed(torch.zeros(32, 32)), 32).predict(image)


@pytest.mark.parametrize("size", [0, -32, 33])
def test_a_size_that_the_network_cannot_take_is_refused(size):
    with pytest.raises(ValueError, match=f"size must be a positive multiple of 32, got {size}"):
        Predictor(Fixed(torch.zeros(32, 32)), size)


def test_the_solvers_of_a_run_are_those_it_has_weights_for(tmp_path):
    with pytest.raises(CheckpointError, match="no trained weights"):
        available_solvers(tmp_path)
    (tmp_path / "hyper.safetensors").touch()
    with pytest.raises(CheckpointError, match="no trained weights"):  # hyper needs implicit too
        available_solvers(tmp_path)
    (tmp_path / "explicit.safetensors").touch()
    assert available_solvers(tmp_path) == ["explicit"]
    (tmp_path / "implicit.safetensors").touch()
    assert available_solvers(tmp_path) == ["explicit", "broyden", "anderson", "hyper"]
    (tmp_path / "hyper.safetensors").unlink()
    assert available_solvers(tmp_path) == ["explicit", "broyden", "anderson"]
    with pytest.raises(CheckpointError, match="there is no such folder"):
        available_solvers(tmp_path / "elsewhere")
    with pytest.raises(CheckpointError, match="is a file"):
        available_solvers(tmp_path / "explicit.safetensors")


def test_the_default_solver_is_the_last_available(tiny_run):
    expected = Predictor.from_run(tiny_run, "hyper").predict(IMAGE).probability
    np.testing.assert_array_equal(Predictor.from_run(tiny_run).predict(IMAGE).probability, expected)


def test_runs_that_cannot_make_a_polyp_mask_are_refused(tiny_run, copy_run):
    with pytest.raises(ValueError, match=r"solver must be one of explicit, .* got 'newton'"):
        Predictor.from_run(tiny_run, "newton")
    with pytest.raises(ValueError, match="device 'warp' cannot be used here"):
        Predictor.from_run(tiny_run, "explicit", device="warp")

    run = copy_run()
    (run / "implicit.safetensors").write_bytes(b"cut short")
    with pytest.raises(CheckpointError, match=r"implicit\.safetensors: not a complete"):
        Predictor.from_run(run, "anderson")
    Predictor.from_run(run, "explicit")  # needs other weights
    (run / "config.yaml").write_text(make_config(overrides=["model.classes=3"]).to_yaml())
    with pytest.raises(CheckpointError, match="do not fit the model"):
        Predictor.from_run(run, "explicit")


def test_of_a_released_model_nobody_is_told_to_train_the_explicit_phase(copy_run):
    run = copy_run()
    (run / "explicit.safetensors").unlink()
    with pytest.raises(CheckpointError, match="a released model holds none; choose another solver"):
        Predictor.from_run(run, "explicit")
    (run / "results.csv").write_text("phase,epoch\nexplicit,1\n")
    with pytest.raises(CheckpointError, match="train it: polypseg-train"):
        Predictor.from_run(run, "explicit")


def test_classes_are_told_apart_by_the_largest_logit():
    class Classes(Fixed):
        def forward(self, images: torch.Tensor) -> Prediction:
            return Prediction(self.logits[None], None)

    logits = torch.zeros(3, 32, 32)
    logits[1, :16] = 2.0
    logits[2, 16:, :8] = 3.0
    result = Predictor(Classes(logits), 32).predict(np.zeros((32, 32, 3), np.uint8))
    np.testing.assert_array_equal(result.labels, logits.argmax(0))
    np.testing.assert_array_equal(result.mask, logits.argmax(0) > 0)
    assert result.probability[0, 0] == pytest.approx(1 - 1 / (2 + np.exp(2)))
    broken = logits.clone()
    broken[1, 0, 0] = torch.inf
    nothing = Predictor(Classes(broken), 32).predict(np.zeros((32, 32, 3), np.uint8))
    assert nothing.status == "NON_FINITE"
    assert not nothing.mask.any()
