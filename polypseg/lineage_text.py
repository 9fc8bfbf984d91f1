"""What a run was trained on, in sentences for a reader."""

from __future__ import annotations

from polypseg.data.splits import NEOPOLYP_VALIDATION_LIST, VALIDATION_LIST, read_list
from polypseg.lineage import Lineage, Origin


def described(lineage: Lineage, seed: int, group: str) -> list[str]:
    """How many images trained and validated, how they were parted, and what the weights were first.

    Args:
        lineage: of the run.
        seed: of the run, which parts all images but those with a committed list.
        group: of the run, the pattern by which whole groups were held out.
    """
    return [
        f"{len(lineage.training)} training and {len(lineage.validation)} validation images"
        f"{trained_too(lineage)}; parted {_rule(lineage, seed, group)}.",
        f"Started from {_start(lineage.start)}.",
    ]


def trained_too(lineage: Lineage) -> str:
    """Follows the number of validation images: how many of them trained, if any did."""
    both = len(lineage.training.keys() & lineage.validation.keys())
    return f", {both} of which trained too" if both else ""


def _rule(lineage: Lineage, seed: int, group: str) -> str:
    if group:  # goes before any list
        return f"at random by group {group}, by the seed {seed}"
    for name in (VALIDATION_LIST, NEOPOLYP_VALIDATION_LIST):
        if lineage.validation.keys() == set(read_list(name)):
            return f"by the committed list {name}"
    return f"at random, by the seed {seed}"


def _start(start: Origin | None) -> str:
    if start is None:
        return "random weights"
    weights = f"{start.file} (SHA-256 {start.sha256})"
    if start.run is None:
        return f"the pretrained encoder {weights}, the rest from random weights"
    if start.record is None:
        return f"{weights} of the run {start.run}, which has no record of its images"
    images = len(start.record.training)
    return (
        f"{weights} of the run {start.run}, which trained on {images} images and started from "
        f"{_start(start.record.start)}"
    )
