"""Training under bf16 and fp16 autocast: near fp32, with losses, solvers and weights in fp32."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest
import torch

from polypseg.checkpoint import load_state, load_weights
from polypseg.config import make_config
from polypseg.data import make_synthetic
from polypseg.models import build_model
from polypseg.objective import Objective, Outcome
from polypseg.schedule import autocast
from polypseg.train import main

# What rounding to so many bits may change in a gradient's direction.
COSINE = {"bf16": 0.95, "fp16": 0.99}


def outcome(precision: str, solves: bool) -> tuple[Outcome, torch.Tensor]:
    config = make_config(overrides=["implicit.max_steps=4", "implicit.tol=1e-2"])
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(4, 3, 64, 64, generator=generator)
    masks = (torch.rand(4, 1, 64, 64, generator=generator) > 0.7).float()
    torch.manual_seed(0)
    objective = Objective(build_model(config.model), config.implicit).train()
    with autocast(precision, torch.device("cpu")):
        found = objective(images, masks, solves, False)
    found.objective.backward()
    gradients = [p.grad.flatten() for p in objective.parameters() if p.grad is not None]
    return found, torch.cat(gradients)


@pytest.mark.parametrize("solves", [False, True])
@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_the_gradient_is_near_that_of_fp32(precision: str, solves: bool) -> None:
    full, expected = outcome("fp32", solves)
    half, found = outcome(precision, solves)
    assert half.objective.dtype == half.loss.dtype == torch.float32
    assert half.loss.item() == pytest.approx(full.loss.item(), rel=0.02)
    assert found.dtype == torch.float32
    assert torch.cosine_similarity(found, expected, dim=0) > COSINE[precision]
    assert not torch.equal(found, expected)  # else nothing ran in half precision
    if solves:
        assert half.solution is not None
        assert half.solution.z.dtype == half.solution.residual.dtype == torch.float32


@pytest.mark.parametrize("precision", ["bf16", "fp16"])
def test_a_run_trains_and_resumes_in_half_precision(precision: str, tmp_path: Path) -> None:
    make_synthetic(tmp_path / "data", train=10, test=1, size=32, seed=0)
    settings = ["data.size=32", "data.scales=[1.0]", "explicit.epochs=2", "explicit.batch=4"]
    settings.append(f"explicit.precision={precision}")
    arguments = ["--data", str(tmp_path / "data"), "--no-evaluate", "--phases", "explicit"]
    for name in ("run", "again"):
        run = tmp_path / name
        assert main([str(run), *arguments, *settings]) == 0
        if name == "run":
            # As after a kill in the second epoch: its checkpoint and what follows are not there.
            (tmp_path / "again").mkdir()
            for file in ("config.yaml", "previous.pt", "results.csv"):
                (tmp_path / "again" / file).write_bytes((run / file).read_bytes())
    whole, _ = load_weights(tmp_path / "run" / "explicit.safetensors")
    resumed, _ = load_weights(tmp_path / "again" / "explicit.safetensors")
    for key, value in whole.items():
        assert value.dtype in (torch.float32, torch.int64)
        assert value.isfinite().all()
        assert torch.equal(value, resumed[key]), key
    # fp16 alone scales its losses, and keeps the scale.
    scaler = load_state(tmp_path / "again" / "last.pt")["scaler"]
    assert ("scale" in scaler) == (precision == "fp16")
    with open(tmp_path / "again" / "results.csv", newline="") as file:
        assert [row["epoch"] for row in csv.DictReader(file)] == ["1", "2"]
