"""A training killed by SIGKILL again and again ends with the weights of one that was not."""

from __future__ import annotations

import builtins
import csv
import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import torch

from polypseg.checkpoint import load_weights
from polypseg.data import make_synthetic

# Three epochs of two updates explicitly, two implicitly, two of the HyperSolver.
TINY = ["data.size=32", "data.scales=[0.75,1.0,1.25]", "explicit.epochs=3", "explicit.batch=4"]
TINY += ["implicit.epochs=2", "implicit.batch=4", "implicit.max_steps=3", "hyper.epochs=2"]
TINY += ["hyper.batch=4", "hyper.steps=2", "hyper.max_steps=20", "solve.max_steps=4"]

# What each process does last, as (event, how many of them); see `count`. In this order.
KILLS = [
    ("update", 4),  # in the second explicit epoch
    ("write last.pt", 1),  # half of its checkpoint is on the disk
    ("replace last.pt", 1),  # the one before is now previous.pt, and there is no last.pt
    ("row explicit", 2),  # before the third row is written
    ("write explicit.safetensors", 1),
    ("update", 2),  # in the first implicit epoch
    ("replace previous.pt", 2),  # after the second implicit row, before its checkpoint
    ("fit", 4),  # in the second epoch of the HyperSolver
    ("replace hyper.pt", 1),  # after the row, before its state
    ("replace hyper.safetensors", 1),
]
RESUMED = {"explicit": [1, 1, 1, 2, 3], "implicit": [1]}


def train(folder: Path, data: Path, kill: tuple[str, int] | None) -> None:
    """What a process runs: `polypseg-train`, and SIGKILL before the event ``kill``."""
    torch.set_num_threads(1)
    from polypseg.train import main

    if kill is not None:
        count(*kill)
    assert main([str(folder), "--data", str(data), "--no-evaluate", *TINY]) == 0


def count(event: str, number: int) -> None:
    """Let SIGKILL hit this process before the ``number``-th ``event``; no handler runs after it."""
    import polypseg.checkpoint
    from deqsolvers.hypersolver import fit
    from polypseg.objective import Objective
    from polypseg.runs import ResultsCsv

    left = number

    def happens(now: str) -> bool:
        nonlocal left
        left -= now == event
        return now == event and left == 0

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def before(owner: Any, name: str, describe: Any) -> None:
        original = getattr(owner, name)

        def counted(*arguments: Any, **options: Any) -> Any:
            if happens(describe(*arguments)):
                die()
            return original(*arguments, **options)

        setattr(owner, name, counted)

    def plain(path: Any) -> str:
        """The name that a file will get: `.last.pt.01ab.tmp` becomes last.pt."""
        name = Path(path).name
        return ".".join(name[1:].split(".")[:2]) if name.startswith(".") else name

    before(Objective, "forward", lambda *_: "update")
    before(fit, "unroll", lambda *_: "fit")
    before(ResultsCsv, "append", lambda _, row: f"row {row['phase']}")
    before(os, "replace", lambda _, target: f"replace {Path(target).name}")

    def half(path: Any, mode: str = "r") -> Any:
        if happens(f"write {plain(path)}"):
            Path(path).write_bytes(bytes(20_000))
            die()
        return builtins.open(path, mode)

    polypseg.checkpoint.open = half  # type: ignore[attr-defined]


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_run_killed_at_any_moment_ends_bit_equal(tmp_path: Path) -> None:
    data, whole, killed = tmp_path / "data", tmp_path / "whole", tmp_path / "killed"
    make_synthetic(data, train=10, test=1, size=32, seed=0)
    # A server that has imported everything forks a process for each start of the training.
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["polypseg.train", "polypseg.data.transforms"])

    def start(folder: Path, kill: tuple[str, int] | None) -> int:
        process = server.Process(target=train, args=(folder, data, kill))
        process.start()
        process.join(600)
        assert process.exitcode is not None, f"{kill}: hangs"
        return process.exitcode

    assert start(whole, None) == 0
    for kill in KILLS:
        assert start(killed, kill) == -signal.SIGKILL, f"{kill} did not happen"
    assert start(killed, None) == 0

    for name in ("explicit", "implicit", "hyper"):
        expected, told = load_weights(whole / f"{name}.safetensors")
        found, again = load_weights(killed / f"{name}.safetensors")
        assert expected.keys() == found.keys()
        assert all(torch.equal(expected[key], found[key]) for key in expected), name
        assert told == again
    assert table(whole) == table(killed)
    # No epoch was computed twice once its checkpoint had a name.
    log = (killed / "train.log").read_text().splitlines()
    for phase, epochs in RESUMED.items():
        lines = [line for line in log if f"{phase}: resuming after epoch" in line]
        assert [int(line.rsplit(" ", 1)[1]) for line in lines] == epochs
    # What the killed processes left half-written does not stay.
    names = sorted(path.name for path in whole.iterdir())
    assert sorted(path.name for path in killed.iterdir()) == names


def table(run: Path) -> list[dict[str, str]]:
    with open(run / "results.csv", newline="") as file:
        return [{**row, "seconds": ""} for row in csv.DictReader(file)]
