"""Elimination written out: torch's own factorisations and solves, and solvers as ONNX."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnxruntime
import pytest
import torch
from torch import Tensor, nn

from deqsolvers import Anderson, Broyden
from deqsolvers.solvers import Solver
from deqsolvers.state import Layout
from polypseg.unrolled import (
    DECOMPOSITIONS,
    cholesky,
    cholesky_solve,
    diagonal_scatter,
    solve_triangular,
)


def positive(n: int) -> Tensor:
    a = torch.randn(2, n, n, dtype=torch.float64, generator=torch.Generator().manual_seed(n))
    return a @ a.mT + torch.eye(n)


@pytest.mark.parametrize("n", [1, 2, 5])
def test_systems_are_solved_as_torch_does(n: int) -> None:
    matrix, right = positive(n), torch.randn(2, n, 3, dtype=torch.float64)
    factor, info = cholesky(matrix)
    torch.testing.assert_close(factor, torch.linalg.cholesky(matrix))
    assert info.tolist() == [0, 0]
    torch.testing.assert_close(cholesky_solve(right, factor), torch.linalg.solve(matrix, right))
    for upper in (False, True):
        for unitriangular in (False, True):
            options = {"upper": upper, "unitriangular": unitriangular}
            # What lies on the other side of the diagonal must not matter.
            expected = torch.linalg.solve_triangular(matrix, right, **options)
            torch.testing.assert_close(solve_triangular(matrix, right, **options), expected)
    values = torch.randn(2, n, dtype=torch.float64)
    expected = torch.diagonal_scatter(matrix, values, dim1=1, dim2=2)
    assert torch.equal(diagonal_scatter(matrix, values, 0, 1, 2), expected)


def test_a_matrix_without_a_factor_is_told_by_sample() -> None:
    indefinite, nan = torch.tensor([[1.0, 2.0], [2.0, 1.0]]), torch.full((2, 2), torch.nan)
    matrix = torch.stack([torch.eye(2), indefinite, torch.zeros(2, 2), torch.ones(2, 2), nan])
    found = (cholesky(matrix)[1] != 0).tolist()
    assert found == (torch.linalg.cholesky_ex(matrix).info != 0).tolist() == [False, *[True] * 4]


class Solve(nn.Module):
    def __init__(self, solver: Solver, steps: int) -> None:
        super().__init__()
        self.solver, self.steps, self.linear = solver, steps, nn.Linear(16, 16)

    def forward(self, x: Tensor) -> Tensor:
        z = torch.zeros_like(x)
        memory = self.solver.init(z, Layout.of(z))
        for _ in range(self.steps):
            fz = torch.tanh(0.9 * self.linear(z) + x)
            z = self.solver.step(memory, z, fz, fz - z)
        return z


@pytest.mark.parametrize("solver", [Anderson(memory=2), Broyden(memory=4)])
def test_a_solver_as_onnx_takes_the_same_steps(solver: Solver, tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Solve(solver, steps=4).eval().requires_grad_(False)
    x = torch.randn(2, 16)
    program = torch.export.export(module, (torch.zeros(2, 16),))
    exported = torch.onnx.export(
        program.run_decompositions(DECOMPOSITIONS), dynamo=True, input_names=["x"], verbose=False
    )
    exported.save(tmp_path / "solve.onnx")  # type: ignore[union-attr]
    session = onnxruntime.InferenceSession(tmp_path / "solve.onnx")
    found = session.run(None, {"x": x.numpy()})[0]
    np.testing.assert_allclose(found, module(x).numpy(), atol=1e-6)
