"""An f that differentiates inside: a gradient step on an energy."""

import pytest
import torch
from torch import Tensor

from deqsolvers import DEQ, Anderson, Implicit, Picard, Solver, fixed_point
from tests.deqsolvers.maps import normal

ROTATION = torch.linalg.qr(normal(6, 6, seed=1))[0]


def energy(z: Tensor, x: Tensor) -> Tensor:
    return (0.5 * (z @ ROTATION).square() + 0.1 * z**4 - x * z).sum()


def with_autograd(z: Tensor, x: Tensor) -> Tensor:
    with torch.enable_grad():
        z = z if z.requires_grad else z.detach().requires_grad_()
        (slope,) = torch.autograd.grad(energy(z, x), z, create_graph=True)
        return z - 0.3 * slope


def with_func(z: Tensor, x: Tensor) -> Tensor:
    return z - 0.3 * torch.func.grad(energy)(z, x)


def vmapped(z: Tensor, x: Tensor) -> Tensor:
    return z - 0.3 * torch.func.vmap(torch.func.grad(energy))(z, x)


@pytest.mark.parametrize("solver", [Picard(), Anderson()])
def test_a_solve_records_nothing_though_f_enables_gradients(solver: Solver) -> None:
    seen = []

    def f(z: Tensor, x: Tensor) -> Tensor:
        seen.append(z.grad_fn)
        return with_autograd(z, x)

    solution = fixed_point(f, torch.zeros(3, 6).double(), (normal(3, 6),), solver=solver, tol=1e-9)
    assert solution.converged.all()
    assert seen == [None] * solution.calls  # else each step would keep the graph of the one before
    fixed = fixed_point(f, solution.z, (normal(3, 6),), solver=solver, tol=None, max_steps=2)
    assert not fixed.z.requires_grad


@pytest.mark.parametrize("f", [with_autograd, with_func, vmapped])
def test_gradients_through_a_gradient(f: object) -> None:
    deq = DEQ(f, tol=1e-12, backward=Implicit(tol=1e-12))  # type: ignore[arg-type]
    x = normal(2, 6, seed=3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: deq(x)[0], (x,), fast_mode=True)
    assert torch.autograd.gradgradcheck(lambda x: deq(x)[0], (x,), fast_mode=True)
