"""What a check found, for a person and for a program."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from polypseg.data.audit import Inspection

if TYPE_CHECKING:
    from polypseg.check import Check

PROGRAM = "polypseg-check"


def as_json(check: Check) -> dict[str, Any]:
    """The result as plain values: groups with their sizes and masks, faults, duplicates."""
    return {
        "program": PROGRAM,
        "sound": check.errors == 0,
        "errors": check.errors,
        "warnings": len(check.faults) - check.errors,
        "groups": {
            name: {
                "folder": str(folder),
                "role": check.roles[name],
                **_statistics(check.inspections[name]),
            }
            for name, folder in check.folders.items()
        },
        "faults": [
            {
                "path": str(fault.path),
                "severity": fault.severity,
                "problem": fault.problem,
                "remedy": fault.remedy,
            }
            for fault in check.faults
        ],
        "duplicates": [
            {
                "kind": found.kind,
                "distance": found.distance,
                "across_train_and_test": check.across(found),
                "files": [
                    str(check.inspections[group][index].pair.image)
                    for group, index in (found.first, found.second)
                ],
            }
            for found in check.duplicates
        ],
    }


def _statistics(group: Sequence[Inspection]) -> dict[str, Any]:
    sizes = np.array([one.size for one in group if one.size is not None]).reshape(-1, 2)
    shares = np.array([one.polyp_share for one in group if one.polyp_share is not None])
    return {
        "pairs": len(group),
        "readable_images": len(sizes),
        "smallest_width_height": sizes.min(axis=0)[::-1].tolist() if len(sizes) else None,
        "largest_width_height": sizes.max(axis=0)[::-1].tolist() if len(sizes) else None,
        "polyp_share_median": float(np.median(shares)) if len(shares) else None,
        "empty_masks": int((shares == 0).sum()),
        "full_masks": int((shares == 1).sum()),
    }


def as_text(check: Check) -> str:
    """The result for a person: every fault on a line, errors first, then what was looked at."""
    lines = [
        f"{severity}: {fault}"
        for severity in ("error", "warning")
        for fault in check.faults
        if fault.severity == severity
    ]
    for name, group in check.inspections.items():
        known = _statistics(group)
        text = f"{name}: {known['pairs']} pairs"
        if known["readable_images"]:
            low, high = known["smallest_width_height"], known["largest_width_height"]
            text += f", {low[0]} x {low[1]} to {high[0]} x {high[1]} pixels"
        if known["polyp_share_median"] is not None:
            text += f", polyp on {known['polyp_share_median']:.1%} of an image (median)"
        lines.append(text)
    if check.duplicates:
        lines.append(_twins(check))
    warnings = len(check.faults) - check.errors
    lines.append(f"{check.errors} errors, {warnings} warnings")
    return "\n".join(lines)


def _twins(check: Check) -> str:
    text = f"{len(check.duplicates)} pairs of images are the same or nearly so"
    tested = {
        place for found in check.duplicates if check.across(found)
        for place in (found.first, found.second) if check.roles[place[0]] == "test"
    }  # fmt: skip
    if {"training", "test"} <= set(check.roles.values()):
        text += (
            f"; {len(tested)} test images have a twin among the training images (nearly the same "
            "picture: of others another frame of the same video may still train)"
        )
    unknown = [name for name, role in check.roles.items() if role == "unknown"]
    if unknown and len(check.roles) > 1:
        text += (
            f"; it is unknown whether {', '.join(unknown)} are for training or for test: only "
            "TrainDataset and the folders of TestDataset say so by their names"
        )
    return text
