"""How gradients pass a fixed point; the forward solve itself is never recorded."""

from __future__ import annotations

import warnings
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqsolvers.fixed_point import Options, iterate
from deqsolvers.solution import ConvergenceWarning, Solution
from deqsolvers.solvers import Anderson, Solver
from deqsolvers.solvers.base import check_count, check_fraction
from deqsolvers.state import Layout


class Backward(ABC):
    """A way to attach gradients to the solution of a fixed point."""

    @abstractmethod
    def attach(self, f: Callable[..., Any], inputs: tuple[Any, ...], solution: Solution) -> Any:
        """A state near ``solution.z`` that is differentiable w.r.t. all that f depends on."""


class Implicit(Backward):
    """The implicit function theorem: exact gradients at the fixed point, whatever solver found it.

    With v the gradient at z*, the backward pass solves ``u = v + J^T u``, J = df/dz at z*, by any
    fixed-point solver at one vector-Jacobian product a step, and passes u through one call of f (Bai,
    Kolter & Koltun 2019, theorem 1). Memory does not depend on the number of forward steps. The pass
    may be repeated (``retain_graph``), interleaved with other solves, and differentiated again.

    A backward solve that misses its tolerance raises a `ConvergenceWarning`; its outcome stands in
    ``Solution.backward`` of the forward solution.

    Args:
        solver: method for u; `Anderson` with its defaults if None.
        tol: relative tolerance for u.
        max_steps: most steps for u.
    """

    def __init__(self, solver: Solver | None = None, tol: float = 1e-4, max_steps: int = 50):
        self.solver = solver or Anderson()
        # The recorded graph of f spans the whole batch, so samples cannot leave it.
        self.options = Options(tol, max_steps, drop_converged=False)

    def attach(self, f: Callable[..., Any], inputs: tuple[Any, ...], solution: Solution) -> Any:
        layout = Layout.of(solution.z)
        fixed = layout.flatten(solution.z).detach()
        matrix_f = _on_matrices(f, inputs, layout)
        return layout.unflatten(self._attach(matrix_f, fixed, layout, solution))

    def _attach(
        self,
        f: Callable[[Tensor], Tensor],
        fixed: Tensor,
        layout: Layout | None,
        solution: Solution | None,
    ) -> Tensor:
        leaf = fixed.detach().requires_grad_()
        with torch.enable_grad():
            recorded = f(leaf)
        if recorded.requires_grad is False or recorded.grad_fn is None:
            return fixed  # f depends on nothing that is trained
        return _ImplicitGradient.apply(self, f, solution, fixed, leaf, recorded)

    def adjoint(
        self, vjp: Callable[[Tensor], Tensor], v: Tensor, solution: Solution | None
    ) -> Tensor:
        """Solve ``u = v + vjp(u)`` without recording."""
        with torch.no_grad():
            found = iterate(lambda u: v + vjp(u), v, (), self.solver, self.options)
        if solution is not None:
            solution.backward = found
        if bool(found.failed.any()):
            warnings.warn(
                f"the implicit backward pass did not converge: {found.describe()}",
                ConvergenceWarning,
                stacklevel=2,
            )
        return found.z


class _ImplicitGradient(torch.autograd.Function):
    """Identity on the fixed point whose gradient is multiplied by (I - J)^-1 on its way to f."""

    @staticmethod
    def forward(
        ctx: Any,
        method: Implicit,
        f: Callable[[Tensor], Tensor],
        solution: Solution | None,
        fixed: Tensor,
        leaf: Tensor,
        recorded: Tensor,
    ) -> Tensor:
        ctx.method, ctx.f, ctx.solution = method, f, solution
        out = fixed.clone()
        ctx.save_for_backward(out, leaf, recorded)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (v,) = grads
        out, leaf, recorded = ctx.saved_tensors
        method = ctx.method
        if not torch.is_grad_enabled():

            def vjp(u: Tensor) -> Tensor:
                return _vjp(recorded, leaf, u, create_graph=False)

            return None, None, None, None, None, method.adjoint(vjp, v, ctx.solution)

        # The caller differentiates this pass (create_graph). J depends on z*, which in turn depends
        # on the parameters, so f is recorded again at `out`, whose own gradient is implicit; and
        # u is a fixed point itself, so its gradient is attached in the same way.
        again = ctx.f(out)
        adjoint_map = _AdjointMap(again, out, v)
        fixed = method.adjoint(adjoint_map.constant, v.detach(), ctx.solution)
        u = method._attach(adjoint_map, fixed, None, None)
        return None, None, None, None, None, u


class _AdjointMap:
    """``u -> v + J^T u``, recorded so that v and J stay differentiable."""

    def __init__(self, fz: Tensor, z: Tensor, v: Tensor):
        self.fz, self.z, self.v = fz, z, v

    def __call__(self, u: Tensor) -> Tensor:
        return self.v + _vjp(self.fz, self.z, u, create_graph=True)

    def constant(self, u: Tensor) -> Tensor:
        """``J^T u`` without recording."""
        return _vjp(self.fz, self.z, u, create_graph=False)


def _vjp(fz: Tensor, z: Tensor, u: Tensor, create_graph: bool) -> Tensor:
    (product,) = torch.autograd.grad(
        fz, z, u, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(z) if product is None else product


class Phantom(Backward):
    """Phantom gradient: backpropagate through a few damped steps of f from the fixed point.

    Args:
        steps: how many steps are recorded; memory grows with it.
        damping: the step ``z <- z + damping (f(z) - z)``, in (0, 1].

    Source: Geng et al., "On training implicit models" (NeurIPS 2021).
    """

    def __init__(self, steps: int = 5, damping: float = 0.5):
        self.steps = check_count("steps", steps)
        self.damping = check_fraction("damping", damping)

    def attach(self, f: Callable[..., Any], inputs: tuple[Any, ...], solution: Solution) -> Any:
        layout = Layout.of(solution.z)
        matrix_f = _on_matrices(f, inputs, layout)
        z = layout.flatten(solution.z).detach()
        for _ in range(self.steps):
            fz = matrix_f(z)
            z = fz if self.damping == 1 else torch.lerp(z, fz, self.damping)
        return layout.unflatten(z)


class JacobianFree(Phantom):
    """Jacobian-free backpropagation: one recorded call of f at the fixed point, (I - J)^-1 taken as I.

    Source: Fung et al., "JFB: Jacobian-free backpropagation for implicit networks" (AAAI 2022).
    """

    def __init__(self) -> None:
        super().__init__(steps=1, damping=1.0)


def _on_matrices(
    f: Callable[..., Any], inputs: tuple[Any, ...], layout: Layout
) -> Callable[[Tensor], Tensor]:
    return lambda matrix: layout.flatten(f(layout.unflatten(matrix), *inputs))


BACKWARDS: dict[str, type[Backward]] = {
    "implicit": Implicit,
    "phantom": Phantom,
    "jacobian-free": JacobianFree,
}


def get_backward(backward: str | Backward) -> Backward:
    """The object that ``backward`` names, with its defaults, or ``backward`` itself.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if isinstance(backward, Backward):
        return backward
    if backward not in BACKWARDS:
        raise ValueError(f"backward must be one of {', '.join(BACKWARDS)}, got {backward!r}")
    return BACKWARDS[backward]()
