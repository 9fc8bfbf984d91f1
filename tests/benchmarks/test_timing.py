"""Statistics of measurements, and the rounds in which they are taken."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from benchmarks.timing import Effort, Quartiles, Timings, paired

CPU = torch.device("cpu")


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=40))
def test_quartiles_are_numpys(values: list[float]) -> None:
    found = Quartiles.of(values)
    expected = np.quantile(values, [0.25, 0.5, 0.75])
    np.testing.assert_allclose([found.q1, found.median, found.q3], expected, atol=1e-9)
    assert found.samples == len(values)


def test_no_values_are_an_error() -> None:
    with pytest.raises(ValueError, match="no values"):
        Quartiles.of([])


def test_ratios_are_formed_within_a_round() -> None:
    # In the second round the machine was ten times slower; ratio of medians would say 2.75.
    timings = Timings({"slow": [2.0, 20.0], "fast": [1.0, 10.0], "base": [0.5, 5.0]})
    assert timings.ratio("slow", "fast") == Quartiles(2.0, 2.0, 2.0, 2)
    assert timings.beyond("fast", "base").median == pytest.approx(2.75)


def test_a_denominator_lost_in_noise_gives_an_infinite_ratio() -> None:
    assert Timings({"a": [2.0], "b": [-0.5]}).ratio("a", "b").median == math.inf


def test_the_first_round_takes_what_its_functions_take_together() -> None:
    assert Timings({"a": [2.0, 9.0], "b": [0.5, 9.0]}).round_seconds == 2.5


def test_functions_take_turns_and_the_first_of_a_round_changes() -> None:
    calls: list[str] = []
    functions = {name: lambda name=name: calls.append(name) for name in "abc"}
    timings = paired(functions, CPU, Effort(rounds=3, seconds=0, most=3))
    assert "".join(calls) == "abc" + "abc" + "bca" + "cab"
    assert [len(values) for values in timings.seconds.values()] == [3, 3, 3]


def test_warm_functions_are_not_warmed_again() -> None:
    calls: list[int] = []
    paired({"a": lambda: calls.append(0)}, CPU, Effort(2, 0, 2), warm=True)
    assert len(calls) == 2


def test_measuring_goes_on_until_time_or_rounds_are_spent() -> None:
    timings = paired({"a": lambda: None}, CPU, Effort(rounds=1, seconds=60, most=7))
    assert timings.of("a").samples == 7


def test_garbage_collection_is_on_again_after_a_failure() -> None:
    import gc

    def fail() -> None:
        raise RuntimeError("broken")

    with pytest.raises(RuntimeError, match="broken"):
        paired({"a": fail}, CPU, Effort(1, 0, 1), warm=True)
    assert gc.isenabled()
