"""Fixed-point correction: losses on the way to the fixed point."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict, replace
from typing import Any

import torch
from torch import Tensor

from deqsolvers.backward import JacobianFree, Phantom
from deqsolvers.deq import DEQ
from deqsolvers.dropout import fixed_masks
from deqsolvers.normalization import cached_weights
from deqsolvers.solution import Solution
from deqsolvers.solvers.base import check_count
from deqsolvers.state import Layout


def fixed_point_correction(
    deq: DEQ,
    *inputs: Any,
    steps: Iterable[int],
    z0: Any = None,
    backward: Phantom | None = None,
) -> tuple[list[Any], Solution]:
    """Solve ``deq`` for the inputs and make some iterates on the way differentiable as well.

    A loss on them keeps the whole path of the solver useful, which steadies training and lets a
    solve be cut short. Give later states more weight::

        states, solution = fixed_point_correction(deq, x, steps=(2, 5))
        last = len(states) - 1
        loss = sum(0.8 ** (last - k) * criterion(state) for k, state in enumerate(states))

    Args:
        deq: the layer; its own backward pass serves the last state.
        inputs: of the layer.
        steps: the iterates after these numbers of solver updates, 0 being the initial state.
        z0: initial state, as for the layer.
        backward: the inexact gradient of the iterates; `JacobianFree` if None, which records one
            call of f for each.

    Returns:
        The states from the earliest iterate to the fixed point, and the forward `Solution`. An
        iterate is not returned as the solver made it but, like any state that `Phantom` makes, a
        step of f further on. There are fewer of them if the whole batch was decided sooner; a
        sample that was decided sooner, or whose iterate is not finite, appears with its result.

    Raises:
        ValueError: ``steps`` is empty or holds something else than integers from 0.

    Source: Bai, Geng, Savani & Kolter, "Deep equilibrium optical flow estimation" (CVPR 2022).
    """
    wanted = {check_count("steps", step, least=0) for step in steps}
    if not wanted:
        raise ValueError("steps is empty; name at least one iterate, or call the DEQ itself")
    if z0 is None:
        z0 = deq.initial_state(*inputs)
    layout = Layout.of(z0)
    iterates = _Iterates(deq.f, layout, wanted)
    watched = DEQ(
        iterates,
        deq.solver,
        backward=deq.backward,
        raise_on_failure=deq.raise_on_failure,
        **asdict(deq.options),
    )
    method = backward or JacobianFree()
    with fixed_masks(), cached_weights(deq.f):
        rows = torch.arange(len(layout.flatten(z0)), device=layout.device)
        z, solution = watched(rows, *inputs, z0=z0)
        states = [
            method.attach(deq.f, inputs, replace(solution, z=iterate))
            for iterate in iterates.complete(solution)
        ]
    return [*states, z], solution


class _Iterates:
    """The f of a DEQ that keeps the states it was evaluated at; its first input numbers samples."""

    def __init__(self, f: Callable[..., Any], layout: Layout, wanted: set[int]):
        self.f = f
        self.layout = layout
        self.wanted = wanted
        self.calls = 0
        # By step: samples, their states, and whether f was finite there.
        self.kept: dict[int, tuple[Tensor, Tensor, Tensor]] = {}

    def __call__(self, z: Any, rows: Tensor, *inputs: Any) -> Any:
        fz = self.f(z, *inputs)
        if self.calls in self.wanted:
            finite = self.layout.flatten(fz).detach().isfinite().all(1)
            self.kept[self.calls] = rows, self.layout.flatten(z).detach(), finite.unsqueeze(1)
        self.calls += 1
        return fz

    def complete(self, solution: Solution) -> list[Any]:
        """The kept states of the solve, in order, filled up from the solution to the whole batch.

        Later calls of f are not part of the solve and are not kept.
        """
        self.wanted = set()
        states = []
        for step in sorted(self.kept):
            if step < solution.calls:
                matrix = self.layout.flatten(solution.z).detach().clone()
                rows, kept, finite = self.kept[step]
                matrix[rows] = torch.where(finite, kept, matrix[rows])
                states.append(self.layout.unflatten(matrix))
        return states
