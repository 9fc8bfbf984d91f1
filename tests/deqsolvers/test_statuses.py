"""Every status has a case that ends in it, and a sentence that says cause and remedy."""

import math

import pytest
import scipy.optimize
import torch
from torch import Tensor

from deqsolvers import (
    Anderson,
    AndersonTypeI,
    Broyden,
    Memory,
    NewtonKrylov,
    Picard,
    Solution,
    Solver,
    Status,
    fixed_point,
)
from deqsolvers.state import Layout
from tests.problems import breaking, expanding, jumping, solved, symmetric, tanh_deq

SOLVERS: list[Solver] = [Picard(), Anderson(), AndersonTypeI(), Broyden(), NewtonKrylov()]

every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)


@every_solver
def test_started_converged_costs_one_evaluation(solver: Solver) -> None:
    problem = solved()
    solution = fixed_point(problem.f, problem.z0, problem.inputs, solver=solver)
    assert solution.statuses() == [Status.STARTED_CONVERGED] * 4
    assert solution.calls == 1
    assert (solution.evaluations == 1).all()
    assert (solution.steps == 0).all()
    assert torch.equal(solution.z, problem.z0)


@every_solver
def test_a_warm_start_at_the_solution_costs_one_evaluation(solver: Solver) -> None:
    problem = tanh_deq()
    first = fixed_point(problem.f, problem.z0, problem.inputs, solver=solver, tol=1e-8)
    again = fixed_point(problem.f, first.z, problem.inputs, solver=solver, tol=1e-7)
    assert again.statuses() == [Status.STARTED_CONVERGED] * 5
    assert again.calls == 1


@every_solver
def test_converged(solver: Solver) -> None:
    problem = tanh_deq()
    solution = fixed_point(problem.f, problem.z0, problem.inputs, solver=solver, tol=1e-5)
    assert solution.statuses() == [Status.CONVERGED] * 5
    assert (solution.residual <= 1e-5).all()
    assert (solution.steps > 0).all()


def test_fixed_steps() -> None:
    problem = tanh_deq()
    solution = fixed_point(problem.f, problem.z0, problem.inputs, tol=None, max_steps=3)
    assert solution.statuses() == [Status.FIXED_STEPS] * 5


def test_step_limit() -> None:
    problem = symmetric(0.99)
    solution = fixed_point(problem.f, problem.z0, problem.inputs, solver=Picard(), max_steps=20)
    assert solution.statuses() == [Status.STEP_LIMIT] * 4
    assert solution.calls == 21


@pytest.mark.parametrize("stall_after", [5, 12])
def test_stalled_after_that_many_steps_without_progress(stall_after: int) -> None:
    problem = jumping()
    solution = fixed_point(
        problem.f, problem.z0, solver=Picard(), stall_after=stall_after, trace=True
    )
    assert solution.statuses() == [Status.STALLED] * 2
    assert solution.trace is not None
    for row in range(2):
        trace = solution.trace[: int(solution.evaluations[row]), row]
        # One evaluation makes the last progress and stall_after more make none.
        assert len(trace) - 1 - int(trace.argmin()) == stall_after


@pytest.mark.parametrize("beside", [False, True], ids=["alone", "beside a converged sample"])
def test_progress_of_less_than_a_percent_is_a_stall(beside: bool) -> None:
    """||f(z) - z|| = 0.9999^k, which takes a hundred steps to fall by one per cent."""
    shift = torch.tensor([[1.0], [0.0]] if beside else [[1.0]], dtype=torch.float64)
    solution = fixed_point(
        lambda z: 0.9999 * z + shift,
        torch.zeros_like(shift),
        solver=Picard(),
        relative=False,
        max_steps=200,
        stall_after=30,
        drop_converged=False,
    )
    assert solution.statuses()[0] == Status.STALLED
    assert solution.evaluations[0] == 31


def test_slow_progress_is_not_a_stall() -> None:
    """Rate 0.999: the residual falls by one per cent in ten steps."""
    problem = symmetric(0.999)
    solution = fixed_point(
        problem.f, problem.z0, problem.inputs, solver=Picard(), stall_after=30, max_steps=200
    )
    assert solution.statuses() == [Status.STEP_LIMIT] * 4


def test_diverged() -> None:
    problem = expanding()
    solution = fixed_point(problem.f, problem.z0, problem.inputs, solver=Picard(), max_steps=1000)
    assert solution.statuses() == [Status.DIVERGED] * 4
    assert torch.isfinite(solution.z).all()


def test_slow_growth_is_divergence_once_it_has_lasted() -> None:
    """The residual is 1.1^k: 17 after as many steps as show a stall, far from 10^10."""
    solution = fixed_point(
        lambda z: 1.1 * z + 1, torch.zeros(1, 1), solver=Picard(), relative=False, stall_after=30
    )
    assert solution.statuses() == [Status.DIVERGED]
    assert solution.calls == 31


class Scripted(Picard):
    """Goes from one given number to the next."""

    def __init__(self, *path: float):
        super().__init__()
        self.path = path

    def init(self, z: Tensor, layout: Layout) -> Memory:
        self.left = iter(self.path)
        return super().init(z, layout)

    def step(self, memory: Memory, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        return torch.full_like(z, next(self.left))


@pytest.mark.parametrize(
    ("path", "status"), [((50.0, 100.0), Status.DIVERGED), ((0.5, 100.0), Status.STEP_LIMIT)]
)
def test_a_last_step_that_went_too_far_is_no_divergence(
    path: tuple[float, ...], status: Status
) -> None:
    """The residual of f(z) = 0 is |z|. Who came closer before needs more steps, no other f."""
    solution = fixed_point(
        torch.zeros_like,
        torch.ones(1, 1),
        solver=Scripted(*path),
        relative=False,
        max_steps=len(path),
    )
    assert solution.statuses() == [status]


def test_a_sample_that_meets_the_tolerance_returns_the_state_that_met_it() -> None:
    """Of f(z) = z + 1 the residual relative to f(z) falls, and ||f(z) - z|| stays what it is."""
    solution = fixed_point(
        lambda z: z + 1, torch.zeros(1, 1), solver=Picard(), tol=0.051, max_steps=40
    )
    assert solution.statuses() == [Status.CONVERGED]
    assert float(solution.z) == int(solution.steps) == 19
    assert float(solution.residual) == pytest.approx(1 / 20)


def test_fast_growth_ends_long_before_a_stall_would_show_it() -> None:
    solution = fixed_point(lambda z: 10 * z + 1, torch.zeros(1, 1), solver=Picard())
    assert solution.statuses() == [Status.DIVERGED]
    # The residual is 10^k, and exceeds 10^10 times the first at k = 10 or 11, as rounding has it.
    assert 11 <= solution.calls <= 12


@pytest.mark.parametrize("origin", [0.0, 1.0])
@pytest.mark.parametrize("distance", [1e-3, 1e-8])
def test_growth_away_from_an_unstable_start_is_not_divergence(
    distance: float, origin: float
) -> None:
    """Close to the unstable fixed point of tanh(3 z), between the stable ones, it grows first."""
    z0 = origin + torch.tensor([[distance], [-distance]], dtype=torch.float64)
    solution = fixed_point(
        lambda z: origin + torch.tanh(3 * (z - origin)), z0, solver=Picard(), tol=1e-10
    )
    assert solution.statuses() == [Status.CONVERGED] * 2
    stable = scipy.optimize.brentq(lambda z: math.tanh(3 * z) - z, 0.5, 1)
    expected = origin + stable * torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    torch.testing.assert_close(solution.z, expected, rtol=0, atol=1e-8)


@every_solver
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_non_finite_at_the_first_evaluation(solver: Solver, bad: float) -> None:
    def f(z: Tensor, mark: Tensor) -> Tensor:
        return torch.where(mark > 0, bad, 0.5 * z + 1)

    mark = torch.tensor([[0.0], [1.0], [0.0]])
    solution = fixed_point(f, torch.zeros(3, 2), (mark,), solver=solver)
    assert solution.statuses() == [Status.CONVERGED, Status.NON_FINITE, Status.CONVERGED]
    assert solution.evaluations[1] == 1
    assert solution.residual[1] == math.inf  # nothing finite was ever measured
    assert torch.equal(solution.z[1], torch.zeros(2))


@every_solver
@pytest.mark.parametrize("tol", [1e-8, None])
def test_non_finite_later_returns_the_best_finite_iterate(
    solver: Solver, tol: float | None
) -> None:
    problem = breaking(after=4, sample=1)
    solution = fixed_point(
        problem.f, problem.z0, problem.inputs, solver=solver, tol=tol, trace=True
    )
    assert solution.statuses()[1] == Status.NON_FINITE
    assert solution.statuses().count(Status.NON_FINITE) == 1
    assert solution.trace is not None
    finite = solution.trace[:4, 1]
    assert torch.isfinite(finite).all()
    assert solution.evaluations[1] == 5
    assert solution.steps[1] == finite.argmin()
    assert solution.residual[1] == finite.min()
    assert torch.isfinite(solution.z).all()


@every_solver
def test_a_broken_sample_has_its_residual_where_nobody_sees_those_of_the_others(
    solver: Solver,
) -> None:
    def solve(trace: bool) -> Solution:
        problem = breaking(after=4, sample=1)
        return fixed_point(
            problem.f,
            problem.z0,
            problem.inputs,
            solver=solver,
            tol=None,
            max_steps=8,
            final="last",
            trace=trace,
        )

    seen, unseen = solve(trace=True), solve(trace=False)
    assert torch.isfinite(unseen.residual[1])
    assert unseen.statuses() == seen.statuses()
    torch.testing.assert_close(unseen.residual, seen.residual, rtol=1e-9, atol=0, equal_nan=True)
    torch.testing.assert_close(unseen.z, seen.z, rtol=0, atol=0, equal_nan=True)


@every_solver
def test_a_finite_map_never_ends_as_non_finite(solver: Solver) -> None:
    """f(z) = 0: the residual relative to ||f(z)|| is undefined at the start, and 0 a step later."""
    solution = fixed_point(torch.zeros_like, torch.full((2, 50), 10.0), solver=solver)
    assert solution.statuses() == [Status.CONVERGED] * 2
    assert torch.equal(solution.z, torch.zeros(2, 50))


@pytest.mark.parametrize("status", list(Status))
def test_every_status_has_a_sentence(status: Status) -> None:
    assert status.sentence.endswith(".")
    if status < 0:
        assert status.sentence.count(".") >= 2, "a failure names its cause and a remedy"
    assert len({other.sentence for other in Status}) == len(Status)


def test_a_stall_at_a_fixed_point_of_zero_points_to_the_absolute_residual() -> None:
    """A relative residual cannot fall there, and the user must learn why."""
    solution = fixed_point(lambda z: 0.5 * z, torch.ones(1, 3), solver=Picard(), max_steps=60)
    assert solution.statuses() == [Status.STALLED]
    assert "relative=False" in solution.describe()


def test_describe_groups_samples_by_status() -> None:
    solution = Solution(
        z=torch.zeros(12, 1),
        status=torch.tensor([1] * 10 + [-1, -4], dtype=torch.int8),
        residual=torch.tensor([1e-5] * 9 + [9e-5, 3e-2, math.inf]),
        steps=torch.zeros(12),
        evaluations=torch.zeros(12),
        calls=1,
        rows_evaluated=12,
    )
    lines = solution.describe().splitlines()
    assert len(lines) == 3
    described = "\n".join(lines)
    assert (
        "10 of 12 CONVERGED (samples 0, 1, 2, 3, 4, 5, 6, 7, ...; worst residual 9.00e-05)"
        in described
    )
    assert "1 of 12 STEP_LIMIT (samples 10; worst residual 3.00e-02)" in described
    assert "1 of 12 NON_FINITE (samples 11; worst residual inf)" in described
    assert Status.NON_FINITE.sentence in lines[0], "the worst comes first"


def test_describe_takes_an_unmeasured_residual_for_no_failure() -> None:
    solution = fixed_point(lambda z: 0.5 * z + 1, torch.zeros(2, 1), tol=0.1, final="last")
    assert solution.residual.isnan().all()
    assert "2 of 2 CONVERGED (samples 0, 1; not measured)" in solution.describe()


class Leap(Solver):
    """Steps so far that half precision overflows where f does not."""

    def init(self, z: Tensor, layout: Layout) -> Memory:
        return Memory()

    def step(self, memory: Memory, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        return z + 4 * g


@pytest.mark.parametrize("tol", [None, 1e-2])
def test_a_last_step_that_overflows_is_not_returned(tol: float | None) -> None:
    z0 = torch.tensor([[1.0], [2e4]]).half()
    solution = fixed_point(lambda z: 1.9 * z, z0, solver=Leap(), tol=tol, max_steps=1, final="last")
    other = Status.FIXED_STEPS if tol is None else Status.STEP_LIMIT
    assert solution.statuses() == [other, Status.NON_FINITE]
    torch.testing.assert_close(solution.z, torch.tensor([[4.6], [2e4]]).half(), rtol=1e-3, atol=0)
    assert solution.steps.tolist() == [1, 0]
    assert solution.residual[0].isnan()
    assert abs(solution.residual[1] - 0.9 / 1.9) < 1e-3


def test_the_best_residual_is_absolute_where_that_was_asked_for() -> None:
    f = iter([torch.full((1, 1), 3.0), torch.full((1, 1), torch.nan)])
    solution = fixed_point(
        lambda z: next(f),
        torch.ones(1, 1),
        solver=Picard(),
        tol=None,
        max_steps=2,
        final="last",
        relative=False,
    )
    assert solution.statuses() == [Status.NON_FINITE]
    assert solution.residual.tolist() == [2.0]


def test_converged_and_failed_split_the_statuses() -> None:
    solution = fixed_point(
        lambda z, rate: rate * z + 1,
        torch.zeros(3, 1),
        (torch.tensor([[0.5], [3.0], [0.99]]),),
        solver=Picard(),
        max_steps=40,
    )
    assert solution.statuses() == [Status.CONVERGED, Status.DIVERGED, Status.STEP_LIMIT]
    assert solution.converged.tolist() == [True, False, False]
    assert solution.failed.tolist() == [False, True, True]
    assert solution.status.dtype == torch.int8
