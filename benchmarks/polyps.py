"""PolypDEQ models and images for the benchmarks."""

from __future__ import annotations

import csv
from collections import defaultdict
from pathlib import Path

import torch
from torch import Tensor

from benchmarks.problems import Problem, make
from benchmarks.settings import Settings
from polypseg.checkpoint import CheckpointError
from polypseg.data import list_images, read_image, resize_image, to_tensor
from polypseg.models import PolypDEQ
from polypseg.released import released_run

ROOT = Path(__file__).resolve().parent.parent
RUNS = ROOT / "results"  # the records of runs, without weights
SAMPLES = ROOT / "samples" / "images"


def trained_runs(settings: Settings) -> list[Path]:
    """The runs that were asked for, or else the model that polypseg-predict uses, if it is here."""
    if settings.runs:
        return list(settings.runs)
    try:
        return [released_run()]
    except CheckpointError:
        return []


def images(count: int, size: int, settings: Settings) -> Tensor:
    """(count, 3, size, size) normalised, fewer where the folder that was given has fewer."""
    paths = list_images(settings.images or SAMPLES)
    count = min(count, len(paths))
    # Spread over the folder, whose neighbours may be frames of one video.
    paths = [paths[place * len(paths) // count] for place in range(count)]
    arrays = [resize_image(read_image(path), size) for path in paths]
    return torch.stack([to_tensor(array) for array in arrays]).to(settings.device)


def problem(name: str, model: PolypDEQ, pictures: Tensor, settings: Settings) -> Problem:
    """The model's f on the stage-1 features of the pictures; f becomes double precision."""
    model = model.eval().to(settings.device)
    with torch.no_grad():
        features = model.features(pictures.to(settings.device))
    # Solvers are asked for 1e-3 in quick mode.
    tol = 1e-7 if settings.quick else 1e-9
    return make(name, model.deq.f.double(), features.double(), settings, tol)


def phase_seconds(run: Path) -> dict[str, float]:
    """Seconds of every training phase of a run; empty where nothing tells them.

    A released model has no results.csv; that of its run may lie in results/.
    """
    seconds: dict[str, float] = defaultdict(float)
    path = run / "results.csv"
    if not path.is_file():
        config = (run / "config.yaml").read_bytes()
        for other in sorted(RUNS.glob("*/config.yaml")):
            if other.read_bytes() == config:
                path = other.parent / "results.csv"
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                seconds[row["phase"]] += float(row["seconds"])
    return dict(seconds)


def dice_lost(run: Path) -> dict[str, float]:
    """Dice points that the HyperSolver loses to the better classic solver, by protocol.

    On the worst test set; empty where the run was not evaluated with both.
    """
    dice: dict[tuple[str, str], dict[str, float]] = defaultdict(dict)
    path = run / "evaluation" / "summary.csv"
    if path.is_file():
        with open(path, newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                dice[row["protocol"], row["data"]][row["solver"]] = 100 * float(row["mDice"])
    lost: dict[str, float] = {}
    for (protocol, _), solvers in dice.items():
        rivals = [solvers[name] for name in ("anderson", "broyden") if name in solvers]
        if rivals and "hyper" in solvers:
            points = max(rivals) - solvers["hyper"]
            lost[protocol] = max(points, lost.get(protocol, points))
    return lost
