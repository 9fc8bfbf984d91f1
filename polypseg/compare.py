"""Two evaluated models compared on the same images."""

from __future__ import annotations

import argparse
import json
import math
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from polypseg import cli
from polypseg.checkpoint import write_atomic
from polypseg.evaluation import earlier_evaluation
from polypseg.report import EVALUATION
from polypseg.scores import ImageRow, by_kind, json_values, read_rows, text_columns
from polypseg.statistics import Comparison, compare_paired, interval_notes
from polypseg.testsets import NOTES

PROGRAM = "polypseg-compare"
METRICS = ("dice", "iou", "hd95")
HEADER = (
    "data", "protocol", "target", "metric", "images", "A", "B", "B - A [95 %]", "p (Wilcoxon)",
    "B higher / equal / lower",
)  # fmt: skip


@dataclass(frozen=True)
class Evaluated:
    """The rows of one solver of an evaluation, by test folder, and what was said beside them."""

    folder: Path
    solver: str
    rows: dict[str, list[ImageRow]]
    notes: list[str]


@dataclass(frozen=True)
class Line:
    """One comparison: B minus A of one metric on one folder, under one protocol and target."""

    data: str
    protocol: str
    target: str
    metric: str
    result: Comparison


def load_evaluated(source: str) -> Evaluated:
    """Read the rows that `RUN` or `RUN:SOLVER` names.

    RUN is a run directory with an evaluation, or the folder of an evaluation. Without a solver it
    is the last one of the evaluation, which is the one to predict with.

    Raises:
        ValueError: there is no evaluation, or it lacks the solver or, as that of a released model,
            the rows.
    """
    text, colon, solver = source.rpartition(":")
    if not colon or Path(source).exists():
        text, solver = source, ""
    folder = Path(text)
    if (folder / EVALUATION).is_dir():
        folder = folder / EVALUATION
    record = earlier_evaluation(folder)
    if record is None:
        raise ValueError(
            f"{text}: holds no evaluation; make one with polypseg-evaluate, and give the run "
            "directory or the folder of --out"
        )
    known = list(record["solvers"])
    solver = solver or known[-1]
    if solver not in known:
        raise ValueError(
            f"{folder}: solver {solver!r} was not evaluated; known: {', '.join(known)}"
        )
    try:
        rows = {
            name: read_rows(folder / f"{name}-{solver}.csv", ImageRow) for name in record["data"]
        }
    except FileNotFoundError as error:
        raise ValueError(
            f"{error.filename}: missing; a released model comes without its scores per image. "
            "Score it again with polypseg-evaluate --out FOLDER, and give that folder"
        ) from error
    # What an older version noted of a set may say less than is known today.
    notes = [NOTES[name] for name in rows if name in NOTES] + record["notes"]
    notes += interval_notes({name: len({row.stem for row in own}) for name, own in rows.items()})
    return Evaluated(folder, solver, rows, list(dict.fromkeys(notes)))


def compare(a: Evaluated, b: Evaluated) -> list[Line]:
    """Compare two models on every folder, protocol and target that both were evaluated on.

    Raises:
        ValueError: they share nothing, or the images or the true masks of a folder differ.
    """
    lines = []
    for data in (name for name in a.rows if name in b.rows):
        first, second = by_kind(a.rows[data]), by_kind(b.rows[data])
        for kind in (kind for kind in first if kind in second):
            left, right = first[kind], second[kind]
            _check_paired(data, kind[0], left, right)
            for metric in METRICS:
                values = [[getattr(row, metric) for row in rows] for rows in (left, right)]
                lines.append(Line(data, *kind, metric, compare_paired(*values)))
    if not lines:
        raise ValueError(
            f"{a.folder} and {b.folder} have no test folder and protocol in common: "
            f"{', '.join(a.rows)} and {', '.join(b.rows)}"
        )
    return lines


def _check_paired(
    data: str, protocol: str, left: Sequence[ImageRow], right: Sequence[ImageRow]
) -> None:
    if [row.stem for row in left] != [row.stem for row in right]:
        only = {row.stem for row in left} ^ {row.stem for row in right}
        named = ", ".join(sorted(only)[:5]) or "in their order"
        raise ValueError(
            f"{data}: the two evaluations differ in {len(only)} images ({named}); evaluate both "
            "runs on the same folder, with the same --limit"
        )
    if protocol == "paper":  # counts at each network's own size
        return
    for one, other in zip(left, right, strict=True):
        if (one.tp + one.fn, one.fp + one.tn) != (other.tp + other.fn, other.fp + other.tn):
            raise ValueError(
                f"{data}: the true mask of {one.stem} has changed between the two evaluations; "
                "evaluate both runs on the same masks"
            )


def as_text(lines: Sequence[Line]) -> str:
    """The comparisons as a table: Dice and IoU in per cent, distances in pixels."""
    table = [HEADER, *map(_cells, lines)]
    return text_columns(table, names=4, optional=("protocol", "target"))


def _cells(line: Line) -> tuple[str, ...]:
    found = line.result
    scale = 1 if line.metric == "hd95" else 100
    a, b, difference, low, high = (
        scale * value
        for value in (found.mean_a, found.mean_b, found.difference, found.low, found.high)
    )
    return (
        line.data,
        line.protocol,
        line.target,
        line.metric,
        str(found.images),
        f"{a:.2f}",
        f"{b:.2f}",
        f"{difference:+.2f} [{'–' if math.isnan(low) else f'{low:+.2f}, {high:+.2f}'}]",
        f"{found.p_value:.2g}",
        f"{found.higher} / {found.equal} / {found.lower}",
    )


def _notes(a: Evaluated, b: Evaluated) -> list[str]:
    """The notes of both evaluations, each once, and whose they are."""
    return [
        f"Note on {' and '.join(name for name, one in (('A', a), ('B', b)) if note in one.notes)}: "
        f"{note}"
        for note in dict.fromkeys(a.notes + b.notes)
    ]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Compare two evaluated models image by image: paired bootstrap intervals of "
        "the mean difference and Wilcoxon signed-rank tests. The p-values are not corrected for "
        "the number of comparisons.",
    )
    for name in ("a", "b"):
        parser.add_argument(
            name,
            metavar=f"{name.upper()}[:SOLVER]",
            help="a run directory that polypseg-evaluate has scored, or the folder of its --out; "
            "by default its last solver",
        )
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the result as JSON too")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `polypseg-compare`; errors are raised (see `polypseg.cli`)."""
    options = _parser().parse_args(argv)
    a, b = load_evaluated(options.a), load_evaluated(options.b)
    lines = compare(a, b)
    for name, one in (("A", a), ("B", b)):
        print(f"{name}: {one.solver} of {one.folder}")
    print(f"\n{as_text(lines)}")
    print("\ndice and iou: per cent, higher is better; hd95: pixels, lower is better")
    print(
        "the interval is of the mean difference, p of the ranks of the differences: either may "
        "tell a difference where the other does not"
    )
    for note in _notes(a, b):
        print(f"\n{note}")
    if options.json is not None:
        record = {
            "program": PROGRAM,
            **{
                name: {"folder": str(one.folder), "solver": one.solver, "notes": one.notes}
                for name, one in (("a", a), ("b", b))
            },
            "comparisons": [
                {
                    **{key: value for key, value in vars(line).items() if key != "result"},
                    **asdict(line.result),
                }
                for line in lines
            ],
        }
        write_atomic(options.json, json.dumps(json_values(record), indent=2).encode())
    return 0


if __name__ == "__main__":
    sys.exit(cli.compare())
