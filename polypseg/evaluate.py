"""Scoring a trained run on test folders, with every solver it has weights for."""

from __future__ import annotations

import argparse
import json
import math
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from polypseg.checkpoint import write_atomic
from polypseg.config import load_config
from polypseg.data import DataError, Fault, Pair, audit_pairs, find_pairs, read_pair, test_folders
from polypseg.metrics import score_masks
from polypseg.predictor import THRESHOLD, Predictor, available_solvers
from polypseg.report import EVALUATION, residual_traces, worst_examples, write_report
from polypseg.runs import versions
from polypseg.scores import ImageRow, SummaryRow, summarise, text_table, to_csv

PROGRAM = "polypseg-evaluate"
WARM_UP = 2
PICTURES = 12
PRINTED_WARNINGS = 10
NOTES = {
    "CVC-ClinicDB": "The field's split of CVC-ClinicDB cuts through its video sequences: 16 of the "
    "62 test frames have a near-twin in the training set, so figures on it are optimistic.",
}


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_run` did.

    Attributes:
        out: the folder that the results were written to.
        predictors: by solver, simplest first.
        sets: the pairs of each test folder.
        rows: for each test folder and solver, the rows in the order of the pairs.
        summary: a row for each test folder and solver.
    """

    out: Path
    predictors: dict[str, Predictor]
    sets: dict[str, list[Pair]]
    rows: dict[str, dict[str, list[ImageRow]]]
    summary: list[SummaryRow]


def evaluate_models(
    predictors: Mapping[str, Predictor], pairs: Sequence[Pair], progress: str | None = None
) -> dict[str, list[ImageRow]]:
    """Predict and score every pair with every predictor, at the true mask's own resolution.

    The predictors take turns on each image, in rotating order, so that whatever else the machine
    does slows all of them alike. Run `warm_up` first where the seconds matter.

    Args:
        predictors: by the name that they get in the result.
        pairs: images and masks; see `audit_pairs`.
        progress: text beside a progress bar; None shows no bar.

    Returns:
        For each predictor the rows in the order of the pairs.

    Raises:
        DataError: a pair cannot be read.
    """
    rows: dict[str, list[ImageRow]] = {name: [] for name in predictors}
    names = list(predictors)
    bar = tqdm(pairs, desc=progress, unit="image", disable=progress is None)
    for index, pair in enumerate(bar):
        image, truth = read_pair(pair)
        for turn in range(len(names)):
            name = names[(index + turn) % len(names)]
            result = predictors[name].predict(image, measure=True)
            score = score_masks(result.mask, truth.astype(bool))
            rows[name].append(
                ImageRow(
                    pair.stem,
                    **asdict(score.confusion),
                    dice=score.dice,
                    iou=score.iou,
                    steps=result.steps,
                    evaluations=result.evaluations,
                    residual=result.residual,
                    status=result.status,
                    seconds=result.seconds,
                )
            )
    return rows


def warm_up(predictors: Mapping[str, Predictor], pair: Pair) -> None:
    """Let each predictor run a few times: first calls allocate memory and choose kernels."""
    image, _ = read_pair(pair)
    for predictor in predictors.values():
        for _ in range(WARM_UP):
            predictor.predict(image)


def find_test_sets(data: Sequence[Path]) -> dict[str, list[Pair]]:
    """Find the pairs of every test folder that a person names, by the folder's name.

    Args:
        data: each a root with `TestDataset/<NAME>/{images,masks}`, or one folder with images and
            masks.

    Raises:
        DataError: a folder is missing, incomplete or empty, files cannot be paired, or two folders
            have one name. The faults of all folders are reported together.
    """
    faults: list[Fault] = []
    folders: dict[str, Path] = {}
    for root in data:
        try:
            nested = (root / "TestDataset").is_dir()
            found = test_folders(root) if nested else {root.resolve().name: root}
        except DataError as error:
            faults.extend(error.faults)
            continue
        for name, folder in found.items():
            if name in folders:
                problem = f"has the same name as {folders[name]}"
                faults.append(Fault(folder, problem, "give one of them, or rename one"))
            folders[name] = folder
    sets: dict[str, list[Pair]] = {}
    for name, folder in folders.items():
        try:
            sets[name] = find_pairs(folder)
        except DataError as error:
            faults.extend(error.faults)
    if faults:
        raise DataError(faults)
    return sets


def evaluate_run(
    run: Path,
    data: Sequence[Path],
    solvers: Sequence[str] | None = None,
    out: Path | None = None,
    *,
    tol: float | None = None,
    max_steps: int | None = None,
    limit: int | None = None,
    command: str = "",
) -> Evaluation:
    """Evaluate a run and write the results, all together once everything is computed.

    Written are `<folder>-<solver>.csv` with a row per image, `summary.csv`, and `summary.json` with
    the configuration, versions and settings behind the numbers.

    Args:
        run: directory that `polypseg-train` wrote.
        data: test folders, as `find_test_sets`.
        solvers: their names; if None, all that the run has weights for.
        out: a folder that is new, empty or from an earlier evaluation, whose files are then
            replaced; if None, `run/evaluation`.
        tol: relative residual at which the solvers stop, if not the run's own.
        max_steps: most solver updates, if not the run's own.
        limit: use only the first images of each folder.
        command: the command line, for the record.

    Raises:
        DataError: images or masks cannot be used, or `out` holds something else. Nothing is written
            then, and neither with any other error before the last image.
        CheckpointError: the run is missing, damaged or lacks weights for a solver.
        ValueError: a solver is unknown or an option out of range.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, got {limit}")
    out = run / EVALUATION if out is None else out
    names = available_solvers(run) if solvers is None else list(dict.fromkeys(solvers))
    stale = _earlier_files(out)
    predictors = {
        name: Predictor.from_run(run, name, tol=tol, max_steps=max_steps) for name in names
    }
    sets = {name: pairs[:limit] for name, pairs in find_test_sets(data).items()}
    _audit(sets)

    warm_up(predictors, next(iter(sets.values()))[0])
    rows = {name: evaluate_models(predictors, pairs, name) for name, pairs in sets.items()}
    summary = [
        summarise(folder, solver, rows[folder][solver]) for folder in rows for solver in names
    ]
    files = {
        f"{folder}-{solver}.csv": to_csv(rows[folder][solver], ImageRow)
        for folder in rows
        for solver in names
    }
    record = {
        "program": PROGRAM,
        "command": command,
        "run": str(run),
        "files": ["summary.csv", *files],
        "protocol": f"Dice and IoU per image at the mask's own resolution, threshold {THRESHOLD}, "
        "then the mean over images; 1 where truth and prediction are both empty. Seconds are those "
        "of the network on one image, after a warm-up, the solvers taking turns.",
        "limit": limit,
        "data": {name: str(pairs[0].image.parent.parent) for name, pairs in sets.items()},
        "notes": [NOTES[name] for name in sets if name in NOTES],
        "solvers": {name: _settings(predictor) for name, predictor in predictors.items()},
        "summary": [_plain(asdict(row)) for row in summary],
        "config": asdict(load_config(run / "config.yaml")),
        "versions": versions(),
    }
    # First of all, so that whatever interrupts the writing, the folder is known as ours.
    write_atomic(out / "summary.json", json.dumps(record, indent=2, default=str).encode())
    write_atomic(out / "summary.csv", to_csv(summary, SummaryRow))
    for name, content in files.items():
        write_atomic(out / name, content)
    for name in stale - files.keys() - {"summary.csv"}:
        (out / name).unlink(missing_ok=True)
    return Evaluation(out, predictors, sets, rows, summary)


def _earlier_files(out: Path) -> set[str]:
    """The files of an earlier evaluation in `out`; an error where something else is in it."""
    if not out.exists() or (out.is_dir() and not any(out.iterdir())):
        return set()
    try:
        record = json.loads((out / "summary.json").read_bytes())
        if record["program"] == PROGRAM:
            return {Path(name).name for name in record["files"]}
    except (OSError, ValueError, TypeError, KeyError):
        pass
    problem = "exists and does not hold an earlier evaluation"
    raise DataError([Fault(out, problem, "give a folder that is new or empty")])


def _audit(sets: Mapping[str, Sequence[Pair]]) -> None:
    """Check all images and masks before the first is predicted; tell the warnings."""
    pairs = [pair for found in sets.values() for pair in found]
    with tqdm(total=len(pairs), desc="checking", unit="pair", leave=False) as bar:
        faults = audit_pairs(pairs, lambda done, _: bar.update(done - bar.n))
    errors = [fault for fault in faults if fault.severity == "error"]
    if errors:
        raise DataError(errors)
    for fault in faults[:PRINTED_WARNINGS]:
        print(f"{PROGRAM}: warning: {fault}", file=sys.stderr)
    if len(faults) > PRINTED_WARNINGS:
        print(f"... and {len(faults) - PRINTED_WARNINGS} more warnings", file=sys.stderr)


def _settings(predictor: Predictor) -> dict[str, Any]:
    """How the predictor solves; empty for an explicit pass."""
    return {} if predictor.deq is None else asdict(predictor.deq.options)


def _plain(row: dict[str, Any]) -> dict[str, Any]:
    """JSON knows neither NaN nor infinity."""
    return {
        key: None if isinstance(value, float) and not math.isfinite(value) else value
        for key, value in row.items()
    }


def _report(run: Path, evaluation: Evaluation) -> Path:
    """Write the run's report, with pictures of the worst images under the last solver."""
    name, predictor = list(evaluation.predictors.items())[-1]
    candidates = [
        (row.dice, pair)
        for folder, pairs in evaluation.sets.items()
        for row, pair in zip(evaluation.rows[folder][name], pairs, strict=True)
    ]
    worst = [pair for _, pair in sorted(candidates, key=lambda item: item[0])[:PICTURES]]
    examples = worst_examples(predictor, worst)
    traces = residual_traces(evaluation.predictors, worst)
    return write_report(run, examples, traces)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Score a trained run on test folders. Research use only, not a medical device.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory polypseg-train wrote")
    parser.add_argument(
        "--data",
        type=Path,
        action="append",
        required=True,
        metavar="DIR",
        help="a root with TestDataset/<NAME>/{images,masks}, or one folder with images and masks; "
        "may be given several times",
    )
    parser.add_argument(
        "--solvers",
        type=lambda text: [name.strip() for name in text.split(",")],
        metavar="LIST",
        help="separated by commas, of explicit, picard, anderson, broyden and hyper; default: all "
        "but picard that the run has weights for",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="a new or empty folder, or one with an earlier evaluation, which is then replaced; "
        "default: RUN/evaluation, and RUN/report.html is then written too",
    )
    parser.add_argument(
        "--tol", type=float, help="relative residual to stop at; default: the run's own"
    )
    parser.add_argument(
        "--max-steps", type=int, metavar="N", help="most solver steps; default: the run's own"
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use only the first N images of each folder"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `polypseg-evaluate`; errors are raised (see `polypseg.cli`)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(arguments)
    evaluation = evaluate_run(
        options.run,
        options.data,
        options.solvers,
        options.out,
        tol=options.tol,
        max_steps=options.max_steps,
        limit=options.limit,
        command=shlex.join([PROGRAM, *arguments]),
    )
    print(text_table(evaluation.summary))
    for name in evaluation.rows:
        if name in NOTES:
            print(f"\nNote: {NOTES[name]}")
    print(f"\nResults per image and summary: {evaluation.out}")
    if options.out is None:
        print(f"Report: {_report(options.run, evaluation)}")
    return 0
