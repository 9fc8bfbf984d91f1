"""What a training minimises, as one module, so that several processes see a single forward pass."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from deqsolvers import Backward, Phantom, Solution, jacobian_regularizer
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
    """The segmentation loss of a network and, on its fixed point, the Jacobian regulariser.

    Args:
        model: its `DEQ` is set up for the implicit phase if ``settings`` are of that.
        settings: of the phase.
    """

    def __init__(self, model: SegmentationModel, settings: PhaseConfig):
        super().__init__()
        self.model = model
        self.weight = 0.0
        if isinstance(settings, ImplicitConfig):
            assert isinstance(model, ImplicitModel)
            self.weight = settings.jacobian
            model.deq = model.deq.with_solver(
                build_solver(settings.solver, settings.memory),
                backward=_backward(settings),
                tol=settings.tol,
                max_steps=settings.max_steps,
            )

    def forward(
        self, images: Tensor, masks: Tensor, solves: bool = False, regularized: bool = False
    ) -> Outcome:
        """For images (B, 3, H, W) and masks (B, 1, H, W) of class numbers.

        Args:
            solves: predict on the fixed point instead of after one evaluation of f.
            regularized: add the Jacobian regulariser.
        """
        model = self.model
        if not solves:
            loss = segmentation_loss(model.explicit(images).logits, masks)
            return Outcome(loss, loss)
        assert isinstance(model, ImplicitModel)
        e = model.features(images)
        z, solution = model.deq(e)
        loss = segmentation_loss(model.read_out(z), masks)
        if not regularized:
            return Outcome(loss, loss, solution=solution)
        # Fused attention has no second derivative on the CPU.
        with sdpa_kernel(SDPBackend.MATH):
            jacobian = jacobian_regularizer(model.deq.f, solution.z, (e,))
        return Outcome(loss + self.weight * jacobian, loss, jacobian, solution)


def _backward(settings: ImplicitConfig) -> Backward:
    if settings.backward == "phantom":
        return Phantom(settings.backward_steps, damping=1.0)
    return get_backward(settings.backward)
