"""What a solver costs beyond f, against torchdeq in the same run and against the memory's speed."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from benchmarks.apart import Apart
from benchmarks.overhead import MEMORY, Case, Overhead, functions, libraries, measure
from benchmarks.results import Results, Value
from benchmarks.settings import Settings

# The ratios over torchdeq 0.1.0 that the project aims at.
GOALS = {
    ("Anderson", 1, 1_000): 2,
    ("Anderson", 64, 1_000): 2,
    ("Anderson", 1, 250_000): 6,
    ("Anderson", 16, 250_000): 4,
    ("Broyden", 16, 250_000): 10,
}

# One size varies, the others stay at these.
BATCH, FEATURES = 4, 10_000


@pytest.fixture(scope="module")
def apart(settings: Settings) -> Iterator[Apart]:
    with Apart(libraries(), functions, settings) as processes:
        yield processes


@pytest.mark.parametrize("method", ["Picard", "Anderson", "Broyden"])
def test_overhead(method: str, settings: Settings, results: Results, apart: Apart) -> None:
    for batch, features in settings.sizes:
        found = measure(Case(method, batch, features), settings, apart)
        key = {"method": method, "batch": batch, "features": features}
        results.add("overhead", key, values(found))
        goal = GOALS.get((method, batch, features))
        if goal is not None:
            results.goal(
                f"{method} ({batch}, {features}): torchdeq / ours, beyond f",
                None if found.ratio is None else found.ratio.median,
                ">=",
                goal,
                "" if found.ratio is not None else _why_no_ratio(found),
            )


@pytest.mark.parametrize("method", ["Anderson", "Broyden"])
@pytest.mark.parametrize("varied", ["batch", "features", "memory"])
def test_scaling(
    method: str, varied: str, settings: Settings, results: Results, apart: Apart
) -> None:
    series = {
        "batch": (1, 8, 64) if settings.quick else (1, 2, 4, 8, 16, 32, 64, 128),
        "features": (1_000, 10_000, 100_000)
        if settings.quick
        else (100, 1_000, 10_000, 100_000, 1_000_000),
        "memory": (1, 5, 20) if settings.quick else (1, 2, 5, 10, 20),
    }
    if varied == "memory" and method == "Broyden":
        pytest.skip("Broyden's memory is the number of steps here")
    for value in series[varied]:
        sizes = {"batch": BATCH, "features": FEATURES, "memory": MEMORY, varied: value}
        found = measure(Case(method, **sizes), settings, apart)
        results.add("scaling", {"method": method, "varied": varied, **sizes}, values(found))


def _why_no_ratio(found: Overhead) -> str:
    if found.torchdeq is None:
        return "torchdeq is not installed"
    return "our time beyond f vanished in the noise"


def values(found: Overhead) -> dict[str, Value]:
    return {
        "ours [ms]": found.ours.scaled(1e3),
        "torchdeq [ms]": None if found.torchdeq is None else found.torchdeq.scaled(1e3),
        "torchdeq / ours": found.ratio,
        "least [ms]": found.least.scaled(1e3),
        "must move [MB]": found.megabytes,
        "share of the limit": found.limit,
    }
