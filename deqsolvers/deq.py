"""The deep-equilibrium layer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, fields
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deqsolvers.backward import Backward, get_backward
from deqsolvers.dropout import hold_masks
from deqsolvers.fixed_point import iterate
from deqsolvers.modes import forward_mode, physical, undifferentiated
from deqsolvers.normalization import cached_weights
from deqsolvers.options import Options
from deqsolvers.precision import widen
from deqsolvers.solution import ConvergenceError, Solution
from deqsolvers.solvers import Anderson, Solver
from deqsolvers.solvers.base import check_solver

_OPTIONS = {field.name for field in fields(Options)}


class DEQ(nn.Module):
    """A layer whose output is the fixed point ``z* = f(z*, *inputs)`` (Bai, Kolter & Koltun 2019).

    Args:
        f: called as ``f(z, *inputs)``; usually an nn.Module. Returns a state of the structure and
            shapes of z. All tensors are batch first. Only an nn.Module registers its parameters
            with the layer: those that a function or a bound method uses get gradients as well, but
            the layer's ``parameters()``, ``state_dict()`` and ``to()`` do not know them.
        solver: the forward method; `Anderson` with its defaults if None. A solver that is an
            nn.Module (`HyperSolver`) is registered as a submodule.
        backward: "implicit", "phantom", "jacobian-free", "shine", "unrolled" or a `Backward`
            object.
        z0: makes the initial state, called as ``z0(*inputs)``, unless the solver has an initializer
            of its own (`HyperSolver`). By default zeros like the first floating-point input.
        tol, max_steps, relative, final, stall_after, drop_converged: see `fixed_point`.
        raise_on_failure: raise `ConvergenceError` if a forward solve fails (synchronises).

    The layer returns ``(z, solution)``: z is differentiable w.r.t. the inputs, f's parameters and
    whatever else f depends on; ``solution`` is the forward `Solution`. With gradients disabled only
    the solve runs; with them f is called once more, by `Phantom` as often as it has steps, even
    where nothing turns out to need them.

    Raises:
        TypeError: f or ``z0`` is not callable, the solver is no `Solver`, or ``backward`` is
            neither a name nor a `Backward`.
        ValueError: an option is out of range.
    """

    def __init__(
        self,
        f: Callable[..., Any],
        solver: Solver | None = None,
        *,
        backward: str | Backward = "implicit",
        z0: Callable[..., Any] | None = None,
        tol: float | None = 1e-4,
        max_steps: int = 50,
        relative: bool = True,
        final: Literal["best", "last"] = "best",
        stall_after: int = 30,
        drop_converged: bool = True,
        raise_on_failure: bool = False,
    ):
        super().__init__()
        if not callable(f):
            raise TypeError(f"f must be callable, as f(z, *inputs), got {f!r}")
        if z0 is not None and not callable(z0):
            raise TypeError(
                "z0 must be a function of the inputs that makes the initial state, got a "
                f"{type(z0).__name__}; give a state itself to the call: deq(x, z0=...)"
            )
        self.f = f
        self.solver = Anderson() if solver is None else solver
        check_solver(self.solver)
        self.backward = get_backward(backward)
        self.z0 = z0
        self.options = Options(tol, max_steps, relative, final, stall_after, drop_converged)
        self.raise_on_failure = raise_on_failure

    def extra_repr(self) -> str:
        return f"solver={type(self.solver).__name__}, {self.options}"

    def forward(self, *inputs: Any, z0: Any = None) -> tuple[Any, Solution]:
        """Solve for the inputs; ``z0`` overrides the initial state (a warm start)."""
        if not torch.is_grad_enabled() and not forward_mode():
            solution = self.solve(*inputs, z0=z0)
            return solution.z, solution
        if z0 is None:
            z0 = self.initial_state(*inputs)
        with cached_weights(self.f):
            f, held = hold_masks(self.f, inputs, z0)
            z, solution = self.backward.solve(f, z0, held, self.solver, self.options)
        self._check(solution)
        return z, solution

    def solve(self, *inputs: Any, z0: Any = None, trace: bool = False) -> Solution:
        """The forward solve alone, without gradients."""
        with undifferentiated(), cached_weights(self.f):
            if z0 is None:
                z0 = self.initial_state(*inputs)
            f, held = hold_masks(self.f, inputs, z0)
            solution = iterate(f, z0, held, self.solver, self.options, trace)
        self._check(solution)
        return solution

    def _check(self, solution: Solution) -> None:
        if self.raise_on_failure and bool(physical(solution.failed).any()):
            raise ConvergenceError(solution)

    def initial_state(self, *inputs: Any, solver: Solver | None = None) -> Any:
        """Where a solve without ``z0`` starts; ``solver`` takes the place of the layer's."""
        started = (self.solver if solver is None else solver).start(*inputs)
        if started is not None:
            return widen(started)
        if self.z0 is not None:
            return widen(self.z0(*inputs))
        for leaf in pytree.tree_leaves(inputs):
            if isinstance(leaf, Tensor) and (leaf.is_floating_point() or leaf.is_complex()):
                return widen(torch.zeros_like(leaf))
        raise ValueError(
            "the DEQ has no floating-point input to take the state's shape from; give z0"
        )

    def __setattr__(self, name: str, value: Any) -> None:
        if name in _OPTIONS:
            raise AttributeError(
                f"{name} of a DEQ is fixed; deq.with_solver({name}=...) makes a layer that shares "
                "f and has another"
            )
        super().__setattr__(name, value)

    def with_solver(self, solver: Solver | None = None, **changes: Any) -> DEQ:
        """A DEQ that shares f (and its parameters) but solves with ``solver``.

        Args:
            solver: None keeps this layer's.
            changes: any of ``backward``, ``z0``, ``raise_on_failure`` and the options of
                `fixed_point` that should differ.
        """
        options = {**asdict(self.options), **changes}
        options.setdefault("backward", self.backward)
        options.setdefault("z0", self.z0)
        options.setdefault("raise_on_failure", self.raise_on_failure)
        solver = self.solver if solver is None else solver
        other = DEQ(self.f, solver, **options)
        other.training = self.training  # f's modules, which may differ, keep theirs
        if isinstance(solver, nn.Module):
            solver.train(self.training)
        return other
