"""What each choice of the network, its training and its HyperSolver is worth.

``python results/ablations.py FOLDER --data DIR --encoder-weights FILE``: every row of
``ablations.csv`` is a training that differs from the first one in a single setting, scored on the
validation images (145 of the 1450; no test image is read). A row that changes the implicit phase
starts from the first row's explicit weights, one that changes the HyperSolver from its implicit
weights too. The injection is compared by the longer runs polypdeq-add-256-all and
polypdeq-res-256-all. Runs are kept in FOLDER and go on where they stopped; after each the table is
written anew, so that a cut leaves the finished rows. Seconds are those of the phases that a row
trained.
"""

from __future__ import annotations

import argparse
import csv
import shutil
from pathlib import Path

from polypseg.runs import read_epochs
from polypseg.train import main as train

HERE = Path(__file__).resolve().parent
PHASES = ("explicit", "implicit", "hyper")
SCHEDULE = (
    "explicit.epochs=8",
    "explicit.ema=0.99",
    "explicit.precision=bf16",
    "implicit.epochs=1",
    "implicit.precision=bf16",
    "implicit.tol=0.01",
    "hyper.initializer=deep",  # the default when the first row was trained
)
BASE = "polypdeq-add: phantom, Jacobian 1, HyperSolver m = 5, K = 3"
# What is changed, the first phase that it changes, the settings.
CHANGES = {
    "strategy: after, as long": ("implicit", ["implicit.epochs=2"]),
    "strategy: alternating": ("implicit", ["implicit.epochs=2", "hyper.alternate=1"]),
    "HyperSolver: no preconditioner": ("hyper", ["hyper.rank=0"]),
    "HyperSolver: paper's initializer": ("hyper", ["hyper.initializer=convolution"]),
    "HyperSolver: start from zero": ("hyper", ["hyper.initializer=zero"]),
    "HyperSolver: K = 6": ("hyper", ["hyper.steps=6"]),
    "implicit learning rate / 4": ("implicit", ["implicit.lr=5e-5"]),
    "backward: jacobian-free": ("implicit", ["implicit.backward=jacobian-free"]),
    "no Jacobian regulariser": ("implicit", ["implicit.jacobian=0"]),
    "HyperSolver: m = 2": ("hyper", ["hyper.memory=2"]),
    "HyperSolver: m = 3": ("hyper", ["hyper.memory=3"]),
    "HyperSolver: m = 4": ("hyper", ["hyper.memory=4"]),
    "loss on the way, weight .5": ("implicit", ["implicit.correction=0.5"]),
    "backward: implicit": ("implicit", ["implicit.backward=implicit"]),
}
COLUMNS = {
    ("explicit", "val_dice"): "explicit Dice",
    ("implicit", "val_dice"): "implicit Dice",
    ("implicit", "val_converged"): "share at 1e-3",
    ("implicit", "val_evaluations"): "evaluations",
    ("implicit", "val_spectral_radius"): "spectral radius",
    ("hyper", "val_dice"): "HyperSolver Dice",
    ("hyper", "distance_start"): "distance at 0",
    ("hyper", "distance_end"): "distance at the end",
}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("folder", type=Path, help="where the runs are kept")
    parser.add_argument("--data", required=True)
    parser.add_argument("--encoder-weights", required=True)
    given = parser.parse_args()
    rows = {BASE: ("explicit", [])} | CHANGES
    for name, (first, settings) in rows.items():
        run = given.folder / _slug(name)
        _borrow(given.folder / _slug(BASE), run, before=first)
        options = ["--data", given.data, "--encoder-weights", given.encoder_weights]
        if code := train([str(run), *options, "--no-evaluate", *SCHEDULE, *settings]):
            raise SystemExit(code)
        done = {each: given.folder / _slug(each) for each in rows}
        _write({each: run for each, run in done.items() if (run / "hyper.safetensors").exists()})


def _borrow(base: Path, run: Path, before: str) -> None:
    """Give a new run the weights of the phases before the one that it changes."""
    if run.exists() or before == PHASES[0]:
        return
    making = run.with_suffix(".new")
    shutil.rmtree(making, ignore_errors=True)
    making.mkdir()
    for phase in PHASES[: PHASES.index(before)]:
        shutil.copy(base / f"{phase}.safetensors", making)
    making.rename(run)


def _write(runs: dict[str, Path]) -> None:
    table = []
    for name, run in runs.items():
        # Phases that a row shares with the first one are told there, and left empty here.
        epochs = read_epochs(run / "results.csv")
        last = {row["phase"]: row for row in epochs}
        cells = {
            title: _cell(last.get(phase, {}).get(field), per_cent="Dice" in title)
            for (phase, field), title in COLUMNS.items()
        }
        seconds = sum(float(row["seconds"]) for row in epochs)
        table.append({"change": name, **cells, "seconds": f"{seconds:.0f}"})
    with (HERE / "ablations.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, list(table[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(table)


def _cell(value: str | None, per_cent: bool) -> str:
    if not value:
        return ""
    return f"{100 * float(value):.1f}" if per_cent else f"{float(value):.2g}"


def _slug(name: str) -> str:
    return "".join(c if c.isalnum() else "-" for c in name).strip("-").lower()


if __name__ == "__main__":
    main()
