"""Inexact gradients from a few recorded calls of f."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from deqsolvers.backward.base import Backward, on_matrices
from deqsolvers.backward.lost import leave_out_lost
from deqsolvers.modes import may_look
from deqsolvers.solution import Solution, Status
from deqsolvers.solvers.base import check_count, check_fraction
from deqsolvers.state import Layout


class Phantom(Backward):
    """Phantom gradient: backpropagate through a few damped steps of f from the fixed point.

    The state that the layer returns is the last of these steps, a little nearer to z* than
    ``solution.z``, to which ``solution.residual`` belongs.

    Args:
        steps: how many steps are recorded; memory grows with it.
        damping: the step ``z <- z + damping (f(z) - z)``, in (0, 1].

    Source: Geng et al., "On training implicit models" (NeurIPS 2021).
    """

    def __init__(self, steps: int = 5, damping: float = 0.5):
        self.steps = check_count("steps", steps)
        self.damping = check_fraction("damping", damping)

    def __repr__(self) -> str:
        return f"Phantom(steps={self.steps}, damping={self.damping})"

    def attach(self, f: Callable[..., Any], inputs: tuple[Any, ...], solution: Solution) -> Any:
        inputs, state, finish = leave_out_lost(inputs, solution)
        layout = Layout.of(state)
        matrix_f = on_matrices(f, inputs, layout)
        start = z = layout.flatten(state).detach()
        # From where f blows up further steps may overflow, and NaN spreads to the gradients of all
        # that samples share. Such a sample takes one step, from its best iterate.
        lost = None
        if self.steps > 1 and not (may_look(z) and bool((solution.status > Status.DIVERGED).all())):
            lost = (solution.status <= Status.DIVERGED).unsqueeze(1)
        for step in range(self.steps):
            fz = matrix_f(z)
            z = fz if self.damping == 1 else torch.lerp(z, fz, self.damping)
            if lost is not None and step + 1 < self.steps:
                z = torch.where(lost, start, z)
        return finish(layout.unflatten(z))


class JacobianFree(Phantom):
    """Jacobian-free backpropagation: one recorded call of f at the fixed point, (I - J)^-1 taken as
    I.

    Source: Fung et al., "JFB: Jacobian-free backpropagation for implicit networks" (AAAI 2022).
    """

    def __init__(self) -> None:
        super().__init__(steps=1, damping=1.0)

    def __repr__(self) -> str:
        return "JacobianFree()"
