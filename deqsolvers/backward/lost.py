"""Samples at which f was never finite, and how they are kept out of the others' gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deqsolvers.modes import may_look
from deqsolvers.solution import Solution, Status
from deqsolvers.state import map_rows, take_rows


def leave_out_lost(
    inputs: tuple[Any, ...], solution: Solution
) -> tuple[tuple[Any, ...], Any, Callable[[Any], Any]]:
    """What to record f on, and how to make the layer's state of what comes of that.

    Zero times NaN is NaN: a sample at which f was never finite would spoil the gradients of all
    that samples share, though the loss masks it. Another one takes its place in the recorded
    calls, and its own state is put back as a constant.

    Nothing is done where the host may not look, or no other sample is left.

    Returns:
        The inputs, the state ``solution.z``, and a function of the differentiable state.
    """
    status = solution.status
    if not may_look(status):
        return inputs, solution.z, _same
    lost = (status == Status.NON_FINITE) & solution.residual.isinf()
    if not lost.any() or lost.all():
        return inputs, solution.z, _same
    rows = torch.arange(len(lost))
    rows[lost] = (~lost).nonzero()[0]

    def take(leaf: Tensor) -> Tensor:
        return take_rows(leaf, rows.to(leaf.device))

    def put_back(leaf: Tensor, constant: Tensor) -> Tensor:
        return torch.where(lost.reshape(-1, *[1] * (leaf.dim() - 1)), constant, leaf)

    return (
        map_rows(take, inputs, len(lost)),
        pytree.tree_map(take, solution.z),
        lambda state: pytree.tree_map(put_back, state, solution.z),
    )


def _same(state: Any) -> Any:
    return state
