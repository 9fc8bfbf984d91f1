"""What can be wrong with a data set, told to a person: all of it at once, each with its remedy."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

MAX_PRINTED_FAULTS = 50


@dataclass(frozen=True)
class Fault:
    """One thing wrong with one file or folder.

    Args:
        path: the file or folder.
        problem: what is wrong with it.
        remedy: what would make it right.
        severity: "error" where the data cannot be used as it is, "warning" where it can but a
            person should look.
    """

    path: Path
    problem: str
    remedy: str
    severity: Literal["error", "warning"] = "error"

    def __str__(self) -> str:
        return f"{self.path}: {self.problem}; {self.remedy}"


class DataError(ValueError):
    """Images or masks that cannot be used.

    `faults` holds every reason; `str()` prints a line for each of the first 50.
    """

    def __init__(self, faults: Sequence[Fault]) -> None:
        # A DataLoader worker re-raises by calling the class with a string. Refusing it makes torch
        # fall back on a RuntimeError that carries the whole message.
        if isinstance(faults, str) or not faults:
            raise TypeError("DataError takes a non-empty sequence of Fault")
        super().__init__(list(faults))
        self.faults = list(faults)

    def __str__(self) -> str:
        lines = [str(fault) for fault in self.faults[:MAX_PRINTED_FAULTS]]
        left = len(self.faults) - len(lines)
        if left:
            lines.append(f"... and {left} more")
        return "\n".join(lines)
