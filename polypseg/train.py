"""Training in three phases: explicit, implicit, HyperSolver."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch

from polypseg.checkpoint import CheckpointError, write_atomic
from polypseg.config import Config, ConfigError, load_config, make_config
from polypseg.data import (
    DataError,
    Pair,
    audit_folder,
    make_synthetic,
    split_for,
    training_folder,
)
from polypseg.evaluate import evaluate_run, print_evaluation, report_evaluation
from polypseg.hyper_training import fit_hyper
from polypseg.models import build_model, load_pretrained
from polypseg.network_training import train_explicit, train_implicit
from polypseg.runs import ResultsCsv, setup_log, versions
from polypseg.testsets import audit_test_sets, find_test_sets
from polypseg.training_run import FIELDS, PHASES, Run
from polypseg.validation import Validation


class InputError(ValueError):
    """Several inputs cannot be used; the message names all that is wrong with them."""


def main(argv: list[str] | None = None) -> int:
    """`polypseg-train`: train what is not yet trained, evaluate, and write the report."""
    arguments = _parser().parse_intermixed_args(argv)
    folder: Path = arguments.run
    config = _config(arguments)
    data = _data(arguments)
    # Whatever is wrong is an error before anything is written.
    _refuse_bad_input(data, arguments.encoder_weights, config, tested=arguments.evaluate)
    split = split_for(data, config.seed)

    folder.mkdir(parents=True, exist_ok=True)
    log = setup_log(folder / "train.log")
    write_atomic(folder / "config.yaml", config.to_yaml().encode())
    write_atomic(folder / "versions.json", json.dumps(versions(), indent=2).encode())
    device = torch.device(arguments.device or ("cuda" if torch.cuda.is_available() else "cpu"))
    log.info(
        "%d training and %d validation images of %s (%s); device %s, %d threads",
        *(len(split.train), len(split.val), data, split.rule, device, torch.get_num_threads()),
    )
    run = Run(
        folder,
        config,
        split,
        Validation(split.val, config.data.size, config.hyper.batch),
        device,
        ResultsCsv(folder / "results.csv", FIELDS),
        log,
    )
    for phase in arguments.phases:
        if run.weights(phase).exists():
            log.info("%s: already trained", phase)
        elif phase == "explicit":
            train_explicit(run, arguments.encoder_weights)
        elif phase == "implicit":
            train_implicit(run)
        else:
            fit_hyper(run)
    if arguments.evaluate:
        _evaluate(folder, data, split.val, arguments.device)
    return 0


def _evaluate(run: Path, data: Path, held_out: list[Pair], device: str | None) -> None:
    """Score the run on its test sets or, where there are none, on the held-out images."""
    tested = (data / "TestDataset").is_dir()
    sets = find_test_sets([data]) if tested else {"validation": held_out}
    command = f"polypseg-train {run}"
    evaluation = evaluate_run(run, sets, device=device, command=command)
    print_evaluation(evaluation)
    print(f"Report: {report_evaluation(run, evaluation)}")


def _config(arguments: argparse.Namespace) -> Config:
    """The run's own configuration if it has one, else that of the arguments."""
    stored = arguments.run / "config.yaml"
    if arguments.config is not None:
        config = load_config(arguments.config, arguments.set)
    elif arguments.demo:
        config = load_config(Path(__file__).with_name("demo.yaml"), arguments.set)
    elif stored.exists():
        config = load_config(stored, arguments.set)
    else:
        config = make_config({}, arguments.set)
    if stored.exists() and load_config(stored) != config:
        raise ConfigError(
            f"{arguments.run}: this run was started with other settings ({stored}); give the same "
            "ones to resume it, or another run directory"
        )
    return config


def _data(arguments: argparse.Namespace) -> Path:
    if arguments.data is not None:
        return Path(arguments.data)
    if not arguments.demo:
        raise ConfigError("--data DIR is needed (or --demo, which draws synthetic images)")
    data = Path(arguments.run) / "data"
    if not data.exists():
        # Under another name until it is whole, so that a kill leaves nothing that looks complete.
        partial = data.with_name("data.partial")
        shutil.rmtree(partial, ignore_errors=True)
        make_synthetic(partial, train=160, test=24, size=128, seed=0)
        partial.rename(data)
    return data


def _refuse_bad_input(data: Path, weights: Path | None, config: Config, tested: bool) -> None:
    """Check images, masks and encoder weights, and report the faults of all of them together."""
    errors: list[Exception] = []
    faults = [fault for fault in audit_folder(training_folder(data)) if fault.severity == "error"]
    if faults:
        errors.append(DataError(faults))
    try:
        if tested and (data / "TestDataset").is_dir():
            audit_test_sets(find_test_sets([data]))
    except DataError as error:
        errors.append(error)
    try:
        if weights is not None:
            load_pretrained(build_model(config.model), weights)
    except CheckpointError as error:
        errors.append(error)
    if len(errors) > 1:
        raise InputError("\n".join(map(str, errors)))
    if errors:
        raise errors[0]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polypseg-train",
        description="Train a polyp-segmentation DEQ: explicit, then implicit, then its "
        "HyperSolver. Repeating the command resumes an unfinished run.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="run directory, made if needed")
    parser.add_argument("set", nargs="*", metavar="KEY=VALUE", help="settings, e.g. data.size=192")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="holds TrainDataset/ or images/ and masks/"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file of settings that differ from the defaults",
    )
    parser.add_argument(
        "--encoder-weights",
        type=Path,
        metavar="FILE",
        help="SegFormer encoder, .safetensors or .pth",
    )
    parser.add_argument(
        "--phases",
        type=_phases,
        default=PHASES,
        help="comma-separated; default: explicit,implicit,hyper",
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help="small quick settings and, without --data, synthetic images",
    )
    parser.add_argument(
        "--no-evaluate",
        dest="evaluate",
        action="store_false",
        help="do not score the run at the end and write no report",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    return parser


def _phases(text: str) -> tuple[str, ...]:
    wanted = text.split(",")
    unknown = [phase for phase in wanted if phase not in PHASES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown phase {', '.join(unknown)}; choose from {', '.join(PHASES)}"
        )
    return tuple(phase for phase in PHASES if phase in wanted)
