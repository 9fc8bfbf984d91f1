"""What is wrong with a folder as a whole, though every pair of it may be sound."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from polypseg.data.audit import Inspection
from polypseg.data.faults import Fault

LARGEST_MEDIAN_SHARE = 0.5  # of polyp; the field's sets have 4 to 15 %


def inverted_faults(folder: Path, group: Sequence[Inspection]) -> list[Fault]:
    """The warning of a folder in most masks of which most is polyp."""
    shares = [one.polyp_share for one in group if one.polyp_share is not None]
    share = float(np.median(shares)) if shares else 0.0
    if share <= LARGEST_MEDIAN_SHARE:
        return []
    problem = f"polyp on {share:.0%} of an image (median): the masks may be inverted"
    remedy = "make sure that polyps are white, or coloured, and all else black"
    return [Fault(folder, problem, remedy, "warning")]
