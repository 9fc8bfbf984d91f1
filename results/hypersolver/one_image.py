"""Why one test image is lost: ``python results/hypersolver/one_image.py RUN clinic_52 --data DIR``.

Writes ``clinic_52.csv`` into a folder of the run's name beside this file: residual, distance to z*
and Dice after so many evaluations of the HyperSolver and of Anderson.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from curves import relative
from polypdeq import Trained, stop_after

from deqsolvers.hypersolver.targets import Teacher
from polypseg.data import PolypDataset, batches
from polypseg.testsets import find_test_sets
from polypseg.validation import score

EVALUATIONS = (1, 2, 3, 4, 6, 8, 12)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("stem", help="of the image's file")
    parser.add_argument("--data", type=Path, required=True)
    given = parser.parse_args()
    trained = Trained(given.run)
    model = trained.model
    pairs = [
        pair
        for pairs in find_test_sets([given.data]).values()
        for pair in pairs
        if pair.stem == given.stem
    ]
    if len(pairs) != 1:
        parser.error(f"{len(pairs)} test images in {given.data} are named {given.stem}")
    scored = PolypDataset(pairs, trained.config.data.size, train=False, seed=0)
    (batch,) = batches(scored, 1, False, 0, 0)
    truth = batch["mask"][0, 0]
    rows = []
    with torch.no_grad():
        e = model.features(batch["image"])
        exact = Teacher(model.deq, tol=1e-5, max_steps=300).deq.solve(e).z

        def add(solver: str, evaluations: int | str, z: torch.Tensor) -> None:
            dice = score(model.read_out(z)[0], truth)["dice"]
            rows.append(
                {
                    "solver": solver,
                    "evaluations": evaluations,
                    "residual": f"{float(relative(z, model.deq.f(z, e))):.2g}",
                    "distance": f"{float(relative(z, exact)):.2g}",
                    "Dice": f"{100 * dice:.1f}",
                }
            )

        add("z*", "", exact)
        for name, solver in (("HyperSolver", trained.hyper), ("Anderson", trained.anderson)):
            for count in EVALUATIONS:
                deq = model.deq.with_solver(solver, **stop_after(count))
                add(name, count, deq.solve(e).z)
    out = Path(__file__).parent / given.run.resolve().name / f"{given.stem}.csv"
    out.parent.mkdir(exist_ok=True)
    with out.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
    print(out.read_text())


if __name__ == "__main__":
    main()
