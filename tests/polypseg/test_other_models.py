"""The baselines go through evaluation, comparison, prediction and videos like PolypDEQ."""

import csv

import pytest
import torch

from polypseg import cli
from polypseg.checkpoint import save_weights
from polypseg.config import make_config
from polypseg.data import read_image
from polypseg.export import export_run
from polypseg.models import build_model
from polypseg.predictor import Predictor


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A run of each baseline with random weights."""
    folder = tmp_path_factory.mktemp("baselines")
    for name, phases in (("mdeq", ("explicit", "implicit")), ("segformer-b0", ("explicit",))):
        (folder / name).mkdir()
        config = make_config(overrides=[f"model.name={name}", "data.size=64", "solve.max_steps=5"])
        (folder / name / "config.yaml").write_text(config.to_yaml())
        (folder / name / "versions.json").write_text("{}")
        with torch.random.fork_rng():
            torch.manual_seed(3)
            model = build_model(config.model)
        for phase in phases:
            save_weights(folder / name / f"{phase}.safetensors", model.state_dict(), {})
    return folder


def test_both_are_evaluated_and_compared(runs, synthetic_data, capsys):
    for name in ("mdeq", "segformer-b0"):
        arguments = [str(runs / name), "--data", str(synthetic_data), "--limit", "2"]
        assert cli.evaluate(arguments) == 0
        assert (runs / name / "report.html").is_file()
    with open(runs / "mdeq" / "evaluation" / "summary.csv", newline="") as file:
        solvers = {row["solver"]: row for row in csv.DictReader(file)}
    assert list(solvers) == ["explicit", "broyden", "anderson"]
    assert float(solvers["anderson"]["residual_median"]) > 0
    assert cli.compare([str(runs / "segformer-b0"), str(runs / "mdeq")]) == 0
    assert "A: explicit of" in capsys.readouterr().out


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "solver", "steps"), [("mdeq", "anderson", 2), ("segformer-b0", "explicit", None)]
)
def test_both_are_exported(runs, tmp_path, name, solver, steps):
    record = export_run(runs / name, tmp_path / "model.pt2", solver, steps)
    assert record["largest_difference"] < 1e-5
    assert (tmp_path / "model.pt2").stat().st_size > 0


def test_the_states_of_mdeq_start_the_next_frame(runs, synthetic_data):
    predictor = Predictor.from_run(runs / "mdeq", "anderson", tol=1e-3, max_steps=60)
    (path, *_) = sorted((synthetic_data / "TestDataset" / "Synthetic" / "images").iterdir())
    image = read_image(path)
    cold = predictor.predict_frame(image)
    assert len(cold.state) == 4  # four scales
    warm = predictor.predict_frame(image, cold.state)
    assert warm.result.residual <= cold.result.residual * 1.001
    assert warm.result.evaluations < cold.result.evaluations
