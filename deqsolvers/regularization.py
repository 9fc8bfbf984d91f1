"""Regularising the Jacobian of f at its fixed point."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from deqsolvers.state import Layout


def jacobian_regularizer(
    f: Callable[..., Any],
    z: Any,
    inputs: tuple[Any, ...] = (),
    *,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Hutchinson's estimate of the mean of ``||df/dz||_F^2 / n``, n the features of a sample.

    With ``e ~ N(0, I)``, ``E ||e^T J||^2 = ||J||_F^2``. Adding it to the loss keeps solves short
    and training stable. The estimate is differentiable w.r.t. f's parameters, and not w.r.t. z.

    Args:
        f: called as ``f(z, *inputs)``; must allow differentiating twice (fused attention kernels
            may not: use ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``).
        z: where the Jacobian is taken, usually ``solution.z``.
        inputs: f's further arguments.
        generator: for the random vectors.

    Returns:
        A scalar.

    Source: Bai, Koltun & Kolter, "Stabilizing equilibrium models by Jacobian regularization" (ICML
        2021).
    """
    layout = Layout.of(z, "z")
    with torch.enable_grad():
        matrix = layout.flatten(z).detach().requires_grad_()
        fz = layout.flatten(f(layout.unflatten(matrix), *inputs))
        noise = torch.randn(fz.shape, generator=generator, dtype=fz.dtype, device=fz.device)
        (product,) = torch.autograd.grad(fz, matrix, noise, create_graph=True)
        return product.square().sum() / product.numel()
