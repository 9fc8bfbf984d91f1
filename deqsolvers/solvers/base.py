"""What a solver is: hyper-parameters, and `init` and `step` over an explicit memory."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass, fields
from numbers import Integral, Real
from typing import Any

from torch import Tensor

from deqsolvers.solvers.history import Gram, History
from deqsolvers.state import Layout
from deqsolvers.workspace import Workspace


@dataclass
class Memory:
    """What a solver remembers between steps: tensors, `History` and `Gram`, with a row a sample."""

    def take(self, rows: Tensor) -> None:
        """Keep only these rows, because the other samples left the batch."""
        for field in fields(self):
            value = getattr(self, field.name)
            if isinstance(value, Tensor):
                setattr(self, field.name, value[rows])
            elif isinstance(value, (History, Gram)):
                value.take(rows)


class Solver(ABC):
    """A method that turns (z, f(z)) into the next z.

    A solver knows nothing of stopping, statuses or autograd: `deqsolvers.fixed_point` owns those.
    To add a method, write these two functions; they see (B, features) matrices and must treat every
    row on its own. They must not write into their arguments.

    Attributes:
        explores: whether an iterate may be a probe, which is no answer, so that ``final="last"``
            cannot return it.
        workspace: its large tensors; ``self.workspace.like(g)`` serves as ``out=``.
    """

    explores: bool = False
    workspace: Workspace

    def __new__(cls, *args: Any, **options: Any) -> Any:
        # Not in __init__, which a method may leave out.
        solver = super().__new__(cls)
        vars(solver)["workspace"] = Workspace()
        return solver

    @abstractmethod
    def init(self, z: Tensor, layout: Layout) -> Any:
        """Fresh memory for a solve that starts at ``z`` (B, features)."""

    @abstractmethod
    def step(self, memory: Any, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        """The iterate after ``z``, given ``fz = f(z)`` and ``g = fz - z``, all (B, features)."""

    def start(self, *inputs: Any) -> Any | None:
        """A state to start from where the caller gives none; None if the method has no opinion."""
        return None


def check_fraction(name: str, value: float) -> float:
    """``value`` if it lies in (0, 1]; ValueError otherwise."""
    if not isinstance(value, Real) or not 0 < value <= 1:
        raise ValueError(f"{name} must be above 0 and at most 1, got {value!r}")
    return float(value)


def check_solver(solver: object) -> None:
    """TypeError unless ``solver`` is a `Solver` object."""
    if not isinstance(solver, Solver):
        raise TypeError(f"solver must be a Solver such as Anderson(), got {solver!r}")


def check_count(name: str, value: int, least: int = 1) -> int:
    """``value`` if it is an integer of at least ``least``; ValueError otherwise."""
    if isinstance(value, bool) or not isinstance(value, Integral) or value < least:
        raise ValueError(f"{name} must be an integer of at least {least}, got {value!r}")
    return int(value)
