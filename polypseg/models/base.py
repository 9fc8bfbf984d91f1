"""What the networks have in common: their answer, and how an implicit one is used."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from deqsolvers import DEQ, Solution

STRIDE = 32  # of the coarsest feature map; image sides must be multiples of it


@dataclass
class Prediction:
    """What a network returns.

    Attributes:
        logits: (B, classes, H, W) at the size of the images.
        solution: the fixed-point `Solution`; None after an explicit pass.
    """

    logits: Tensor
    solution: Solution | None


class SegmentationModel(nn.Module):
    """A network from normalised images (B, 3, H, W) to a `Prediction`.

    ``explicit`` is one ordinary pass; ``forward`` is the same unless the network is implicit.

    Attributes:
        head: reads the prediction out; its last layer alone depends on the number of classes.
    """

    head: nn.Sequential

    def explicit(self, images: Tensor) -> Prediction:
        """Predict in one pass, without a solver."""
        raise NotImplementedError

    def forward(self, images: Tensor) -> Prediction:
        return self.explicit(images)


class ImplicitModel(SegmentationModel):
    """A network that predicts on a fixed point z* = f(z*, e) of features e of the image.

    A subclass makes ``deq``, the `DEQ` layer around f, and the three methods below. Replace ``deq``
    by ``deq.with_solver(...)`` to solve differently.
    """

    deq: DEQ

    def features(self, images: Tensor) -> Tensor:
        """What f takes beside z, computed once an image."""
        raise NotImplementedError

    def zero_state(self, e: Tensor) -> Any:
        """The state that an explicit pass and the classic solvers start from."""
        raise NotImplementedError

    def read_out(self, z: Any) -> Tensor:
        """Logits (B, classes, H, W) from a state."""
        raise NotImplementedError

    def explicit(self, images: Tensor) -> Prediction:
        """One evaluation of f from z = 0."""
        e = self.features(images)
        return Prediction(self.read_out(self.deq.f(self.zero_state(e), e)), None)

    def forward(self, images: Tensor, z0: Any = None) -> Prediction:
        """Predict on the fixed point; the solve starts from the state ``z0`` if given."""
        z, solution = self.deq(self.features(images), z0=z0)
        return Prediction(self.read_out(z), solution)


def check_sides(images: Tensor) -> None:
    """Raise ValueError unless the sides of images (B, 3, H, W) are multiples of `STRIDE`."""
    height, width = images.shape[-2:]
    if height % STRIDE or width % STRIDE:
        raise ValueError(
            f"image sides must be multiples of {STRIDE}, got {height} x {width}; resize first"
        )
