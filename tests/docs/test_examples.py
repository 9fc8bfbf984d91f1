"""The examples run, learn what they say, and stay short."""

import importlib.util
from pathlib import Path
from types import ModuleType

import pytest

from tests.docs.pages import ROOT

SCRIPTS = sorted((ROOT / "examples").glob("*.py"))


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", ROOT / f"examples/{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("script", [pytest.param(s, id=s.stem) for s in SCRIPTS])
def test_short_and_in_the_list(script: Path) -> None:
    assert len(script.read_text().splitlines()) < 80
    assert f"({script.name})" in (ROOT / "examples/README.md").read_text()


def test_toy_finds_the_matrix() -> None:
    assert load("toy").main() < 1e-2


def test_multiscale_finds_the_square() -> None:
    assert load("multiscale").main() > 0.8


def test_sequence_learns() -> None:
    assert load("sequence").main() < 0.05


def test_hypersolver_beats_anderson() -> None:
    assert all(learned < classic for learned, classic in load("hypersolver").main())


def test_every_backward_pass_trains() -> None:
    losses = load("backward").main()
    assert max(losses.values()) < 0.1


def test_predict_draws(tiny_run: Path, synthetic_data: Path, tmp_path: Path) -> None:
    images = sorted((synthetic_data / "TestDataset" / "Synthetic" / "images").iterdir())[:2]
    arguments = [str(tiny_run), *map(str, images), "--out", str(tmp_path / "picture.png")]
    assert load("predict").main(arguments).stat().st_size > 10_000
