"""What the options of the command line ask for."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import torch

from benchmarks.timing import Effort

DTYPES = {"float32": torch.float32, "float64": torch.float64}

# (batch, features) that the speed goals name.
GOAL_SIZES = ((1, 1_000), (64, 1_000), (1, 250_000), (16, 250_000))


@dataclass(frozen=True)
class Settings:
    """Options of one run; ``runs`` are directories of trained PolypDEQ models."""

    device: torch.device
    dtype: torch.dtype
    quick: bool
    sizes: tuple[tuple[int, int], ...] = GOAL_SIZES
    runs: tuple[Path, ...] = ()
    images: Path | None = None

    @property
    def effort(self) -> Effort:
        """How long one paired measurement may take."""
        return Effort(2, 0.1, 15) if self.quick else Effort(7, 4.0, 51)

    @property
    def slow_effort(self) -> Effort:
        """The same where a round takes a second and more, beside which the noise is small."""
        return Effort(1, 1.0, 15) if self.quick else Effort(5, 4.0, 51)


def parse_sizes(text: str) -> tuple[tuple[int, int], ...]:
    """(batch, features) pairs from "1x1000,16x250000".

    Raises:
        ValueError: the text is something else; says what is expected.
    """
    sizes = []
    for part in text.split(","):
        match = re.fullmatch(r"\s*([1-9]\d*)x([1-9]\d*)\s*", part)
        if not match:
            raise ValueError(
                f"--benchmark-sizes: {part!r} is no size; give BATCHxFEATURES, "
                "several with commas between, such as 1x1000,16x250000"
            )
        sizes.append((int(match[1]), int(match[2])))
    return tuple(sizes)
