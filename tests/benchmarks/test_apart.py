"""Processes that time one library each."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

from benchmarks.apart import Apart
from benchmarks.settings import Settings

SETTINGS = Settings(torch.device("cpu"), torch.float32, quick=True)


@dataclass(frozen=True)
class Note:
    """A case whose function notes the process that it ran in."""

    path: str


def make(library: str, case: Note, settings: Settings) -> dict[str, Callable[[], object]]:
    def note() -> None:
        with open(case.path, "a") as file:
            file.write(f"{library} {os.getpid()} {settings.dtype}\n")

    return {"note": note}


def end(library: str, case: Note, settings: Settings) -> dict[str, Callable[[], object]]:
    return {"end": lambda: os._exit(3)}


def test_every_library_has_a_process_of_its_own(tmp_path: Path) -> None:
    cases = [Note(str(tmp_path / name)) for name in ("first", "second")]
    with Apart(["a", "b"], make, SETTINGS) as apart:
        for case in cases:
            for library in apart.libraries:
                found = apart.seconds(library, case, settle=False)
                assert list(found) == ["note"]
                assert 0 < found["note"] < 10
    lines = [Path(case.path).read_text().splitlines() for case in cases]
    assert lines[0] == lines[1]  # the same processes
    processes = {tuple(line.split()[:2]) for line in lines[0]}
    assert sorted(library for library, _ in processes) == ["a", "b"]
    assert len({process for _, process in processes} | {str(os.getpid())}) == 3
    assert all(line.endswith("torch.float32") for line in lines[0])


@pytest.mark.parametrize("settle", [False, True])
def test_functions_run_once_before_they_are_timed(tmp_path: Path, settle: bool) -> None:
    case = Note(str(tmp_path / "runs"))
    with Apart(["a"], make, SETTINGS) as apart:
        for _ in range(2):
            apart.seconds("a", case, settle=settle)
    runs = len(Path(case.path).read_text().splitlines())
    assert runs == 1 + 2 * (1 + settle)


def test_a_process_that_has_ended_is_named(tmp_path: Path) -> None:
    ended = pytest.raises(RuntimeError, match="times a has ended")
    with Apart(["a"], end, SETTINGS) as apart, ended:
        apart.seconds("a", Note(str(tmp_path)), settle=False)
