"""How often bootstrap intervals hold the true mean: ``python results/coverage.py``.

Draws test sets of so many images from the Dice values of 100 Kvasir images (with replacement, so
that their mean is the true one) and counts the 95 % bootstrap intervals that hold it.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np

from polypseg.scores import ImageRow, read_rows
from polypseg.statistics import bootstrap_interval

VALUES = Path(__file__).parent / "polypdeq-add-256-all" / "evaluation" / "Kvasir-hyper.csv"
SIZES = (1, 2, 4, 8, 10, 15, 30, 62, 100)
SETS = 1000


def dice() -> np.ndarray:
    """The Dice of each image under the default protocol."""
    return np.array([row.dice for row in read_rows(VALUES, ImageRow) if row.protocol == "default"])


def coverage(images: int, sets: int = SETS) -> float:
    """The share of test sets of so many images whose interval holds the true mean."""
    population = dice()
    draws = np.random.default_rng(images).choice(population, (sets, images))
    ends = np.array([bootstrap_interval(values) for values in draws.tolist()])
    true = population.mean()
    return float(np.mean((ends[:, 0] <= true) & (true <= ends[:, 1])))


def main() -> None:
    for images in SIZES:
        print(f"{images:4d} images: {100 * coverage(images):.0f} %", flush=True)


if __name__ == "__main__":
    main()
