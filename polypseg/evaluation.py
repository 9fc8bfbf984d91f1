"""The files of an evaluation."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polypseg.checkpoint import write_atomic
from polypseg.data import DataError, Fault, Pair
from polypseg.predictor import Predictor
from polypseg.protocols import PROTOCOLS
from polypseg.runs import versions
from polypseg.scores import ImageRow, SummaryRow, json_values, to_csv
from polypseg.statistics import FEWEST

PROGRAM = "polypseg-evaluate"


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_run` did: predictors by solver, pairs by folder, rows by folder and solver.

    ``notes`` is what has to be said beside the figures, ``settings`` what made them.
    """

    out: Path
    predictors: dict[str, Predictor]
    sets: dict[str, list[Pair]]
    protocols: list[str]
    rows: dict[str, dict[str, list[ImageRow]]]
    summary: list[SummaryRow]
    notes: list[str]
    settings: dict[str, Any]


def write_evaluation(evaluation: Evaluation) -> None:
    """Write all files; those of an earlier evaluation that are not among them go.

    Raises:
        DataError: the folder holds something other than an earlier evaluation.
    """
    earlier = earlier_files(evaluation.out)
    files = {"summary.csv": to_csv(evaluation.summary, SummaryRow)}
    for folder, by_solver in evaluation.rows.items():
        for solver, rows in by_solver.items():
            files[f"{folder}-{solver}.csv"] = to_csv(rows, ImageRow)
    predictors, sets = evaluation.predictors, evaluation.sets
    record = {
        "program": PROGRAM,
        **evaluation.settings,
        "protocols": {name: PROTOCOLS[name] for name in evaluation.protocols},
        "intervals": "95 %, bootstrap over images (not over videos or patients); none below "
        f"{FEWEST} images",
        "precision_recall": "means over images; 0 where truth or prediction is empty, 1 where both "
        "are",
        "hd95": "95 % Hausdorff distance of the borders, pixels; the image's diagonal where only "
        "one of truth and prediction is empty",
        "seconds": "of the network on one image, after a warm-up, the solvers taking turns",
        "data": {name: str(pairs[0].image.parent.parent) for name, pairs in sets.items()},
        "notes": evaluation.notes,
        "device": str(next(iter(predictors.values())).device),
        "solvers": {  # an explicit pass has no options
            name: {} if predictor.deq is None else asdict(predictor.deq.options)
            for name, predictor in predictors.items()
        },
        "summary": [asdict(row) for row in evaluation.summary],
        "versions": versions(),
        "files": list(files),
    }
    # First of all, so that whatever interrupts the writing, the folder is known as ours.
    summary = json.dumps(json_values(record), indent=2).encode()
    write_atomic(evaluation.out / "summary.json", summary)
    for name, content in files.items():
        write_atomic(evaluation.out / name, content)
    for name in earlier - files.keys():
        (evaluation.out / name).unlink(missing_ok=True)


def earlier_files(out: Path) -> set[str]:
    """The files of an earlier evaluation in `out`; an error where something else is in it."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return set()
    record = earlier_evaluation(out)
    if record is None:
        problem = "exists and does not hold an earlier evaluation"
        raise DataError([Fault(out, problem, "give a folder that is new or empty")])
    return {Path(name).name for name in record["files"]}


def earlier_evaluation(folder: Path) -> dict[str, Any] | None:
    """The record (`summary.json`) of an evaluation in a folder; None where there is none."""
    try:
        record = json.loads((folder / "summary.json").read_bytes())
        complete = record["program"] == PROGRAM and isinstance(record["files"], list)
    except (OSError, ValueError, TypeError, KeyError):
        return None
    return record if complete else None
