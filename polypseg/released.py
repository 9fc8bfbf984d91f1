"""Where the released model lies."""

from __future__ import annotations

from pathlib import Path

from polypseg.checkpoint import CheckpointError

# Beside the package in a clone of the repository; a wheel does not bring it.
RELEASED = Path(__file__).parents[1] / "models" / "polypdeq-add"


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
