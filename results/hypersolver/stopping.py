"""When a HyperSolver may stop: evaluations and accuracy against the tolerance.

``python results/hypersolver/stopping.py RUN --data DIR`` writes RUN/stopping.csv beside this file.
A solve stops at the first evaluation whose iterate has a residual of at most the tolerance, and
takes one update more (``final="last"``), with at most `MOST` evaluations. ``solve.hyper_tol`` is
chosen from this table: validation images only.
"""

from __future__ import annotations

import argparse
import csv
import statistics
from pathlib import Path

import torch
from curves import relative
from polypdeq import Trained

from polypseg.data import PolypDataset, batches, split_for
from polypseg.metrics import score_masks

MOST = 4
TOLERANCES = (0.0, 0.04, 0.05, 0.06, 0.07, 0.08, 0.1, float("inf"))  # inf: two evaluations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    trained = Trained(given.run)
    model, config = trained.model, trained.config
    dataset = PolypDataset(split_for(given.data, config.seed).val, config.data.size, False, 0)
    exact = model.deq.with_solver(trained.anderson, tol=1e-4, max_steps=100)
    fast = [
        model.deq.with_solver(trained.hyper, tol=None, max_steps=steps, final="last")
        for steps in range(1, MOST + 1)
    ]
    images = []
    for batch in batches(dataset, 1, False, 0, 0):
        truth = batch["mask"][0, 0].bool()
        with torch.no_grad():
            e = model.features(batch["image"])
            target = exact.solve(e).z
            states = [deq.solve(e).z for deq in fast]
            residuals = [float(relative(z, model.deq.f(z, e))) for z in states]
            wanted = model.read_out(target)[0, 0] > 0
            masks = [model.read_out(z)[0, 0] > 0 for z in states]
        dice = score_masks(wanted, truth).dice
        images.append(
            {
                "residual": residuals,
                "distance": [float(relative(z, target)) for z in states],
                "pixels": [float((mask != wanted).float().mean()) for mask in masks],
                "lost": [dice - score_masks(mask, truth).dice for mask in masks],
            }
        )
    rows = []
    for tol in TOLERANCES:
        ends = [
            next((k for k in range(1, MOST - 1) if image["residual"][k - 1] <= tol), MOST - 1)
            for image in images
        ]
        at = {
            key: [image[key][end] for image, end in zip(images, ends, strict=True)]
            for key in ("distance", "pixels", "lost")
        }
        rows.append(
            {
                "tolerance": tol,
                "evaluations": f"{1 + statistics.fmean(ends):.3f}",
                "distance to z*": f"{statistics.fmean(at['distance']):.4f}",
                "worst": f"{max(at['distance']):.3f}",
                "pixels unlike z*'s [%]": f"{100 * statistics.fmean(at['pixels']):.3f}",
                "Dice points lost": f"{100 * statistics.fmean(at['lost']):.3f}",
                "worst loss": f"{100 * max(at['lost']):.2f}",
            }
        )
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


if __name__ == "__main__":
    main()
