"""Backward passes: time, memory, and the error of the gradient against double precision."""

from __future__ import annotations

import sys
import warnings
from functools import partial

import pytest
import torch

from benchmarks.gradients import exact_gradient, gradient, modes, trainable
from benchmarks.memory import peaks
from benchmarks.problems import PROBLEMS
from benchmarks.results import Results
from benchmarks.settings import Settings
from benchmarks.timing import paired
from deqsolvers import ConvergenceWarning


@pytest.mark.parametrize("name", ["mlp", "convolution"])
def test_backward(name: str, settings: Settings, results: Results) -> None:
    problem = PROBLEMS[name](settings)
    exact = exact_gradient(problem)
    f, x, v = trainable(problem)
    errors, runs = {}, {}
    for place, mode in enumerate(modes()):
        with warnings.catch_warnings():
            # A tolerance that the backward solve misses shows in the error.
            warnings.simplefilter("ignore", ConvergenceWarning)
            found = gradient(mode, f, x, v).double()
        errors[place] = float((found - exact).norm() / exact.norm())
        runs[place, "both"] = partial(gradient, mode, f, x, v)
        runs[place, "forward"] = torch.no_grad()(partial(mode.forward, f, x))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)
        timings = paired(runs, settings.device, settings.slow_effort, warm=True)
    memory: dict[str, float] = {}
    if sys.platform == "linux" and name == "convolution":
        memory = peaks(
            [f"backward {name} {place}" for place in range(len(modes()))], settings.device
        )
    for place, mode in enumerate(modes()):
        megabytes = {case: size / 1e6 for case, size in memory.items()}
        results.add(
            "backward",
            {"problem": problem.name, "backward": mode.name, "library": mode.library},
            {
                "gradient error": errors[place],
                "both [ms]": timings.of((place, "both")).scaled(1e3),
                "forward [ms]": timings.of((place, "forward")).scaled(1e3),
                "backward [ms]": timings.beyond((place, "both"), (place, "forward")).scaled(1e3),
                "peak of both [MB]": megabytes.get(f"backward {name} {place}"),
            },
        )
