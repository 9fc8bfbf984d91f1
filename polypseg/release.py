"""Making a released model of a trained run: half-precision weights, checksums, a model card."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch

from polypseg.checkpoint import CheckpointError, load_weights, save_weights, write_atomic
from polypseg.evaluate import evaluate_run
from polypseg.evaluation import Evaluation, write_evaluation
from polypseg.lineage import RECORD, read_lineage
from polypseg.model_card import Facts, model_card, tells_start
from polypseg.released import RELEASED
from polypseg.report import EVALUATION
from polypseg.run_config import load_run_config
from polypseg.testsets import find_test_sets

PHASES = ("implicit", "hyper")
CHECKSUMS = "SHA256SUMS"
CARD = "README.md"


def write_release(run: Path, out: Path) -> None:
    """Copy what prediction needs of a run, its weights in half precision, and its record.

    Raises:
        CheckpointError: the run lacks a phase, a weight does not fit into half precision, or
            ``out`` is the run or a file. Nothing is written then.
    """
    _refuse_folder(run, out)
    tensors = {phase: load_weights(run / f"{phase}.safetensors") for phase in PHASES}
    for phase, (weights, _) in tensors.items():
        halved = {
            key: value.half() if value.dtype == torch.float32 else value
            for key, value in weights.items()
        }
        overflown = [key for key, value in halved.items() if not torch.isfinite(value).all()]
        if overflown:
            raise CheckpointError(
                f"{run}: {', '.join(overflown)} of {phase} do not fit into half precision"
            )
        weights.update(halved)
    for phase, (weights, metadata) in tensors.items():
        save_weights(out / f"{phase}.safetensors", weights, metadata)
    for name in ("config.yaml", "versions.json"):
        write_atomic(out / name, (run / name).read_bytes())
    if (run / RECORD).exists():
        write_atomic(out / RECORD, (run / RECORD).read_bytes())
    sums = [
        f"{hashlib.sha256((out / f'{phase}.safetensors').read_bytes()).hexdigest()}  "
        f"{phase}.safetensors\n"
        for phase in PHASES
    ]
    write_atomic(out / CHECKSUMS, "".join(sums).encode())


def release(
    run: Path, out: Path, data: Path, trained_on: str, pretraining: str | None, command: str
) -> None:
    """Release a run with the card and the evaluation of its half-precision weights.

    All of it is made elsewhere first, so that ``out`` stays as it is if anything goes wrong.

    Raises:
        CheckpointError: as `write_release`.
        DataError: as `evaluate_run`.
    """
    _refuse_folder(run, out)
    with tempfile.TemporaryDirectory() as folder:
        made = Path(folder)
        write_release(run, made)
        config = load_run_config(made / "config.yaml")
        classes = config.model.classes
        evaluation = evaluate_run(
            made,
            find_test_sets([data], classes),
            out=out / EVALUATION,
            protocols=("default", "pranet", "paper") if classes == 1 else ("default", "paper"),
            command=command,
            write=False,
        )
        facts = Facts(
            config,
            read_lineage(made),
            json.loads((made / "versions.json").read_text()),
            trained_on,
            pretraining,
            _use(out),
            evaluation.summary,
            evaluation.notes,
        )
        _place(made, out, evaluation, model_card(facts, CHECKSUMS))


def _refuse_folder(run: Path, out: Path) -> None:
    if out.resolve() == run.resolve():
        raise CheckpointError(f"{out}: a release must not replace the run that it is made of")
    if out.exists() and not out.is_dir():
        raise CheckpointError(f"{out}: is a file; give a folder for the release")


def _use(out: Path) -> str:
    """The arguments by which `polypseg-predict` finds a release."""
    if out.resolve() == RELEASED:
        return ""
    beside = out.resolve().parent == RELEASED.parent
    return f" --run {'models/' if beside else ''}{out.name}"


def _place(made: Path, out: Path, evaluation: Evaluation, card: str) -> None:
    for path in sorted(made.iterdir()):
        write_atomic(out / path.name, path.read_bytes())
    if not (made / RECORD).exists():
        (out / RECORD).unlink(missing_ok=True)  # of an earlier release
    # The rows per image are the run's to keep; the card has what users of the weights need.
    settings = {**evaluation.settings, "run": str(out)}
    write_evaluation(replace(evaluation, rows={}, settings=settings))
    write_atomic(out / CARD, card.encode())


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m polypseg.release RUN OUT --data DIR`: release a run with its measured card."""
    parser = argparse.ArgumentParser(prog="python -m polypseg.release", description=main.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--trained-on", required=True, metavar="TEXT", help="for the card")
    parser.add_argument(
        "--pretraining",
        metavar="TEXT",
        help=f"what the weights started from, for the card; needed unless RUN/{RECORD} tells",
    )
    options = parser.parse_args(argv)
    if options.pretraining is None and not tells_start(read_lineage(options.run)):
        parser.error(
            f"--pretraining TEXT is needed: {options.run / RECORD} is missing or does not tell all "
            "that the weights started from"
        )
    release(
        options.run,
        options.out,
        options.data,
        options.trained_on,
        options.pretraining,
        command=f"python -m polypseg.release {options.run} {options.out}",
    )
    print(f"Released: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
