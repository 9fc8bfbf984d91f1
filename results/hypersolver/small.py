"""HyperSolvers on small vector and sequence DEQs: ``python results/hypersolver/small.py``.

Writes small.csv, small.png and small.json beside this file, in about ten minutes on one core.
Problems that small.json already holds are kept: delete it to measure all of them again.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import torch
from curves import Point, measure, read, rivals, verdict, write
from small_problems import SequenceModel, VectorModel, train

from deqsolvers import Anderson, HyperSolver, fit_hypersolver, spectral_radius
from deqsolvers.hypersolver.targets import Teacher
from polypseg.runs import versions

PROBLEMS = {"vector": VectorModel, "sequence": SequenceModel}
UPDATES = {"vector": (400, 64), "sequence": (300, 32)}  # of the DEQ, and its batch
REGULARISED = {"weakly": 0.0, "strongly": 1.0}
BATCHES, BATCH, EPOCHS, STEPS = 40, 64, 8, 6  # of the HyperSolver's fit


def hypersolvers(kind: str) -> dict[str, HyperSolver]:
    """As in the papers, and with a preconditioner; both within 3 % of the DEQ's parameters."""
    if kind == "vector":
        return {
            "HyperSolver (paper)": HyperSolver.for_vectors(128, width=16, initializer_width=32),
            "HyperSolver": HyperSolver.for_vectors(128, width=8, initializer_width=32, rank=16),
        }
    return {
        "HyperSolver (paper)": HyperSolver.for_sequences(192, width=8, initializer_width=10),
        "HyperSolver": HyperSolver.for_sequences(192, width=8, initializer_width=6, rank=8),
    }


def title(kind: str, strength: str) -> str:
    return f"{kind}, {strength} regularised"


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def run(kind: str, strength: str, quick: bool) -> tuple[list[Point], dict[str, object]]:
    problem = title(kind, strength)
    torch.manual_seed(0)
    model = PROBLEMS[kind]()
    started = time.perf_counter()
    updates, batch = UPDATES[kind]
    train(model, REGULARISED[strength], updates // (20 if quick else 1), batch)
    record: dict[str, object] = {
        "problem": problem,
        "deq_parameters": count(model),
        "deq_seconds": time.perf_counter() - started,
    }
    training = torch.Generator().manual_seed(11)
    with torch.no_grad():
        batches = [
            model.features(model.data(BATCH, training)[0]) for _ in range(4 if quick else BATCHES)
        ]
        x, y = model.data(256, torch.Generator().manual_seed(12))
        held_out, truths = list(model.features(x).split(BATCH)), y.split(BATCH)
    z = model.deq.solve(held_out[0]).z
    radius = spectral_radius(model.deq.f, z, (held_out[0],))
    record["spectral_radius"] = [float(radius.mean()), float(radius.max())]
    learned = {}
    for name, hyper in hypersolvers(kind).items():
        torch.manual_seed(0)
        started = time.perf_counter()
        history = fit_hypersolver(
            hyper,
            model.deq,
            batches,
            epochs=1 if quick else EPOCHS,
            steps=STEPS,
            lr=1e-2,
            cache=True,
            teacher_tol=1e-6,
        )
        record[name] = {
            "parameters": count(hyper),
            "share_of_deq": count(hyper) / count(model),
            "fit_seconds": time.perf_counter() - started,
            "skipped": history[-1].skipped,
        }
        learned[name] = hyper
    teacher = Teacher(model.deq, tol=1e-6, max_steps=300)
    points = measure(
        problem,
        model.deq,
        held_out,
        rivals(learned, Anderson(5)),
        lambda index, z: model.quality(z, truths[index]),
        [teacher.deq.solve(x).z for x in held_out],
        repeats=1 if quick else 5,
    )
    names = [each for name in learned for each in (name, f"{name}, handing over")]
    record["verdict"] = [line for name in names for line in verdict(points, problem, name)]
    return points, record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent)
    parser.add_argument("--quick", action="store_true", help="a check of the script, no result")
    arguments = parser.parse_args()
    points: list[Point] = []
    records: list[dict[str, object]] = []
    file = arguments.out / "small.json"
    if file.exists():
        points = read(arguments.out / "small.csv")
        records = json.loads(file.read_text())["problems"]
    done = {record["problem"] for record in records}
    for kind in PROBLEMS:
        for strength in REGULARISED:
            if title(kind, strength) in done:
                continue
            found, record = run(kind, strength, arguments.quick)
            points += found
            records.append(record)
            print(json.dumps(record, indent=1), flush=True)
            write(points, arguments.out, "small", "quality")
            content = {"command": "python results/hypersolver/small.py", **versions()}
            content["problems"] = records
            file.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
