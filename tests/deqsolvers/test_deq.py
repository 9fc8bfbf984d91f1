"""The layer: what it calls, what it keeps in memory, and how it behaves as a module."""

import copy
import pickle
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deqsolvers import (
    DEQ,
    Anderson,
    Broyden,
    ConvergenceError,
    HyperSolver,
    Implicit,
    Picard,
    Status,
    fixed_point,
)
from tests.deqsolvers.maps import LinearMap, TanhMap, normal
from tests.problems import expanding, tanh_deq

BACKWARDS = ["implicit", "phantom", "jacobian-free"]
every_backward = pytest.mark.parametrize("backward", BACKWARDS)


class Counting(nn.Module):
    """A tanh map that counts its calls."""

    def __init__(self) -> None:
        super().__init__()
        self.map = TanhMap(5)
        self.calls = 0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls += 1
        return self.map(z, x)


@every_backward
def test_without_gradients_only_the_solve_runs(backward: str) -> None:
    f = Counting()
    with torch.no_grad():
        z, solution = DEQ(f, backward=backward)(normal(3, 5))
    assert f.calls == solution.calls
    assert not z.requires_grad
    assert torch.equal(z, solution.z)


@every_backward
def test_a_frozen_layer_returns_a_constant(backward: str) -> None:
    """Gradients are enabled, but nothing here is trained."""
    f = Counting().requires_grad_(False)
    z, solution = DEQ(f, backward=backward)(normal(3, 5))
    assert not z.requires_grad
    torch.testing.assert_close(z, solution.z, rtol=1e-3, atol=1e-3)


def test_implicit_returns_the_solution_and_calls_f_once_more() -> None:
    f = Counting()
    z, solution = DEQ(f)(normal(3, 5))
    assert f.calls == solution.calls + 1
    assert z.requires_grad
    assert torch.equal(z, solution.z)
    assert not solution.z.requires_grad
    z.sum().backward()
    assert f.calls == solution.calls + 1  # the backward pass uses vector-Jacobian products alone


@pytest.mark.parametrize("backward", BACKWARDS)
def test_memory_does_not_grow_with_the_forward_steps(backward: str) -> None:
    x = normal(3, 5)
    saved: dict[int, int] = {}
    for steps in (10, 100):
        count = 0

        def pack(tensor: Tensor) -> Tensor:
            nonlocal count
            count += tensor.numel()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            DEQ(TanhMap(5), Picard(), backward=backward, tol=None, max_steps=steps)(x)
        saved[steps] = count
    assert 0 < saved[10] == saved[100]


def gradients(deq: DEQ, x: Tensor, autocast: bool, inside: bool) -> list[Tensor]:
    """Gradients of x and of the parameters; ``inside``: backward is called under autocast too."""
    deq.zero_grad()
    x = x.clone().requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        z, _ = deq(x)
        loss = z.float().square().sum()
        if inside:
            loss.backward()
    if not inside:
        loss.backward()
    grads = [x.grad, *(p.grad for p in deq.parameters())]
    assert all(grad is not None for grad in grads)
    return grads  # type: ignore[return-value]


@every_backward
@pytest.mark.parametrize("inside", [False, True], ids=["backward outside", "backward inside"])
@pytest.mark.filterwarnings("ignore:tol=.* is below what torch.bfloat16")
@pytest.mark.filterwarnings("ignore::deqsolvers.ConvergenceWarning")
def test_autocast_gradients_are_those_of_single_precision_roughly(
    backward: str, inside: bool
) -> None:
    deq = DEQ(LinearMap(24), backward=backward, tol=1e-2)
    x = normal(4, 24, dtype=torch.float32)
    expected = gradients(deq, x, autocast=False, inside=False)
    found = gradients(deq, x, autocast=True, inside=inside)
    for one, other in zip(found, expected, strict=True):
        assert one.dtype == torch.float32
        assert (one - other).norm() <= 0.05 * other.norm()


@pytest.mark.filterwarnings("ignore:tol=.* is below what torch.bfloat16")
@pytest.mark.filterwarnings("ignore::deqsolvers.ConvergenceWarning")
def test_double_backward_after_autocast() -> None:
    """The input comes from a module under autocast, and so has half precision."""
    deq, encoder = DEQ(LinearMap(24), tol=1e-2), nn.Linear(24, 24)
    x = normal(4, 24, dtype=torch.float32).requires_grad_()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = encoder(x)
        assert features.dtype == torch.bfloat16
        z, _ = deq(features, z0=torch.zeros(4, 24))
    (slope,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    slope.square().sum().backward()
    assert all(torch.isfinite(p.grad).all() for p in deq.parameters() if p.grad is not None)


@pytest.mark.filterwarnings("ignore:tol=.* is below what torch.bfloat16")
@pytest.mark.filterwarnings("ignore::deqsolvers.ConvergenceWarning")
def test_an_f_that_raises_leaves_no_weights_in_the_cache_of_autocast() -> None:
    """A cached weight would lack gradients (torch 2.6), and what was written to it since."""
    f, x = LinearMap(24), normal(4, 24, dtype=torch.float32)

    def interrupted(z: Tensor, x: Tensor) -> Tensor:
        f(z, x)
        raise KeyboardInterrupt

    with torch.autocast("cpu", dtype=torch.bfloat16):
        with pytest.raises(KeyboardInterrupt):
            DEQ(interrupted)(x)
        with torch.no_grad():
            f.recur.weight.mul_(0.5)
        found = f(x, x)
        found.sum().backward()
    assert f.recur.weight.grad is not None
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(found, f(x, x), rtol=0, atol=0)


def test_the_default_start_has_single_precision_under_autocast() -> None:
    """The input comes from a module under autocast; the state must not inherit its precision."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = nn.Linear(24, 24)(normal(4, 24, dtype=torch.float32))
        assert features.dtype == torch.bfloat16
        z, solution = DEQ(LinearMap(24), tol=1e-2)(features)
    assert z.dtype == solution.z.dtype == torch.float32


def test_a_half_precision_layer_trains() -> None:
    f = LinearMap(24).bfloat16()
    deq = DEQ(f, tol=2e-2, backward=Implicit(tol=2e-2))
    x = normal(4, 24, dtype=torch.bfloat16).requires_grad_()
    z, solution = deq(x)
    z.float().square().sum().backward()
    assert z.dtype == torch.bfloat16
    assert solution.converged.all()
    assert x.grad is not None
    assert x.grad.dtype == torch.bfloat16
    double = DEQ(copy.deepcopy(f).double(), tol=1e-10, backward=Implicit(tol=1e-10))
    y = x.detach().double().requires_grad_()
    double(y)[0].square().sum().backward()
    assert y.grad is not None
    assert (x.grad.double() - y.grad).norm() <= 0.1 * y.grad.norm()


def test_the_initial_state() -> None:
    f, x = TanhMap(5), normal(3, 5)
    starts: list[Tensor] = []

    def watched(z: Tensor, x: Tensor) -> Tensor:
        starts.append(z)
        return f(z, x)

    deq = DEQ(watched, tol=None, max_steps=1)
    deq(x)
    assert torch.equal(starts[0], torch.zeros_like(x))  # by default zeros like the first input
    starts.clear()
    DEQ(watched, z0=lambda x: 2 * x)(x)
    assert torch.equal(starts[0], 2 * x)
    starts.clear()
    deq(x, z0=3 * x)
    assert torch.equal(starts[0], 3 * x)


def test_a_warm_start_is_not_differentiated() -> None:
    f, x = TanhMap(5), normal(3, 5)
    z0 = normal(3, 5, seed=3).requires_grad_()
    z, _ = DEQ(f)(x, z0=z0)
    z.sum().backward()
    assert z0.grad is None


def test_solve_is_the_fixed_point_function() -> None:
    problem = tanh_deq()
    deq = DEQ(problem.f, Broyden(memory=7), tol=1e-8, max_steps=33)
    here = deq.solve(*problem.inputs, trace=True)
    there = fixed_point(
        problem.f,
        problem.z0,
        problem.inputs,
        solver=Broyden(memory=7),
        tol=1e-8,
        max_steps=33,
        trace=True,
    )
    assert torch.equal(here.z, there.z)
    assert here.trace is not None
    assert there.trace is not None
    torch.testing.assert_close(here.trace, there.trace, equal_nan=True, rtol=0, atol=0)


def test_raise_on_failure() -> None:
    problem = expanding()
    deq = DEQ(problem.f, Picard(), raise_on_failure=True)
    with pytest.raises(ConvergenceError, match="DIVERGED") as caught:
        deq(*problem.inputs)
    assert caught.value.solution.statuses() == [Status.DIVERGED] * 4


def test_an_empty_batch_passes_through() -> None:
    f = TanhMap(5)
    x = torch.zeros(0, 5, dtype=torch.float64, requires_grad=True)
    z, solution = DEQ(f)(x)
    assert z.shape == (0, 5)
    assert solution.calls == 0
    z.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == (0, 5)
    for parameter in f.parameters():
        assert parameter.grad is None or (parameter.grad == 0).all()


def test_with_solver_shares_f_and_keeps_the_options() -> None:
    f = TanhMap(5)
    backward = Implicit(tol=1e-7)
    deq = DEQ(f, backward=backward, z0=torch.ones_like, tol=1e-3, max_steps=9, final="last")
    deq.eval()
    other = deq.with_solver(Picard(), max_steps=4, relative=False)
    assert other.f is f
    assert isinstance(other.solver, Picard)
    assert other.backward is backward
    assert other.z0 is torch.ones_like
    assert not other.training
    expected: dict[str, Any] = {"tol": 1e-3, "max_steps": 4, "final": "last", "relative": False}
    assert {name: getattr(other.options, name) for name in expected} == expected
    assert deq.options.max_steps == 9  # the original is as it was
    assert isinstance(deq.solver, Anderson)


def test_parameters_are_those_of_f_and_of_a_learned_solver() -> None:
    f = TanhMap(5)
    assert set(DEQ(f).state_dict()) == {"f.weight", "f.inject", "f.bias"}
    learned = DEQ(f, HyperSolver.for_vectors(5))
    assert len(list(learned.parameters())) > 3
    assert all(name.split(".")[0] in ("f", "solver") for name in learned.state_dict())


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda deq: pickle.loads(pickle.dumps(deq))])
@every_backward
def test_a_layer_can_be_copied_and_pickled(backward: str, duplicate: Any) -> None:
    deq = DEQ(TanhMap(5), Broyden(memory=3), backward=backward)
    x = normal(3, 5)
    other = duplicate(deq)
    assert torch.equal(other(x)[0], deq(x)[0])
    assert repr(other) == repr(deq)


def test_repr_names_solver_and_options() -> None:
    text = repr(DEQ(TanhMap(5), Broyden(), tol=1e-3))
    assert "Broyden" in text
    assert "tol=0.001" in text
