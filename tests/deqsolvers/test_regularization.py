"""The Jacobian regulariser against Jacobians that torch.func computes in full."""

import pytest
import torch
from torch import Tensor

from deqsolvers import jacobian_regularizer
from tests.deqsolvers.maps import ConvolutionMap, TanhMap, normal
from tests.problems import convolution_deq, tanh_deq


def frobenius(f: torch.nn.Module, z: Tensor, x: Tensor) -> Tensor:
    """The mean over the samples of ||df/dz||_F^2 / n."""

    def alone(z: Tensor, x: Tensor) -> Tensor:
        return f(z.unsqueeze(0), x.unsqueeze(0)).flatten()

    jacobians = [torch.func.jacrev(alone)(row, extra) for row, extra in zip(z, x, strict=True)]
    return torch.stack([j.square().sum() / z[0].numel() for j in jacobians]).mean()


def average(f: torch.nn.Module, z: Tensor, x: Tensor, draws: int = 2000) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    # Many draws at once: the estimate of a batch is the mean over its samples.
    repeated = [tensor.repeat(draws, *[1] * (tensor.dim() - 1)) for tensor in (z, x)]
    return jacobian_regularizer(f, repeated[0], (repeated[1],), generator=generator)


@pytest.mark.parametrize("build", [tanh_deq, convolution_deq])
def test_the_estimate_is_right_on_average(build: object) -> None:
    problem = build()  # type: ignore[operator]
    assert problem.solution is not None
    expected = frobenius(problem.f, problem.solution, problem.inputs[0])
    found = average(problem.f, problem.solution, problem.inputs[0])
    torch.testing.assert_close(found, expected, rtol=0.03, atol=0)


def test_a_linear_map_needs_one_draw_where_the_jacobian_is_orthogonal() -> None:
    """||e^T Q|| = ||e||, so one draw gives ||e||^2 / n whatever the direction."""
    q = torch.linalg.qr(normal(6, 6))[0]
    generator = torch.Generator().manual_seed(3)
    found = jacobian_regularizer(lambda z: z @ q.T, normal(4, 6), generator=generator)
    noise = torch.randn(4, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    torch.testing.assert_close(found, noise.square().mean())


def test_its_gradient_is_that_of_the_frobenius_norm() -> None:
    f = TanhMap(4)
    z, x = normal(2, 4, seed=1), normal(2, 4, seed=2)
    (found,) = torch.autograd.grad(average(f, z, x, draws=10_000), f.weight)
    (expected,) = torch.autograd.grad(frobenius(f, z, x), f.weight)
    assert (found - expected).norm() <= 0.05 * expected.norm()


def test_no_gradient_reaches_the_state() -> None:
    f = TanhMap(4)
    z = normal(2, 4).requires_grad_()
    jacobian_regularizer(f, z, (normal(2, 4, seed=2),)).backward()
    assert z.grad is None
    assert f.weight.grad is not None
    assert f.weight.grad.abs().sum() > 0


def test_nested_states_and_no_grad() -> None:
    f = ConvolutionMap(3)
    z, x = normal(2, 3, 4, 4), normal(2, 3, 4, 4, seed=1)
    flat = jacobian_regularizer(f, z, (x,), generator=torch.Generator().manual_seed(5))
    with torch.no_grad():
        nested = jacobian_regularizer(
            lambda state, x: {"z": f(state["z"], x)},
            {"z": z},
            (x,),
            generator=torch.Generator().manual_seed(5),
        )
    torch.testing.assert_close(nested, flat)
    assert nested.requires_grad


def test_it_is_reproducible_under_a_seed() -> None:
    f = TanhMap(4)
    z, x = normal(2, 4), normal(2, 4, seed=2)
    one, other = (
        jacobian_regularizer(f, z, (x,), generator=torch.Generator().manual_seed(1))
        for _ in range(2)
    )
    assert torch.equal(one, other)
    assert not torch.equal(one, jacobian_regularizer(f, z, (x,)))


def test_a_map_that_ignores_the_state_has_a_jacobian_of_zero() -> None:
    bias = torch.ones(3, requires_grad=True)
    found = jacobian_regularizer(lambda z: bias.expand(2, 3), torch.zeros(2, 3))
    assert found == 0
