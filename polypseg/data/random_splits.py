"""Splits that chance decides: by image, or by patient or video."""

from __future__ import annotations

import hashlib
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

from polypseg.data.faults import DataError, Fault
from polypseg.data.folders import Pair, natural_key
from polypseg.data.groups import find_groups, take_that_fit


@dataclass(frozen=True)
class Split:
    """Training and validation pairs, in words how they were parted, and pairs kept for testing.

    `test` is empty where the test images lie in folders of their own (`test_folders`).
    """

    train: list[Pair]
    val: list[Pair]
    rule: str
    test: list[Pair] = field(default_factory=list)

    def with_validation_in_training(self) -> Split:
        """The same, but the validation pairs train too: for a last training, with all data."""
        train = sorted([*self.train, *self.val], key=lambda pair: natural_key(pair.stem))
        return replace(self, train=train, rule=f"{self.rule}, which trains too")


def random_split(pairs: Sequence[Pair], fraction: float, seed: int) -> Split:
    """Hold out a random fraction of the pairs, at least one, and keep the given order.

    Args:
        pairs: at least two.
        fraction: of the pairs that validate, between 0 and 1 (exclusive).
        seed: decides which; the choice depends on the stems and the seed alone.

    Raises:
        ValueError: there are fewer than two pairs, or the fraction is out of range.
    """
    _check_fraction(fraction)
    if len(pairs) < 2:
        raise ValueError(f"pairs holds {len(pairs)}; a split needs at least 2")
    count = min(max(1, round(fraction * len(pairs))), len(pairs) - 1)
    held_out = set(shuffled([pair.stem for pair in pairs], seed)[:count])
    return Split(
        [pair for pair in pairs if pair.stem not in held_out],
        [pair for pair in pairs if pair.stem in held_out],
        f"random: {count} of {len(pairs)} held out, seed {seed}",
    )


def group_split(
    folder: Path, pairs: Sequence[Pair], pattern: str, fraction: float, seed: int
) -> Split:
    """Hold out whole groups of pairs, and keep the given order.

    Args:
        folder: of the pairs, for errors.
        pairs: of two groups at least.
        pattern: as of `find_groups`.
        fraction: of the pairs that validate, between 0 and 1 (exclusive). Groups are taken in a
            random order, each if it still fits; the smallest one if none does.
        seed: decides which; the choice depends on the stems and the seed alone.

    Raises:
        ValueError: as `compile_group`, or the fraction is out of range.
        DataError: as `find_groups`, or there is a single group.
    """
    _check_fraction(fraction)
    names = find_groups(pairs, pattern)
    sizes = Counter(names)
    if len(sizes) < 2:
        problem = f"the pattern {pattern} finds one group in all {len(names)} names: {names[0]}"
        remedy = "change the pattern: one group at least trains, and another validates"
        raise DataError([Fault(folder, problem, remedy)])
    order = shuffled(list(sizes), seed)
    held_out = take_that_fit(order, sizes, round(fraction * len(pairs)))
    held_out = held_out or {min(order, key=lambda name: sizes[name])}
    named = list(zip(names, pairs, strict=True))
    train = [pair for name, pair in named if name not in held_out]
    val = [pair for name, pair in named if name in held_out]
    return Split(
        train,
        val,
        f"random by group {pattern}: {len(held_out)} of {len(sizes)} groups with {len(val)} of "
        f"{len(pairs)} held out, seed {seed}",
    )


def shuffled(names: Sequence[str], seed: int) -> list[str]:
    """The names in an order that they and the seed alone decide."""
    # By hash and not by a random generator: the order is the same for ever, whatever the version of
    # Python or NumPy, and whatever order the file system lists the names in.
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}:{name}".encode()).digest())


def _check_fraction(fraction: float) -> None:
    if not 0 < fraction < 1:
        raise ValueError(f"fraction must lie between 0 and 1, got {fraction}")
