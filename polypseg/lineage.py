"""What a run was trained on: the weights that it started from, and its images by their bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polypseg.checkpoint import LAST, PREVIOUS, write_atomic
from polypseg.config import ConfigError
from polypseg.data import Pair, Split
from polypseg.data.folders import natural_key
from polypseg.starting import Start
from polypseg.training_run import PHASES

RECORD = "data.json"
READING_THREADS = 4
NAMED = 5  # stems in an error message

Digests = dict[str, list[str]]  # by stem: of the image and of the mask


@dataclass(frozen=True)
class Origin:
    """The weights file that a network started from.

    Attributes:
        file, sha256: name and digest of the file.
        run: name of the run directory that it is of; None for a pretrained encoder.
        record: of that run; None where it has none.
    """

    file: str
    sha256: str
    run: str | None = None
    record: Lineage | None = None


@dataclass(frozen=True)
class Lineage:
    """What `data.json` of a run directory holds.

    Attributes:
        start: None where the network started from random weights.
        training, validation: its images and masks; an image may be among both.
    """

    start: Origin | None
    training: Digests
    validation: Digests

    def seen(self) -> set[str]:
        """The digests of all images that trained the weights, in this run or before it."""
        return {image for trained in self._trained() for image, _ in trained.values()}

    def seen_stems(self) -> set[str]:
        """Their stems."""
        return {stem for trained in self._trained() for stem in trained}

    def _trained(self) -> list[Digests]:
        before = self.start.record if self.start is not None else None
        return [self.training, *(before._trained() if before is not None else [])]


def make_lineage(split: Split, start: Start) -> Lineage:
    """Read all images and masks of a split, and the weights that a network starts from."""
    origin = None
    file = start.file()
    if file is not None:
        sha256 = hashlib.sha256(file.read_bytes()).hexdigest()
        origin = Origin(file.name, sha256)
        if start.run is not None:
            origin = Origin(file.name, sha256, start.run.resolve().name, read_lineage(start.run))
    return Lineage(origin, _digests(split.train), _digests(split.val))


def keep_lineage(folder: Path, now: Lineage) -> Lineage | None:
    """The record of a run directory, which gets ``now`` where it is new.

    None for a run that an older version began: nobody knows what with.
    """
    kept = read_lineage(folder)
    if kept is None and not _is_begun(folder):
        write_lineage(folder, now)
        return now
    return kept


def write_lineage(folder: Path, lineage: Lineage) -> None:
    """Keep a record in a run directory."""
    write_atomic(folder / RECORD, json.dumps(asdict(lineage), indent=1).encode())


def read_lineage(folder: Path) -> Lineage | None:
    """The record of a run directory; None where there is none, as in those of older versions.

    Raises:
        ConfigError: the file is damaged.
    """
    path = folder / RECORD
    if not path.exists():
        return None
    try:
        return _lineage(json.loads(path.read_bytes()))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise ConfigError(
            f"{path}: not a record of what a run was trained on; copy it again, or move it away "
            "to go on without one"
        ) from error


def check_resumed(folder: Path, now: Lineage) -> None:
    """Keep a run from going on with other images than before, wherever they lie by now.

    Nor may an unfinished explicit phase go on with another start. A run without a record may go on
    with anything.

    Raises:
        ConfigError: says what differs.
    """
    before = read_lineage(folder)
    if before is None:
        return
    changed = [
        text
        for name in ("training", "validation")
        for text in _changes(name, getattr(before, name), getattr(now, name))
    ]
    old, new = (record.start and record.start.sha256 for record in (before, now))
    if old != new and not (folder / f"{PHASES[0]}.safetensors").exists():
        changed.append(f"it started from {_told(before.start)}, now from {_told(now.start)}")
    if changed:
        raise ConfigError(
            f"{folder}: this run was started with other data ({folder / RECORD}): "
            f"{'; '.join(changed)}. Give the same to resume it, or another run directory"
        )


def warning_on_start(lineage: Lineage | None) -> str | None:
    """What to say where the run that this one starts from was trained on validation images."""
    if lineage is None or lineage.start is None or lineage.start.record is None:
        return None
    seen = lineage.start.record.seen()
    stems = [stem for stem, (image, _) in lineage.validation.items() if image in seen]
    if not stems:
        return None
    return (
        f"the network starts from weights that were trained on {len(stems)} of the "
        f"{len(lineage.validation)} validation images ({_some(stems)}): the val_ columns say "
        "little about new images"
    )


def image_digests(pairs: Sequence[Pair]) -> list[str]:
    """A digest of each image file's bytes."""
    with ThreadPoolExecutor(READING_THREADS) as pool:
        return list(pool.map(_digest, (pair.image for pair in pairs)))


def _digests(pairs: Sequence[Pair]) -> Digests:
    with ThreadPoolExecutor(READING_THREADS) as pool:
        masks = list(pool.map(_digest, (pair.mask for pair in pairs)))
    images = image_digests(pairs)
    return {
        pair.stem: [image, mask] for pair, image, mask in zip(pairs, images, masks, strict=True)
    }


def _digest(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def _lineage(fields: dict[str, Any]) -> Lineage:
    origin, found = None, fields["start"]
    if found is not None:
        record = None if found["record"] is None else _lineage(found["record"])
        origin = Origin(found["file"], found["sha256"], found["run"], record)
    training, validation = (
        {stem: [str(image), str(mask)] for stem, (image, mask) in fields[part].items()}
        for part in ("training", "validation")
    )
    return Lineage(origin, training, validation)


def _is_begun(folder: Path) -> bool:
    """Whether a run directory holds weights of any kind."""
    names = [LAST, PREVIOUS, *(f"{phase}.safetensors" for phase in PHASES)]
    return any((folder / name).exists() for name in names)


def _changes(name: str, old: Digests, new: Digests) -> list[str]:
    """How the images of a part of the data differ, one text for each kind of difference."""
    kinds = {
        "gone": old.keys() - new.keys(),
        "new": new.keys() - old.keys(),
        "with another image or mask": {
            stem for stem in old.keys() & new.keys() if old[stem] != new[stem]
        },
    }
    return [
        f"{len(stems)} of the {name} images {kind} ({_some(stems)})"
        for kind, stems in kinds.items()
        if stems
    ]


def _some(stems: Collection[str]) -> str:
    named = sorted(stems, key=natural_key)
    rest = len(named) - NAMED
    return ", ".join(named[:NAMED]) + (f" and {rest} more" if rest > 0 else "")


def _told(start: Origin | None) -> str:
    if start is None:
        return "random weights"
    of = f" of {start.run}" if start.run else ""
    return f"{start.file}{of} (SHA-256 {start.sha256[:12]})"
