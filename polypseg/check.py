"""Auditing data folders: every fault of every file at once, and images that occur twice."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from polypseg import cli
from polypseg.check_text import PROGRAM, as_json, as_text
from polypseg.checkpoint import write_atomic
from polypseg.data import Fault, scan_pairs
from polypseg.data.audit import Inspection, inspect_pairs
from polypseg.data.duplicates import Alike, Duplicate, Place, find_duplicates, group_duplicates
from polypseg.data.folders import left_out_faults
from polypseg.data.groups import compile_group
from polypseg.data.splits import scan_test_folders
from polypseg.data.whole import mask_faults, split_faults

TRAIN = "TrainDataset"
TEST = "TestDataset"
STDOUT = Path("-")
NAMED_TWINS = 10  # of the others that an image is the same as
Role = Literal["training", "test", "unknown"]


@dataclass(frozen=True)
class Check:
    """What `check_folders` found.

    Attributes:
        folders: by name of the group, for example "TrainDataset" and "TestDataset/Kvasir".
        roles: by the same names; "unknown" of a lone folder that neither is `TrainDataset` nor lies
            in `TestDataset`.
        inspections: every pair of each group.
        faults: all that is wrong, duplicates among it.
        duplicates: images that occur twice, within and across groups.
    """

    folders: dict[str, Path]
    roles: dict[str, Role]
    inspections: dict[str, list[Inspection]]
    faults: list[Fault]
    duplicates: list[Duplicate]

    @property
    def errors(self) -> int:
        """How many faults keep the data from being used as they are."""
        return sum(fault.severity == "error" for fault in self.faults)

    def across(self, found: Duplicate) -> bool:
        """Whether one of the two is a training and the other a test image."""
        return self.on_both_sides((found.first, found.second))

    def on_both_sides(self, places: Iterable[Place]) -> bool:
        """Whether there are training and test images among some."""
        return {"training", "test"} <= {self.roles[name] for name, _ in places}


def check_folders(
    roots: Sequence[Path], *, classes: int = 1, group: str = "", progress: bool = False
) -> Check:
    """Decode every file of data folders and collect all that is wrong; changes nothing.

    Args:
        roots: each a root with `TrainDataset/` and `TestDataset/<NAME>/`, or one folder with
            `images` and `masks`.
        classes: of the masks: 1, or 3 for NeoPolyp's colours.
        group: by which images will be split, as of `split_for`.
        progress: whether to show a progress bar.

    Returns:
        Errors are files that cannot be paired, decoded or used (see `audit_pairs`) and images that
        occur with the same pixels both in a training and in a test folder. Warnings are files that
        are left out, empty and full masks, masks that look inverted or are read as one class from
        the colours of three, other duplicates, near-duplicates, and a random split that parts
        these. A folder whose name another root has used goes by its path.

    Raises:
        ValueError: as `compile_group`.
    """
    if group:
        compile_group(group)
    faults: list[Fault] = []
    folders: dict[str, Path] = {}
    for root in roots:
        found, unsound = _groups(root)
        faults.extend(unsound)
        for name, folder in found.items():
            folders[name if name not in folders else str(folder)] = folder
    roles = {name: _role(folder) for name, folder in folders.items()}
    pairs = {}
    for name, folder in folders.items():
        pairs[name], unpaired = scan_pairs(folder)
        faults += [*unpaired, *left_out_faults(folder)]
    total = sum(map(len, pairs.values()))
    inspections = {}
    with tqdm(
        total=total, desc="checking", unit="pair", leave=False, disable=None if progress else True
    ) as bar:

        def advance(*_: int) -> None:
            bar.update()

        for name, found_pairs in pairs.items():
            inspections[name] = inspect_pairs(found_pairs, advance, classes=classes)
    faults += [fault for found in inspections.values() for one in found for fault in one.faults]
    for name, inspected in inspections.items():
        faults += mask_faults(folders[name], inspected)
    duplicates = find_duplicates(
        {name: [one.fingerprint for one in group] for name, group in inspections.items()}
    )
    check = Check(folders, roles, inspections, faults, duplicates)
    duplicates.sort(key=lambda found: not check.across(found))  # stable: what matters comes first
    alike = sorted(
        group_duplicates(duplicates), key=lambda found: not check.on_both_sides(found.places)
    )
    faults += [_duplicate_fault(found, check) for found in alike]
    for name, inspected in inspections.items():
        if roles[name] != "test":
            within = [one for one in duplicates if one.first[0] == one.second[0] == name]
            faults += split_faults(folders[name], inspected, within, group)
    return check


def _groups(root: Path) -> tuple[dict[str, Path], list[Fault]]:
    """The folders of pairs below a root, by name, and faults; a lone folder goes by its own."""
    found = {}
    faults: list[Fault] = []
    if (root / TRAIN).is_dir():
        found[TRAIN] = root / TRAIN
    if (root / TEST).is_dir():
        tests, faults = scan_test_folders(root)
        found.update({f"{TEST}/{name}": path for name, path in tests.items()})
    return (found, faults) if found or faults else ({root.resolve().name: root}, [])


def _role(folder: Path) -> Role:
    path = folder.resolve()
    if path.name == TRAIN:
        return "training"
    return "test" if path.parent.name == TEST else "unknown"


def _duplicate_fault(found: Alike, check: Check) -> Fault:
    order = {name: number for number, name in enumerate(check.folders)}
    first, *others = sorted(found.places, key=lambda place: (order[place[0]], place[1]))
    # Those of another role come first, so that they are not among what is cut off.
    others.sort(key=lambda place: check.roles[place[0]] == check.roles[first[0]])
    image, *twins = (check.inspections[name][index].pair.image for name, index in (first, *others))
    pair = len(others) == 1
    hash_share = f"{1 - found.distance:.0%} of its hash{'' if pair else ' or more'}"
    likeness = (
        "has the same pixels as"
        if found.kind == "exact"
        else f"looks nearly the same ({hash_share}) as"
    )
    problem = f"{likeness} {', '.join(map(str, twins[:NAMED_TWINS]))}"
    if len(twins) > NAMED_TWINS:
        problem += f" and {len(twins) - NAMED_TWINS} more"
    if found.kind == "near" and not pair:
        problem += ", all of them alike"
    across = check.on_both_sides(found.places)
    if across and pair:
        problem += ", one being a training and one a test image"
        remedy = "take one of them out of its set, or say so beside every figure"
    elif across:
        problem += ", some being training and some test images"
        remedy = "take the training or the test images out, or say so beside every figure"
    else:
        remedy = f"keep one of them, unless {'both' if pair else 'all'} are meant to count"
    return Fault(image, problem, remedy, "error" if across and found.kind == "exact" else "warning")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Check images and masks: pairs by stem, every file decoded, sizes, mask "
        "values, duplicates and near-duplicates. All faults are reported at once; nothing is "
        "changed.",
        epilog="Exit code: 0 if the data can be used (there may be warnings), 1 if there are "
        "errors, 2 for a wrong command line.",
    )
    parser.add_argument(
        "data",
        nargs="+",
        type=Path,
        metavar="DIR",
        help="a root with TrainDataset/ and TestDataset/<NAME>/, or a folder with images/ and "
        "masks/",
    )
    parser.add_argument(
        "--classes",
        type=int,
        choices=(1, 3),
        default=1,
        help="of the masks: 1, black and white, or 3, NeoPolyp's black, red and green; default: 1",
    )
    parser.add_argument(
        "--group",
        type=_group,
        metavar="PATTERN",
        help="as data.group of polypseg-train: a regular expression whose one group in parentheses "
        r"finds the patient or video in a stem, such as '^(patient\d+)_'",
    )
    parser.add_argument(
        "--json", type=Path, metavar="FILE", help="write the result as JSON too; - prints only that"
    )
    return parser


def _group(text: str) -> str:
    try:
        compile_group(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(str(error)) from None
    return text


def main(argv: Sequence[str] | None = None) -> int:
    """Run `polypseg-check`; errors of the program are raised (see `polypseg.cli`)."""
    options = _parser().parse_args(argv)
    check = check_folders(
        options.data, classes=options.classes, group=options.group or "", progress=True
    )
    document = json.dumps(as_json(check), indent=2)
    if options.json == STDOUT:
        print(document)
        return int(check.errors > 0)
    print(as_text(check))
    if options.json is not None:
        write_atomic(options.json, document.encode())
    return int(check.errors > 0)


if __name__ == "__main__":
    sys.exit(cli.check())
