"""Timing of alternatives side by side."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping

import torch


def paired(
    functions: Mapping[str, Callable[[], object]], device: torch.device, repeats: int = 7
) -> dict[str, float]:
    """Median seconds of each function; the functions take turns, so that noise hits all alike."""
    for function in functions.values():
        function()
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for _ in range(repeats):
        for name, function in functions.items():
            _wait(device)
            start = time.perf_counter()
            function()
            _wait(device)
            seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
