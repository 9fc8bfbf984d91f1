"""Peak memory of solves, and of training against the number of forward steps."""

from __future__ import annotations

import sys

import pytest

from benchmarks.memory import BATCH, FEATURES, MEMORY, STATE, STEPS, peaks
from benchmarks.methods import OURS
from benchmarks.overhead import libraries
from benchmarks.results import Results
from benchmarks.settings import Settings

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="memory is measured on Linux only")


def test_forward(settings: Settings, results: Results) -> None:
    cases = {
        f"forward {method} {library}": (method, library)
        for method in ("Picard", "Anderson", "Broyden")
        for library in libraries()
    }
    found = peaks(list(cases), settings.device)
    for case, (method, library) in cases.items():
        results.add(
            "memory",
            {
                "what": f"forward, ({BATCH}, {FEATURES}), {STEPS} steps, {method}",
                "library": library,
            },
            {"peak [MB]": found[case] / 1e6, "peak [states]": found[case] / STATE},
        )
    results.goal(
        f"Anderson ({BATCH}, {FEATURES}), m = {MEMORY}: peak memory in states",
        found[f"forward Anderson {OURS}"] / STATE,
        "<=",
        2 * (MEMORY + 1) + 4,
    )


def test_training_memory_does_not_grow_with_steps(settings: Settings, results: Results) -> None:
    found = peaks(["training 10", "training 100"], settings.device)
    for case, size in found.items():
        steps = case.removeprefix("training ")
        results.add(
            "memory",
            {"what": f"training, (4096, 256), {steps} forward steps, Picard", "library": OURS},
            {"peak [MB]": size / 1e6, "peak [states]": size / (4096 * 256 * 4)},
        )
    results.goal(
        "training: peak memory with 100 forward steps / with 10",
        found["training 100"] / found["training 10"],
        "<=",
        1.05,
    )
