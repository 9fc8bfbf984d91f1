"""Images that belong together: the frames of a video, the images of a patient."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence

from polypseg.data.faults import DataError, Fault
from polypseg.data.folders import Pair

_WANTED = "group must be a regular expression with one group in parentheses"


def compile_group(pattern: str) -> re.Pattern[str]:
    """Compile a regular expression that finds the name of a group.

    Raises:
        ValueError: it is none, or has another number of parentheses than one pair.
    """
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"{_WANTED}, got no regular expression ({error}): {pattern!r}") from None
    if compiled.groups != 1:
        count = compiled.groups
        raise ValueError(f"{_WANTED}, got one with {count} groups in parentheses: {pattern!r}")
    return compiled


def find_groups(pairs: Sequence[Pair], pattern: str) -> list[str]:
    r"""The group of every pair, by its stem.

    Args:
        pairs: at least one.
        pattern: a regular expression with one group in parentheses, searched in every stem:
            ``^(patient\d+)_`` finds patient12 in patient12_0034.

    Raises:
        ValueError: as `compile_group`.
        DataError: names every pair in whose stem it finds nothing.
    """
    compiled = compile_group(pattern)
    found = [compiled.search(pair.stem) for pair in pairs]
    names = [(match.group(1) or "") if match else "" for match in found]
    problem = f"the pattern {pattern} finds no group in its name"
    remedy = "name it as the others, or change the pattern"
    faults = [
        Fault(pair.image, problem, remedy)
        for pair, name in zip(pairs, names, strict=True)
        if not name
    ]
    if faults:
        raise DataError(faults)
    return names


def take_that_fit(order: Iterable[str], sizes: Mapping[str, int], wanted: int) -> set[str]:
    """Groups of at most ``wanted`` images in all, each taken in that order if it still fits."""
    taken: set[str] = set()
    left = wanted
    for name in order:
        if sizes[name] <= left:
            taken.add(name)
            left -= sizes[name]
    return taken
