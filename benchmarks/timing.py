"""Timing of alternatives side by side: medians and quartiles of runs that took turns."""

from __future__ import annotations

import gc
import math
import statistics
import time
from collections.abc import Callable, Hashable, Iterable, Mapping
from dataclasses import dataclass

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
        return Quartiles.of(self._differences(name, base))

    def ratio(self, over: Hashable, under: Hashable, base: Hashable | None = None) -> Quartiles:
        """``over / under``, each beyond ``base`` if that is given.

        Infinite in a round where the denominator vanished in the noise.
        """
        if base is None:
            numerators, denominators = self.seconds[over], self.seconds[under]
        else:
            numerators = self._differences(over, base)
            denominators = self._differences(under, base)
        return Quartiles.of(
            a / b if b > 0 else math.inf for a, b in zip(numerators, denominators, strict=True)
        )

    def share(self, part: Hashable, whole: Hashable, base: Hashable) -> Quartiles:
        """``part`` over ``whole`` beyond ``base``; infinite where that vanished in the noise."""
        parts, beyond = self.seconds[part], self._differences(whole, base)
        return Quartiles.of(
            a / b if b > 0 else math.inf for a, b in zip(parts, beyond, strict=True)
        )

    def _differences(self, name: Hashable, base: Hashable) -> list[float]:
        return [a - b for a, b in zip(self.seconds[name], self.seconds[base], strict=True)]


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
    settle: bool = False,
) -> Timings:
    """Time functions that take turns, after each has run once to warm up (``warm``: it has).

    ``settle`` runs each once more right before it is timed, so that it finds the caches and the
    heap as it leaves them itself, not as the others do.
    Every round starts with another function, so that none always runs in the wake of the same one.
    On a GPU the times are those between two CUDA events with the queue empty before and after.
    """
    if not warm:
        for function in functions.values():
            function()
    names = list(functions)
    seconds: dict[Hashable, list[float]] = {name: [] for name in names}
    collecting = gc.isenabled()
    gc.collect()
    gc.disable()
    try:
        start, done = time.perf_counter(), 0
        while done < effort.rounds or (
            done < effort.most and time.perf_counter() - start < effort.seconds
        ):
            first = done % len(names)
            for name in names[first:] + names[:first]:
                if settle:
                    functions[name]()
                seconds[name].append(_timed(functions[name], device))
            done += 1
    finally:
        if collecting:
            gc.enable()
    return Timings(seconds)


def _timed(function: Callable[[], object], device: torch.device) -> float:
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
