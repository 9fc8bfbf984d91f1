"""Scoring a trained run on test folders, with every solver it has weights for."""

from __future__ import annotations

import argparse
import shlex
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from polypseg import cli
from polypseg.data import Pair, read_image, read_pair
from polypseg.data.classes import CLASS_NAMES
from polypseg.evaluation import PROGRAM, Evaluation, earlier_files, write_evaluation
from polypseg.examples import PICTURES, residual_traces, worst_examples
from polypseg.lineage import read_lineage
from polypseg.predictor import Predictor, available_solvers
from polypseg.protocols import POLYP, PROTOCOLS, check_protocols, score_result
from polypseg.report import EVALUATION, write_report
from polypseg.run_config import load_run_config
from polypseg.scores import (
    ImageRow,
    by_kind,
    summarise,
    text_table,
)
from polypseg.seen import held_out_sets, notes_on_seen
from polypseg.solver_arguments import add_solver_arguments, check_solver_arguments
from polypseg.statistics import interval_notes
from polypseg.testsets import NOTES, audit_test_sets, find_test_sets

WARM_UP = 2


def evaluate_models(
    predictors: Mapping[str, Predictor],
    pairs: Sequence[Pair],
    progress: str | None = None,
    protocols: Sequence[str] = ("default",),
    classes: int = 1,
) -> dict[str, list[ImageRow]]:
    """Predict every pair with every predictor, and score it under every protocol.

    The predictors take turns on each image, in rotating order, so that whatever else the machine
    does slows all of them alike. Run `warm_up` first where the seconds matter.

    Args:
        predictors: by the name that they get in the result.
        pairs: images and masks; see `audit_pairs`.
        progress: text beside a progress bar; None shows no bar.
        protocols: of `PROTOCOLS`.
        classes: that the networks tell apart, 1 or 3.

    Returns:
        For each predictor the rows in the order of the pairs, within a pair by protocol and target.

    Raises:
        DataError: a pair cannot be read.
    """
    rows: dict[str, list[ImageRow]] = {name: [] for name in predictors}
    names = list(predictors)
    polyps = CLASS_NAMES[1:classes]
    bar = tqdm(pairs, desc=progress, unit="image", disable=None if progress else True)
    for index, pair in enumerate(bar):
        image, truth = read_pair(pair, classes)
        for turn in range(len(names)):
            name = names[(index + turn) % len(names)]
            result = predictors[name].predict(image, measure=True)
            for protocol in protocols:
                for target, scored in score_result(result, truth, protocol, polyps).items():
                    rows[name].append(
                        ImageRow(
                            pair.stem,
                            protocol,
                            target,
                            **asdict(scored.confusion),
                            dice=scored.dice,
                            iou=scored.iou,
                            mae=scored.mae,
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
    image = read_image(pair.image)
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
    write: bool = True,
) -> Evaluation:
    """Evaluate a run and write the results, all together once everything is computed.

    Written are `<folder>-<solver>.csv` with a row per image, protocol and target, `summary.csv`
    with intervals, and `summary.json` with the configuration, versions and settings behind the
    numbers.

    Args:
        run: directory that `polypseg-train` wrote.
        sets: the pairs of each test set by name, as `find_test_sets`; of the run's own training
            folder the images that it held out are scored.
        solvers: their names; if None, all that the run has weights for.
        out: a folder that is new, empty or from an earlier evaluation, whose files are then
            replaced; if None, `run/evaluation`.
        protocols: how to score, of `PROTOCOLS`.
        tol: relative residual at which the solvers stop, if not the run's own.
        max_steps: most solver updates, if not the run's own.
        limit: use only the first images of each folder.
        device: where to compute; if None, a GPU where there is one.
        command: the command line, for the record.
        write: whether to write now; otherwise `write_evaluation` does it later.

    Raises:
        DataError: images or masks cannot be used, or `out` holds something else. Nothing is written
            then, and neither with any other error before the last image.
        CheckpointError: the run is missing, damaged or lacks weights for a solver.
        ValueError: a solver or protocol is unknown, an option out of range, or ``tol`` or
            ``max_steps`` given to the explicit pass alone.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1 image, got {limit}")
    protocols = list(dict.fromkeys(protocols))
    check_protocols(protocols, 1)
    out = run / EVALUATION if out is None else out
    names = available_solvers(run) if solvers is None else list(dict.fromkeys(solvers))
    check_solver_arguments(names, tol, max_steps)
    earlier_files(out)  # refuses a foreign folder before any work
    predictors = {
        name: Predictor.from_run(run, name, tol=tol, max_steps=max_steps, device=device)
        for name in names
    }
    config = load_run_config(run / "config.yaml")
    classes = config.model.classes
    check_protocols(protocols, classes)
    lineage = read_lineage(run)
    scored = held_out_sets(lineage, sets)
    limited = {name: pairs[:limit] for name, pairs in scored.items()}
    audit_test_sets(limited, classes)

    warm_up(predictors, next(iter(limited.values()))[0])
    rows = {
        name: evaluate_models(predictors, pairs, name, protocols, classes)
        for name, pairs in limited.items()
    }
    summary = [
        summarise(folder, solver, same)
        for folder, by_solver in rows.items()
        for solver, found in by_solver.items()
        for same in by_kind(found).values()
    ]
    # Protocol by protocol, so that what compares stands together.
    summary.sort(key=lambda row: (protocols.index(row.protocol), list(rows).index(row.data)))
    notes = [NOTES[name] for name in limited if name in NOTES]
    notes += notes_on_seen(lineage, sets, limited)
    notes += interval_notes({name: len(pairs) for name, pairs in limited.items()})
    settings = {
        "command": command,
        "run": str(run),
        "limit": limit,
        "config": asdict(config),
    }
    evaluation = Evaluation(out, predictors, limited, protocols, rows, summary, notes, settings)
    if write:
        write_evaluation(evaluation)
    return evaluation


def run_classes(run: Path) -> int:
    """How many classes a run's masks have; 1 where there is no run, which is told elsewhere."""
    path = run / "config.yaml"
    return load_run_config(path).model.classes if path.is_file() else 1


def print_evaluation(evaluation: Evaluation) -> None:
    """Print the summary table, what has to be said beside it, and where the files are."""
    print(text_table(evaluation.summary))
    for protocol in evaluation.protocols:
        print(f"\nProtocol {protocol}: {PROTOCOLS[protocol]}")
    for note in evaluation.notes:
        print(f"\nNote: {note}")
    print(f"\nResults per image and summary: {evaluation.out}")


def report_evaluation(run: Path, evaluation: Evaluation) -> Path:
    """Write the run's report, with pictures of each folder's worst images under the last solver."""
    solver, predictor = [*evaluation.predictors.items()][-1]
    examples, traced = {}, []
    for folder, pairs in evaluation.sets.items():
        rows = by_kind(evaluation.rows[folder][solver])[evaluation.protocols[0], POLYP]
        order = sorted(range(len(pairs)), key=lambda index: rows[index].dice)
        worst = [pairs[index] for index in order[:PICTURES]]
        examples[f"{folder}, {solver}"] = worst_examples(predictor, worst, run_classes(run))
        traced += worst[: max(1, PICTURES // len(evaluation.sets))]
    return write_report(run, examples, residual_traces(evaluation.predictors, traced))


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
        "--limit", type=int, metavar="N", help="use only the first N images of each folder"
    )
    add_solver_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `polypseg-evaluate`; errors are raised (see `polypseg.cli`)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(arguments)
    evaluation = evaluate_run(
        options.run,
        find_test_sets(options.data, run_classes(options.run)),
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


if __name__ == "__main__":
    sys.exit(cli.evaluate())
