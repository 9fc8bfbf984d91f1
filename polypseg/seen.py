"""Images of an evaluation that the network was trained on: left out, or else told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from polypseg.data import DataError, Fault, Pair
from polypseg.lineage import Digests, Lineage, image_digests

HELD_OUT = "validation"  # the name under which a training scores its own held-out images
# Of the images whose bytes are new, the share with names of training images that is no accident.
NAMED_ALIKE = 0.5

Sets = Mapping[str, Sequence[Pair]]


def held_out_sets(lineage: Lineage | None, sets: Sets) -> dict[str, list[Pair]]:
    """The sets to score: a run's own training folder becomes the images that the run held out.

    Such a folder holds exactly the validation images of the record beside ones that trained. Any
    other set stays what it is.

    Raises:
        DataError: another set has the name that the held-out images get.
    """
    scored: dict[str, list[Pair]] = {}
    for name, pairs in sets.items():
        held_out = _held_out(lineage, pairs) if lineage is not None else []
        scored_as = HELD_OUT if held_out else name
        if scored_as in scored:
            problem = f'another folder, too, would be scored as "{scored_as}"'
            raise DataError([Fault(_folder(pairs), problem, "evaluate one of them at a time")])
        scored[scored_as] = held_out or list(pairs)
    return scored


def notes_on_seen(lineage: Lineage | None, given: Sets, scored: Sets) -> list[str]:
    """What has to be said of sets that hold, or held, images which the network was trained on.

    Args:
        lineage: of the run; without one nothing is known.
        given: the sets that a person named.
        scored: what `held_out_sets` made of them, or the first images of each.
    """
    if lineage is None:
        return []
    notes = [
        f"{HELD_OUT}: the images of {_folder(pairs)} that the run held out; it was trained on the "
        "others there."
        for name, pairs in given.items()
        if name not in scored
    ]
    seen, stems = lineage.seen(), lineage.seen_stems()
    for name, pairs in scored.items():
        known = [digest in seen for digest in image_digests(pairs)]
        if any(known):
            notes.append(
                f"{name}: {sum(known)} of {len(pairs)} images were trained on; figures on those "
                "say nothing of new images."
            )
        others = [pair.stem for pair, same in zip(pairs, known, strict=True) if not same]
        named = sum(stem in stems and not stem.isdecimal() for stem in others)
        if named and named >= NAMED_ALIKE * len(others):
            notes.append(
                f"{name}: {named} of {len(pairs)} images have the names of training images and "
                "other bytes. If they are those images, saved anew, figures on them say nothing of "
                "new ones."
            )
    return notes


def _held_out(lineage: Lineage, pairs: Sequence[Pair]) -> list[Pair]:
    """The validation pairs of a training folder; none of any other folder."""
    trained, validation = _images(lineage.training), _images(lineage.validation)
    stems = [pair.stem for pair in pairs]
    images = list(zip(stems, image_digests(pairs), strict=True))
    others = [
        (image, pair) for image, pair in zip(images, pairs, strict=True) if image not in trained
    ]
    if len(others) == len(pairs) or {image for image, _ in others} != validation:
        return []
    return [pair for _, pair in others]


def _images(digests: Digests) -> set[tuple[str, str]]:
    return {(stem, image) for stem, (image, _) in digests.items()}


def _folder(pairs: Sequence[Pair]) -> Path:
    return pairs[0].image.parent.parent
