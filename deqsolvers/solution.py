"""What a solve returns: the solution, and for every sample a status that says cause and remedy."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from enum import IntEnum
from typing import Any

from torch import Tensor
from torch.utils import _pytree as pytree

from deqsolvers.modes import values


class Status(IntEnum):
    """How the solve of one sample ended.

    Positive codes are successes, negative ones failures, zero is neither; compare a whole batch
    with ``solution.status == Status.CONVERGED``.
    """

    STARTED_CONVERGED = 2
    CONVERGED = 1
    FIXED_STEPS = 0
    STEP_LIMIT = -1
    STALLED = -2
    DIVERGED = -3
    NON_FINITE = -4

    @property
    def sentence(self) -> str:
        """Cause and remedy in plain words."""
        return _SENTENCES[self]


_SENTENCES = {
    Status.STARTED_CONVERGED: "The initial state already met the tolerance; nothing to do.",
    Status.CONVERGED: "The residual met the tolerance.",
    Status.FIXED_STEPS: "The requested number of steps was run without a tolerance (tol=None).",
    Status.STEP_LIMIT: (
        "The residual was still above the tolerance when max_steps ran out. Raise max_steps, "
        "loosen tol, or use a faster solver (Anderson or Broyden instead of Picard, a larger "
        "memory)."
    ),
    Status.STALLED: (
        "The residual stopped falling. If it is near the precision floor of the dtype, loosen tol "
        "or use a wider dtype; if not, f is probably not contractive here: try damping below 1, "
        "another solver, or train f with a Jacobian regulariser. A part of f that is redrawn at "
        "every evaluation (dropout, drop path) also has this effect, and so has a fixed point of "
        "zero, where only an absolute residual can fall (relative=False)."
    ),
    Status.DIVERGED: (
        "The residual grew far beyond its first value. f expands here: try damping below 1, "
        "Anderson or Broyden instead of Picard, or train f with a Jacobian regulariser."
    ),
    Status.NON_FINITE: (
        "f returned NaN or infinity, or a step overflowed. The best iterate at which f was finite "
        "is returned, or the initial state if there is none. Look for overflow in half precision, "
        "a division by zero or a logarithm in f, or inputs or an initial state that are not finite."
    ),
}


class ConvergenceError(RuntimeError):
    """Raised with ``raise_on_failure=True``; ``solution`` holds what was reached."""

    def __init__(self, solution: Solution):
        self.solution = solution
        super().__init__(solution.describe())

    def __reduce__(self) -> tuple[Any, ...]:
        return ConvergenceError, (self.solution,)  # not the message, which it would be made of


class ConvergenceWarning(UserWarning):
    """A solve that nobody looks at (a backward pass, for instance) missed its tolerance."""


@dataclass
class Solution:
    """The outcome of a fixed-point solve over a batch of B samples.

    Attributes:
        z: the state, in the structure, shapes and dtypes of ``z0``. It is each sample's best
            measured iterate or, with ``final="last"``, the last one.
        status: (B,) int8, codes of `Status`.
        residual: (B,) ``||f(z) - z|| / ||f(z)||`` of the returned ``z`` (without the denominator
            when ``relative=False``). Infinity where f was never finite; NaN where ``final="last"``
            returned an iterate that was not measured.
        steps: (B,) solver updates that led from ``z0`` to the returned ``z``.
        evaluations: (B,) evaluations of f that each sample took part in until its status was
            decided.
        calls: how often f was called, on whatever part of the batch was left.
        rows_evaluated: samples summed over these calls: the work that was really done.
        trace: (calls, B) residual of every evaluated iterate, NaN once a sample was decided;
            ``None`` unless asked for.
        backward: the `Solution` of the implicit backward solve, once that ran.
        memory: the solver's memory at the end; kept only for backward passes that use it.

    It is a pytree: `torch.func` transforms and `torch.export` pass it through, without the memory.
    """

    z: Any
    status: Tensor
    residual: Tensor
    steps: Tensor
    evaluations: Tensor
    calls: int
    rows_evaluated: int
    trace: Tensor | None = None
    backward: Solution | None = None
    memory: Any = field(default=None, repr=False)

    def detach(self) -> Solution:
        """The same outcome with ``z`` cut off from the graph that made it."""
        return replace(self, z=pytree.tree_map(Tensor.detach, self.z))

    @property
    def converged(self) -> Tensor:
        """(B,) bool: which samples met the tolerance."""
        return self.status > 0

    @property
    def failed(self) -> Tensor:
        """(B,) bool: which samples did not do what was asked of them."""
        return self.status < 0

    def statuses(self) -> list[Status]:
        """The B statuses as enum members (synchronises with the device)."""
        return [Status(code) for code in values(self.status)]

    def describe(self) -> str:
        """How many samples ended how, each kind with cause and remedy (synchronises)."""
        statuses = self.statuses()
        residual = values(self.residual)
        lines = []
        for status, count in sorted(Counter(statuses).items(), key=lambda item: item[0]):
            rows = [row for row, other in enumerate(statuses) if other == status]
            shown = ", ".join(map(str, rows[:8])) + (", ..." if count > 8 else "")
            measured = [residual[row] for row in rows if not math.isnan(residual[row])]
            worst = f"worst residual {max(measured):.2e}" if measured else "not measured"
            lines.append(
                f"{count} of {len(statuses)} {status.name} (samples {shown}; {worst}): "
                f"{status.sentence}"
            )
        return "\n".join(lines) if lines else "The batch was empty."


def _flatten(solution: Solution) -> tuple[list[Any], tuple[int, int, bool, bool]]:
    children = [
        solution.z,
        solution.status,
        solution.residual,
        solution.steps,
        solution.evaluations,
    ]
    # A leaf that is None is no tensor, which some transforms refuse.
    later = [solution.trace, solution.backward]
    has_trace, has_backward = (child is not None for child in later)
    children += [child for child in later if child is not None]
    return children, (solution.calls, solution.rows_evaluated, has_trace, has_backward)


def _unflatten(children: Iterable[Any], context: tuple[int, int, bool, bool]) -> Solution:
    z, status, residual, steps, evaluations, *later = children
    calls, rows_evaluated, has_trace, has_backward = context
    trace = later[0] if has_trace else None
    backward = later[-1] if has_backward else None
    return Solution(z, status, residual, steps, evaluations, calls, rows_evaluated, trace, backward)


pytree.register_pytree_node(
    Solution, _flatten, _unflatten, serialized_type_name="deqsolvers.Solution"
)
