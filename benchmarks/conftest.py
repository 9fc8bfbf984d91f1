"""Options of the benchmarks, and the tables that are printed at the end."""

from __future__ import annotations

import re
import time
from pathlib import Path

import pytest
import torch

from benchmarks import machine, plots, tables
from benchmarks.results import Results
from benchmarks.settings import DTYPES, GOAL_SIZES, Settings, parse_sizes
from polypseg.checkpoint import CheckpointError
from polypseg.predictor import available_solvers

_RESULTS = pytest.StashKey[Results]()
_SETTINGS = pytest.StashKey[Settings]()
_START = pytest.StashKey[float]()


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("benchmarks")
    sizes = ",".join(f"{batch}x{features}" for batch, features in GOAL_SIZES)
    group.addoption(
        "--benchmark", action="store_true", help="run the benchmarks (they take minutes)"
    )
    group.addoption(
        "--benchmark-mode",
        default="quick",
        choices=("quick", "full"),
        help="quick takes five to six minutes on 2 cores; full measures longer and larger. "
        "Default: quick",
    )
    group.addoption("--benchmark-device", default="cpu", help="cpu or cuda[:N]. Default: cpu")
    group.addoption(
        "--benchmark-dtype", default="float32", choices=tuple(DTYPES), help="Default: float32"
    )
    group.addoption(
        "--benchmark-sizes",
        default=sizes,
        metavar="BxN,...",
        help=f"batch and features of the overhead measurements. Default: {sizes}",
    )
    group.addoption(
        "--benchmark-out",
        metavar="DIR",
        help="write results.json, tables.txt, a CSV a table and plots there",
    )
    group.addoption(
        "--benchmark-run",
        action="append",
        default=[],
        metavar="DIR",
        help="a run of polypseg-train, whose trained PolypDEQ is measured too; may be repeated",
    )
    group.addoption(
        "--benchmark-images",
        metavar="DIR",
        help="images for the trained PolypDEQ instead of the eight of samples/",
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--benchmark"):
        return
    skip = pytest.mark.skip(reason="a benchmark: give --benchmark to run it")
    for item in items:
        item.add_marker(skip)


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--benchmark"):
        return
    try:
        settings = _settings(config)
    except (ValueError, CheckpointError) as error:
        raise pytest.UsageError(str(error)) from None
    config.stash[_SETTINGS] = settings
    config.stash[_START] = time.monotonic()
    header = machine.header(_command(config), settings.device, settings.dtype)
    config.stash[_RESULTS] = Results(header)


def _settings(config: pytest.Config) -> Settings:
    device = _device(config.getoption("--benchmark-device"))
    out = config.getoption("--benchmark-out")
    if out is not None and Path(out).exists() and not Path(out).is_dir():
        raise ValueError(f"--benchmark-out: {out} is a file; give a folder")
    runs = tuple(Path(run) for run in config.getoption("--benchmark-run"))
    for run in runs:
        if not (run / "config.yaml").is_file():
            raise ValueError(f"--benchmark-run: {run} is no run of polypseg-train")
        if "broyden" not in available_solvers(run):
            raise ValueError(
                f"--benchmark-run: {run} has no weights of the implicit phase; give a finished run"
            )
    images = config.getoption("--benchmark-images")
    if images is not None and not Path(images).is_dir():
        raise ValueError(f"--benchmark-images: there is no folder {images}")
    return Settings(
        device=device,
        dtype=DTYPES[config.getoption("--benchmark-dtype")],
        quick=config.getoption("--benchmark-mode") == "quick",
        sizes=parse_sizes(config.getoption("--benchmark-sizes")),
        runs=runs,
        images=None if images is None else Path(images),
    )


def _device(text: str) -> torch.device:
    if not re.fullmatch(r"cpu|cuda(:\d+)?", text):
        raise ValueError(f"--benchmark-device: expected cpu, cuda or cuda:N, got {text!r}")
    device = torch.device(text)
    if device.type == "cuda":
        if not torch.cuda.is_available():
            raise ValueError("--benchmark-device: torch sees no CUDA device here; give cpu")
        count = torch.cuda.device_count()
        if (device.index or 0) >= count:
            raise ValueError(
                f"--benchmark-device: there is no {text}, torch sees {count} CUDA device(s)"
            )
    return device


def _command(config: pytest.Config) -> str:
    """The command line without the paths of this machine."""
    words = ["pytest", *(Path(argument).name for argument in config.args), "--benchmark"]
    for option in ("mode", "device", "dtype", "sizes"):
        words += [f"--benchmark-{option}", config.getoption(f"--benchmark-{option}")]
    for run in config.getoption("--benchmark-run"):
        words += ["--benchmark-run", Path(run).name]
    if config.getoption("--benchmark-images"):
        words += ["--benchmark-images", "DIR"]
    if config.getoption("--benchmark-out"):
        words += ["--benchmark-out", "DIR"]
    return " ".join(words)


@pytest.fixture(scope="session")
def settings(request: pytest.FixtureRequest) -> Settings:
    return request.config.stash[_SETTINGS]


@pytest.fixture(scope="session")
def results(request: pytest.FixtureRequest) -> Results:
    return request.config.stash[_RESULTS]


def pytest_terminal_summary(
    terminalreporter: pytest.TerminalReporter, config: pytest.Config
) -> None:
    results = config.stash.get(_RESULTS, None)
    if results is None or not (results.rows or results.goals):
        return
    results.header["seconds"] = round(time.monotonic() - config.stash[_START])
    for title, lines in tables.report(results):
        terminalreporter.section(title)
        for line in lines:
            terminalreporter.write_line(line)
    out = config.getoption("--benchmark-out")
    if out:
        results.write(Path(out))
        (Path(out) / "tables.txt").write_text(tables.as_text(results), encoding="utf-8")
        plots.write(results, Path(out))
        terminalreporter.write_line(f"written to {out}")
