"""The options of a solve, checked once and passed on together."""

from __future__ import annotations

from dataclasses import dataclass
from numbers import Real
from typing import Literal

from deqsolvers.solvers.base import check_count


@dataclass(frozen=True)
class Options:
    """When a solve stops and what it returns; see `fixed_point` for each field."""

    tol: float | None = 1e-4
    max_steps: int = 50
    relative: bool = True
    final: Literal["best", "last"] = "best"
    stall_after: int = 30
    drop_converged: bool = True

    def __post_init__(self) -> None:
        check_count("max_steps", self.max_steps)
        check_count("stall_after", self.stall_after)
        number = isinstance(self.tol, Real) and not isinstance(self.tol, bool)
        if self.tol is not None and not (number and self.tol >= 0):
            raise ValueError(f"tol must be None or a number of at least 0, got {self.tol!r}")
        if self.final not in ("best", "last"):
            raise ValueError(f"final must be 'best' or 'last', got {self.final!r}")
