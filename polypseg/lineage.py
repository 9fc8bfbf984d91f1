"""What a run was trained on: the weights that it started from, and its images by their bytes."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from polypseg.checkpoint import LAST, PREVIOUS, write_atomic
from polypseg.config import ConfigError
from polypseg.data import Pair, Split
from polypseg.starting import Start
from polypseg.training_run import PHASES

RECORD = "data.json"
READING_THREADS = 4

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


def is_begun(folder: Path) -> bool:
    """Whether a run directory holds weights of any kind."""
    names = [LAST, PREVIOUS, *(f"{phase}.safetensors" for phase in PHASES)]
    return any((folder / name).exists() for name in names)


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
