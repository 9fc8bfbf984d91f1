"""Learned linear maps of the mixed residual: a step towards Newton's, beyond the paper.

Newton's step is ``(I - J)^-1 g``; Anderson's and the HyperSolver's is a scalar beta times g. A
fixed linear map ``I + U V`` of low rank, learned together with alpha and beta, carries what the
Jacobians of all samples have in common. It moves nothing where the residual is zero, so fixed
points stay fixed points.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deqsolvers.state import Layout


def precondition(preconditioner: nn.Module, layout: Layout, residual: Tensor) -> Tensor:
    """What ``preconditioner`` makes of residuals (B, features).

    It sees them in the structure of the state and in the dtype of its own parameters.
    """
    state = layout.unflatten(residual)
    parameter = next(preconditioner.parameters(), None)
    if parameter is not None:
        dtype = parameter.dtype
        state = pytree.tree_map(lambda g: g if g.is_complex() else g.to(dtype), state)
    return layout.flatten(preconditioner(state)).to(residual.dtype)


class VectorPreconditioner(nn.Module):
    """``g + U V g`` on the last dimension, for vectors (B, C) and sequences (B, T, C).

    Args:
        features: C.
        rank: of the correction U V, which an untrained preconditioner has as zero.
    """

    def __init__(self, features: int, rank: int = 16):
        super().__init__()
        self.arguments = {"features": features, "rank": rank}
        self.down = nn.Linear(features, rank, bias=False)
        self.up = nn.Linear(rank, features, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, residual: Tensor) -> Tensor:
        return residual + self.up(self.down(residual))


class ImagePreconditioner(nn.Module):
    """``g + U V g`` with a convolution V and a 1 x 1 convolution U, for images (B, C, H, W).

    Args:
        channels: C.
        rank: channels between the two, whose product is zero before training.
        kernel_size: odd size of V.
    """

    def __init__(self, channels: int, rank: int = 16, kernel_size: int = 3):
        super().__init__()
        self.arguments = {"channels": channels, "rank": rank, "kernel_size": kernel_size}
        self.down = nn.Conv2d(channels, rank, kernel_size, padding=kernel_size // 2, bias=False)
        self.up = nn.Conv2d(rank, channels, 1, bias=False)
        nn.init.zeros_(self.up.weight)

    def forward(self, residual: Tensor) -> Tensor:
        return residual + self.up(self.down(residual))
