"""Running out of memory, told with the settings that would help."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch

from polypseg.training_run import Run


@contextlib.contextmanager
def explain_lack_of_memory(run: Run, phase: str) -> Iterator[None]:
    """Raise MemoryError, naming the settings of ``phase`` to change, where memory runs out."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        # On the CPU torch raises a plain RuntimeError.
        out = isinstance(error, (MemoryError, torch.OutOfMemoryError))
        if not out and "not enough memory" not in str(error):
            raise
        config = run.config
        settings = config.explicit if phase == "explicit" else config.implicit
        remedies = [
            f"raise {phase}.accumulate (now {settings.accumulate}; the update stays the same)",
            f"in a new run directory, lower data.size ({config.data.size}) or the largest of "
            f"data.scales ({max(config.data.scales)})",
        ]
        if settings.precision == "fp32":
            remedies[1] += f", or set {phase}.precision=bf16"
        if phase == "implicit":
            remedies[1] += f", or lower implicit.memory ({config.implicit.memory})"
        raise MemoryError(
            f"the {phase} phase ran out of memory on {run.device}: {'; or, '.join(remedies)}"
        ) from error
