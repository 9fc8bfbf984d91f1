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
from polypseg.data import DataError, Fault, Pair, read_pair
from polypseg.predictor import Predictor, available_solvers
from polypseg.protocols import POLYP, PROTOCOLS, check_protocols, score_result
from polypseg.report import EVALUATION, PICTURES, residual_traces, worst_examples, write_report
from polypseg.runs import versions
from polypseg.scores import ImageRow, SummaryRow, by_kind, summarise, text_table, to_csv
from polypseg.testsets import NOTES, audit_test_sets, find_test_sets

PROGRAM = "polypseg-evaluate"
WARM_UP = 2


@dataclass(frozen=True)
class Evaluation:
    """What `evaluate_run` did: predictors by solver, pairs by folder, rows by folder and solver."""

    out: Path
    predictors: dict[str, Predictor]
    sets: dict[str, list[Pair]]
    protocols: list[str]
    rows: dict[str, dict[str, list[ImageRow]]]
    summary: list[SummaryRow]


def evaluate_models(
    predictors: Mapping[str, Predictor],
    pairs: Sequence[Pair],
    progress: str | None = None,
    protocols: Sequence[str] = ("default",),
) -> dict[str, list[ImageRow]]:
    """Predict every pair with every predictor, and score it under every protocol.

    The predictors take turns on each image, in rotating order, so that whatever else the machine
    does slows all of them alike. Run `warm_up` first where the seconds matter.

    Args:
        predictors: by the name that they get in the result.
        pairs: images and masks; see `audit_pairs`.
        progress: text beside a progress bar; None shows no bar.
        protocols: of `PROTOCOLS`.

    Returns:
        For each predictor the rows in the order of the pairs, within a pair by protocol and target.

    Raises:
        DataError: a pair cannot be read.
    """
    rows: dict[str, list[ImageRow]] = {name: [] for name in predictors}
    names = list(predictors)
    bar = tqdm(pairs, desc=progress, unit="image", disable=None if progress else True)
    for index, pair in enumerate(bar):
        image, truth = read_pair(pair)
        for turn in range(len(names)):
            name = names[(index + turn) % len(names)]
            result = predictors[name].predict(image, measure=True)
            for protocol in protocols:
                for target, scored in score_result(result, truth, protocol).items():
                    rows[name].append(
                        ImageRow(
                            pair.stem,
                            protocol,
                            target,
                            **asdict(scored.confusion),
                            dice=scored.dice,
                            iou=scored.iou,
                            hd95=scored.hd95,
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


def evaluate_run(
    run: Path,
    sets: Mapping[str, Sequence[Pair]],
    solvers: Sequence[str] | None = None,
    out: Path | None = None,
    *,
    protocols: Sequence[str] = ("default",),
    tol: float | None = None,
    max_steps: int | None = None,
    limit: int | None = None,
    device: str | None = None,
    command: str = "",
) -> Evaluation:
    """Evaluate a run and write the results, all together once everything is computed.

    Written are `<folder>-<solver>.csv` with a row per image, protocol and target, `summary.csv`
    with intervals, and `summary.json` with the configuration, versions and settings behind the
    numbers.

    Args:
        run: directory that `polypseg-train` wrote.
        sets: the pairs of each test set by name, as `find_test_sets`.
        solvers: their names; if None, all that the run has weights for.
        out: a folder that is new, empty or from an earlier evaluation, whose files are then
            replaced; if None, `run/evaluation`.
        protocols: how to score, of `PROTOCOLS`.
        tol: relative residual at which the solvers stop, if not the run's own.
        max_steps: most solver updates, if not the run's own.
        limit: use only the first images of each folder.
        device: where to compute; if None, a GPU where there is one.
        command: the command line, for the record.

    Raises:
        DataError: images or masks cannot be used, or `out` holds something else. Nothing is written
            then, and neither with any other error before the last image.
        CheckpointError: the run is missing, damaged or lacks weights for a solver.
        ValueError: a solver or protocol is unknown or an option out of range.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, got {limit}")
    protocols = list(dict.fromkeys(protocols))
    check_protocols(protocols, 1)
    out = run / EVALUATION if out is None else out
    names = available_solvers(run) if solvers is None else list(dict.fromkeys(solvers))
    earlier = _earlier_files(out)
    predictors = {
        name: Predictor.from_run(run, name, tol=tol, max_steps=max_steps, device=device)
        for name in names
    }
    check_protocols(protocols, load_config(run / "config.yaml").model.classes)
    limited = {name: list(pairs[:limit]) for name, pairs in sets.items()}
    audit_test_sets(limited)

    warm_up(predictors, next(iter(limited.values()))[0])
    rows = {
        name: evaluate_models(predictors, pairs, name, protocols) for name, pairs in limited.items()
    }
    summary = [
        summarise(folder, solver, same)
        for folder, by_solver in rows.items()
        for solver, found in by_solver.items()
        for same in by_kind(found).values()
    ]
    # Protocol by protocol, so that what compares stands together.
    summary.sort(key=lambda row: (protocols.index(row.protocol), list(rows).index(row.data)))
    evaluation = Evaluation(out, predictors, limited, protocols, rows, summary)
    settings = {
        "command": command,
        "run": str(run),
        "limit": limit,
        "config": asdict(load_config(run / "config.yaml")),
    }
    _write(evaluation, settings, earlier)
    return evaluation


def _write(evaluation: Evaluation, settings: dict[str, Any], earlier: set[str]) -> None:
    """Write all files; those of an earlier evaluation that are not among them go."""
    files = {"summary.csv": to_csv(evaluation.summary, SummaryRow)}
    for folder, by_solver in evaluation.rows.items():
        for solver, rows in by_solver.items():
            files[f"{folder}-{solver}.csv"] = to_csv(rows, ImageRow)
    predictors, sets = evaluation.predictors, evaluation.sets
    record = {
        "program": PROGRAM,
        **settings,
        "protocols": {name: PROTOCOLS[name] for name in evaluation.protocols},
        "intervals": "95 %, bootstrap over images (not over videos or patients)",
        "hd95": "95 % Hausdorff distance of the borders, pixels; the image's diagonal where only "
        "one of truth and prediction is empty",
        "seconds": "of the network on one image, after a warm-up, the solvers taking turns",
        "data": {name: str(pairs[0].image.parent.parent) for name, pairs in sets.items()},
        "notes": [NOTES[name] for name in sets if name in NOTES],
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
    summary = json.dumps(_plain(record), indent=2).encode()
    write_atomic(evaluation.out / "summary.json", summary)
    for name, content in files.items():
        write_atomic(evaluation.out / name, content)
    for name in earlier - files.keys():
        (evaluation.out / name).unlink(missing_ok=True)


def _earlier_files(out: Path) -> set[str]:
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


def _plain(value: Any) -> Any:
    """What JSON can hold: it knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: _plain(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the summary table, what has to be said beside it, and where the files are."""
    print(text_table(evaluation.summary))
    for protocol in evaluation.protocols:
        print(f"\nProtocol {protocol}: {PROTOCOLS[protocol]}")
    for name in evaluation.rows:
        if name in NOTES:
            print(f"\nNote: {NOTES[name]}")
    print(f"\nResults per image and summary: {evaluation.out}")


def report_evaluation(run: Path, evaluation: Evaluation) -> Path:
    """Write the run's report, with pictures of the worst images under the last solver."""
    name, predictor = [*evaluation.predictors.items()][-1]
    scored = [
        (row.dice, pair)
        for folder, pairs in evaluation.sets.items()
        for row, pair in zip(
            by_kind(evaluation.rows[folder][name])[evaluation.protocols[0], POLYP],
            pairs,
            strict=True,
        )
    ]
    worst = [pair for _, pair in sorted(scored, key=lambda item: item[0])[:PICTURES]]
    examples = {name: worst_examples(predictor, worst)}
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
        "--protocols",
        type=lambda text: [name.strip() for name in text.split(",")],
        default=["default"],
        metavar="LIST",
        help="how to score, separated by commas, of default (each mask's own size, threshold 0.5), "
        "pranet (min-max stretch, mean over 256 thresholds) and paper (at the training size)",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="DIR",
        help="a folder that is new, empty or holds an earlier evaluation, which is then replaced; "
        "default: RUN/evaluation, and then RUN/report.html is written too",
    )
    parser.add_argument(
        "--tol", type=float, help="relative residual to stop at; default: the run's own"
    )
    parser.add_argument(
        "--max-steps",
        type=int,
        metavar="N",
        help="most solver steps, and the steps of hyper; default: the run's own",
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="use only the first N images of each folder"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `polypseg-evaluate`; errors are raised (see `polypseg.cli`)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(arguments)
    evaluation = evaluate_run(
        options.run,
        find_test_sets(options.data),
        options.solvers,
        options.out,
        protocols=options.protocols,
        tol=options.tol,
        max_steps=options.max_steps,
        limit=options.limit,
        device=options.device,
        command=shlex.join([PROGRAM, *arguments]),
    )
    print_evaluation(evaluation)
    if options.out is None:
        print(f"Report: {report_evaluation(options.run, evaluation)}")
    return 0
