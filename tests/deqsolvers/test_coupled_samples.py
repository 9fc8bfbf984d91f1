"""An f that couples the samples of a batch: nodes of a graph, points of a grid."""

from typing import Any

import pytest
import torch
from torch import Tensor

from deqsolvers import (
    DEQ,
    Anderson,
    Broyden,
    Implicit,
    NewtonKrylov,
    Picard,
    Solution,
    Solver,
    Status,
    fixed_point,
)
from tests.deqsolvers.maps import normal
from tests.deqsolvers.references import unrolled

NODES, CHANNELS = 12, 3
_PATH = torch.diag(torch.ones(NODES - 1, dtype=torch.float64), 1)
_EDGES = _PATH + _PATH.T
ADJACENCY = _EDGES / _EDGES.sum(1, keepdim=True)
WEIGHT = 0.8 * torch.linalg.qr(normal(CHANNELS, CHANNELS, seed=1))[0]
X = normal(NODES, CHANNELS, seed=2)
ONE_NODE = torch.where(torch.arange(NODES).unsqueeze(1) == 3, X, 0.0)


def graph(z: Tensor, x: Tensor) -> Tensor:
    """(NODES, CHANNELS), every node from its neighbours."""
    return torch.tanh(ADJACENCY @ z @ WEIGHT + x)


def residuals(z: Tensor, x: Tensor) -> Tensor:
    fz = graph(z, x)
    return (fz - z).norm(dim=1) / fz.norm(dim=1)


def solve(x: Tensor, solver: Solver, **options: Any) -> Solution:
    options = {"tol": 1e-4, "max_steps": 300, "drop_converged": False, **options}
    return fixed_point(graph, torch.zeros_like(x), (x,), solver=solver, **options)


@pytest.mark.parametrize("x", [X, ONE_NODE], ids=["every node", "one node"])
def test_a_converged_sample_goes_on_where_others_move_it(x: Tensor) -> None:
    """From zero all nodes but one are at rest, until their neighbour reaches them."""
    solution = solve(x, Picard())
    assert solution.converged.all()
    assert (residuals(solution.z, x) <= 1.1e-4).all()


@pytest.mark.parametrize("x", [X, ONE_NODE], ids=["every node", "one node"])
def test_newton_krylov_looks_again_whichever_iterate_is_asked_for(x: Tensor) -> None:
    """It returns its best iterate with ``final="last"`` too."""
    last, best = (solve(x, NewtonKrylov(), final=final) for final in ("last", "best"))
    torch.testing.assert_close(last.status, best.status, rtol=0, atol=0)
    torch.testing.assert_close(last.z, best.z, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("solver", [Picard(), Anderson(), Broyden()], ids=repr)
@pytest.mark.parametrize("x", [X, ONE_NODE], ids=["every node", "one node"])
def test_no_node_is_called_converged_that_is_not(x: Tensor, solver: Solver) -> None:
    solution = solve(x, solver)
    if solution.converged.all():
        assert (residuals(solution.z, x) <= 1.1e-4).all()


def test_the_implicit_gradient_reaches_nodes_that_the_loss_does_not_see() -> None:
    """The gradient at all other nodes starts at zero, a fixed point of theirs at first."""
    gradients = []
    for whole in (False, True):
        backward = Implicit(Picard(), tol=1e-10, max_steps=500)
        f = (lambda z, x: graph(z[0], x[0])[None]) if whole else graph
        deq = DEQ(f, Picard(), tol=1e-12, max_steps=500, drop_converged=False, backward=backward)
        x = X.clone().requires_grad_()
        z, solution = deq(x[None] if whole else x)
        z.reshape(NODES, CHANNELS)[5].sum().backward()
        assert solution.backward is not None
        assert solution.backward.converged.all()
        assert x.grad is not None
        gradients.append(x.grad)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-7, atol=1e-9)
    x = X.clone().requires_grad_()
    (expected,) = torch.autograd.grad(
        unrolled(graph, torch.zeros_like(x), x, steps=400)[5].sum(), x
    )
    torch.testing.assert_close(gradients[0], expected, rtol=1e-6, atol=1e-8)


def test_a_sample_that_goes_on_is_judged_by_where_it_goes_on_from() -> None:
    """At rest its residual was 0, above which all is far; then it flips between 1 and -1."""
    driven = torch.tensor([[True], [False]])

    def f(z: Tensor) -> Tensor:
        flip = torch.where(z >= 0, -1.0, 1.0).to(z.dtype)
        return torch.where(driven, torch.where(z[1] > 0.4, flip, z), 0.5 * z + 0.5)

    solution = fixed_point(
        f,
        torch.zeros(2, 1, dtype=torch.float64),
        solver=Picard(),
        relative=False,
        tol=1e-6,
        max_steps=60,
        drop_converged=False,
    )
    assert solution.statuses() == [Status.STALLED, Status.CONVERGED]


def test_samples_that_f_does_not_couple_are_not_reopened() -> None:
    """Rows of their own are decided where they would be alone, though they stay in the batch."""
    x = X * torch.logspace(-3, 1, NODES, dtype=torch.float64).unsqueeze(1)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ WEIGHT + x)

    together = fixed_point(f, torch.zeros_like(x), (x,), drop_converged=False, tol=1e-8)
    assert len(set(together.steps.tolist())) > 1
    for row in range(NODES):
        one = x[row : row + 1]
        alone = fixed_point(f, torch.zeros_like(one), (one,), tol=1e-8)
        assert alone.statuses()[0] == together.statuses()[row]
        assert int(alone.evaluations) == int(together.evaluations[row])
        torch.testing.assert_close(alone.z[0], together.z[row])
