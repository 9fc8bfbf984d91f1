"""The tables of all evaluated runs beside the paper's: ``python results/tables.py``.

Reads ``*/evaluation/summary.csv``, ``*/elsewhere/summary.csv`` (networks of one class on images of
another hospital) and ``*/results.csv`` beside this file and writes ``tables.md``.
"""

from __future__ import annotations

import csv
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

from polypseg.paper import NEOPOLYP, SETS, TABLE_2, TABLE_3, TARGETS
from polypseg.protocols import PROTOCOLS
from polypseg.run_config import load_run_config
from polypseg.runs import read_epochs
from polypseg.scores import SummaryRow, read_rows
from polypseg.testsets import NOTES

HERE = Path(__file__).parent
CLINIC = f"{NOTES[SETS[1]]}\n"
CURVES = "polypdeq-add-256"  # trained without its validation images
CURVE_SOLVERS = ("HyperSolver", "Anderson from the start of HyperSolver", "Anderson", "Picard")
SOLVERS = ("explicit", "picard", "broyden", "anderson", "hyper")


def main() -> None:
    runs = sorted(path.parent.parent for path in HERE.glob("*/evaluation/summary.csv"))
    rows = {run.name: read_rows(run / "evaluation" / "summary.csv", SummaryRow) for run in runs}
    both = {name: found for name, found in rows.items() if found[0].data in SETS}
    classes = {name: found for name, found in rows.items() if found[0].data == NEOPOLYP}
    parts = [
        "# Tables\n",
        "Written by `python results/tables.py` from the files beside it. Dice and IoU are means "
        "over images in per cent, with 95 % bootstrap intervals over images. What each run is, its "
        "command and its commit: [README.md](README.md). Seconds are medians for one image, the "
        "solvers taking turns, on two CPU cores that did other work too where the README says so; "
        "peak MB is what predicting one image holds beside the weights; "
        "the paper's rows come from other schedules and another pretraining.\n",
    ]
    for protocol in PROTOCOLS:
        title = f"## Kvasir-SEG and CVC-ClinicDB, protocol `{protocol}`\n"
        parts += [title, _sets(both, protocol), CLINIC]
    if classes:
        parts += ["## NeoPolyp-Small, protocol `default`\n", _targets(classes)]
    elsewhere = {
        path.parent.parent.name: read_rows(path, SummaryRow)
        for path in sorted(HERE.glob("*/elsewhere/summary.csv"))
    }
    parts += [
        "## Images of another hospital, polyp or none, protocol `default`\n",
        f"Trained on Kvasir-SEG and CVC-ClinicDB, scored on {NEOPOLYP}. {NOTES[NEOPOLYP]}\n",
        _elsewhere(elsewhere),
    ]
    parts += ["## Solves\n", _solves(rows), CLINIC, "## Trainings\n", _trainings(runs)]
    for name, when in (("ablations", ""), ("ablations-before", ", before the masks were aligned")):
        parts += [f"## Ablations, validation images{when}\n", _ablations(f"{name}.csv")]
    parts.append(
        "The injection: `polypdeq-add-256-all` and `polypdeq-res-256-all` above, of one schedule, "
        "data and starting weights. The initializer alone (M = 0) and 1 to 12 steps: next table.\n"
    )
    parts += [f"## Evaluations at inference, validation images, `{CURVES}`\n", _curves()]
    (HERE / "tables.md").write_text("\n".join(parts))


def _sets(rows: dict[str, list[SummaryRow]], protocol: str) -> str:
    names = SETS[:2]
    table = []
    for run, solver, found in _by_solver(rows, protocol):
        cells = {row.data: row for row in found}
        table.append([run, solver, *(_scores(cells.get(name)) for name in names)])
    if protocol == "paper":
        table += [
            ["paper", name, *(f"{dice} / {iou}" for dice, iou in cells[:2])]
            for name, cells in TABLE_2.items()
        ]
    return _markdown(["run", "solver", *(f"{name}, Dice / IoU" for name in names)], table)


def _targets(rows: dict[str, list[SummaryRow]]) -> str:
    table = []
    for run, solver, found in _by_solver(rows, "default"):
        cells = {row.target: row for row in found}
        table.append([run, solver, *(_scores(cells.get(name)) for name in TARGETS)])
    table += [
        ["paper", name, *(f"{dice} / {iou}" for dice, iou in cells)]
        for name, cells in TABLE_3.items()
    ]
    return _markdown(["run", "solver", *(f"{name}, Dice / IoU" for name in TARGETS)], table)


def _elsewhere(rows: dict[str, list[SummaryRow]]) -> str:
    table = [
        [run, solver, *(_scores(row) for row in found)]
        for run, solver, found in _by_solver(rows, "default")
    ]
    return _markdown(["run", "solver", f"{NEOPOLYP}, Dice / IoU"], table)


def _solves(rows: dict[str, list[SummaryRow]]) -> str:
    header = ["run", "solver", "set", "evaluations", "residual, median", "worst", "at 1e-3"]
    table = []
    for run, solver, found in _by_solver(rows, "default"):
        memory = _peak(run, solver)
        for row in found:
            if row.target == "polyp":
                measured = not math.isnan(row.residual_median)
                table.append(
                    [
                        *(run, solver, row.data, f"{row.evaluations_mean:.1f}"),
                        f"{row.residual_median:.1e}" if measured else "",
                        f"{row.residual_worst:.1e}" if measured else "",
                        f"{row.converged_share:.0%}" if measured else "",
                        f"{row.seconds_median:.3f}",
                        memory,
                    ]
                )
    return _markdown([*header, "seconds", "peak MB"], table)


def _peak(run: str, solver: str) -> str:
    """What one prediction holds beside the weights, as results/memory.py measured it."""
    path = HERE / run / "memory.csv"
    if not path.exists():
        return ""
    with path.open(newline="") as file:
        return {row["solver"]: row["peak [MB]"] for row in csv.DictReader(file)}.get(solver, "")


def _trainings(runs: Sequence[Path]) -> str:
    header = ["run", "network", "size", "images", "epochs", "validation Dice"]
    more = ["at 1e-3", "evaluations", "spectral radius"]
    table = []
    for run in runs:
        config = load_run_config(run / "config.yaml")
        last = {row["phase"]: row for row in read_epochs(run / "results.csv")}
        implicit = last.get("implicit", {})
        share = implicit.get("val_converged")
        dice = [f"{100 * float(row['val_dice']):.1f}" for row in last.values()]
        whole = config.data.train_on == "all"
        table.append(
            [
                *(run.name, config.model.name, str(config.data.size)),
                "all" if whole else "split",
                " + ".join(row["epoch"] for row in last.values()),
                "(seen) " * whole + " / ".join(dice),
                f"{float(share):.0%}" if share else "",
                *(
                    _number(implicit.get(f"val_{key}"))
                    for key in ("evaluations", "spectral_radius")
                ),
            ]
        )
    return _markdown([*header, *more], table)


def _ablations(file_name: str) -> str:
    with (HERE / file_name).open(newline="") as file:
        header, *rows = csv.reader(file)
    return _markdown(header, rows)


def _curves() -> str:
    """Dice and distance to z* after so many evaluations; 0 is the initializer alone."""
    with (HERE / "hypersolver" / CURVES / "curves.csv").open(newline="") as file:
        found = {(row["solver"], row["evaluations"]): row for row in csv.DictReader(file)}
    table = []
    for count in map(str, range(13)):
        points = [found[solver, count] for solver in CURVE_SOLVERS]
        cells = [f"{100 * float(p['quality']):.1f} / {float(p['distance']):.1e}" for p in points]
        table.append([count, *cells])
    return _markdown(["M", *(f"{solver}, Dice / distance" for solver in CURVE_SOLVERS)], table)


def _by_solver(
    rows: dict[str, list[SummaryRow]], protocol: str
) -> Iterable[tuple[str, str, list[SummaryRow]]]:
    for run, found in rows.items():
        for solver in SOLVERS:
            own = [r for r in found if r.solver == solver and r.protocol == protocol]
            if own:
                yield run, solver, own


def _scores(row: SummaryRow | None) -> str:
    if row is None:
        return ""
    dice, low, high, iou = (
        100 * share for share in (row.mDice, row.mDice_low, row.mDice_high, row.mIoU)
    )
    return f"{dice:.1f} ({low:.1f} ... {high:.1f}) / {iou:.1f}"


def _number(text: str | None) -> str:
    return f"{float(text):.2f}" if text else ""


def _markdown(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


if __name__ == "__main__":
    main()
