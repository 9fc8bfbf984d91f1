"""Handing a solve from one solver to another, sample by sample, inside one loop."""

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from deqsolvers import (
    Anderson,
    Broyden,
    FittedOn,
    HandOver,
    HyperSolver,
    Memory,
    NewtonKrylov,
    Picard,
    Solution,
    Solver,
    Status,
    fixed_point,
)
from deqsolvers.state import Layout
from tests.problems import Problem, iterates, rotating, symmetric, tanh_deq


class Stuck(Solver):
    """Picard for a while, then it does not move; NaN instead, if asked."""

    def __init__(self, after: int, rows: tuple[int, ...] | None = None, bad: float = 0.0):
        self.after, self.rows, self.bad = after, rows, bad

    def init(self, z: Tensor, layout: Layout) -> Any:
        self.calls = 0
        return Memory()

    def step(self, memory: Any, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        self.calls += 1
        if self.calls <= self.after:
            return fz
        stuck = torch.ones(len(z), dtype=torch.bool)
        if self.rows is not None:
            stuck[:] = False
            stuck[list(self.rows)] = True
        return torch.where(stuck.unsqueeze(1), z + self.bad, fz)


def test_a_stuck_solver_is_rescued_from_the_point_reached() -> None:
    """Alone it ends as stalled; the tolerance is met all the same."""
    problem = symmetric(0.99)
    alone = fixed_point(problem.f, problem.z0, problem.inputs, solver=Stuck(3), tol=1e-10)
    assert (alone.status == Status.STALLED).all()
    solver = HandOver(Stuck(3), slowest=0.999)
    rescued = fixed_point(
        problem.f, problem.z0, problem.inputs, solver=solver, tol=1e-9, max_steps=200
    )
    assert rescued.statuses() == [Status.CONVERGED] * 4
    assert problem.solution is not None
    torch.testing.assert_close(rescued.z, problem.solution, rtol=1e-6, atol=1e-6)


def test_the_second_solver_draws_on_the_history_of_the_first() -> None:
    """On a linear map of n dimensions, Anderson with n pairs is there one step after it took over.

    Without the history of the plain steps it would need n of its own.
    """
    problem = symmetric(0.9)
    size = problem.z0.shape[1]
    found = iterates(
        problem, HandOver(Picard(), Anderson(memory=size), slowest=1e9, after=size), size + 2
    )
    assert problem.solution is not None

    def distance(step: int) -> float:
        assert problem.solution is not None
        return float((found[step] - problem.solution).norm() / problem.solution.norm())

    assert distance(size) > 1e-2
    assert distance(size + 1) < 1e-5


@pytest.mark.parametrize("after", [1, 4])
def test_after_is_the_number_of_steps_of_the_first(after: int) -> None:
    problem = tanh_deq()
    found = iterates(problem, HandOver(Picard(), Anderson(), slowest=1e9, after=after), 8)
    plain = iterates(problem, Picard(), 8)
    for step in range(after + 1):
        torch.testing.assert_close(found[step], plain[step])
    assert not torch.allclose(found[after + 1], plain[after + 1])


def test_a_fast_enough_solver_keeps_every_sample() -> None:
    problem = tanh_deq()
    found = iterates(problem, HandOver(Picard(), slowest=1e9), 8)
    torch.testing.assert_close(found, iterates(problem, Picard(), 8))


def test_each_sample_is_handed_over_on_its_own() -> None:
    problem = tanh_deq()
    solver = HandOver(Stuck(2, rows=(1, 3)), Anderson(), slowest=0.95)
    found = iterates(problem, solver, 8)
    plain = iterates(problem, Picard(), 8)
    others = [0, 2, 4]
    for step in range(9):
        torch.testing.assert_close(found[step][others], plain[step][others])
    assert problem.solution is not None
    for row in (1, 3):
        left = (found[8][row] - problem.solution[row]).norm()
        assert left < (plain[2][row] - problem.solution[row]).norm()


class Scaled(Solver):
    """``z + scale g``: on ``rate z + b`` errors fall by ``1 - scale (1 - rate)`` a step."""

    def __init__(self, scale: float):
        self.scale = scale

    def init(self, z: Tensor, layout: Layout) -> Any:
        return Memory()

    def step(self, memory: Any, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        return z + self.scale * g


@pytest.mark.parametrize("rate", [0.1, 0.5, 0.95, -0.7])
@pytest.mark.parametrize("better", [True, False])
def test_by_default_the_first_solver_must_gain_more_than_plain_iteration(
    rate: float, better: bool
) -> None:
    """On a linear map of one rate what f contracts by is known; plain steps have scale 1."""
    fall = 0.8 * abs(rate) if better else abs(rate) + 0.2 * (1 - abs(rate))
    first = Scaled((1 - fall) / (1 - rate))
    shift = torch.arange(1.0, 4, dtype=torch.float64).unsqueeze(1).repeat(1, 5)
    problem = Problem("", lambda z: rate * z + shift, torch.zeros_like(shift))
    found = iterates(problem, HandOver(first, Anderson()), 4)
    alone = iterates(problem, first, 4)
    torch.testing.assert_close(found[1], alone[1])
    if better:
        torch.testing.assert_close(found, alone)
    else:  # Anderson with one pair is exact here
        torch.testing.assert_close(found[2], shift / (1 - rate))


@pytest.mark.parametrize("rate", [1.5, -2.0])
def test_where_f_expands_the_residual_must_fall(rate: float) -> None:
    problem = Problem("", lambda z: rate * z + 1, torch.zeros(2, 3, dtype=torch.float64))
    growing = iterates(problem, HandOver(Scaled(1), Anderson()), 3)
    torch.testing.assert_close(growing[2], torch.full((2, 3), 1 / (1 - rate)).double())
    falling = Scaled(0.5 / (1 - rate))
    torch.testing.assert_close(
        iterates(problem, HandOver(falling, Anderson()), 3), iterates(problem, falling, 3)
    )


def test_a_solver_that_does_not_move_at_all_is_slow() -> None:
    """What f contracts by along a step of no length is unknown, 0 / 0."""
    problem = tanh_deq()
    found = iterates(problem, HandOver(Stuck(0), Anderson()), 3)
    torch.testing.assert_close(found[1], problem.z0)
    torch.testing.assert_close(found[2], problem.f(problem.z0, *problem.inputs).detach())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_non_finite_step_is_replaced(bad: float) -> None:
    problem = tanh_deq()

    def solve(solver: Solver) -> Solution:
        return fixed_point(
            problem.f, problem.z0, problem.inputs, solver=solver, drop_converged=False
        )

    assert solve(Stuck(2, (1,), bad)).statuses()[1] == Status.NON_FINITE
    saved = solve(HandOver(Stuck(2, (1,), bad)))
    assert saved.converged.all()


def test_samples_that_leave_the_batch_change_nothing() -> None:
    problem = tanh_deq()
    torch.manual_seed(0)
    hyper = HyperSolver.for_vectors(16, memory=3).double()
    torch.nn.init.normal_(hyper.network.read.weight, std=0.05)  # type: ignore[union-attr, arg-type]
    results = [
        fixed_point(
            problem.f,
            None,
            problem.inputs,
            solver=HandOver(hyper, Anderson(), after=4),
            tol=1e-8,
            drop_converged=drop,
        )
        for drop in (True, False)
    ]
    assert results[0].converged.all()
    assert results[0].rows_evaluated < results[1].rows_evaluated
    torch.testing.assert_close(results[0].z, results[1].z)


def test_a_probe_of_the_first_solver_is_no_answer() -> None:
    problem = tanh_deq()
    solution = fixed_point(
        problem.f,
        problem.z0,
        problem.inputs,
        solver=HandOver(NewtonKrylov(3), slowest=1e9),
        tol=None,
        max_steps=8,
        final="last",
    )
    fz = problem.f(solution.z, *problem.inputs).detach()
    torch.testing.assert_close(solution.residual, (fz - solution.z).norm(dim=1) / fz.norm(dim=1))


def test_an_unfitted_hypersolver_then_keeps_the_promise_of_anderson() -> None:
    """On a map where plain steps crawl; the start of the HyperSolver is used."""
    problem = rotating()
    torch.manual_seed(0)
    hyper = HyperSolver.for_vectors(12).double()
    solver = HandOver(hyper, Anderson(memory=12))
    guess = hyper.start(*problem.inputs).detach()
    torch.testing.assert_close(solver.start(*problem.inputs), guess)
    options: dict[str, Any] = {"tol": 1e-9, "max_steps": 60}
    solution = fixed_point(problem.f, None, problem.inputs, solver=solver, **options)
    assert solution.converged.all()
    alone = fixed_point(problem.f, None, problem.inputs, solver=hyper, **options)
    assert not alone.converged.any()


def test_by_default_anderson_takes_over_after_the_steps_of_the_fit_and_what_was_learned() -> None:
    problem = tanh_deq()
    torch.manual_seed(0)
    hyper = HyperSolver.for_vectors(16, memory=3, rank=4).double()
    assert hyper.preconditioner is not None
    torch.nn.init.normal_(hyper.preconditioner.up.weight, std=0.1)  # type: ignore[union-attr, arg-type]
    solver = HandOver(hyper, slowest=1e9)
    alone = iterates_from(problem, hyper, 6)
    torch.testing.assert_close(iterates_from(problem, solver, 6), alone)  # it was not fitted
    hyper.fitted_on = FittedOn("f", 1, ((16,),), 1, 1, 2, (1.0, 0.5, 0.1))
    found = iterates_from(problem, solver, 6)
    torch.testing.assert_close(found[:3], alone[:3])
    then = Anderson(preconditioner=hyper.preconditioner)
    told = HandOver(hyper, then, slowest=1e9, after=2)
    torch.testing.assert_close(found, iterates_from(problem, told, 6))
    for other in (HandOver(hyper, Anderson(), slowest=1e9, after=2), hyper):
        assert not torch.allclose(iterates_from(problem, other, 6)[3], found[3])


def iterates_from(problem: Problem, solver: Solver, steps: int) -> Tensor:
    """From the solver's own start."""
    with torch.no_grad():
        start = solver.start(*problem.inputs)
    return torch.stack(iterates(replace(problem, z0=start), solver, steps))


def test_its_modules_are_registered() -> None:
    hyper = HyperSolver.for_vectors(4)
    solver = HandOver(hyper)
    assert set(solver.parameters()) == set(hyper.parameters())
    assert "Anderson(memory=5" in repr(solver)


def test_bad_arguments() -> None:
    with pytest.raises(TypeError, match="Broyden"):
        HandOver(Picard(), Broyden())
    with pytest.raises(TypeError, match="NewtonKrylov"):
        HandOver(Picard(), NewtonKrylov())
    with pytest.raises(TypeError, match="solver must be a Solver"):
        HandOver("anderson")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="slowest"):
        HandOver(Picard(), slowest=0)
    with pytest.raises(ValueError, match="after must be an integer"):
        HandOver(Picard(), after=0)
