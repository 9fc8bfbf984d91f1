"""Options of the benchmarks, and the table that is printed at the end."""

from __future__ import annotations

import os
import platform

import pytest
import torch

from benchmarks.goals import GOALS


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--benchmark", action="store_true", help="run the benchmarks (they take minutes)"
    )
    parser.addoption("--benchmark-device", default="cpu", help="cpu or cuda; default: cpu")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.getoption("--benchmark"):
        return
    skip = pytest.mark.skip(reason="a benchmark: give --benchmark to run it")
    for item in items:
        item.add_marker(skip)


@pytest.fixture(scope="session")
def device(request: pytest.FixtureRequest) -> torch.device:
    device = torch.device(request.config.getoption("--benchmark-device"))
    if device.type == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")
    return device


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not GOALS:
        return
    write = terminalreporter.write_line
    terminalreporter.section("goals")
    write(
        f"torch {torch.__version__}, {torch.get_num_threads()} threads, {os.cpu_count()} CPUs, "
        f"{platform.platform()}"
    )
    write(f"{'what':58} {'measured':>10} {'goal':>10}")
    for goal in GOALS:
        verdict = "met" if goal.met else "MISSED"
        write(f"{goal.what:58} {goal.measured:>10.2f} {goal.sign}{goal.wanted:>9.2f}  {verdict}")
