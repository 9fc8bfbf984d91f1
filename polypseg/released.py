"""What lies beside the package in a clone of the repository: the released model, sample images.

A wheel brings neither.
"""

from __future__ import annotations

from pathlib import Path

from polypseg.checkpoint import CheckpointError
from polypseg.data import list_images

_CLONE = Path(__file__).parents[1]
RELEASED = _CLONE / "models" / "polypdeq-res"
SAMPLES = _CLONE / "samples" / "images"


def released_run() -> Path:
    """The run directory of the released model.

    Raises:
        CheckpointError: this installation has none.
    """
    if not (RELEASED / "config.yaml").is_file():
        raise CheckpointError(
            "this installation has no released model (a clone of the repository has it in "
            "models/); name a run directory with --run"
        )
    return RELEASED


def sample_images() -> list[Path]:
    """The sample images, in the order of `find_pairs`; none in an installation without them."""
    return list_images(SAMPLES) if SAMPLES.is_dir() else []
