"""Peak memory of predicting one image, per solver: ``python results/memory.py RUN ...``.

RUN is a directory of `polypseg-train` with its weights, whose results lie in a folder of the same
name beside this file; ``memory.csv`` is written there. Each solver is measured in a process of its
own on one random image of the training size, batch 1, after a first prediction, above what the
process held with the network loaded.
"""

from __future__ import annotations

import csv
import json
import sys
from pathlib import Path

import torch

from polypseg.predictor import Predictor, available_solvers

HERE = Path(__file__).resolve().parent
sys.path.insert(0, str(HERE.parent))  # benchmarks/ is not installed
from benchmarks.memory import in_own_process, peak  # noqa: E402


def measure(run: Path, solver: str) -> dict[str, float]:
    """Bytes of the weights, and of one prediction on top of them."""
    predictor = Predictor.from_run(run, solver)
    generator = torch.Generator().manual_seed(0)
    size = (predictor.size, predictor.size, 3)
    image = torch.randint(256, size, generator=generator, dtype=torch.uint8).numpy()
    predictor.predict(image)
    weights = [*predictor.model.parameters(), *predictor.model.buffers()]
    return {
        "weights": sum(each.nbytes for each in weights),
        "peak": peak(lambda: predictor.predict(image), predictor.device),
    }


def main(runs: list[Path]) -> None:
    for run in runs:
        rows = []
        for solver in available_solvers(run):
            found = in_own_process([__file__, "--measure", str(run.resolve()), solver])
            megabytes = {f"{key} [MB]": f"{value / 1e6:.1f}" for key, value in found.items()}
            rows.append({"solver": solver, **megabytes})
        with (HERE / run.resolve().name / "memory.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        print(run, *rows, sep="\n")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--measure"]:
        print(json.dumps(measure(Path(sys.argv[2]), sys.argv[3])))
    else:
        main([Path(argument) for argument in sys.argv[1:]])
