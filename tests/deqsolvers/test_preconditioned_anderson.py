"""Anderson with a preconditioner, against closed forms and against a step worked out in NumPy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deqsolvers import Anderson, AndersonTypeI, Solution, Solver, fixed_point
from deqsolvers.hypersolver.preconditioners import VectorPreconditioner
from tests.problems import Problem, iterates, rotating, symmetric, tanh_deq


class Matrix(nn.Module):
    """``residual @ matrix``; a buffer, as a preconditioner need not have parameters."""

    def __init__(self, matrix: Tensor):
        super().__init__()
        self.register_buffer("matrix", matrix)

    def forward(self, residual: Tensor) -> Tensor:
        return residual @ self.matrix


def inverse(problem: Problem) -> Tensor:
    """``(I - J)^-1`` of a linear map, for states as rows."""
    size = problem.z0.shape[1]
    zero, unit = torch.zeros(1, size, dtype=torch.float64), torch.eye(size, dtype=torch.float64)
    inputs = tuple(x[:1].expand(size, *x.shape[1:]) for x in problem.inputs)
    constant = problem.f(zero.expand(size, -1), *inputs)
    jacobian = problem.f(unit, *inputs) - constant
    return torch.linalg.inv(unit - jacobian)


@pytest.mark.parametrize("method", [Anderson, AndersonTypeI])
@pytest.mark.parametrize("problem", [symmetric(0.99), rotating()], ids=["symmetric", "rotating"])
def test_with_the_exact_inverse_one_step_solves_a_linear_map(
    method: type[Anderson], problem: Problem
) -> None:
    def solve(solver: Solver) -> Solution:
        return fixed_point(problem.f, problem.z0, problem.inputs, solver=solver, tol=1e-10)

    plain, exact = solve(method()), solve(method(preconditioner=Matrix(inverse(problem))))
    assert exact.converged.all()
    assert (exact.evaluations == 2).all()
    assert (plain.evaluations > 5).all()
    torch.testing.assert_close(exact.z, problem.solution, rtol=1e-8, atol=1e-8)


@pytest.mark.parametrize("damping", [1.0, 0.6])
def test_steps_are_those_of_a_least_squares_solver(damping: float) -> None:
    """``z_bar + damping P g_bar`` over all pairs so far, weights from NumPy's lstsq."""
    problem = tanh_deq()
    torch.manual_seed(0)
    matrix = torch.eye(16, dtype=torch.float64) + 0.2 * torch.randn(16, 16, dtype=torch.float64)
    solver = Anderson(4, damping, regularization=0.0, preconditioner=Matrix(matrix))
    seen = iterates(problem, solver, 4)
    states = torch.stack(seen).numpy()
    residuals = torch.stack([problem.f(z, *problem.inputs).detach() - z for z in seen]).numpy()
    for step in range(4):
        for row in range(states.shape[1]):
            z, g = states[: step + 1, row], residuals[: step + 1, row]
            gamma = np.linalg.lstsq(np.diff(g, axis=0).T, g[-1], rcond=None)[0]
            z_bar = z[-1] - gamma @ np.diff(z, axis=0)
            g_bar = g[-1] - gamma @ np.diff(g, axis=0)
            expected = z_bar + damping * g_bar @ matrix.numpy()
            np.testing.assert_allclose(states[step + 1, row], expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", [Anderson, AndersonTypeI])
def test_one_that_was_not_trained_changes_nothing(method: type[Anderson]) -> None:
    """Its correction is zero; it sees half of the state's precision."""
    problem = tanh_deq()

    def solve(solver: Solver) -> Tensor:
        return fixed_point(problem.f, problem.z0, problem.inputs, solver=solver, tol=1e-6).z

    found = solve(method(preconditioner=VectorPreconditioner(16, 2)))
    assert found.dtype == torch.float64
    torch.testing.assert_close(found, solve(method()), rtol=1e-5, atol=1e-5)


def test_where_it_misleads_the_safeguard_takes_plain_steps() -> None:
    """P = -3 I leads away from every fixed point; f contracts, so plain steps do not."""
    problem = symmetric(0.5)
    against = Matrix(-3 * torch.eye(12, dtype=torch.float64))
    found = fixed_point(
        problem.f,
        problem.z0,
        problem.inputs,
        solver=Anderson(1, safeguard=1, preconditioner=against),
        tol=1e-8,
        max_steps=200,
    )
    assert found.converged.all()
    torch.testing.assert_close(found.z, problem.solution, rtol=1e-6, atol=1e-6)


def test_it_must_be_a_module() -> None:
    with pytest.raises(TypeError, match=r"preconditioner must be an nn\.Module or None"):
        Anderson(preconditioner=lambda g: g)  # type: ignore[arg-type]


def test_structured_states_reach_it_as_they_are() -> None:
    shapes: list[tuple[int, ...]] = []

    class Halves(nn.Module):
        def forward(self, state: dict[str, Tensor]) -> dict[str, Tensor]:
            shapes.append(tuple(state["a"].shape))
            return {name: 0.5 * part for name, part in state.items()}

    z0 = {"a": torch.ones(2, 3, 4), "b": torch.ones(2, 5)}

    def f(z: dict[str, Tensor]) -> dict[str, Tensor]:
        return {name: torch.cos(part) for name, part in z.items()}

    found = fixed_point(f, z0, solver=Anderson(preconditioner=Halves()), tol=1e-5)
    assert found.converged.all()
    assert set(shapes) <= {(2, 3, 4), (1, 3, 4)}
    assert shapes
    for part in found.z.values():
        torch.testing.assert_close(part, torch.full_like(part, 0.7390851), rtol=0, atol=1e-4)
