"""Training end to end on tiny synthetic images, resuming, and what is refused."""

import csv
import html
import json
import shlex
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polypseg.checkpoint import CheckpointError, load_weights
from polypseg.config import ConfigError, load_recipe
from polypseg.data import DataError, list_images, make_synthetic, read_image
from polypseg.predictor import Predictor
from polypseg.schedule import learning_rate, parameter_groups, rescale
from polypseg.train import InputError, main

TINY = [
    "data.size=64",
    "data.scales=[1.0]",
    "explicit.epochs=6",
    "explicit.batch=8",
    "explicit.lr=1e-3",
    "explicit.ema=0.8",
    "implicit.epochs=2",
    "implicit.batch=8",
    "implicit.ema=0.8",
    "hyper.epochs=3",
    "hyper.steps=4",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    make_synthetic(folder, train=48, test=6, size=64, seed=0)
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    assert main([str(folder), "--data", str(data), "--no-evaluate", *TINY]) == 0
    return folder


def rows(run: Path) -> list[dict[str, str]]:
    with open(run / "results.csv", newline="") as file:
        return list(csv.DictReader(file))


def test_three_phases_leave_a_complete_run(run: Path) -> None:
    for name in ("config.yaml", "versions.json", "train.log", "results.csv", "curves.png"):
        assert (run / name).stat().st_size > 0
    for phase in ("explicit", "implicit", "hyper"):
        _, metadata = load_weights(run / f"{phase}.safetensors")
        assert metadata["phase"] == phase
        assert "data:" in metadata["config"]
        assert torch.__version__.startswith(json.loads(metadata["versions"])["torch"])
    assert [(row["phase"], row["epoch"]) for row in rows(run)] == [
        *(("explicit", str(epoch)) for epoch in range(1, 7)),
        *(("implicit", str(epoch)) for epoch in range(1, 3)),
        *(("hyper", str(epoch)) for epoch in range(1, 4)),
    ]


def test_dice_rises_and_the_fixed_point_is_reached(run: Path) -> None:
    table = rows(run)
    explicit = [float(row["val_dice"]) for row in table if row["phase"] == "explicit"]
    assert max(explicit[3:]) > explicit[0] + 0.02
    implicit = [row for row in table if row["phase"] == "implicit"][-1]
    assert float(implicit["val_residual"]) <= 1e-3
    assert 0 < float(implicit["val_spectral_radius"]) < 1  # plain iteration converges, too
    assert float(implicit["loss"]) < float(table[0]["loss"])


def test_the_hypersolver_comes_closer_to_the_fixed_point(run: Path, data: Path) -> None:
    table = [row for row in rows(run) if row["phase"] == "hyper"]
    assert float(table[-1]["distance_end"]) < float(table[0]["distance_end"])
    for row in table:
        assert float(row["distance_start"]) == pytest.approx(1)  # from zero
    # And independently of what the training said: on test images its residual after two steps is
    # below that of plain iteration from zero.
    fitted, plain = (Predictor.from_run(run, solver) for solver in ("hyper", "picard"))
    images = [read_image(path) for path in list_images(data / "TestDataset/Synthetic/images")]
    residuals = [(fitted.residuals(i, 3)[2], plain.residuals(i, 3)[2]) for i in images]
    learned, classic = np.mean(residuals, axis=0)
    assert learned < classic


def test_a_finished_run_is_left_alone(run: Path, data: Path) -> None:
    before = {path.name: path.read_bytes() for path in run.glob("*.safetensors")}
    assert main([str(run), "--data", str(data), "--no-evaluate"]) == 0
    assert before == {path.name: path.read_bytes() for path in run.glob("*.safetensors")}
    assert len(rows(run)) == 11


def test_the_report_has_the_whole_command(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copy = Path(shutil.copytree(run, tmp_path / "a copy"))
    config = Path(shutil.copy(run / "config.yaml", tmp_path))
    given = [str(copy), "--data", str(data), "--config", str(config), "explicit.epochs=6"]
    monkeypatch.setattr("sys.argv", ["polypseg-train", *given])
    assert main() == 0
    command = shlex.join(["polypseg-train", *given])
    assert json.loads((copy / "evaluation" / "summary.json").read_text())["command"] == command
    assert f"<p>Command: {html.escape(command)}</p>" in (copy / "report.html").read_text()


def test_a_run_is_not_continued_with_other_settings(run: Path, data: Path) -> None:
    with pytest.raises(ConfigError, match="started with other settings"):
        main([str(run), "--data", str(data), "explicit.epochs=7"])


def test_bad_data_is_named_all_at_once_and_nothing_is_written(data: Path, tmp_path: Path) -> None:
    bad = tmp_path / "bad"
    shutil.copytree(data / "TrainDataset", bad)
    images = sorted((bad / "images").iterdir())
    images[0].write_bytes(b"not an image")
    Image.fromarray(np.zeros((10, 12), np.uint8)).save(bad / "masks" / f"{images[1].stem}.png")
    with pytest.raises(DataError) as caught:
        main([str(tmp_path / "run"), "--data", str(bad)])
    assert images[0].name in str(caught.value)
    assert images[1].stem in str(caught.value)
    (bad / "masks" / f"{images[2].stem}.png").unlink()
    (tmp_path / "w.safetensors").write_bytes(b"nonsense")
    weights = ["--encoder-weights", str(tmp_path / "w.safetensors")]
    with pytest.raises(InputError) as both:
        main([str(tmp_path / "run"), "--data", str(bad), *weights])
    for named in (images[0].name, images[1].stem, images[2].stem, "w.safetensors"):
        assert named in str(both.value)
    (tmp_path / "empty").mkdir()
    with pytest.raises(DataError, match="empty"):
        main([str(tmp_path / "run"), "--data", str(tmp_path / "empty")])
    assert not (tmp_path / "run").exists()


def test_a_single_pair_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    make_synthetic(tmp_path / "data", train=1, test=1, size=64, seed=0)
    with pytest.raises(DataError, match=r"data.TrainDataset: holds a single pair"):
        main([str(tmp_path / "run"), "--data", str(tmp_path / "data"), *TINY])
    assert not (tmp_path / "run").exists()


def copy_with_empty_masks(data: Path, folder: Path, empty: int) -> Path:
    shutil.copytree(data / "TrainDataset", folder)
    for mask in sorted((folder / "masks").iterdir())[:empty]:
        Image.new("L", (64, 64)).save(mask)
    return folder


def test_warnings_about_the_training_data_are_in_the_log(data: Path, tmp_path: Path) -> None:
    folder = copy_with_empty_masks(data, tmp_path / "data", empty=14)
    mask = sorted((folder / "masks").iterdir())[20]
    Image.new("L", (64, 64), 255).save(mask)
    arguments = [str(tmp_path / "run"), "--data", str(folder), "--no-evaluate"]
    assert main([*arguments, "--phases", "explicit", *TINY, "explicit.epochs=1"]) == 0
    log = (tmp_path / "run" / "train.log").read_text().splitlines()
    warnings = [line for line in log if " WARNING " in line]
    assert f"{folder}: 14 of 48 masks are empty; make sure" in warnings[0]
    assert f"{mask}: mask is full" in warnings[1]
    assert [line.count("mask is empty") for line in warnings] == [0, 0, *[1] * 8, 0]
    assert warnings[-1].endswith("... and 6 more warnings")


def test_data_without_a_single_polyp_are_refused(data: Path, tmp_path: Path) -> None:
    folder = copy_with_empty_masks(data, tmp_path / "data", empty=48)
    with pytest.raises(DataError, match=r"data: 48 of 48 masks are empty; add images that show"):
        main([str(tmp_path / "run"), "--data", str(folder), *TINY])
    assert not (tmp_path / "run").exists()


def test_training_on_all_images_has_none_left_to_evaluate_on(data: Path, tmp_path: Path) -> None:
    folder = data / "TrainDataset"
    once = ["explicit.epochs=1", "data.train_on=all"]
    arguments = [str(tmp_path / "run"), "--data", str(folder), "--phases", "explicit"]
    assert main([*arguments, *TINY, *once]) == 0
    log = (tmp_path / "run" / "train.log").read_text()
    assert "48 training and 5 validation images" in log
    assert "not evaluated" in log
    assert not (tmp_path / "run" / "evaluation").exists()


def test_wrong_encoder_weights_stop_before_anything_is_written(data: Path, tmp_path: Path) -> None:
    (tmp_path / "w.safetensors").write_bytes(b"nonsense")
    weights = ["--encoder-weights", str(tmp_path / "w.safetensors")]
    with pytest.raises(CheckpointError, match=r"w\.safetensors"):
        main([str(tmp_path / "run"), "--data", str(data), *weights])
    assert not (tmp_path / "run").exists()


def test_the_learning_rate_warms_up_and_decays() -> None:
    from polypseg.config import make_config

    settings = make_config({}, ["explicit.lr=1e-3", "explicit.final_lr=1e-6"]).explicit
    assert learning_rate(settings, 0.05) == pytest.approx(0.5e-3)
    assert learning_rate(settings, 0.1) == pytest.approx(1e-3)
    assert learning_rate(settings, 0.55) == pytest.approx((1e-3 + 1e-6) / 2)
    assert learning_rate(settings, 1.0) == pytest.approx(1e-6)


@pytest.mark.parametrize("warmup", [0.0, 1e-9, 1e-4, 1e-3, 0.1, 1.0])
def test_the_learning_rate_never_exceeds_its_peak(warmup: float) -> None:
    from polypseg.config import make_config

    settings = make_config({}, ["explicit.lr=1e-3", f"explicit.warmup={warmup}"]).explicit
    updates = 20_000
    rates = [learning_rate(settings, update / updates) for update in range(updates)]
    assert min(rates) > 0
    assert max(rates) == pytest.approx(1e-3, rel=1e-3)
    assert max(rates) <= 1e-3


def test_the_paper_restarts_the_learning_rate_after_the_warm_epochs() -> None:
    settings = load_recipe("polypdeq-add-paper").implicit
    assert learning_rate(settings, 0.0) == pytest.approx(1e-3)
    assert learning_rate(settings, 0.025) == pytest.approx((1e-3 + 1e-6) / 2)
    assert learning_rate(settings, 0.04999) == pytest.approx(1e-6, rel=1)
    assert learning_rate(settings, 0.05) == pytest.approx(1e-4)
    assert learning_rate(settings, 0.525) == pytest.approx((1e-4 + 1e-6) / 2)
    assert learning_rate(settings, 1.0) == pytest.approx(1e-6)


def test_weights_decay_and_biases_and_normalisation_do_not() -> None:
    model = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    model.append(torch.nn.Linear(4, 2))
    decayed, others = parameter_groups(model, 0.3)
    assert decayed["weight_decay"] == 0.3
    assert others["weight_decay"] == 0
    assert {id(p) for p in decayed["params"]} == {id(model[0].weight), id(model[2].weight)}
    assert len(others["params"]) == 4


@pytest.mark.parametrize("scale", [0.75, 1.25])
def test_a_rescaled_mask_lies_where_its_image_does(scale: float) -> None:
    """By the middle of a square, on average over how it lies to the pixels."""
    masks = torch.zeros(16, 1, 128, 128)
    for number, mask in enumerate(masks):
        row, column = divmod(number, 4)
        mask[0, 40 + row : 80 + row, 20 + column : 50 + column] = 1
    batch = {"image": masks.expand(-1, 3, -1, -1), "mask": masks}
    middles = []
    for found in rescale(batch, scale, torch.device("cpu")):
        places = (torch.arange(found.shape[-1]) + 0.5) * 128 / found.shape[-1]
        weights = found[:, 0] / found[:, 0].sum((1, 2), keepdim=True)
        middles.append(torch.stack([weights.sum(2) @ places, weights.sum(1) @ places]).mean(1))
    torch.testing.assert_close(middles[0], torch.tensor([61.5, 36.5]), rtol=0, atol=0.01)
    torch.testing.assert_close(middles[1], middles[0], rtol=0, atol=0.2)


def test_a_smaller_image_is_an_average() -> None:
    """Of stripes on every fourth column, also of those between the columns that lie nearest."""
    stripes = (torch.arange(256) % 4 == 0).float().expand(1, 3, 256, 256)
    images, _ = rescale({"image": stripes, "mask": stripes[:, :1]}, 0.25, torch.device("cpu"))
    torch.testing.assert_close(images[..., 1:-1], torch.full((1, 3, 64, 62), 0.25))


@pytest.mark.parametrize(("scale", "side"), [(0.75, 192), (1.0, 256), (1.25, 320), (0.3, 64)])
def test_scales_give_sides_that_the_model_takes(scale: float, side: int) -> None:
    batch = {
        "image": torch.randn(2, 3, 256, 256),
        "mask": torch.randint(3, (2, 1, 256, 256)).float(),
    }
    images, masks = rescale(batch, scale, torch.device("cpu"))
    assert images.shape == (2, 3, side, side)
    assert masks.shape == (2, 1, side, side)
    assert set(masks.unique().tolist()) == {0.0, 1.0, 2.0}
