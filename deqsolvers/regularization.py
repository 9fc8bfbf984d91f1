"""The Jacobian of f at its fixed point: a regulariser for training, and its spectral radius."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deqsolvers.solvers.base import check_count
from deqsolvers.state import Layout, check_inputs


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
        f: called as ``f(z, *inputs)``; must allow differentiating twice. Fused attention kernels
            may not: use ``torch.nn.attention.sdpa_kernel(SDPBackend.MATH)``. Nor does what
            `torch.compile` made of f: give f itself.
        z: where the Jacobian is taken, usually ``solution.z``.
        inputs: f's further arguments.
        generator: for the random vectors.

    Returns:
        A scalar; 0 for an empty batch.

    Raises:
        ValueError, TypeError: z is no state, ``inputs`` no tuple, or f returns another shape than
            z.

    Source: Bai, Koltun & Kolter, "Stabilizing equilibrium models by Jacobian regularization" (ICML
        2021).
    """
    with torch.inference_mode(False), torch.enable_grad():
        matrix, fz = _recorded(f, z, inputs)
        noise = torch.randn(fz.shape, generator=generator, dtype=fz.dtype, device=fz.device)
        product = _vjp(fz, matrix, noise, create_graph=True)
        return product.square().sum() / max(product.numel(), 1)


def spectral_radius(
    f: Callable[..., Any],
    z: Any,
    inputs: tuple[Any, ...] = (),
    *,
    iterations: int = 30,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The spectral radius of df/dz of every sample: below 1, plain iteration converges near z.

    Arnoldi's method on vector-Jacobian products. It returns the largest modulus of the Ritz values,
    so that it does not matter whether the dominant eigenvalues are real, a complex pair or
    repeated, all of which break a power iteration with a Rayleigh quotient.

    Where a sample has at most ``iterations`` features, the value is right up to rounding (an
    eigenvalue of index k only up to the k-th root of that, as with any method). Otherwise it is an
    estimate from a Krylov space of ``iterations`` dimensions: good where the dominant eigenvalues
    stand apart, too small by a few per cent where many lie close together, and possibly too large
    where the Jacobian is far from normal, but never above its norm. Raise ``iterations`` and see
    whether the value stays.

    Args:
        f: called as ``f(z, *inputs)``; must treat samples independently.
        z: where the Jacobian is taken, usually ``solution.z``.
        inputs: f's further arguments.
        iterations: most vector-Jacobian products, and vectors of the size of z that are kept.
        generator: for the random start vectors.

    Returns:
        (B,) without gradient; NaN for a sample whose Jacobian is not finite.

    Raises:
        ValueError, TypeError: ``iterations`` is not a positive integer, z is no state, ``inputs``
            no tuple, or f returns another shape than z.

    Source: Saad, "Numerical methods for large eigenvalue problems" (2011), chapter 6.
    """
    check_count("iterations", iterations)
    with torch.inference_mode(False):
        with torch.enable_grad():
            matrix, fz = _recorded(f, z, inputs)
        return _radius(matrix.detach(), lambda v: _vjp(fz, matrix, v), iterations, generator)


def _recorded(f: Callable[..., Any], z: Any, inputs: tuple[Any, ...]) -> tuple[Tensor, Tensor]:
    """z as a matrix (B, features), a leaf, and f of it, recorded."""
    layout = Layout.of(z, "z")
    check_inputs(inputs)
    z, inputs = pytree.tree_map(_ordinary, (z, inputs))
    matrix = layout.flatten(z).detach().requires_grad_()
    state = f(layout.unflatten(matrix), *inputs)
    layout.check(state, len(matrix), "z")
    return matrix, layout.flatten(state)


def _ordinary(leaf: Any) -> Any:
    """A tensor that autograd can record; one made in inference mode is copied."""
    return leaf.clone() if isinstance(leaf, Tensor) and leaf.is_inference() else leaf


def _radius(
    matrix: Tensor,
    product: Callable[[Tensor], Tensor],
    iterations: int,
    generator: torch.Generator | None,
) -> Tensor:
    """(B,) of the map ``product`` of matrices like ``matrix``."""
    if matrix.numel() == 0:
        return matrix.new_zeros(len(matrix))
    with torch.no_grad():
        start = torch.empty_like(matrix).normal_(generator=generator)
        size = min(iterations, start.shape[1])
        hessenberg = _arnoldi(product, start, size)
        finite = hessenberg.isfinite().all(2).all(1)
        # A matrix this small is not worth a kernel of the device's own.
        small = torch.where(finite[:, None, None], hessenberg, 0.0).cpu()
        radius = torch.linalg.eigvals(small).abs().amax(1).to(matrix)
        return torch.where(finite, radius, torch.nan)


def _arnoldi(product: Callable[[Tensor], Tensor], start: Tensor, size: int) -> Tensor:
    """(B, size, size) float64: the linear map ``product`` in a basis of its Krylov space."""
    batch, features = start.shape
    basis = start.new_zeros(batch, size, features)
    hessenberg = start.new_zeros(batch, size, size, dtype=torch.float64)
    floor = 10 * torch.finfo(start.dtype).eps
    q = start / torch.linalg.vector_norm(start, dim=1, keepdim=True)
    for column in range(size):
        basis[:, column] = q
        used = basis[:, : column + 1]
        w = product(q)
        before = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        for _ in range(2):  # once would leave the basis orthogonal only up to cancellation
            weights = torch.bmm(used, w.unsqueeze(2))
            w = w - torch.bmm(used.transpose(1, 2), weights).squeeze(2)
            hessenberg[:, : column + 1, column] += weights.squeeze(2)
        if column + 1 == size:
            break
        # A remainder that is mere rounding means that the space is invariant: it is complete, and
        # the zeros that fill the rest of the matrix only add eigenvalues of zero.
        length = torch.linalg.vector_norm(w, dim=1, keepdim=True)
        new = ~(length <= floor * before)  # true for NaN, which must show in the result
        hessenberg[:, column + 1, column] = torch.where(new, length, 0.0).squeeze(1)
        q = torch.where(new, w / length, 0.0)
    return hessenberg


def _vjp(fz: Tensor, z: Tensor, v: Tensor, create_graph: bool = False) -> Tensor:
    """``v^T dfz/dz``, which is zero where fz does not depend on z."""
    if not fz.requires_grad:
        return torch.zeros_like(z)
    (product,) = torch.autograd.grad(
        fz, z, v, retain_graph=True, create_graph=create_graph, allow_unused=True
    )
    return torch.zeros_like(z) if product is None else product
