"""Exact gradients by the implicit function theorem."""

from __future__ import annotations

import contextlib
import copy
import warnings
from collections.abc import Callable
from dataclasses import replace
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deqsolvers.backward.again import keep_tensors
from deqsolvers.backward.base import Backward
from deqsolvers.backward.functional import attach_functional
from deqsolvers.backward.graph import (
    closure_leaves,
    refuse_computed_targets,
    refuse_other_leaves,
    refuse_several,
)
from deqsolvers.backward.lost import leave_out_lost
from deqsolvers.fixed_point import iterate
from deqsolvers.modes import forward_mode, physical, transforming, undifferentiated
from deqsolvers.options import Options
from deqsolvers.precision import Autocast, coarsest, precision_floor
from deqsolvers.solution import ConvergenceWarning, Solution
from deqsolvers.solvers import Anderson, Solver
from deqsolvers.solvers.base import check_solver
from deqsolvers.state import Layout

_Map = Callable[[Tensor, tuple[Tensor, ...]], Tensor]  # of z and of what f depends on as inputs

_TOL = 1e-4  # where the precision allows it

_CLOSED_OVER = (
    "with create_graph=True the gradient of a computed tensor that f closes over is not known; "
    "pass that tensor to the DEQ as an input of f. One that all samples share, w, goes in as "
    "w.expand(B, *w.shape), for a batch of B, and f multiplies by it with torch.bmm, say"
)
_THIRD_DERIVATIVE = (
    "Implicit gives third and higher derivatives with respect to leaf tensors only, not to a "
    "computed tensor. Differentiate with respect to the leaf that it was computed from, pass "
    "x.detach().requires_grad_() to the DEQ, or use backward='unrolled'. If no third derivative is "
    "wanted, leave create_graph=True out of the second one"
)


class Implicit(Backward):
    """The implicit function theorem: exact gradients at the fixed point, whatever solver found it.

    With v the gradient at z*, the backward pass solves ``u = v + J^T u``, J = df/dz at z*, by any
    fixed-point solver at one vector-Jacobian product a step, and passes u through one call of f
    (Bai, Kolter & Koltun 2019, theorem 1). Memory does not depend on the number of forward steps.
    The pass may be repeated (``retain_graph``), interleaved with other solves, and differentiated
    again, to any order. With ``create_graph`` gradients reach the inputs and the leaf tensors
    (parameters) that f depends on. A computed tensor in f's closure must then be passed as input if
    its own gradient is wanted. That is an error where torch can tell; it cannot where one pass asks
    for the gradients of both that tensor and something it was computed from, and the former is
    then too small. Third and higher derivatives are taken with respect to leaf tensors only;
    another target is an error.

    Under torch.func (grad, vjp, jvp, jacrev, jacfwd, vmap of these) and forward-mode
    differentiation it gives first derivatives; a second one is an error that names the way out.

    A backward solve that misses its tolerance raises a `ConvergenceWarning`; its outcome stands in
    ``Solution.backward`` of the forward solution.

    Args:
        solver: method for u; `Anderson` with its defaults if None.
        tol: relative tolerance for u. "auto" is 1e-4 or, with a state in half precision or under
            autocast, what that can reach (6e-4 for fp16, 5e-3 for bf16). None runs exactly
            ``max_steps`` steps, and on a device other than the CPU does not wait to see how they
            went, for CUDA graphs.
        max_steps: most steps for u.
    """

    def __init__(
        self,
        solver: Solver | None = None,
        tol: float | Literal["auto"] | None = "auto",
        max_steps: int = 50,
    ):
        self.solver = Anderson() if solver is None else solver
        check_solver(self.solver)
        self.tol = tol
        # The recorded graph of f spans the whole batch, so samples cannot leave it.
        self.options = Options(_TOL if tol == "auto" else tol, max_steps, drop_converged=False)

    def __repr__(self) -> str:
        return (
            f"Implicit(solver={self.solver!r}, tol={self.tol!r}, "
            f"max_steps={self.options.max_steps})"
        )

    def attach(self, f: Callable[..., Any], inputs: tuple[Any, ...], solution: Solution) -> Any:
        inputs, start, finish = leave_out_lost(inputs, solution)
        layout = Layout.of(start)
        leaves, structure = pytree.tree_flatten(inputs)
        places = [
            place
            for place, leaf in enumerate(leaves)
            if isinstance(leaf, Tensor) and leaf.requires_grad
        ]

        autocast = _autocast_now(layout.device.type)

        def matrix_f(z: Tensor, variables: tuple[Tensor, ...]) -> Tensor:
            given = list(leaves)
            for place, variable in zip(places, variables, strict=True):
                given[place] = variable
            arguments = pytree.tree_unflatten(given, structure)
            with autocast():  # the backward pass may record f again outside of it
                return layout.flatten(f(layout.unflatten(z), *arguments))

        fixed = layout.flatten(start).detach()
        variables = tuple(leaves[place] for place in places)
        method = self._within(coarsest(layout.dtypes, Autocast(solution.z).dtype))
        if transforming() or forward_mode():
            fixed = attach_functional(
                lambda z: matrix_f(z, variables),
                fixed,
                lambda product, v: method.adjoint(product, v, solution),
            )
            return finish(layout.unflatten(fixed))
        again = keep_tensors(matrix_f, f)
        attached = method._attach(matrix_f, again, fixed, variables, solution)
        return finish(layout.unflatten(attached))

    def _within(self, dtype: torch.dtype) -> Implicit:
        """This, or where it may choose a copy whose tolerance ``dtype`` can reach."""
        if self.tol != "auto":
            return self
        method = copy.copy(self)
        method.options = replace(self.options, tol=max(_TOL, precision_floor(dtype)))
        return method

    def _attach(
        self,
        f: _Map,
        again: _Map,
        fixed: Tensor,
        variables: tuple[Tensor, ...],
        solution: Solution | None,
    ) -> Tensor:
        """``fixed``, a fixed point of ``f``, with its gradient.

        A pass that is differentiated calls ``again``, which is f as it is now. ``solution`` is that
        of the forward solve, None where the fixed point is a gradient itself.
        """
        leaf = fixed.detach().requires_grad_()
        aliases = tuple(variable.view_as(variable) for variable in variables)
        recorded = f(leaf, aliases)
        closure = closure_leaves(recorded, (leaf, *aliases))
        if not variables and not closure:
            return fixed  # f depends on nothing that needs a gradient
        attached = _ImplicitGradient.apply(
            self,
            again,
            solution,
            len(variables),
            tuple(alias.grad_fn for alias in aliases),
            fixed,
            leaf,
            recorded,
            *variables,
            *closure,
        )
        # A second derivative needs that tensor as it is; what the caller does in place (an
        # activation, a mask) must not reach it.
        return attached.clone()

    def adjoint(
        self, vjp: Callable[[Tensor], Tensor], v: Tensor, solution: Solution | None
    ) -> Tensor:
        """Solve ``u = v + vjp(u)`` without recording."""
        with undifferentiated():
            found = iterate(lambda u: v + vjp(u), v, (), self.solver, self.options)
        if solution is not None:
            solution.backward = found
        unseen = self.options.tol is None and not v.is_cpu
        if not unseen and bool(physical(found.failed).any()):
            # No numbers, so that Python's filters show each kind of failure once and not at every
            # update of a training.
            kinds = sorted({status for status in found.statuses() if status < 0}, reverse=True)
            causes = " ".join(f"{kind.name}: {kind.sentence}" for kind in kinds)
            warnings.warn(
                "the implicit backward pass did not converge for some samples, which "
                f"Solution.backward of the forward solution names. {causes}",
                ConvergenceWarning,
                stacklevel=2,
            )
        return found.z


def _autocast_now(device_type: str) -> Callable[[], contextlib.AbstractContextManager[Any]]:
    """A context that restores the autocast setting in force here."""
    if device_type == "meta":  # which does not have it
        return contextlib.nullcontext
    enabled = torch.is_autocast_enabled(device_type)
    dtype = torch.get_autocast_dtype(device_type)
    return lambda: torch.autocast(device_type, dtype=dtype, enabled=enabled)


class _ImplicitGradient(torch.autograd.Function):
    """Identity on the fixed point whose gradient is multiplied by (I - J)^-T on its way to f.

    In an ordinary backward pass that gradient goes through ``recorded``, the call of f that the
    forward pass recorded. A pass that is itself differentiated (create_graph) cannot use it,
    because there z* is a constant. It records f again at this node's own output and returns the
    gradients of all that f depends on (``variables``, and the leaves in f's closure) itself.
    """

    @staticmethod
    def forward(
        ctx: Any,
        method: Implicit,
        f: _Map,
        solution: Solution | None,
        count: int,
        aliases: tuple[Any, ...],
        fixed: Tensor,
        leaf: Tensor,
        recorded: Tensor,
        *sources: Tensor,
    ) -> Tensor:
        ctx.method, ctx.f, ctx.solution = method, f, solution
        ctx.count, ctx.aliases = count, aliases
        ctx.set_materialize_grads(False)
        out = fixed.clone()
        ctx.save_for_backward(out, leaf, recorded, *sources)
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        (v,) = grads
        out, leaf, recorded, *sources = ctx.saved_tensors
        nothing = (None,) * 7
        if v is None:  # a closed gate stands between this pass and the output
            return (*nothing, None, *(None for _ in sources))
        refuse_several(v, "Implicit")
        if not torch.is_grad_enabled():
            u = ctx.method.adjoint(lambda u: _vjp(recorded, leaf, u), v, ctx.solution)
            return (*nothing, u, *(None for _ in sources))

        reason = _CLOSED_OVER if ctx.solution is not None else _THIRD_DERIVATIVE
        refuse_computed_targets(recorded, ctx.aliases, reason)
        gate = _Gate()
        z = gate(out)
        variables = tuple(gate(source) for source in sources[: ctx.count])
        again = ctx.f(z, variables)
        refuse_other_leaves(again, (z, *variables), sources[ctx.count :])
        fixed = ctx.method.adjoint(lambda u: _vjp(again, z, u), v.detach(), ctx.solution)

        def adjoint(u: Tensor, _: tuple[Tensor, ...]) -> Tensor:
            return v + _vjp(again, z, u, create_graph=True)

        # u is a fixed point too, so its gradient is attached in the same way.
        u = ctx.method._attach(adjoint, adjoint, fixed, (), None)
        targets = (*variables, *sources[ctx.count :])
        partial = torch.autograd.grad(again, targets, u, create_graph=True, allow_unused=True)
        gate.open = True
        return (*nothing, None, *partial)


class _Gate:
    """Makes aliases through which no gradient flows back until the gate is opened.

    It parts the partial derivatives of f, taken while it is closed, from their own dependence on
    the aliased tensors, which later passes need.
    """

    def __init__(self) -> None:
        self.open = False

    def __call__(self, x: Tensor) -> Tensor:
        return _Gated.apply(self, x)


class _Gated(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: _Gate, x: Tensor) -> Tensor:
        ctx.set_materialize_grads(False)
        ctx.gate = gate
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[None, Tensor | None]:
        return None, grads[0] if ctx.gate.open else None


def _vjp(fz: Tensor, z: Tensor, u: Tensor, create_graph: bool = False) -> Tensor:
    (product,) = torch.autograd.grad(
        fz, z, u, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(z) if product is None else product
