"""Timing of alternatives side by side: medians and quartiles of runs that took turns."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import partial

import torch


@dataclass(frozen=True)
class Quartiles:
    """Median and quartiles of ``samples`` measurements."""

    median: float
    q1: float
    q3: float
    samples: int

    @staticmethod
    def of(values: Iterable[float]) -> Quartiles:
        """Quartiles that interpolate between measurements, as NumPy's default does.

        Raises:
            ValueError: there are no values.
        """
        ordered = sorted(values)
        if not ordered:
            raise ValueError("no values to take quartiles of")
        if len(ordered) == 1:
            return Quartiles(ordered[0], ordered[0], ordered[0], 1)
        q1, median, q3 = statistics.quantiles(ordered, n=4, method="inclusive")
        return Quartiles(median, q1, q3, len(ordered))

    def scaled(self, factor: float) -> Quartiles:
        """In another unit; ``factor`` is positive."""
        return Quartiles(self.median * factor, self.q1 * factor, self.q3 * factor, self.samples)


@dataclass(frozen=True)
class Timings:
    """Seconds of functions that took turns; entry i of every list belongs to round i.

    Differences and ratios are formed within a round, between runs that are moments apart, so a
    machine that is slower for a while slows both sides.
    """

    seconds: Mapping[Hashable, list[float]]

    @property
    def round_seconds(self) -> float:
        """Of the first round."""
        return sum(seconds[0] for seconds in self.seconds.values())

    def of(self, name: Hashable) -> Quartiles:
        return Quartiles.of(self.seconds[name])

    def beyond(self, name: Hashable, base: Hashable) -> Quartiles:
        """Seconds of ``name`` minus those of ``base``."""
        pairs = zip(self.seconds[name], self.seconds[base], strict=True)
        return Quartiles.of(a - b for a, b in pairs)

    def ratio(self, over: Hashable, under: Hashable) -> Quartiles:
        """``over / under``, infinite in a round where the latter vanished in the noise."""
        pairs = zip(self.seconds[over], self.seconds[under], strict=True)
        return Quartiles.of(a / b if b > 0 else math.inf for a, b in pairs)


@dataclass(frozen=True)
class Effort:
    """How long to measure: at least ``rounds`` rounds, then up to ``seconds`` or ``most``."""

    rounds: int
    seconds: float
    most: int


def paired(
    functions: Mapping[Hashable, Callable[[], object]],
    device: torch.device,
    effort: Effort,
    *,
    warm: bool = False,
) -> Timings:
    """Time functions that take turns, after each has run once to warm up (``warm``: it has).

    See `turns` and `timed`.
    """
    if not warm:
        for function in functions.values():
            function()
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        return turns(
            {name: partial(_alone, name, functions[name], device) for name in functions}, effort
        )
    finally:
        if collecting:
            gc.enable()


def turns(
    measures: Mapping[Hashable, Callable[[], Mapping[Hashable, float]]], effort: Effort
) -> Timings:
    """Take measurements in turns, each of which tells the seconds of one function or of several.

    Every round starts with another one, so that none always runs in the wake of the same.
    """
    names = list(measures)
    seconds: dict[Hashable, list[float]] = {}
    start, done = time.perf_counter(), 0
    while done < effort.rounds or (
        done < effort.most and time.perf_counter() - start < effort.seconds
    ):
        first = done % len(names)
        for name in names[first:] + names[:first]:
            for what, took in measures[name]().items():
                seconds.setdefault(what, []).append(took)
        done += 1
    return Timings(seconds)


def _alone(
    name: Hashable, function: Callable[[], object], device: torch.device
) -> dict[Hashable, float]:
    return {name: timed(function, device)}


def timed(function: Callable[[], object], device: torch.device) -> float:
    """Seconds of a call; on a GPU between two CUDA events with the queue empty before and after."""
    if device.type != "cuda":
        start = time.perf_counter()
        function()
        return time.perf_counter() - start
    torch.cuda.synchronize(device)
    before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    before.record()
    function()
    after.record()
    torch.cuda.synchronize(device)
    return before.elapsed_time(after) / 1e3
