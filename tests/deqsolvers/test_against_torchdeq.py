"""The same answers as torchdeq where it is right, and the faults found in it absent here."""

import pytest
import torch
import torchdeq
from torch import nn

from deqsolvers import (
    DEQ,
    Anderson,
    AndersonTypeI,
    Broyden,
    Implicit,
    NewtonKrylov,
    Picard,
    Solver,
    Status,
    fixed_point,
)
from tests.deqsolvers.maps import LinearMap, TanhMap, normal
from tests.problems import PROBLEMS, breaking, linear, scaled, symmetric, tanh_deq, with_spectrum

SOLVERS: list[Solver] = [Picard(), Anderson(), AndersonTypeI(), Broyden(), NewtonKrylov()]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)
# torchdeq adds 1e-4 to every Gram matrix unless told otherwise, and stops short of 1e-9.
TIGHT = {"lam": 1e-12}
PAIRS: list[tuple[str, Solver, dict[str, float]]] = [
    ("anderson", Anderson(memory=5), TIGHT),
    ("anderson", AndersonTypeI(memory=5), TIGHT),
    ("broyden", Broyden(memory=50), {}),
]


@pytest.mark.parametrize(("method", "solver", "options"), PAIRS, ids=repr)
@pytest.mark.parametrize("name", ["tanh", "perceptron", "convolution", "symmetric 0.5", "bratu"])
def test_the_same_fixed_points(
    name: str, method: str, solver: Solver, options: dict[str, float]
) -> None:
    problem = PROBLEMS[name]()
    theirs, _, _ = torchdeq.get_solver(method)(
        lambda z: problem.f(z, *problem.inputs),
        problem.z0,
        max_iter=80,
        tol=1e-9,
        stop_mode="rel",
        **options,
    )
    ours = fixed_point(problem.f, problem.z0, problem.inputs, solver=solver, tol=1e-9, max_steps=80)
    assert ours.converged.all()
    torch.testing.assert_close(ours.z, theirs.detach(), rtol=0, atol=1e-7)


@pytest.mark.parametrize("name", ["tanh", "perceptron", "convolution"])
def test_the_same_implicit_gradients(name: str) -> None:
    problem = PROBLEMS[name]()
    assert isinstance(problem.f, nn.Module)
    x = problem.inputs[0].requires_grad_()
    variables = [x, *problem.f.parameters()]
    theirs = torchdeq.get_deq(
        ift=True,
        f_solver="broyden",
        b_solver="broyden",
        f_max_iter=60,
        b_max_iter=60,
        f_tol=1e-11,
        b_tol=1e-11,
        f_stop_mode="rel",
        b_stop_mode="rel",
    )
    ours = DEQ(problem.f, tol=1e-11, backward=Implicit(tol=1e-11), max_steps=100)
    (their_z,), _ = theirs(lambda z: problem.f(z, x), problem.z0)
    expected = torch.autograd.grad(their_z.square().sum(), variables)
    found = torch.autograd.grad(ours(x)[0].square().sum(), variables)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


# Of six evaluations Newton-Krylov spends five on probes.
@pytest.mark.parametrize("solver", SOLVERS[:4], ids=repr)
def test_fault_1_one_nan_evaluation_keeps_the_best_so_far(solver: Solver) -> None:
    problem = breaking(after=5, sample=0)
    solution = fixed_point(problem.f, problem.z0, problem.inputs, solver=solver, tol=1e-9)
    assert solution.statuses()[0] == Status.NON_FINITE
    assert torch.isfinite(solution.z).all()
    assert solution.residual[0] < 0.2  # five evaluations were not in vain
    assert solution.converged[1:].all()


@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_fault_2_a_fifty_dimensional_contraction(scale: float) -> None:
    """Anderson with an absolute ridge needs 399 steps here, and never ends at a scale of 1e-3."""
    spectrum = torch.linspace(-0.93, 0.93, 50, dtype=torch.float64)
    problem = scaled(linear("contraction", with_spectrum(spectrum), batch=2), scale)
    steps = {}
    for solver in (Picard(), Anderson(memory=6), Broyden(memory=20)):
        solution = fixed_point(
            problem.f, problem.z0, problem.inputs, solver=solver, tol=1e-6, max_steps=400
        )
        assert solution.converged.all(), solution.describe()
        steps[type(solver)] = int(solution.steps.max())
    assert steps[Anderson] <= 60
    assert steps[Broyden] <= 60
    assert steps[Picard] >= 2 * steps[Anderson]


def test_fault_3_a_sample_is_evaluated_until_it_is_done_and_no_longer() -> None:
    rates = torch.full((20, 1), 0.05, dtype=torch.float64)
    rates[7] = 0.95
    solution = fixed_point(
        lambda z, rate, b: rate * z + b,
        torch.zeros(20, 4, dtype=torch.float64),
        (rates, normal(20, 4)),
        solver=Picard(),
        tol=1e-6,
        max_steps=400,
    )
    assert solution.converged.all()
    # From zero, f(z_k) - z_k = rate^k b and f(z_k) = (1 - rate^(k + 1)) / (1 - rate) b.
    fast, slow = (
        next(k for k in range(400) if rate**k * (1 - rate) / (1 - rate ** (k + 1)) <= 1e-6) + 1
        for rate in (0.05, 0.95)
    )
    assert solution.evaluations.tolist() == [slow if row == 7 else fast for row in range(20)]
    assert solution.rows_evaluated == 19 * fast + slow


def test_fault_4_calls_and_backward_passes_may_interleave() -> None:
    f, x, y = TanhMap(4), normal(2, 4).requires_grad_(), normal(2, 4, seed=1).requires_grad_()
    deq = DEQ(f, tol=1e-10, backward=Implicit(tol=1e-10))
    one, other = deq(x)[0].sum(), deq(y)[0].sum()
    first = torch.autograd.grad(one, x, retain_graph=True)
    torch.autograd.grad(other, y)
    second = torch.autograd.grad(one, x)
    assert torch.equal(first[0], second[0])
    assert torch.equal(first[0], torch.autograd.grad(deq(x)[0].sum(), x)[0])


def test_fault_4_double_backward() -> None:
    f = TanhMap(3, norm=0.6)
    deq = DEQ(f, tol=1e-13, max_steps=100, backward=Implicit(tol=1e-13, max_steps=100))
    x = normal(2, 3).requires_grad_()
    assert torch.autograd.gradgradcheck(lambda x: deq(x)[0], x)


@every_solver
def test_fault_5_autocast_costs_the_solver_nothing(solver: Solver) -> None:
    """It reaches what f's own rounding allows, and the backward pass meets no mixed dtypes."""
    f, x = LinearMap(64), normal(4, 64, dtype=torch.float32).requires_grad_()
    deq = DEQ(f, solver, tol=None, max_steps=30, backward=Implicit(solver, tol=5e-3))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        z, solution = deq(x)
        loss = z.square().sum()
    loss.backward()
    assert (solution.residual < 4e-3).all()
    assert x.grad is not None
    assert f.recur.weight.grad is not None
    assert f.recur.weight.grad.dtype == torch.float32


@every_solver
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_fault_5_native_half_precision(solver: Solver, dtype: torch.dtype) -> None:
    f, x = LinearMap(64).to(dtype), normal(4, 64, dtype=dtype)
    solution = fixed_point(f, torch.zeros_like(x), (x,), solver=solver, tol=2e-2)
    assert solution.converged.all()
    assert solution.z.dtype == dtype


def test_fault_6_a_memory_of_one() -> None:
    problem = symmetric(0.5)
    for method in (Anderson, AndersonTypeI, Broyden, NewtonKrylov):
        solver = method(memory=1)
        solution = fixed_point(problem.f, problem.z0, problem.inputs, solver=solver)
        assert solution.converged.all()


@every_solver
def test_fault_6_two_steps_are_two_steps(solver: Solver) -> None:
    problem = tanh_deq()
    solution = fixed_point(
        problem.f, problem.z0, problem.inputs, solver=solver, tol=None, max_steps=2, trace=True
    )
    assert solution.trace is not None
    assert (solution.trace[2] < solution.trace[0]).all()
    assert (solution.steps == 2).all()


@every_solver
def test_fault_6_a_warm_start_at_the_solution_costs_one_evaluation(solver: Solver) -> None:
    problem = tanh_deq()
    assert problem.solution is not None
    solution = fixed_point(problem.f, problem.solution, problem.inputs, solver=solver, tol=1e-8)
    assert solution.statuses() == [Status.STARTED_CONVERGED] * 5
    assert solution.calls == 1


@pytest.mark.parametrize("damping", [1.0, 0.5, 0.1])
def test_fault_6_damping_does_not_flatter_the_residual(damping: float) -> None:
    """||z_(k+1) - z_k|| is damping times the residual; the tolerance is for the residual."""
    problem = symmetric(0.5)
    solution = fixed_point(
        problem.f,
        problem.z0,
        problem.inputs,
        solver=Picard(damping=damping),
        tol=1e-4,
        max_steps=400,
    )
    assert solution.converged.all()
    fz = problem.f(solution.z, *problem.inputs)
    residual = (fz - solution.z).norm(dim=1) / fz.norm(dim=1)
    assert (residual <= 1e-4).all()
    torch.testing.assert_close(solution.residual, residual)


def test_fault_6_broydens_memory_is_its_own_not_that_of_the_steps() -> None:
    problem = tanh_deq()
    sizes: set[int] = set()
    fixed_point(
        problem.f,
        problem.z0,
        problem.inputs,
        solver=Broyden(memory=4),
        max_steps=10_000,
        callback=lambda info: sizes.add(info.memory.steps.buffer.shape[0]),
    )
    assert sizes == {5}  # four rank-one factors link five steps


@pytest.mark.parametrize("name", ["stop_mode", "f_tol", "lam", "max_iter"])
def test_fault_7_unknown_options_are_errors(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        fixed_point(torch.cos, torch.zeros(1, 1), **{name: "rel"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=name):
        Anderson(**{name: "rel"})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=name):
        DEQ(torch.cos, **{name: "rel"})  # type: ignore[arg-type]
