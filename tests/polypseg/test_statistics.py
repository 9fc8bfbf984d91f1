"""Intervals and paired comparisons against SciPy and closed forms."""

import numpy as np
import pytest
from scipy import stats

from polypseg.statistics import (
    bootstrap_interval,
    compare_paired,
    interval_notes,
    mean_interval,
)

VALUES = np.random.default_rng(0).beta(5, 1, 80)


def test_the_interval_is_scipys_bootstrap_within_its_noise():
    found = mean_interval(VALUES)
    expected = stats.bootstrap(
        (VALUES,), np.mean, n_resamples=20_000, method="percentile", rng=1
    ).confidence_interval
    assert found == pytest.approx(tuple(expected), abs=0.015 * VALUES.std())
    assert found == mean_interval(VALUES)  # a fixed seed


def test_blocks_do_not_change_the_interval(monkeypatch):
    """Large sets are resampled in blocks."""
    whole = mean_interval(VALUES)
    monkeypatch.setattr("polypseg.statistics._BLOCK", 80 * 999)
    assert mean_interval(VALUES) == pytest.approx(whole, abs=1e-12)


def test_few_images_have_no_interval_and_a_note_says_so():
    assert np.isnan(mean_interval(VALUES[:9])).all()
    assert mean_interval(VALUES[:10]) == bootstrap_interval(VALUES[:10])
    few, more = interval_notes({"nine": 9, "ten": 10, "thirty": 30})
    assert few.startswith("nine: no intervals; those of 9 images would hold the true mean far less")
    assert more.startswith("ten: 10 images are too few for exact intervals")
    with pytest.raises(ValueError, match="at least one image"):
        mean_interval([])


def test_coverage_is_what_it_says():
    rng = np.random.default_rng(1)
    inside = 0
    for _ in range(200):
        low, high = mean_interval(rng.normal(3, 1, 60))
        inside += low <= 3 <= high
    assert 180 <= inside <= 200  # 190 expected, 3 standard deviations are 9


def test_a_comparison_is_paired():
    """A small but constant gain is certain, though either model alone varies far more."""
    rng = np.random.default_rng(2)
    better = VALUES + 0.01 + rng.normal(0, 0.003, VALUES.size)
    found = compare_paired(VALUES, better)
    assert found.difference == pytest.approx(found.mean_b - found.mean_a)
    assert 0.008 < found.low < found.difference < found.high < 0.012
    assert found.p_value == pytest.approx(stats.wilcoxon(better, VALUES).pvalue)
    assert found.higher + found.equal + found.lower == found.images == 80
    back = compare_paired(better, VALUES)
    assert (back.higher, back.lower) == (found.lower, found.higher)
    assert back.difference == pytest.approx(-found.difference)


def test_images_without_a_difference_count_for_both_sides():
    """The 20 that are zero share the ranks 1 to 20 evenly, and half of their sum is positive's."""
    signs = np.where(np.arange(21, 81) % 3 == 0, -1, 1)
    differences = np.concatenate([np.zeros(20), signs * np.arange(21, 81) / 100])
    found = compare_paired(np.zeros(80), differences)
    negative = sum(rank for rank in range(21, 81) if rank % 3 == 0) + sum(range(1, 21)) / 2
    variance = 80 * 81 * 161 / 24 - (20**3 - 20) / 48  # of a rank sum, less what the ties take away
    z = (negative - 80 * 81 / 4) / np.sqrt(variance)
    assert found.p_value == pytest.approx(2 * stats.norm.cdf(-abs(z)), rel=1e-6)


def test_equal_models_do_not_differ():
    found = compare_paired(VALUES, VALUES)
    assert (found.difference, found.low, found.high, found.p_value) == (0, 0, 0, 1)
    assert found.equal == 80


def test_unpaired_values_are_refused():
    with pytest.raises(ValueError, match="a holds 2 values and b 3"):
        compare_paired([0, 1], [0, 1, 2])
