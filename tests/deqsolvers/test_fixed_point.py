"""What the loop promises: how often f is called, what is measured, returned and recorded."""

import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from deqsolvers import (
    Anderson,
    AndersonTypeI,
    Broyden,
    ConvergenceError,
    NewtonKrylov,
    Picard,
    Solver,
    Status,
    StepInfo,
    fixed_point,
)
from tests.problems import Problem, expanding, linear, rotation, symmetric, tanh_deq

SOLVERS: list[Solver] = [
    Picard(),
    Picard(damping=0.3),
    Anderson(memory=4),
    Anderson(memory=4, damping=0.3),
    AndersonTypeI(memory=4),
    Broyden(memory=6),
    Broyden(memory=6, damping=0.3),
    NewtonKrylov(memory=6),
]


class Counted:
    """Counts the calls of a map and keeps the number of samples that each one saw."""

    def __init__(self, f: Callable[..., Any]):
        self.f = f
        self.sizes: list[int] = []

    def __call__(self, z: Tensor, *inputs: Any) -> Any:
        self.sizes.append(len(z))
        return self.f(z, *inputs)


def residual_of(problem: Problem, z: Tensor, relative: bool = True) -> Tensor:
    """The residual by its definition."""
    with torch.no_grad():
        fz = problem.f(z, *problem.inputs)
    size = (fz - z).flatten(1).pow(2).sum(1).sqrt()
    return size / fz.flatten(1).pow(2).sum(1).sqrt() if relative else size


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("drop", [True, False])
def test_one_evaluation_a_step(solver: Solver, drop: bool) -> None:
    problem = tanh_deq()
    f = Counted(problem.f)
    solution = fixed_point(
        f, problem.z0, problem.inputs, solver=solver, tol=1e-7, max_steps=200, drop_converged=drop
    )
    assert solution.converged.all()
    # z_0 is measured, then every update is followed by one evaluation.
    assert solution.calls == len(f.sizes) == int(solution.steps.max()) + 1
    assert solution.rows_evaluated == sum(f.sizes)
    assert torch.equal(solution.evaluations, solution.steps + 1)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("relative", [True, False])
@pytest.mark.parametrize("tol", [1e-6, None])
def test_the_reported_residual_is_that_of_the_returned_state(
    solver: Solver, relative: bool, tol: float | None
) -> None:
    problem = tanh_deq()
    solution = fixed_point(
        problem.f,
        problem.z0,
        problem.inputs,
        solver=solver,
        tol=tol,
        max_steps=12,
        relative=relative,
    )
    expected = residual_of(problem, solution.z, relative)
    torch.testing.assert_close(solution.residual, expected, rtol=1e-6, atol=1e-15)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_the_best_measured_iterate_is_returned(solver: Solver) -> None:
    """Residuals of an expanding rotation go up and down, or only up."""
    problem = linear("rotation", rotation(4, 2.0, 1.4))
    measured: list[tuple[Tensor, Tensor]] = []
    solution = fixed_point(
        problem.f,
        problem.z0 + 0.1,
        problem.inputs,
        solver=solver,
        tol=None,
        max_steps=9,
        callback=lambda info: measured.append((info.z.clone(), info.residual.clone())),
    )
    sizes = torch.stack([(problem.f(z, *problem.inputs) - z).norm(dim=1) for z, _ in measured])
    best = sizes.argmin(0)
    assert torch.equal(solution.steps, best)
    for row, step in enumerate(best.tolist()):
        assert solution.residual[row] == measured[step][1][row]
        assert torch.equal(solution.z[row], measured[step][0][row])


def test_tol_none_runs_exactly_max_steps() -> None:
    problem = tanh_deq()
    f = Counted(problem.f)
    solution = fixed_point(f, problem.z0, problem.inputs, tol=None, max_steps=7)
    assert solution.statuses() == [Status.FIXED_STEPS] * 5
    assert solution.calls == len(f.sizes) == 8
    assert (solution.evaluations == 8).all()
    assert not solution.converged.any()
    assert not solution.failed.any()


@pytest.mark.parametrize("tol", [None, 1e-12])
def test_final_last_returns_the_unmeasured_last_iterate(tol: float | None) -> None:
    problem = tanh_deq()
    solution = fixed_point(
        problem.f,
        problem.z0,
        problem.inputs,
        solver=Picard(),
        tol=tol,
        max_steps=6,
        final="last",
    )
    z = problem.z0
    with torch.no_grad():
        for _ in range(6):
            z = problem.f(z, *problem.inputs)
    torch.testing.assert_close(solution.z, z)
    assert solution.calls == 6
    assert (solution.steps == 6).all()
    assert solution.residual.isnan().all()
    expected = Status.FIXED_STEPS if tol is None else Status.STEP_LIMIT
    assert solution.statuses() == [expected] * 5


def test_final_last_keeps_the_measured_state_of_converged_samples() -> None:
    """One sample starts at its solution, the others do not get there in time."""
    problem = symmetric(0.99)
    assert problem.solution is not None
    z0 = problem.z0.clone()
    z0[2] = problem.solution[2]
    solution = fixed_point(
        problem.f, z0, problem.inputs, solver=Picard(), tol=1e-8, max_steps=5, final="last"
    )
    assert solution.statuses() == [
        Status.STEP_LIMIT,
        Status.STEP_LIMIT,
        Status.STARTED_CONVERGED,
        Status.STEP_LIMIT,
    ]
    assert torch.equal(solution.z[2], problem.solution[2])
    assert solution.residual.isnan().tolist() == [True, True, False, True]
    assert solution.steps.tolist() == [5, 5, 0, 5]
    assert solution.evaluations.tolist() == [5, 5, 1, 5]


@pytest.mark.parametrize("drop", [True, False])
def test_final_last_takes_the_update_of_converged_samples_too(drop: bool) -> None:
    """Samples meet the tolerance at steps of their own; each gets f of the state that met it."""
    problem = tanh_deq()
    options: dict[str, Any] = {"solver": Picard(), "tol": 1e-3, "drop_converged": drop}
    best = fixed_point(problem.f, problem.z0, problem.inputs, **options)
    last = fixed_point(problem.f, problem.z0, problem.inputs, **options, final="last")
    assert best.converged.all()
    assert len(set(best.steps.tolist())) > 1
    with torch.no_grad():
        torch.testing.assert_close(last.z, problem.f(best.z, *problem.inputs))
    assert torch.equal(last.steps, best.steps + 1)
    assert torch.equal(last.status, best.status)
    assert torch.equal(last.evaluations, best.evaluations)
    assert last.calls == best.calls
    assert last.residual.isnan().all()


def test_final_last_keeps_what_met_the_tolerance_where_the_update_overflows() -> None:
    class Exploding(Picard):
        def step(self, memory: Any, z: torch.Tensor, fz: torch.Tensor, g: torch.Tensor) -> Any:
            return torch.where(g.norm(dim=1, keepdim=True) < 0.1, torch.inf, fz)

    z0 = torch.ones(3, 2)
    solution = fixed_point(lambda z: 0.5 * z + 1, z0, solver=Exploding(), tol=0.05, final="last")
    assert solution.converged.all()
    assert solution.z.isfinite().all()
    assert (solution.residual <= 0.05).all()


@pytest.mark.parametrize("drop", [True, False])
def test_trace_holds_each_sample_until_it_is_decided(drop: bool) -> None:
    problem = tanh_deq()
    measured: dict[tuple[int, int], float] = {}

    def record(info: StepInfo) -> None:
        for row, residual in zip(info.rows.tolist(), info.residual.tolist(), strict=True):
            measured[info.step, row] = residual

    solution = fixed_point(
        problem.f,
        problem.z0,
        problem.inputs,
        solver=Picard(),
        tol=1e-6,
        drop_converged=drop,
        trace=True,
        callback=record,
    )
    assert solution.trace is not None
    assert solution.trace.shape == (solution.calls, 5)
    for row in range(5):
        evaluations = int(solution.evaluations[row])
        column = solution.trace[:, row]
        assert column[evaluations:].isnan().all()
        assert column[:evaluations].tolist() == [measured[step, row] for step in range(evaluations)]
        assert column[evaluations - 1] == solution.residual[row]


def test_no_trace_unless_asked_for() -> None:
    problem = tanh_deq()
    assert fixed_point(problem.f, problem.z0, problem.inputs).trace is None


def test_callback_sees_every_evaluated_state() -> None:
    problem = tanh_deq()
    f = Counted(problem.f)
    infos: list[StepInfo] = []
    solution = fixed_point(f, problem.z0, problem.inputs, callback=infos.append, tol=1e-6)
    assert [info.step for info in infos] == list(range(solution.calls))
    assert [len(info.rows) for info in infos] == f.sizes
    assert torch.equal(infos[0].z, problem.z0)
    assert infos[0].rows.tolist() == [0, 1, 2, 3, 4]
    for info in infos:
        alone = Problem("rows", problem.f, info.z, tuple(x[info.rows] for x in problem.inputs))
        torch.testing.assert_close(info.residual, residual_of(alone, info.z), rtol=1e-6, atol=0)
        assert info.memory is not None


def test_tolerance_below_the_floor_of_the_precision_warns() -> None:
    problem = tanh_deq(dtype=torch.float32)
    with pytest.warns(
        UserWarning, match=r"tol=1e-08 is below what torch.float32 can reach"
    ) as found:
        fixed_point(problem.f, problem.z0, problem.inputs, tol=1e-8, max_steps=2)
    assert found[0].filename == __file__  # it points at the call, not into the library


@pytest.mark.parametrize(
    ("dtype", "tol", "relative"),
    [
        (torch.float32, 1e-6, True),
        (torch.float64, 1e-12, True),
        (torch.float32, 1e-8, False),  # an absolute tolerance has no floor
        (torch.float32, None, True),
    ],
)
def test_a_tolerance_within_reach_does_not_warn(
    dtype: torch.dtype, tol: float | None, relative: bool
) -> None:
    problem = tanh_deq(dtype=dtype)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fixed_point(problem.f, problem.z0, problem.inputs, tol=tol, relative=relative, max_steps=2)


def test_inference_mode() -> None:
    problem = tanh_deq()
    expected = fixed_point(problem.f, problem.z0, problem.inputs)
    with torch.inference_mode():
        inside = fixed_point(problem.f, problem.z0.clone(), problem.inputs)
        outside = fixed_point(problem.f, problem.z0, problem.inputs)
    for solution in (inside, outside):
        assert torch.equal(solution.z, expected.z)
        assert solution.statuses() == expected.statuses()


def test_an_empty_batch() -> None:
    f = Counted(lambda z, x: 0.5 * z + x)
    solution = fixed_point(f, torch.zeros(0, 3, 2), (torch.zeros(0, 3, 2),), trace=True)
    assert solution.z.shape == (0, 3, 2)
    assert solution.calls == solution.rows_evaluated == len(f.sizes) == 0
    assert solution.statuses() == []
    assert solution.trace is not None
    assert solution.trace.shape == (0, 0)
    assert solution.describe() == "The batch was empty."


def test_the_solution_does_not_share_memory_with_the_initial_state() -> None:
    """Otherwise writing the next warm start into z0's buffer would change the old solution."""
    problem = symmetric(0.5)
    assert problem.solution is not None
    z0 = problem.solution.clone()
    solution = fixed_point(problem.f, z0, problem.inputs, tol=1e-6)
    z0.zero_()
    torch.testing.assert_close(solution.z, problem.solution)


def test_a_diverging_sample_does_not_return_its_farthest_iterate() -> None:
    """Its relative residual falls towards 1 - 1/rate while it runs away."""
    solution = fixed_point(
        lambda z: 2 * z + 1, torch.zeros(1, 3), solver=Picard(), tol=1e-6, max_steps=60
    )
    assert solution.statuses() == [Status.DIVERGED]
    assert torch.equal(solution.z, torch.zeros(1, 3))


def test_gradients_stay_out_of_the_solve() -> None:
    problem = tanh_deq()
    z0, x = problem.z0.clone().requires_grad_(), problem.inputs[0].clone().requires_grad_()
    solution = fixed_point(problem.f, z0, (x,))
    assert not solution.z.requires_grad
    assert not solution.residual.requires_grad


def test_raise_on_failure_carries_the_solution() -> None:
    problem = expanding()
    with pytest.raises(ConvergenceError, match="4 of 4 DIVERGED") as caught:
        fixed_point(problem.f, problem.z0, problem.inputs, solver=Picard(), raise_on_failure=True)
    assert caught.value.solution.statuses() == [Status.DIVERGED] * 4
    assert str(caught.value) == caught.value.solution.describe()


def test_raise_on_failure_is_silent_on_success() -> None:
    problem = tanh_deq()
    fixed_point(problem.f, problem.z0, problem.inputs, raise_on_failure=True)
    fixed_point(problem.f, problem.z0, problem.inputs, tol=None, max_steps=1, raise_on_failure=True)
