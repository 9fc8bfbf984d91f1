"""The spectral radius against the eigenvalues of Jacobians that are computed in full."""

import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deqsolvers import spectral_radius
from tests.problems import (
    Problem,
    convolution_deq,
    non_normal,
    normal,
    perceptron_deq,
    rotation,
    tanh_deq,
)


def of_matrix(matrix: Tensor, batch: int = 2, **options: Any) -> Tensor:
    z = torch.zeros(batch, len(matrix), dtype=matrix.dtype)
    return spectral_radius(lambda z: z @ matrix.T, z, **options)


def truth(matrix: Tensor) -> float:
    return float(np.abs(np.linalg.eigvals(matrix.numpy())).max())


def assert_radius(found: Tensor, expected: float, rtol: float = 1e-9) -> None:
    torch.testing.assert_close(found, torch.full_like(found, expected), rtol=rtol, atol=0)


@pytest.mark.parametrize("build", [tanh_deq, perceptron_deq, convolution_deq])
def test_networks(build: Callable[[], Problem]) -> None:
    problem = build()
    assert problem.solution is not None
    z, (x,) = problem.solution, problem.inputs
    expected = []
    for row, extra in zip(z, x, strict=True):
        jacobian = torch.func.jacrev(lambda z, extra=extra: problem.f(z[None], extra[None])[0])(row)
        expected.append(truth(jacobian.reshape(row.numel(), -1).detach()))
    everything = z[0].numel()  # as many iterations as features: exact
    found = spectral_radius(problem.f, z, (x,), iterations=everything)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-6)
    np.testing.assert_allclose(spectral_radius(problem.f, z, (x,)).numpy(), expected, rtol=0.03)


@pytest.mark.parametrize("size", [2, 6, 200])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_a_complex_pair_counts_by_its_modulus(size: int, dtype: torch.dtype) -> None:
    """A Rayleigh quotient would give 0.9 cos(1)."""
    rtol = 1e-9 if dtype == torch.float64 else 1e-5
    assert_radius(of_matrix(rotation(size, 1.0, 0.9).to(dtype)), 0.9, rtol)


def test_a_complex_pair_beside_smaller_real_eigenvalues() -> None:
    spectrum = torch.diag(torch.linspace(-0.8, 0.8, 20, dtype=torch.float64))
    basis = normal(22, 22)
    matrix = basis @ torch.block_diag(rotation(2, math.pi / 2, 0.9), spectrum) @ basis.inverse()
    assert_radius(of_matrix(matrix), 0.9, 1e-8)


@pytest.mark.parametrize("value", [0.7, -1.3, 0.0])
def test_a_multiple_of_the_identity(value: float) -> None:
    assert_radius(of_matrix(value * torch.eye(50, dtype=torch.float64)), abs(value))


def test_opposite_eigenvalues() -> None:
    """Their moduli are equal, so that a power iteration never settles."""
    assert_radius(
        of_matrix(torch.diag(torch.tensor([0.8, -0.8, 0.3, 0.1], dtype=torch.float64))), 0.8
    )


@pytest.mark.parametrize(("order", "rtol"), [(2, 1e-6), (3, 1e-4), (5, 1e-2)])
def test_a_defective_eigenvalue(order: int, rtol: float) -> None:
    block = 0.5 * torch.eye(order, dtype=torch.float64)
    block += torch.diag(torch.ones(order - 1, dtype=torch.float64), 1)
    basis = normal(order, order)
    assert_radius(of_matrix(basis @ block @ basis.inverse()), 0.5, rtol)


def test_few_iterations_on_a_matrix_far_from_normal_stay_below_its_norm() -> None:
    shift = torch.diag(torch.full((99,), 0.9, dtype=torch.float64), 1)  # all eigenvalues are 0
    found = of_matrix(shift)
    assert bool((found <= 0.9).all())
    problem = non_normal()
    assert_radius(spectral_radius(problem.f, problem.z0, problem.inputs), 0.5, 0.02)


def test_the_default_is_close_where_eigenvalues_are_many() -> None:
    gaussian = normal(150, 150) / 150**0.5
    assert_radius(of_matrix(gaussian), truth(gaussian), 0.03)
    mixed = torch.linalg.qr(normal(150, 150))[0]  # all moduli are 1: the hardest case
    found = of_matrix(mixed)
    assert bool((found > 0.94).all() and (found < 1 + 1e-9).all())


def test_every_sample_has_its_own() -> None:
    matrix, rates = rotation(6, 2.0, 1.0), torch.tensor([[0.0], [0.5], [2.0]], dtype=torch.float64)
    found = spectral_radius(lambda z, rate: rate * (z @ matrix.T), normal(3, 6), (rates,))
    torch.testing.assert_close(found, rates.squeeze(1), rtol=1e-9, atol=1e-12)


def test_a_jacobian_that_is_not_finite_concerns_its_sample_alone() -> None:
    z = torch.tensor([[1.0, 4.0], [0.0, 1.0]], dtype=torch.float64)
    found = spectral_radius(torch.sqrt, z)  # the derivative at 0 is infinite
    assert found[0] == pytest.approx(0.5)
    assert found[1].isnan()


def test_nested_and_complex_states() -> None:
    factor = 0.6 * torch.exp(torch.tensor(0.7j, dtype=torch.complex128))

    def f(state: dict[str, Tensor]) -> dict[str, Tensor]:
        return {"a": 0.3 * state["a"], "b": factor * state["b"]}

    z = {"a": normal(2, 3), "b": torch.complex(normal(2, 2, 2), normal(2, 2, 2))}
    assert_radius(spectral_radius(f, z), 0.6)


def test_maps_that_ignore_the_state() -> None:
    bias = torch.ones(2, 3, requires_grad=True)
    assert torch.equal(spectral_radius(lambda z: bias.detach(), torch.zeros(2, 3)), torch.zeros(2))
    assert torch.equal(spectral_radius(lambda z: bias * 1, torch.zeros(2, 3)), torch.zeros(2))


def test_empty_batches_and_states() -> None:
    assert spectral_radius(torch.tanh, torch.zeros(0, 3)).shape == (0,)
    assert torch.equal(spectral_radius(torch.tanh, torch.zeros(2, 0)), torch.zeros(2))


def test_no_gradient_is_recorded_or_left_behind() -> None:
    problem = tanh_deq()
    x = problem.inputs[0].clone().requires_grad_()
    found = spectral_radius(problem.f, problem.z0, (x,))
    assert not found.requires_grad
    assert x.grad is None
    assert all(parameter.grad is None for parameter in problem.f.parameters())  # type: ignore[attr-defined]
    with torch.no_grad():
        torch.testing.assert_close(spectral_radius(problem.f, problem.z0, (x,)), found)


def test_it_is_reproducible_under_a_seed() -> None:
    matrix = normal(60, 60)
    one, other = (
        of_matrix(matrix, iterations=5, generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert torch.equal(one, other)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="iterations"):
        spectral_radius(torch.tanh, torch.zeros(2, 3), iterations=0)
    with pytest.raises(ValueError, match="shape of z,"):
        spectral_radius(lambda z: z[:, :2], torch.zeros(2, 3))
