"""SHINE: gradients from Broyden's own inverse Jacobian."""

import pytest
import torch
from torch import Tensor

from deqsolvers import DEQ, Anderson, Broyden, Implicit, JacobianFree, Shine
from tests.deqsolvers.maps import normal

RATES = torch.tensor([[0.1], [0.5], [0.9]], dtype=torch.float64)


def f(z: Tensor, x: Tensor, rates: Tensor) -> Tensor:
    return torch.tanh(rates * z.roll(1, dims=1) + x)


def gradient(backward: object, rows: slice = slice(None), memory: int = 60) -> Tensor:
    x = normal(3, 8)[rows].requires_grad_()
    deq = DEQ(f, Broyden(memory), backward=backward, tol=1e-10, max_steps=60)  # type: ignore[arg-type]
    z, _ = deq(x, RATES[rows], z0=torch.zeros_like(x))
    return torch.autograd.grad(z.square().sum(), x)[0]


def test_it_is_closer_to_the_implicit_gradient_than_the_jacobian_free_one() -> None:
    exact = gradient(Implicit(tol=1e-12, max_steps=200))
    shine = (gradient(Shine(fallback=100)) - exact).norm(dim=1)
    free = (gradient(JacobianFree()) - exact).norm(dim=1)
    assert (shine < free).all()


@pytest.mark.parametrize("row", [0, 1, 2])
def test_a_gradient_does_not_depend_on_the_batch(row: int) -> None:
    """Samples converge at different steps; the first must not spoil their estimate meanwhile."""
    together = gradient(Shine(fallback=100))[row]
    alone = gradient(Shine(fallback=100), slice(row, row + 1))[0]
    torch.testing.assert_close(together, alone, rtol=1e-8, atol=1e-10)


def test_an_estimate_that_is_too_long_falls_back_to_the_raw_gradient() -> None:
    free, tight = gradient(JacobianFree()), gradient(Shine(fallback=1e-9))
    torch.testing.assert_close(tight, free)


def test_it_needs_broyden() -> None:
    deq = DEQ(lambda z, x: 0.5 * z + x, Anderson(), backward="shine")
    with pytest.raises(TypeError, match="Shine needs the forward solver Broyden"):
        deq(torch.ones(2, 3, requires_grad=True))
