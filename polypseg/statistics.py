"""How certain a mean over images is, and whether two models differ on the same images."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

CONFIDENCE = 0.95
RESAMPLES = 10_000
SEED = 0
# Below the first no interval is given, below the second one with a note: from so few images a
# bootstrap covers the mean far less often than it says (`python results/coverage.py`).
FEWEST = 10
FEW = 30
# Resampled values held at once, so that large test sets do not fill the memory.
_BLOCK = 4_000_000


def mean_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % confidence interval of a mean over images, as `bootstrap_interval`.

    Both ends are NaN where there are fewer than 10 values, too few for any.

    Raises:
        ValueError: there are no values.
    """
    found = bootstrap_interval(values)
    return found if len(values) >= FEWEST else (math.nan, math.nan)


def interval_notes(images: Mapping[str, int]) -> list[str]:
    """What has to be said of intervals over few images.

    Args:
        images: how many each test set holds, by its name.
    """
    return [
        f"{name}: no intervals; those of {count} images would hold the true mean far less often "
        "than they say."
        if count < FEWEST
        else f"{name}: {count} images are too few for exact intervals; they hold the true mean "
        "less often than they say."
        for name, count in images.items()
        if count < FEW
    ]


def bootstrap_interval(values: Sequence[float]) -> tuple[float, float]:
    """95 % interval of a mean, of any number of values: percentile bootstrap, 10 000 resamples.

    The seed is fixed, so equal values give an equal interval. Images are drawn independently: where
    they are frames of few videos, the true interval is wider.

    Raises:
        ValueError: there are no values.
    """
    array = np.asarray(values, float)
    if array.size == 0:
        raise ValueError("values is empty; an interval needs at least one image")
    rng = np.random.default_rng(SEED)
    rows = max(1, _BLOCK // array.size)
    means = np.concatenate(
        [
            array[rng.integers(array.size, size=(min(rows, RESAMPLES - done), array.size))].mean(1)
            for done in range(0, RESAMPLES, rows)
        ]
    )
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(means, [tail, 1 - tail])
    return float(low), float(high)


@dataclass(frozen=True)
class Comparison:
    """Two models on the same images, B minus A.

    Attributes:
        mean_a, mean_b: means over the images.
        difference: mean of B minus A.
        low, high: its 95 % confidence interval (`mean_interval`) over images (paired).
        p_value: two-sided Wilcoxon signed-rank test of the differences, those of zero split evenly
            between the signs; 1 where all are zero.
        higher, equal, lower: on how many images B is above, equal to or below A.
    """

    images: int
    mean_a: float
    mean_b: float
    difference: float
    low: float
    high: float
    p_value: float
    higher: int
    equal: int
    lower: int


def compare_paired(a: Sequence[float], b: Sequence[float]) -> Comparison:
    """Compare two models by their values on the same images, in the same order.

    Raises:
        ValueError: the sequences differ in length or are empty.
    """
    first, second = np.asarray(a, float), np.asarray(b, float)
    if first.shape != second.shape:
        raise ValueError(f"a holds {first.size} values and b {second.size}; they must be paired")
    differences = second - first
    low, high = mean_interval(differences.tolist())
    p_value = 1.0
    if differences.any():
        p_value = float(stats.wilcoxon(differences, zero_method="zsplit").pvalue)
    return Comparison(
        images=first.size,
        mean_a=float(first.mean()),
        mean_b=float(second.mean()),
        difference=float(differences.mean()),
        low=low,
        high=high,
        p_value=p_value,
        higher=int((differences > 0).sum()),
        equal=int((differences == 0).sum()),
        lower=int((differences < 0).sum()),
    )
