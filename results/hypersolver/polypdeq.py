"""HyperSolver on a trained PolypDEQ, beside the classic solvers.

``python results/hypersolver/polypdeq.py curves RUN --data DIR`` measures distances to z* and Dice
against evaluations and time on validation images; every choice is made on these.
``... table RUN --data DIR`` scores the test sets once, and times batches of 1 and 8; run it alone.
Both write into ``--out`` (default: a folder of the run's name beside this file).
"""

from __future__ import annotations

import argparse
import csv
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from curves import handing_over, measure, relative, rivals, verdict, write
from torch import Tensor

from deqsolvers import Anderson, HyperSolver, load_hypersolver, spectral_radius
from deqsolvers.hypersolver.targets import Teacher
from polypseg.data import Pair, PolypDataset, batches, split_for
from polypseg.inference import hyper_options, load_model
from polypseg.models import PolypDEQ, Prediction, build_solver
from polypseg.runs import read_epochs, versions
from polypseg.testsets import find_test_sets
from polypseg.validation import Validation, score

EVALUATIONS = 2  # at which solvers are compared
APART = 0.01  # relative distance of what counts as two fixed points
TIMED = 7  # repeats of every timed prediction


class Trained:
    """A run with what the experiment needs of it."""

    def __init__(self, run: Path):
        model, self.config = load_model(run, "anderson")
        assert isinstance(model, PolypDEQ)
        self.run, self.model = run, model.requires_grad_(False)
        self.hyper: HyperSolver = load_hypersolver(run / "hyper.safetensors").requires_grad_(False)
        solve = self.config.solve
        self.anderson = build_solver("anderson", solve.anderson_memory)
        assert isinstance(self.anderson, Anderson)
        self.broyden = build_solver("broyden", 100)

    def record(self) -> dict[str, object]:
        """Parameters and training times."""
        count = sum(p.numel() for p in self.model.parameters())
        own = sum(p.numel() for p in self.hyper.parameters())
        seconds = {"explicit": 0.0, "implicit": 0.0, "hyper": 0.0}
        for row in read_epochs(self.run / "results.csv"):
            seconds[row["phase"]] += float(row["seconds"])
        deq = seconds["explicit"] + seconds["implicit"]
        return {
            "parameters": {"deq": count, "hypersolver": own, "share": own / count},
            "training_seconds": {**seconds, "share": seconds["hyper"] / deq if deq else None},
            "fitted_on": str(self.hyper.fitted_on),
            **versions(),
        }

    def predictors(self) -> dict[str, Callable[[Tensor], Prediction]]:
        """What the table compares, all on the same weights but for the explicit model's own."""
        sure = {"tol": 1e-3, "max_steps": 100}
        hand_over = handing_over(self.hyper, self.anderson)
        deqs = {
            "Broyden, 100 steps": (self.broyden, {"tol": None, "max_steps": 100}),
            "Broyden to 1e-3": (self.broyden, sure),
            "Anderson to 1e-3": (self.anderson, sure),
            f"Anderson, {EVALUATIONS} evaluations": (self.anderson, stop_after(EVALUATIONS)),
            f"Anderson, {2 * EVALUATIONS} evaluations": (
                self.anderson,
                stop_after(2 * EVALUATIONS),
            ),
            "HyperSolver, 1 evaluation": (self.hyper, stop_after(1)),
            f"HyperSolver, {EVALUATIONS} evaluations": (self.hyper, stop_after(EVALUATIONS)),
            f"HyperSolver, {EVALUATIONS + 1} evaluations": (
                self.hyper,
                stop_after(EVALUATIONS + 1),
            ),
            "HyperSolver, stopping by itself": (self.hyper, hyper_options(self.config.solve)),
            "HyperSolver handing over, to 1e-3": (hand_over, sure),
        }
        found: dict[str, Callable[[Tensor], Prediction]] = {
            "one evaluation from zero": self.model.explicit
        }
        if (self.run / "explicit.safetensors").exists():  # not in a released model
            found["explicit training, one evaluation"] = load_model(self.run, "explicit")[0]
        for name, (solver, options) in deqs.items():
            found[name] = _Solved(self.model, self.model.deq.with_solver(solver, **options))
        return found


def stop_after(evaluations: int) -> dict[str, object]:
    """Options of a solve that stops there."""
    return {"tol": None, "final": "last", "max_steps": evaluations}


class _Solved:
    """A model that predicts on what one DEQ layer finds."""

    def __init__(self, model: PolypDEQ, deq: torch.nn.Module):
        self.model, self.deq = model, deq

    def __call__(self, images: Tensor) -> Prediction:
        z, solution = self.deq(self.model.features(images))
        return Prediction(self.model.read_out(z), solution)


def curves(trained: Trained, pairs: list[Pair], out: Path) -> None:
    """Distance and Dice after 0 .. 12 evaluations."""
    model, config = trained.model, trained.config
    scoring = Validation(pairs, config.data.size, config.hyper.batch)
    features, indices = [], []
    with torch.no_grad():
        for batch in batches(scoring.dataset, config.hyper.batch, False, 0, 0):
            features.append(model.features(batch["image"]))
            indices.append(batch["index"].tolist())

    def dice(index: int, z: Tensor) -> list[float]:
        found = zip(model.read_out(z), indices[index], strict=True)
        return [score(logits, scoring.masks[image])["dice"] for logits, image in found]

    name = trained.run.resolve().name
    solvers = rivals({"HyperSolver": trained.hyper}, trained.anderson)
    teacher = Teacher(model.deq, tol=1e-6, max_steps=300)
    exact = [teacher.deq.solve(e) for e in features]
    goals = [solution.z for solution in exact]
    points = measure(name, model.deq, features, solvers, dice, goals)
    write(points, out, "curves", "Dice")
    radius = spectral_radius(model.deq.f, exact[0].z, (features[0],))
    started = model.deq.with_solver(trained.hyper)
    again = [teacher.deq.solve(e, z0=started.initial_state(e)) for e in features]
    apart = [
        (relative(other.z, solution.z) > APART) & other.converged & solution.converged
        for other, solution in zip(again, exact, strict=True)
    ]
    record = {
        "command": "python results/hypersolver/polypdeq.py curves RUN --data DATA",
        "images": sum(map(len, indices)),
        "spectral_radius": {"mean": float(radius.mean()), "largest": float(radius.max())},
        "z*": {
            "dice": statistics.fmean(
                value for i, solution in enumerate(exact) for value in dice(i, solution.z)
            ),
            "converged": sum(int(solution.converged.sum()) for solution in exact),
            "worst residual": max(float(solution.residual.max()) for solution in exact),
            "evaluations": float(torch.cat([s.evaluations for s in exact]).double().mean()),
            # Found from the start of the HyperSolver by the same classic solver.
            "images with another one": sum(int(each.sum()) for each in apart),
        },
        "verdict": [
            line
            for each in ("HyperSolver", "HyperSolver, handing over")
            for line in verdict(points, name, each)
        ],
        **trained.record(),
    }
    (out / "curves.json").write_text(json.dumps(record, indent=1) + "\n")
    print(json.dumps(record, indent=1))


def table(trained: Trained, sets: dict[str, list[Pair]], out: Path, timed_only: bool) -> None:
    """Dice on every set and seconds an image in batches of 1 and 8, all in the same run."""
    size = trained.config.data.size
    predictors = trained.predictors()
    rows: dict[str, dict[str, object]] = {name: {"solver": name} for name in predictors}
    first = PolypDataset(next(iter(sets.values()))[:8], size, train=False, seed=0)
    images = next(iter(batches(first, 8, False, 0, 0)))["image"]
    for count in (1, 8):
        seconds: dict[str, list[float]] = {name: [] for name in predictors}
        with torch.inference_mode():
            for turn in range(TIMED + 1):
                for name, predict in predictors.items():
                    if turn > 3 and name == "Broyden, 100 steps":
                        continue  # three repeats of the slowest are enough
                    started = time.perf_counter()
                    prediction = predict(images[:count])
                    if turn:
                        seconds[name].append((time.perf_counter() - started) / count)
                    if prediction.solution is not None:
                        rows[name][f"evaluations, batch {count}"] = prediction.solution.calls
        for name, values in seconds.items():
            rows[name][f"seconds an image, batch {count}"] = statistics.median(values)
    for count in (1, 8):
        key = f"seconds an image, batch {count}"
        for row in rows.values():
            row[f"times an explicit pass, batch {count}"] = (
                row[key] / rows["one evaluation from zero"][key]
            )
            row[f"faster than Broyden-100, batch {count}"] = (
                rows["Broyden, 100 steps"][key] / row[key]
            )
    _write_table(rows, trained, out, "timing" if timed_only else "table")
    if timed_only:
        return
    for folder, pairs in sets.items():
        scoring = Validation(pairs, size, 8)
        for name, predict in predictors.items():
            scores = scoring.measure(predict, torch.device("cpu"))
            rows[name][f"{folder} Dice"] = 100 * scores["dice"]
            rows[name][f"{folder} evaluations"] = scores.get("evaluations")
            print(folder, name, f"{100 * scores['dice']:.2f}", flush=True)
    _write_table(rows, trained, out, "table")


def _write_table(
    rows: dict[str, dict[str, object]], trained: Trained, out: Path, name: str
) -> None:
    out.mkdir(parents=True, exist_ok=True)
    columns = list(dict.fromkeys(key for row in rows.values() for key in row))
    with open(out / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        for row in rows.values():
            writer.writerow({k: f"{v:.4g}" if isinstance(v, float) else v for k, v in row.items()})
    record = {
        "command": f"python results/hypersolver/polypdeq.py {name} RUN --data DATA",
        **trained.record(),
    }
    (out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    print((out / f"{name}.csv").read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what", choices=("curves", "timing", "table"))
    parser.add_argument("run", type=Path)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--every", type=int, default=1, help="use every n-th image only")
    arguments = parser.parse_args()
    out = arguments.out or Path(__file__).parent / arguments.run.resolve().name
    trained = Trained(arguments.run)
    held_out = split_for(arguments.data, trained.config.seed).val[:: arguments.every]
    if arguments.what == "curves":
        curves(trained, held_out, out)
    elif arguments.what == "timing":
        table(trained, {"validation": held_out}, out, timed_only=True)
    else:
        sets = {
            name: pairs[:: arguments.every]
            for name, pairs in find_test_sets([arguments.data]).items()
        }
        table(trained, sets, out, timed_only=False)


if __name__ == "__main__":
    main()
