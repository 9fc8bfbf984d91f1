"""Which pairs train, which validate and which test."""

from __future__ import annotations

import hashlib
from bisect import bisect_left
from collections import defaultdict
from collections.abc import Sequence
from importlib import resources
from pathlib import Path

from polypseg.data.faults import DataError, Fault
from polypseg.data.folders import Pair, find_pairs, natural_key, pair_folders
from polypseg.data.groups import take_that_fit
from polypseg.data.random_splits import Split, group_split, random_split, shuffled

CLINIC_PREFIX = "clinic_"
# Last frame of each of CVC-ClinicDB's 29 video sequences; frames are numbered from 1 through all of
# them.
CLINIC_SEQUENCE_ENDS = (
    25, 50, 67, 78, 103, 126, 151, 177, 199, 205, 227, 252, 277, 297, 317,
    342, 363, 383, 408, 428, 447, 466, 478, 503, 528, 546, 571, 591, 612,
)  # fmt: skip
# `stems_digest` of the field's training set: 900 of Kvasir-SEG and 550 of CVC-ClinicDB.
TRAIN_DIGEST = "e99504cc3e158989f78060b0b0b358cf0e193f1a0f1554a7e0627aefaa5cdf8c"
# The same of NeoPolyp-Small's 1000.
NEOPOLYP_DIGEST = "9bb9c36bc98191a2eb6a1d724b01f0f887124d86ab808bdbd11cde21f931b709"
VALIDATION_LIST = "polyp_val.txt"
NEOPOLYP_VALIDATION_LIST = "neopolyp_val.txt"
NEOPOLYP_TEST_LIST = "neopolyp_test.txt"
VALIDATION_SEED = 3  # the first, counting from 0, whose sequences make exactly 55 frames
KVASIR_HELD_OUT = 90
CLINIC_HELD_OUT = 55
RANDOM_FRACTION = 0.1


def split_for(root: Path, seed: int = 0, group: str = "") -> Split:
    """Find the training pairs of a data folder and part them.

    Args:
        root: holds `TrainDataset/images` and `TrainDataset/masks`, or `images` and `masks`
            directly.
        seed: of a random split; the published one does not depend on it.
        group: a pattern as of `find_groups`; with one, whole groups are held out at random.

    Returns:
        The published split where the stems are exactly the field's 1450, the committed one of
        NeoPolyp-Small where they are its 1000, otherwise, or with ``group``, a random one that
        holds out 10 %.

    Raises:
        DataError: as `find_pairs` and `group_split`, or there is a single pair.
        ValueError: as `compile_group`.
    """
    folder = training_folder(root)
    pairs = find_pairs(folder)
    if len(pairs) < 2:
        remedy = "add images with masks: one at least trains, and another validates"
        raise DataError([Fault(folder, f"holds a single pair, {pairs[0].stem}", remedy)])
    return part_pairs(folder, pairs, seed, group)


def part_pairs(folder: Path, pairs: Sequence[Pair], seed: int, group: str) -> Split:
    """`split_for` for the pairs of a folder, at least two, that were found already."""
    if group:
        return group_split(folder, pairs, group, RANDOM_FRACTION, seed)
    return committed_split(pairs) or random_split(pairs, RANDOM_FRACTION, seed)


def committed_split(pairs: Sequence[Pair]) -> Split | None:
    """The split of a data set that a list comes with, told by its stems; None for any other."""
    digest = stems_digest([pair.stem for pair in pairs])
    if digest == TRAIN_DIGEST:
        return published_split(pairs)
    return neopolyp_split(pairs) if digest == NEOPOLYP_DIGEST else None


def training_folder(root: Path) -> Path:
    """The folder of a data root that holds the training images and masks."""
    nested = Path(root) / "TrainDataset"
    return nested if nested.is_dir() else Path(root)


def published_split(train_pairs: Sequence[Pair]) -> Split:
    """Part the field's standard training set by the committed list of validation stems.

    It holds out 90 of 900 Kvasir-SEG images and whole CVC-ClinicDB video sequences of 55 frames in
    all, so that no frame of ClinicDB that trains has a near-twin among those that validate.

    Raises:
        ValueError: the pairs are not exactly the standard 1450.
    """
    if stems_digest([pair.stem for pair in train_pairs]) != TRAIN_DIGEST:
        raise ValueError(
            f"train_pairs ({len(train_pairs)}) are not the field's standard training set (900 "
            "Kvasir-SEG + 550 CVC-ClinicDB images, `clinic_` prefix); use random_split for others"
        )
    held_out = set(published_validation_stems())
    return Split(
        [pair for pair in train_pairs if pair.stem not in held_out],
        [pair for pair in train_pairs if pair.stem in held_out],
        f"published: {VALIDATION_LIST}",
    )


def test_folders(root: Path) -> dict[str, Path]:
    """Find the test sets of a data folder.

    Args:
        root: holds `TestDataset/<NAME>/images` and `.../masks` for each set.

    Returns:
        Name to folder, in natural order; never empty.

    Raises:
        DataError: there is no `TestDataset`, nothing in it, or a folder in it lacks its images or
            masks.
    """
    folders, faults = scan_test_folders(root)
    if faults:
        raise DataError(faults)
    return folders


test_folders.__test__ = False  # type: ignore[attr-defined]  # its name makes pytest take it for a test


def scan_test_folders(root: Path) -> tuple[dict[str, Path], list[Fault]]:
    """The sound test sets of a folder, as `test_folders`, and all that is wrong with the others."""
    parent = Path(root) / "TestDataset"
    remedy = "put each test set in TestDataset/<NAME>/{images,masks}"
    if not parent.is_dir():
        return {}, [Fault(parent, "there is no such folder", remedy)]
    faults: list[Fault] = []
    folders: dict[str, Path] = {}
    entries = (
        entry for entry in parent.iterdir() if entry.is_dir() and not entry.name.startswith(".")
    )
    for folder in sorted(entries, key=lambda entry: natural_key(entry.name)):
        try:
            pair_folders(folder)
        except DataError as error:
            faults.extend(error.faults)
        else:
            folders[folder.name] = folder
    if not folders and not faults:
        faults.append(Fault(parent, "holds no test set", remedy))
    return folders, faults


def neopolyp_split(pairs: Sequence[Pair]) -> Split:
    """Part NeoPolyp-Small's 1000 images into 720 that train, 80 that validate and 200 that test.

    The competition's own 200 test masks are not public. `polypseg.data.neopolyp` made the lists.

    Raises:
        ValueError: the pairs are not exactly those 1000.
    """
    if stems_digest([pair.stem for pair in pairs]) != NEOPOLYP_DIGEST:
        raise ValueError(
            f"pairs ({len(pairs)}) are not the 1000 images of NeoPolyp-Small; use random_split"
        )
    test, val = (set(read_list(name)) for name in (NEOPOLYP_TEST_LIST, NEOPOLYP_VALIDATION_LIST))
    return Split(
        [pair for pair in pairs if pair.stem not in test | val],
        [pair for pair in pairs if pair.stem in val],
        f"committed: {NEOPOLYP_VALIDATION_LIST}, {NEOPOLYP_TEST_LIST}",
        [pair for pair in pairs if pair.stem in test],
    )


def read_list(name: str) -> list[str]:
    """The stems of a committed list, whose first line holds their SHA-256 digest.

    Raises:
        ValueError: the list was changed since it was made.
    """
    path = resources.files("polypseg.data") / "lists" / name
    head, *stems = path.read_text(encoding="utf-8").split("\n")[:-1]
    if head != list_head(stems):
        raise ValueError(f"{path}: the stems do not match the digest in its first line")
    return stems


def list_head(stems: Sequence[str]) -> str:
    """The first line of a committed list."""
    return f"# sha256 of the sorted stems: {stems_digest(stems)}"


def published_validation_stems() -> list[str]:
    """Return the committed validation stems of the field's standard training set."""
    return read_list(VALIDATION_LIST)


def make_validation_list(stems: Sequence[str], seed: int = VALIDATION_SEED) -> list[str]:
    """Choose validation stems of the standard training set; this made the committed list.

    Kvasir: the first 90 in a seeded order. ClinicDB: whole sequences in a seeded order, each taken
    if its training frames still fit into 55.

    Returns:
        The stems in natural order.
    """
    clinic: dict[int, list[str]] = defaultdict(list)
    kvasir: list[str] = []
    for stem in stems:
        if stem.startswith(CLINIC_PREFIX):
            clinic[clinic_sequence(stem)].append(stem)
        else:
            kvasir.append(stem)
    chosen = shuffled(kvasir, seed)[:KVASIR_HELD_OUT]
    sizes = {str(sequence): len(frames) for sequence, frames in clinic.items()}
    sequences = take_that_fit(shuffled(list(sizes), seed), sizes, CLINIC_HELD_OUT)
    frames = [stem for sequence in sequences for stem in clinic[int(sequence)]]
    return sorted(chosen + frames, key=natural_key)


def clinic_sequence(stem: str) -> int:
    """Return the video sequence, 0 to 28, of a CVC-ClinicDB frame named `clinic_<frame number>`."""
    frame = int(stem.removeprefix(CLINIC_PREFIX))
    if not 1 <= frame <= CLINIC_SEQUENCE_ENDS[-1]:
        raise ValueError(
            f"stem {stem!r} names frame {frame}; "
            f"CVC-ClinicDB has frames 1 to {CLINIC_SEQUENCE_ENDS[-1]}"
        )
    return bisect_left(CLINIC_SEQUENCE_ENDS, frame)


def stems_digest(stems: Sequence[str]) -> str:
    """SHA-256 of the sorted stems, one a line."""
    return hashlib.sha256("\n".join(sorted(stems)).encode()).hexdigest()
