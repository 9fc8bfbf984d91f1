"""When a solve may stop: accuracy after a few evaluations, and against a HyperSolver's tolerance.

``python results/hypersolver/stopping.py RUN --data DIR`` writes RUN/stopping.csv beside this file.
Its first rows stop every image after as many evaluations, the HyperSolver and Anderson. In the
others the HyperSolver stops at the first evaluation whose iterate has a residual of at most the
tolerance, and takes one update more (``final="last"``), with at most `MOST` evaluations.
``solve.hyper_tol`` is chosen from this table: validation images only.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

import torch
from polypdeq import Trained
from torch import Tensor

from deqsolvers.hypersolver.losses import unroll
from deqsolvers.hypersolver.targets import Teacher
from deqsolvers.state import Layout
from polypseg.data import PolypDataset, batches, split_for
from polypseg.metrics import score_masks
from polypseg.models import PolypDEQ

MOST = 4
TOLERANCES = (0.03, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, 0.12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    trained = Trained(given.run)
    model, config = trained.model, trained.config
    dataset = PolypDataset(split_for(given.data, config.seed).val, config.data.size, False, 0)
    teacher = Teacher(model.deq, trained.anderson)
    solvers = {"HyperSolver": trained.hyper, "Anderson": trained.anderson}
    looks: dict[str, list[dict[str, list[float]]]] = {name: [] for name in solvers}
    for batch in batches(dataset, 1, False, 0, 0):
        truth = batch["mask"][0, 0].bool()
        with torch.no_grad():
            e = model.features(batch["image"])
            target = teacher.target(e)
            wanted, *_ = seen(model, [target.goal], target.layout)
            dice = score_masks(wanted, truth).dice
            for name, solver in solvers.items():
                way = unroll(solver, model.deq, target, MOST + 1)  # the last step measures MOST
                masks = seen(model, way.states[1:-1], target.layout)
                looks[name].append(
                    {
                        "residual": way.residuals[1:, 0].tolist(),
                        "distance": way.distances[1:-1, 0].tolist(),
                        "pixels": [float((mask != wanted).float().mean()) for mask in masks],
                        "lost": [dice - score_masks(mask, truth).dice for mask in masks],
                    }
                )
    images = looks["HyperSolver"]
    rows = [
        {"solver": name, "tolerance": "", **summary(looks[name], [k] * len(images))}
        for name in solvers
        for k in range(MOST)
    ]
    for tol in TOLERANCES:
        ends = [
            next((k for k in range(1, MOST - 1) if image["residual"][k - 1] <= tol), MOST - 1)
            for image in images
        ]
        rows.append({"solver": "HyperSolver", "tolerance": tol, **summary(images, ends)})
    out = Path(__file__).parent / given.run.resolve().name
    out.mkdir(exist_ok=True)
    with (out / "stopping.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print((out / "stopping.csv").read_text())
    first = sorted(image["residual"][0] for image in images)
    quartiles = [round(q, 4) for q in statistics.quantiles(first, n=4)]
    print(f"residual after one step, quartiles: {quartiles}")


def seen(model: PolypDEQ, states: list[Tensor], layout: Layout) -> list[Tensor]:
    """The masks (H, W) that are read out of states (1, features) of one image."""
    return [model.read_out(layout.unflatten(z))[0, 0] > 0 for z in states]


def summary(images: list[dict[str, list[float]]], ends: list[int]) -> dict[str, str]:
    """Of the state after ``ends[i] + 1`` evaluations of every image."""
    at = {
        key: [image[key][end] for image, end in zip(images, ends, strict=True)]
        for key in ("distance", "pixels", "lost")
    }
    return {
        "evaluations": f"{1 + statistics.fmean(ends):.3f}",
        "distance to z*": f"{statistics.fmean(at['distance']):.4f}",
        "worst": f"{max(at['distance']):.3f}",
        "pixels unlike z*'s [%]": f"{100 * statistics.fmean(at['pixels']):.3f}",
        "Dice points lost": f"{100 * statistics.fmean(at['lost']):.3f}",
        "worst loss": f"{100 * max(at['lost']):.2f}",
    }


if __name__ == "__main__":
    main()
