"""What a training minimises, as one module, so that several processes see a single forward pass."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import _pytree as pytree

from deqsolvers import (
    Backward,
    Phantom,
    Solution,
    fixed_point_correction,
    jacobian_regularizer,
)
from deqsolvers.backward import get_backward
from polypseg.config import ImplicitConfig, PhaseConfig
from polypseg.losses import segmentation_loss
from polypseg.models import ImplicitModel, SegmentationModel, build_solver


class Outcome(NamedTuple):
    """The objective of some images, and what it consists of."""

    objective: Tensor
    loss: Tensor
    jacobian: Tensor | None = None
    solution: Solution | None = None


class Objective(nn.Module):
    """The segmentation loss of a network; in the implicit phase, that on its fixed point, the
    Jacobian regulariser and the loss on the way to the fixed point.

    Args:
        model: its `DEQ` is set up for the implicit phase if ``settings`` are of that.
        settings: of the phase.
    """

    def __init__(self, model: SegmentationModel, settings: PhaseConfig):
        super().__init__()
        self.model = model
        self.jacobian = self.correction = 0.0
        if isinstance(settings, ImplicitConfig):
            assert isinstance(model, ImplicitModel)
            self.jacobian, self.correction = settings.jacobian, settings.correction
            model.deq = model.deq.with_solver(
                build_solver(settings.solver, settings.memory),
                backward=_backward(settings),
                tol=settings.tol,
                max_steps=settings.max_steps,
            )

    def forward(
        self,
        images: Tensor,
        masks: Tensor,
        solves: bool = False,
        regularized: bool = False,
        early: int = 0,
    ) -> Outcome:
        """For images (B, 3, H, W) and masks (B, 1, H, W) of class numbers.

        Args:
            solves: predict on the fixed point instead of after one evaluation of f.
            regularized: add the Jacobian regulariser.
            early: add the loss of the iterate after this many steps of the solve; 0: of none.
        """
        model = self.model
        if not solves:
            loss = segmentation_loss(model.explicit(images).logits, masks)
            return Outcome(loss, loss)
        assert isinstance(model, ImplicitModel)
        e = model.features(images)
        if early:
            states, solution = fixed_point_correction(model.deq, e, steps=(early,))
        else:
            z, solution = model.deq(e)
            states = [z]
        # Read out together, so that the head normalises them alike, as it does at inference.
        logits = model.read_out(_stack(states)).split(len(images))
        loss = segmentation_loss(logits[-1], masks)
        objective = loss
        for iterate in logits[:-1]:
            objective = objective + self.correction * segmentation_loss(iterate, masks)
        if not regularized:
            return Outcome(objective, loss, solution=solution)
        # Fused attention has no second derivative on the CPU.
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = jacobian_regularizer(model.deq.f, solution.z, (e,))
        return Outcome(objective + self.jacobian * jacobian, loss, jacobian, solution)


def _stack(states: list[Any]) -> Any:
    """States (B, ...) as one state (len(states) B, ...)."""
    if len(states) == 1:  # spares a copy
        return states[0]
    return pytree.tree_map(lambda *parts: torch.cat(parts), *states)


def _backward(settings: ImplicitConfig) -> Backward:
    if settings.backward == "phantom":
        return Phantom(settings.backward_steps, damping=1.0)
    return get_backward(settings.backward)
