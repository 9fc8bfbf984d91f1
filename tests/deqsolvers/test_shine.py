"""SHINE: gradients from Broyden's own inverse Jacobian."""

import pytest
import torch
from torch import Tensor

from deqsolvers import DEQ, Anderson, Broyden, Implicit, JacobianFree, Shine
from tests.deqsolvers.maps import normal

RATES = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64)


def f(z: Tensor, x: Tensor, rates: Tensor) -> Tensor:
    return torch.tanh(rates * z.roll(1, dims=1) + x)


def gradient(backward: object, rows: slice = slice(None), damping: float = 1.0) -> Tensor:
    x = normal(3, 8)[rows].requires_grad_()
    deq = DEQ(f, Broyden(60, damping), backward=backward, tol=1e-10, max_steps=60)  # type: ignore[arg-type]
    z, _ = deq(x, RATES[rows], z0=torch.zeros_like(x))
    return torch.autograd.grad(z.square().sum(), x)[0]


def test_it_is_closer_to_the_implicit_gradient_than_the_jacobian_free_one() -> None:
    exact = gradient(Implicit(tol=1e-12, max_steps=200))
    shine = (gradient(Shine(fallback=100)) - exact).norm(dim=1)
    free = (gradient(JacobianFree()) - exact).norm(dim=1)
    assert (shine < free).all()


@pytest.mark.parametrize("damping", [1.0, 0.7])
@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_gradient_does_not_depend_on_the_batch(row: int, damping: float) -> None:
    """Samples converge at different steps; the first must not spoil their estimate meanwhile."""
    together = gradient(Shine(fallback=100), damping=damping)[row]
    alone = gradient(Shine(fallback=100), slice(row, row + 1), damping)[0]
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-10)


def test_in_one_dimension_the_estimate_is_the_last_secant() -> None:
    """H is then the change of z over that of f(z) - z, between the last two iterates."""
    path = []

    def g(z: Tensor, x: Tensor) -> Tensor:
        path.append(z.detach().clone())
        return torch.cos(z) * 0.8 + x

    x = torch.full((1, 1), 0.3, dtype=torch.float64, requires_grad=True)
    z, solution = DEQ(g, Broyden(), backward=Shine(fallback=100), tol=1e-6)(x)
    (found,) = torch.autograd.grad(z.sum(), x)
    one, other = path[solution.calls - 2 : solution.calls]
    slope = 0.8 * (other.cos() - one.cos()) / (other - one)
    torch.testing.assert_close(found, 1 / (1 - slope), rtol=1e-7, atol=0)


def test_an_estimate_that_is_too_long_falls_back_to_the_raw_gradient() -> None:
    free, tight = gradient(JacobianFree()), gradient(Shine(fallback=1e-9))
    torch.testing.assert_close(tight, free)


def test_it_needs_broyden() -> None:
    deq = DEQ(lambda z, x: 0.5 * z + x, Anderson(), backward="shine")
    with pytest.raises(TypeError, match="Shine needs the forward solver Broyden"):
        deq(torch.ones(2, 3, requires_grad=True))
