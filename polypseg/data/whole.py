"""What is wrong with a folder as a whole, though every pair of it may be sound."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polypseg.data.audit import Inspection, inspect_pairs
from polypseg.data.duplicates import Duplicate
from polypseg.data.faults import DataError, Fault
from polypseg.data.folders import left_out_faults, scan_pairs
from polypseg.data.splits import committed_split, part_pairs

LARGEST_MEDIAN_SHARE = 0.5  # of polyp; the field's sets have 4 to 15 %
NAMED_TWINS = 5  # of the training images that a validation image is nearly the same as
SPLIT_SEED = 0  # the default of polypseg-train


def audit_folder(root: Path, classes: int = 1) -> list[Fault]:
    """All that is wrong with a folder, its pairing and, as `audit_pairs` says, its pairs."""
    pairs, faults = scan_pairs(root)
    inspected = inspect_pairs(pairs, duplicates=False, classes=classes)
    faults += [*left_out_faults(root), *(fault for one in inspected for fault in one.faults)]
    return [*mask_faults(root, inspected), *faults]


def mask_faults(folder: Path, group: Sequence[Inspection]) -> list[Fault]:
    """The warnings of a folder whose masks may mean something else than they are read as."""
    return [*_inverted_faults(folder, group), *_painted_faults(folder, group)]


def _painted_faults(folder: Path, group: Sequence[Inspection]) -> list[Fault]:
    painted = sum(one.painted for one in group)
    if not painted:
        return []
    problem = f"{painted} of {len(group)} masks are red or green, and read as polyp or none"
    remedy = "to tell neoplastic polyps (red) from others (green) set model.classes=3"
    return [Fault(folder, problem, remedy, "warning")]


def _inverted_faults(folder: Path, group: Sequence[Inspection]) -> list[Fault]:
    """The warning of a folder in most masks of which most is polyp."""
    shares = [one.polyp_share for one in group if one.polyp_share is not None]
    share = float(np.median(shares)) if shares else 0.0
    if share <= LARGEST_MEDIAN_SHARE:
        return []
    problem = f"polyp on {share:.0%} of an image (median): the masks may be inverted"
    remedy = "make sure that polyps are white, or coloured, and all else black"
    return [Fault(folder, problem, remedy, "warning")]


def split_faults(
    folder: Path,
    inspected: Sequence[Inspection],
    duplicates: Sequence[Duplicate],
    group: str = "",
) -> list[Fault]:
    """What is wrong with how a folder will be split: between images that look alike, or not at all.

    Args:
        folder: of which some images train and others validate.
        inspected: its pairs.
        duplicates: within these.
        group: as of `split_for`.
    """
    pairs = [one.pair for one in inspected]
    if len(pairs) < 2 or (not group and committed_split(pairs) is not None):
        return []
    try:
        split = part_pairs(folder, pairs, SPLIT_SEED, group)
    except DataError as error:
        return error.faults
    held_out = {pair.stem for pair in split.val}
    twins: dict[str, list[str]] = defaultdict(list)
    for found in duplicates:
        two = [pairs[index] for _, index in (found.first, found.second)]
        for one, other in (two, two[::-1]):
            if one.stem in held_out and other.stem not in held_out:
                twins[one.image.name].append(other.image.name)
    if not twins:
        return []
    listed = "; ".join(f"{one} of {_first(others)}" for one, others in twins.items())
    problem = (
        f"trained on, it is split at random{' by group' if group else ''}: with seed "
        f"{SPLIT_SEED}, {len(twins)} of {len(held_out)} validation images have a near-twin in "
        f"training ({listed})"
    )
    remedy = (
        "keep one image of each view, and judge by a test folder of other videos"
        if group
        else "keep patients or videos together (data.group, --group), or one image of each view"
    )
    return [Fault(folder, problem, remedy, "warning")]


def _first(names: Sequence[str]) -> str:
    return ", ".join(names[:NAMED_TWINS]) + (", ..." if len(names) > NAMED_TWINS else "")
