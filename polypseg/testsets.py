"""The test folders that a person names for an evaluation."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from tqdm import tqdm

from polypseg.data import DataError, Fault, Pair, audit_pairs, scan_pairs
from polypseg.data.splits import NEOPOLYP_DIGEST, neopolyp_split, scan_test_folders, stems_digest

PRINTED_WARNINGS = 10
# Said beside every figure on the test folder of that name.
NOTES = {
    "CVC-ClinicDB": "All 62 test frames of the field's split of CVC-ClinicDB come from video "
    "sequences that are in its training set too, each next to a training frame (56 of them where "
    "the validation images do not train); 16 are near-identical to one. Figures on it are "
    "optimistic.",
    "NeoPolyp-Small": "The masks of the competition's test images are not public: figures are "
    "those of 200 of its 1000 training images, held out by a committed list. For a network of one "
    "class a polyp of either kind is a polyp.",
}


def find_test_sets(data: Sequence[Path], classes: int = 1) -> dict[str, list[Pair]]:
    """Find the pairs of every test folder that a person names, by the folder's name.

    Args:
        data: each a root with `TestDataset/<NAME>/{images,masks}`, or one folder with images and
            masks. Of the 1000 images of NeoPolyp-Small only the 200 held out are taken.
        classes: of the masks, as `read_mask`; only for what is reported.

    Raises:
        DataError: a folder is missing, incomplete or empty, files cannot be paired, or two folders
            have one name. The faults of all folders are reported together.
    """
    faults: list[Fault] = []
    folders: dict[str, Path] = {}
    for root in data:
        found = {root.resolve().name: root}
        if (root / "TestDataset").is_dir():
            found, unsound = scan_test_folders(root)
            faults.extend(unsound)
        for name, folder in found.items():
            if name in folders:
                problem = f"has the same name as {folders[name]}"
                faults.append(Fault(folder, problem, "give one of them, or rename one"))
            folders[name] = folder
    scanned = {name: scan_pairs(folder) for name, folder in folders.items()}
    faults += [fault for _, found in scanned.values() for fault in found]
    if faults:
        # Whoever has to repair the data wants to know all of it.
        for pairs, _ in scanned.values():
            faults += [
                fault for fault in audit_pairs(pairs, classes=classes) if fault.severity == "error"
            ]
        raise DataError(faults)
    return {name: _held_out(pairs) for name, (pairs, _) in scanned.items()}


def _held_out(pairs: list[Pair]) -> list[Pair]:
    """Those that nobody trains on, of a folder that has both in it."""
    if stems_digest([pair.stem for pair in pairs]) != NEOPOLYP_DIGEST:
        return pairs
    return neopolyp_split(pairs).test


def audit_test_sets(sets: Mapping[str, Sequence[Pair]], classes: int = 1) -> None:
    """Check all images and masks; warnings go to stderr.

    Raises:
        DataError: a file cannot be used; names all such files.
    """
    pairs = [pair for found in sets.values() for pair in found]
    with tqdm(total=len(pairs), desc="checking", unit="pair", leave=False, disable=None) as bar:

        def progress(done: int, _: int) -> None:
            bar.update(done - bar.n)

        faults = audit_pairs(pairs, progress, classes=classes)
    errors = [fault for fault in faults if fault.severity == "error"]
    if errors:
        raise DataError(errors)
    for fault in faults[:PRINTED_WARNINGS]:
        print(f"warning: {fault}", file=sys.stderr)
    if len(faults) > PRINTED_WARNINGS:
        print(f"... and {len(faults) - PRINTED_WARNINGS} more warnings", file=sys.stderr)
