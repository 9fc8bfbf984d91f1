"""Implicit derivatives under torch.func and forward-mode differentiation."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqsolvers.modes import differentiations, undifferentiated

_Map = Callable[[Tensor], Tensor]

_FIRST_ORDER = (
    "Implicit gives first derivatives under torch.func and forward-mode differentiation; this asks "
    "for a second one. Use torch.autograd.grad(..., create_graph=True), which works to any order, "
    "or backward='unrolled'"
)
_OUTSIDE_VMAP = (
    "a DEQ with an Implicit backward pass can be differentiated inside of vmap, as in "
    "vmap(grad(...)), but not from outside of it. Fold the mapped dimension into the batch instead"
)


def attach_functional(f: _Map, fixed: Tensor, adjoint: Callable[[_Map, Tensor], Tensor]) -> Tensor:
    """``fixed`` with the derivatives of the fixed point w.r.t. all that f depends on.

    Args:
        f: a map of (B, features) matrices.
        fixed: its fixed point, a constant.
        adjoint: solves ``u = v + product(u)``, given the product and v.

    Raises:
        NotImplementedError: a second derivative is asked for, here or when it is taken.
    """
    if differentiations() > 1:
        raise NotImplementedError(_FIRST_ORDER)
    recorded = f(fixed)
    with undifferentiated():
        pull = torch.func.vjp(f, fixed)[1]
    return _Derivative.apply(recorded, fixed, _Jacobian(pull, fixed), adjoint)


class _Jacobian:
    """Products with the Jacobian of f; those from the right transpose those from the left."""

    def __init__(self, pull: Callable[[Tensor], tuple[Tensor]], like: Tensor):
        self._pull = pull
        self._like = like

    def from_left(self, u: Tensor) -> Tensor:
        return self._pull(u)[0]

    def from_right(self) -> _Map:
        push = torch.func.vjp(self.from_left, torch.zeros_like(self._like))[1]
        return lambda w: push(w)[0]


class _Derivative(torch.autograd.Function):
    """The fixed point, whose tangent is that of one call of f there times (I - J)^-1."""

    @staticmethod
    def forward(recorded: Tensor, fixed: Tensor, jacobian: _Jacobian, adjoint: Any) -> Tensor:
        return fixed.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, _, ctx.jacobian, ctx.adjoint = inputs
        ctx.save_for_backward(output)
        ctx.save_for_forward(output)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None]:
        with undifferentiated():
            u = ctx.adjoint(ctx.jacobian.from_left, grads[0])
        return _Refuse.apply(u, ctx.saved_tensors[0], _FIRST_ORDER), None, None, None

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        with undifferentiated():
            w = ctx.adjoint(ctx.jacobian.from_right(), tangents[0])
        return _Refuse.apply(w, ctx.saved_tensors[0], _FIRST_ORDER)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int | None]:
        recorded, fixed, *_ = inputs
        return _Refuse.apply(fixed, recorded, _OUTSIDE_VMAP), in_dims[1]


class _Refuse(torch.autograd.Function):
    """The first argument, whose derivative w.r.t. what the second one depends on is an error."""

    @staticmethod
    def forward(value: Tensor, witness: Tensor, message: str) -> Tensor:
        return value.clone()

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        ctx.message = inputs[2]

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None, None]:
        raise NotImplementedError(ctx.message)

    @staticmethod
    def jvp(ctx: Any, *tangents: Any) -> Tensor:
        raise NotImplementedError(ctx.message)

    @staticmethod
    def vmap(info: Any, in_dims: Any, *inputs: Any) -> tuple[Tensor, int | None]:
        return _Refuse.apply(*inputs), in_dims[0]
