"""What ONNX or its exporter lacks, in elementary operations: small linear systems above all.

A solver's systems have as many unknowns as its history has columns, so that elimination, written
out, is a few dozen operations.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

aten = torch.ops.aten


def cholesky(matrix: Tensor, *, upper: bool = False, check_errors: bool = False) -> Any:
    """`torch.linalg.cholesky_ex` of (..., n, n): the lower factor, and 1 where there is none."""
    assert not upper
    n = matrix.shape[-1]
    rows: list[Tensor] = []
    failed = torch.zeros_like(matrix[..., 0, 0], dtype=torch.bool)
    for i in range(n):
        entries: list[Tensor] = []
        for j in range(i + 1):
            value = matrix[..., i, j]
            for k in range(j):
                value = value - entries[k] * (entries[k] if i == j else rows[j][..., k])
            if i == j:
                failed = failed | ~(value > 0)
                entries.append(value.sqrt())
            else:
                entries.append(value / rows[j][..., j])
        zeros = [torch.zeros_like(entries[0])] * (n - 1 - i)
        rows.append(torch.stack([*entries, *zeros], dim=-1))
    return torch.stack(rows, dim=-2), failed.to(torch.int32)


def solve_triangular(
    matrix: Tensor,
    right: Tensor,
    *,
    upper: bool,
    left: bool = True,
    unitriangular: bool = False,
) -> Tensor:
    """`torch.linalg.solve_triangular` of (..., n, n) and (..., n, columns)."""
    assert left
    n = matrix.shape[-1]
    order = range(n)[::-1] if upper else range(n)
    rows: dict[int, Tensor] = {}
    for i in order:
        value = right[..., i, :]
        for j, row in rows.items():
            value = value - matrix[..., i, j, None] * row
        rows[i] = value if unitriangular else value / matrix[..., i, i, None]
    return torch.stack([rows[i] for i in range(n)], dim=-2)


def cholesky_solve(right: Tensor, factor: Tensor, upper: bool = False) -> Tensor:
    """`torch.cholesky_solve` with a lower factor."""
    assert not upper
    half = solve_triangular(factor, right, upper=False)
    return solve_triangular(factor.mT, half, upper=True)


def diagonal_scatter(
    matrix: Tensor, values: Tensor, offset: int = 0, dim1: int = 0, dim2: int = 1
) -> Tensor:
    """`torch.diagonal_scatter` into (batch, n, n); torch's own leaves a copy that ONNX refuses."""
    assert (offset, dim1, dim2, matrix.ndim) == (0, 1, 2, 3)
    n = matrix.shape[-1]
    number = torch.arange(n, device=matrix.device)
    return torch.where(number[:, None] == number, values.unsqueeze(-1), matrix)


def batch_norm(
    x: Tensor,
    weight: Tensor,
    bias: Tensor,
    mean: Tensor,
    variance: Tensor,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """BatchNorm of (B, C, H, W) in evaluation mode; torch 2.6 cannot pass its own on to ONNX."""
    scale = weight * (variance + eps).rsqrt()
    shift = bias - mean * scale
    nothing = x.new_zeros(0)  # statistics, which only training has
    return x * scale[:, None, None] + shift[:, None, None], nothing, nothing


# What to hand to `ExportedProgram.run_decompositions`.
DECOMPOSITIONS: dict[Any, Callable[..., Any]] = {
    aten._native_batch_norm_legit_no_training.default: batch_norm,
    aten.linalg_cholesky_ex.default: cholesky,
    aten.linalg_solve_triangular.default: solve_triangular,
    aten.cholesky_solve.default: cholesky_solve,
    aten.diagonal_scatter.default: diagonal_scatter,
}
