"""Speed goals and what was measured for them, collected over one run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal


@dataclass(frozen=True)
class Goal:
    """A measured number beside its goal; ``sign`` says on which side of it it should lie."""

    what: str
    measured: float
    sign: Literal[">", "<"]
    wanted: float

    @property
    def met(self) -> bool:
        return self.measured > self.wanted if self.sign == ">" else self.measured < self.wanted


GOALS: list[Goal] = []


def record(what: str, measured: float, sign: Literal[">", "<"], wanted: float) -> None:
    """Add a line to the table at the end. A missed goal shows there; it does not fail the run."""
    GOALS.append(Goal(what, measured, sign, wanted))
