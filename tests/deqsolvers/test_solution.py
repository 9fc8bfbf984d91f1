"""A solution as a pytree, which transforms of torch pass through."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from deqsolvers import DEQ, Anderson, Picard, Solution, fixed_point


class Tanh(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(4, 4)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.linear(z) + x)


@pytest.fixture
def x() -> Tensor:
    return torch.randn(3, 4, generator=torch.Generator().manual_seed(1))


def assert_same(found: Solution, expected: Solution) -> None:
    for name, value in vars(expected).items():
        if name != "memory":
            torch.testing.assert_close(getattr(found, name), value, equal_nan=True)


@pytest.mark.parametrize("trace", [False, True])
@pytest.mark.parametrize("tol", [None, 1e-3])
def test_leaves_and_structure_make_the_solution_again(x, trace, tol):
    solution = fixed_point(
        lambda z: tuple(0.5 * part + 1 for part in z), (x, x), tol=tol, max_steps=4, trace=trace
    )
    leaves, spec = pytree.tree_flatten(solution)
    assert all(isinstance(leaf, Tensor) for leaf in leaves)
    assert_same(pytree.tree_unflatten(leaves, spec), solution)
    doubled = pytree.tree_map(lambda leaf: 2 * leaf, solution)
    torch.testing.assert_close(doubled.z[1], 2 * solution.z[1])
    assert doubled.calls == solution.calls


def test_the_backward_solution_is_kept(x):
    deq = DEQ(Tanh(), tol=1e-4)
    z, solution = deq(x.requires_grad_())
    z.sum().backward()
    again = pytree.tree_map(torch.clone, solution.detach())
    assert_same(again.backward, solution.backward)
    assert again.describe() == solution.describe()


def test_grad_returns_it_beside_the_gradient(x):
    deq = DEQ(Tanh(), tol=1e-5)

    def loss(x: Tensor) -> tuple[Tensor, Solution]:
        z, solution = deq(x)
        return z.square().sum(), solution

    gradient, solution = torch.func.grad(loss, has_aux=True)(x)
    leaf = x.clone().requires_grad_()
    z, expected = deq(leaf)
    z.square().sum().backward()
    torch.testing.assert_close(gradient, leaf.grad)
    torch.testing.assert_close(solution.residual, expected.residual)
    assert solution.converged.all()


def test_vmap_stacks_the_solutions_of_its_slices(x):
    deq = DEQ(Tanh(), Picard(), tol=1e-4)
    stacked = torch.stack([x, -2 * x])
    with torch.no_grad():
        z, solution = torch.func.vmap(deq)(stacked)
        for index, part in enumerate(stacked):
            one, expected = deq(part)
            torch.testing.assert_close(z[index], one)
            torch.testing.assert_close(solution.steps[index], expected.steps)
            torch.testing.assert_close(solution.residual[index], expected.residual)


def test_a_layer_of_fixed_steps_is_exported_whole(x):
    deq = DEQ(Tanh(), Anderson(3), tol=None, max_steps=4).eval()
    with torch.no_grad():
        program = torch.export.export(deq, (x,))
        for batch in (x, x.flip(0)):
            z, solution = program.module()(batch)
            expected_z, expected = copy.deepcopy(deq)(batch)
            torch.testing.assert_close(z, expected_z)
            assert isinstance(solution, Solution)
            assert_same(solution, expected)
