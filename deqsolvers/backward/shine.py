"""SHINE: the forward solver's inverse Jacobian, used again for the gradient."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from deqsolvers.backward.base import Backward, on_matrices
from deqsolvers.backward.graph import refuse_several
from deqsolvers.backward.lost import leave_out_lost
from deqsolvers.fixed_point import iterate
from deqsolvers.modes import forward_mode, transforming
from deqsolvers.normalization import forget_unrecorded_weights
from deqsolvers.options import Options
from deqsolvers.solution import Solution
from deqsolvers.solvers import Broyden, Solver
from deqsolvers.state import Layout


class Shine(Backward):
    """Gradients from the inverse Jacobian that Broyden's method built on its way to z*.

    Where `Implicit` solves ``u = (I - J)^-T v``, this takes ``u = -H^T v``, H the forward solver's
    estimate of the inverse Jacobian of f(z) - z: no further evaluation, one recorded call of f. A
    sample whose estimate is longer than ``fallback`` times v gets v itself, which is the
    Jacobian-free gradient. It cannot be differentiated again.

    The forward solver must be `Broyden`, with a memory of as many steps as the solve may take if H
    is not to lose its first terms.

    Args:
        fallback: the largest ratio ``||u|| / ||v||`` that is trusted.

    Source: Ramzi et al., "SHINE: sharing the inverse estimate" (ICLR 2022).
    """

    def __init__(self, fallback: float = 1.3):
        if not fallback > 0:
            raise ValueError(f"fallback must be above 0, got {fallback}")
        self.fallback = fallback

    def __repr__(self) -> str:
        return f"Shine(fallback={self.fallback})"

    def solve(
        self,
        f: Callable[..., Any],
        z0: Any,
        inputs: tuple[Any, ...],
        solver: Solver,
        options: Options,
    ) -> tuple[Any, Solution]:
        if not isinstance(solver, Broyden):
            raise TypeError(f"Shine needs the forward solver Broyden, got {solver!r}")
        if transforming() or forward_mode():
            raise NotImplementedError(
                "Shine knows neither torch.func nor forward-mode differentiation; use "
                "torch.autograd, or another backward pass such as 'implicit'"
            )
        # The estimates of samples that left the batch would be lost.
        options = replace(options, drop_converged=False)
        with torch.no_grad(), forget_unrecorded_weights():
            solution = iterate(f, z0, inputs, solver, options, keep_memory=True)
        memory, solution.memory = solution.memory, None
        inputs, state, finish = leave_out_lost(inputs, solution)
        layout = Layout.of(state)
        fixed = layout.flatten(state).detach()
        recorded = on_matrices(f, inputs, layout)(fixed)
        if memory is None:  # an empty batch
            return layout.unflatten(recorded), solution
        if not recorded.requires_grad:  # nothing to train
            return solution.z, solution

        def adjoint(v: Tensor) -> Tensor:
            u = -solver.inverse_transposed(memory, v)
            trusted = _norm(u) <= self.fallback * _norm(v)  # false for NaN
            return torch.where(trusted, u, v)

        attached = _ShineGradient.apply(adjoint, fixed, recorded)
        return finish(layout.unflatten(attached)), solution

    def attach(self, f: Callable[..., Any], inputs: tuple[Any, ...], solution: Solution) -> Any:
        raise TypeError("Shine needs the memory of the forward solve; use its solve method")


def _norm(matrix: Tensor) -> Tensor:
    return torch.linalg.vector_norm(matrix, dim=1, keepdim=True)


class _ShineGradient(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, adjoint: Callable[[Tensor], Tensor], fixed: Tensor, recorded: Tensor
    ) -> Tensor:
        ctx.adjoint = adjoint
        return fixed.clone()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, Tensor]:
        refuse_several(grads[0], "Shine")
        return None, None, ctx.adjoint(grads[0])
