"""Training in three phases: explicit, implicit, HyperSolver."""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import shlex
import shutil
import sys
from pathlib import Path

import torch

from polypseg import cli
from polypseg.checkpoint import CheckpointError, remove_unfinished, write_atomic
from polypseg.config import (
    Config,
    ConfigError,
    load_config,
    load_recipe,
    make_config,
    recipes,
)
from polypseg.config_limits import SEGFORMERS
from polypseg.data import (
    DataError,
    Fault,
    Split,
    audit_folder,
    make_synthetic,
    scan_pairs,
    split_for,
    training_folder,
)
from polypseg.data.audit import EMPTY_MASK
from polypseg.distributed import Processes, choose_device, join_processes, leave_processes
from polypseg.evaluate import evaluate_run, print_evaluation, report_evaluation
from polypseg.hyper_training import fit_hyper
from polypseg.lineage import check_resumed, keep_lineage, make_lineage, warning_on_start
from polypseg.malloc import keep_freed_memory
from polypseg.models import build_model
from polypseg.network_training import train_explicit, train_implicit
from polypseg.run_config import added_settings, differences, load_run_config
from polypseg.runs import ResultsCsv, lock_folder, setup_log, versions
from polypseg.seen import HELD_OUT
from polypseg.starting import Start, network_of
from polypseg.testsets import PRINTED_WARNINGS, audit_test_sets, find_test_sets
from polypseg.train_arguments import parse
from polypseg.training_run import PHASES, Run, fields, summary_writer
from polypseg.validation import Validation


class InputError(ValueError):
    """Several inputs cannot be used; the message names all that is wrong with them."""


def main(argv: list[str] | None = None) -> int:
    """`polypseg-train`: train what is not yet trained, evaluate, and write the report."""
    given = sys.argv[1:] if argv is None else argv
    arguments = parse(given)
    if arguments.recipe == "list":
        width = max(map(len, recipes()))
        print("\n".join(f"{name:{width}}  {purpose}" for name, purpose in recipes().items()))
        return 0
    config = _config(arguments)
    if arguments.print_config:
        print(config.to_yaml(), end="")
        return 0
    phases = _phases(arguments.phases, config)
    device = choose_device(arguments.device)
    if device.type == "cpu":
        keep_freed_memory()
    processes, device = join_processes(device)
    start = Start(arguments.encoder_weights, arguments.start_from)
    with contextlib.ExitStack() as stack:
        stack.callback(leave_processes, processes)
        run, data = _open_run(arguments, config, start, device, processes, stack)
        if processes.world > 1 and config.hyper.alternate:
            raise ConfigError("hyper.alternate trains in one process; start it without torchrun")
        for phase in phases:
            if run.weights(phase).exists():
                run.log.info("%s: already trained", phase)
            elif phase == "explicit":
                train_explicit(run, start)
            elif phase == "implicit":
                train_implicit(run)
            elif processes.first:  # so small a network is not worth sharing
                fit_hyper(run)
    if arguments.evaluate and processes.first:
        _evaluate(run, data, shlex.join(["polypseg-train", *given]))
    return 0


def _open_run(
    arguments: argparse.Namespace,
    config: Config,
    start: Start,
    device: torch.device,
    processes: Processes,
    stack: contextlib.ExitStack,
) -> tuple[Run, Path]:
    """Check all that was given, then make or reopen the run directory; also returns the data.

    The run directory stays locked until ``stack`` is left.
    """
    folder: Path = arguments.run
    writer = summary_writer() if arguments.tensorboard else None
    if processes.first:
        draws = arguments.demo and arguments.data is None
        if draws:  # into the run directory, where two at once would take each other's images away
            _claim(folder, stack)
        data = _data(arguments)
        # Whatever is wrong is an error before anything else is written.
        warnings = _refuse_bad_input(data, start, config, tested=arguments.evaluate)
        if not draws:
            _claim(folder, stack)
        remove_unfinished(folder)
        split = _split(data, config)
        lineage = make_lineage(split, start)
        check_resumed(folder, lineage)
        log = setup_log(folder / "train.log")
        file = folder / "config.yaml"
        for key, value in (added_settings(file) if file.exists() else {}).items():
            log.info(
                "config.yaml, of an older version, now also holds %s=%s, as before", key, value
            )
        _log_warnings(log, warnings)
        write_atomic(file, config.to_yaml().encode())
        write_atomic(folder / "versions.json", json.dumps(versions(), indent=2).encode())
        if warning := warning_on_start(keep_lineage(folder, lineage)):
            log.warning(warning)
        results = ResultsCsv(folder / "results.csv", fields(config))
    processes.wait()
    if not processes.first:
        data = _data(arguments)
        log = logging.getLogger("polypseg.other")  # the first process tells
        log.setLevel(logging.CRITICAL)
        results = ResultsCsv(folder / "results.csv", fields(config))
        split = _split(data, config)
    log.info(
        "%d training and %d validation images of %s (%s); device %s, %d processes, %d threads",
        *(len(split.train), len(split.val), data, split.rule),
        *(device, processes.world, torch.get_num_threads()),
    )
    validation = Validation(
        split.val, config.data.size, config.hyper.batch, classes=config.model.classes
    )
    board = writer(folder / "tensorboard") if writer and processes.first else None
    run = Run(folder, config, split, validation, device, results, log, processes, board)
    return run, data


def _claim(folder: Path, stack: contextlib.ExitStack) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    stack.enter_context(lock_folder(folder))


def _split(data: Path, config: Config) -> Split:
    """The pairs of a data folder, parted as the configuration says."""
    split = split_for(data, config.seed, config.data.group)
    return split.with_validation_in_training() if config.data.train_on == "all" else split


def _evaluate(run: Run, data: Path, command: str) -> None:
    """Score the run on its test sets or, where there are none, on the held-out images."""
    if (data / "TestDataset").is_dir():
        sets = find_test_sets([data], run.config.model.classes)
    elif run.split.test:
        sets = {data.resolve().name: run.split.test}
    elif run.config.data.train_on == "all":
        run.log.info("not evaluated: data.train_on=all leaves no image that it has not seen")
        return
    else:
        sets = {HELD_OUT: run.split.val}
    evaluation = evaluate_run(run.folder, sets, device=str(run.device), command=command)
    print_evaluation(evaluation)
    print(f"Report: {report_evaluation(run.folder, evaluation)}")


def _phases(wanted: tuple[str, ...] | None, config: Config) -> tuple[str, ...]:
    """The phases to train: those asked for, or all that the network has."""
    own = PHASES[:1] if config.model.name in SEGFORMERS else PHASES
    strange = [phase for phase in wanted or () if phase not in own]
    if strange:
        raise ConfigError(
            f"{config.model.name} is an explicit network, without the phases {', '.join(strange)}"
        )
    return wanted or own


def _config(arguments: argparse.Namespace) -> Config:
    """The run's own configuration if it has one, else that of the arguments."""
    stored = arguments.run / "config.yaml" if arguments.run else None
    recipe = arguments.recipe or ("demo" if arguments.demo else None)
    if arguments.config is not None:
        config = load_config(arguments.config, arguments.set)
    elif recipe is not None:
        config = load_recipe(recipe, arguments.set)
    elif stored is not None and stored.exists():
        config = load_run_config(stored, arguments.set)
    else:
        config = make_config(network_of(arguments.start_from), arguments.set)
    if stored is not None and stored.exists():
        before = load_run_config(stored)
        changed = differences(before, config)
        if changed:
            raise ConfigError(
                f"{arguments.run}: this run was started with other settings ({stored}): "
                f"{'; '.join(changed)}. Give the same ones to resume it, or another run directory"
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


def _refuse_bad_input(data: Path, start: Start, config: Config, tested: bool) -> list[Fault]:
    """Check images, masks and starting weights, and report the faults of all of them together.

    Returns:
        The warnings about the training data.
    """
    errors: list[Exception] = []
    found = _training_faults(data, config)
    faults = [fault for fault in found if fault.severity == "error"]
    if faults:
        errors.append(DataError(faults))
    try:
        if tested and (data / "TestDataset").is_dir():
            classes = config.model.classes
            audit_test_sets(find_test_sets([data], classes), classes)
    except DataError as error:
        errors.append(error)
    try:
        if start != Start():
            start.load(build_model(config.model), config.model)
    except (CheckpointError, ConfigError) as error:
        errors.append(error)
    if len(errors) > 1:
        raise InputError("\n".join(map(str, errors)))
    if errors:
        raise errors[0]
    return found


def _training_faults(data: Path, config: Config) -> list[Fault]:
    """All that is wrong with the training data, file by file and as a whole; the whole first."""
    folder = training_folder(data)
    faults = audit_folder(folder, config.model.classes)
    if any(fault.severity == "error" for fault in faults):
        return faults
    pairs, _ = scan_pairs(folder)
    empty = sum(fault.problem == EMPTY_MASK for fault in faults)
    problem = f"{empty} of {len(pairs)} masks are empty"
    if empty == len(pairs):
        remedy = "add images that show polyps: from none of them nothing can be learnt"
        faults.insert(0, Fault(folder, problem, remedy))
    elif empty:
        remedy = "make sure these images show no polyp"
        faults.insert(0, Fault(folder, problem, remedy, "warning"))
    try:
        _split(data, config)
    except DataError as error:
        faults = [*error.faults, *faults]
    return faults


def _log_warnings(log: logging.Logger, warnings: list[Fault]) -> None:
    # Empty masks come last: there may be many, and their number has been said.
    warnings = sorted(warnings, key=lambda fault: fault.problem == EMPTY_MASK)
    for fault in warnings[:PRINTED_WARNINGS]:
        log.warning("%s", fault)
    if len(warnings) > PRINTED_WARNINGS:
        log.warning("... and %d more warnings", len(warnings) - PRINTED_WARNINGS)


if __name__ == "__main__":
    sys.exit(cli.train())
