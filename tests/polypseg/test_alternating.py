"""Fitting the HyperSolver of a run: its file, resuming, and the alternating strategy."""

import csv
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import polypseg.alternating
from deqsolvers import HandOver, load_hypersolver
from deqsolvers.hypersolver.targets import Teacher
from polypseg.alternating import due
from polypseg.checkpoint import load_weights
from polypseg.config import make_config
from polypseg.data import make_synthetic
from polypseg.train import main

TINY = [
    "data.size=64",
    "data.scales=[1.0]",
    "explicit.epochs=1",
    "explicit.batch=8",
    "implicit.epochs=3",
    "implicit.batch=8",
    "implicit.max_steps=6",
    "hyper.epochs=2",
    "hyper.steps=2",
    "hyper.mode=truncate",
    "hyper.max_steps=12",
    "hyper.alternate=1",
    "hyper.alternate_updates=2",
]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    make_synthetic(folder, train=20, test=1, size=64, seed=0)
    return folder


@pytest.fixture(scope="module")
def run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("runs") / "alternating"
    assert main([str(folder), "--data", str(data), "--no-evaluate", *TINY]) == 0
    return folder


def test_a_hypersolver_is_fitted_between_the_epochs(run: Path) -> None:
    log = (run / "train.log").read_text()
    fits = [line for line in log.splitlines() if "fitting a HyperSolver before epoch" in line]
    assert [line.rsplit(" ", 1)[1] for line in fits] == ["2", "3"]
    tensors, metadata = load_weights(run / "alternating.safetensors")
    assert metadata["epoch"] == "2"
    final, _ = load_weights(run / "hyper.safetensors")
    assert final.keys() == tensors.keys()


def test_the_file_says_what_it_was_fitted_on(run: Path) -> None:
    """And deqsolvers reads what polypseg wrote."""
    hyper = load_hypersolver(run / "hyper.safetensors")
    assert hyper.fitted_on is not None
    assert (hyper.fitted_on.f, hyper.fitted_on.state) == ("PolypF", ((32, 16, 16),))
    assert (hyper.fitted_on.steps, hyper.fitted_on.epochs) == (2, 2)
    assert not (run / "hyper.pt").exists()


def test_the_weights_of_the_model_do_not_hold_the_hypersolver(run: Path) -> None:
    alternating, _ = load_weights(run / "implicit.safetensors")
    explicit, _ = load_weights(run / "explicit.safetensors")
    assert alternating.keys() == explicit.keys()


def test_the_implicit_phase_trains_with_it(run: Path, data: Path, tmp_path: Path) -> None:
    """Killed in its last epoch and repeated, it ends with the same weights; the fit is not lost."""
    shutil.copy(run / "config.yaml", tmp_path / "config.yaml")
    shutil.copy(run / "explicit.safetensors", tmp_path / "explicit.safetensors")
    arguments = [str(tmp_path), "--data", str(data), "--no-evaluate", "--phases", "implicit"]
    used: list[Any] = []
    original = polypseg.alternating.HandOver.step

    def step(self: HandOver, memory: Any, *rest: Any) -> Any:
        used.append(type(self.first).__name__)
        if len(used) == 7:
            raise KeyboardInterrupt
        return original(self, memory, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(HandOver, "step", step)
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    assert set(used) == {"HyperSolver"}
    assert main(arguments) == 0
    again, _ = load_weights(tmp_path / "implicit.safetensors")
    whole, _ = load_weights(run / "implicit.safetensors")
    for name, value in whole.items():
        torch.testing.assert_close(again[name], value, msg=name)


def test_an_interrupted_fit_goes_on(run: Path, data: Path, tmp_path: Path) -> None:
    for name in ("config.yaml", "implicit.safetensors", "alternating.safetensors"):
        shutil.copy(run / name, tmp_path / name)
    arguments = [str(tmp_path), "--data", str(data), "--no-evaluate", "--phases", "hyper"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("polypseg.training_run.Run.report", _interrupt_second())
        with pytest.raises(KeyboardInterrupt):
            main(arguments)
    assert (tmp_path / "hyper.pt").exists()
    assert main(arguments) == 0
    again, _ = load_weights(tmp_path / "hyper.safetensors")
    whole, _ = load_weights(run / "hyper.safetensors")
    for name, value in whole.items():
        assert torch.equal(again[name], value), name


def test_samples_without_a_reliable_fixed_point_are_counted(
    run: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One in each of the two batches of 8 that an epoch has."""
    for name in ("config.yaml", "implicit.safetensors", "alternating.safetensors"):
        shutil.copy(run / name, tmp_path / name)
    original = Teacher._solve

    def solve(self: Teacher, inputs: tuple[Any, ...]) -> tuple[Any, torch.Tensor]:
        z, residual = original(self, inputs)
        return z, residual.index_fill(0, torch.tensor([0]), torch.inf)

    monkeypatch.setattr(Teacher, "_solve", solve)
    arguments = [str(tmp_path), "--data", str(data), "--no-evaluate", "--phases", "hyper"]
    assert main(arguments) == 0
    with open(tmp_path / "results.csv", newline="") as file:
        assert [row["skipped"] for row in csv.DictReader(file)] == ["2", "2"]
    assert "hyper epoch 2: 2 of 16 images skipped" in (tmp_path / "train.log").read_text()


def _interrupt_second() -> Any:
    from polypseg.training_run import Run

    original = Run.report

    def report(self: Run, row: dict[str, Any]) -> None:
        original(self, row)
        if row["epoch"] == 2:
            raise KeyboardInterrupt

    return report


def test_when_a_fit_is_due() -> None:
    class Fake:
        config = make_config({}, ["hyper.alternate=2", "implicit.warm_epochs=1"])

    assert [epoch for epoch in range(8) if due(Fake(), epoch)] == [3, 5, 7]  # type: ignore[arg-type]


def test_results_hold_every_epoch_once(run: Path) -> None:
    with open(run / "results.csv", newline="") as file:
        rows = [(row["phase"], row["epoch"]) for row in csv.DictReader(file)]
    expected = [*(("implicit", str(e)) for e in (1, 2, 3)), ("hyper", "1"), ("hyper", "2")]
    assert rows[1:] == expected
