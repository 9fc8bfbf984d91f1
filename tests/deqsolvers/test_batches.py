"""A sample's result does not depend on its batch mates, and decided samples leave the batch."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from deqsolvers import (
    Anderson,
    AndersonTypeI,
    Broyden,
    NewtonKrylov,
    Picard,
    Solution,
    Solver,
    Status,
    fixed_point,
)
from tests.deqsolvers.maps import normal
from tests.problems import breaking, tanh_deq

SOLVERS: list[Solver] = [
    Picard(),
    Anderson(memory=4),
    AndersonTypeI(memory=4),
    Broyden(memory=8),
    NewtonKrylov(memory=6),
]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)
# The same examples in every run: a test suite must not fail by chance.
few = settings(deadline=None, max_examples=10, derandomize=True)


def uneven(batch: int, seed: int, size: int = 6) -> tuple[Tensor, Tensor]:
    """Inputs (rate, x) of maps that contract between very fast and slowly, in random order."""
    order = torch.randperm(batch, generator=torch.Generator().manual_seed(seed))
    rates = torch.linspace(0.0, 0.93, batch, dtype=torch.float64)[order]
    return rates.unsqueeze(1), normal(batch, size, seed=seed)


def mixing(z: Tensor, rate: Tensor, x: Tensor) -> Tensor:
    """A map that couples the features of a sample, and whose rate is an input."""
    return torch.tanh(rate * z.roll(1, dims=1) + x) + 0.3 * rate * z


def solve(inputs: tuple[Tensor, ...], solver: Solver, **options: object) -> Solution:
    options = {"tol": 1e-9, "max_steps": 60, **options}
    return fixed_point(mixing, torch.zeros_like(inputs[1]), inputs, solver=solver, **options)  # type: ignore[arg-type]


def assert_same(one: Solution, other: Solution) -> None:
    assert one.statuses() == other.statuses()
    assert torch.equal(one.steps, other.steps)
    assert torch.equal(one.evaluations, other.evaluations)
    torch.testing.assert_close(one.z, other.z, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(one.residual, other.residual, rtol=1e-4, atol=1e-14)


def rows_of(solution: Solution, rows: list[int]) -> Solution:
    return Solution(
        solution.z[rows],
        solution.status[rows],
        solution.residual[rows],
        solution.steps[rows],
        solution.evaluations[rows],
        solution.calls,
        solution.rows_evaluated,
    )


@every_solver
@given(seed=st.integers(0, 10_000), batch=st.integers(2, 9), drop=st.booleans())
@few
def test_solved_together_is_solved_alone(solver: Solver, seed: int, batch: int, drop: bool) -> None:
    inputs = uneven(batch, seed)
    together = solve(inputs, solver, drop_converged=drop)
    for row in range(batch):
        alone = solve(tuple(tensor[row : row + 1] for tensor in inputs), solver)
        assert_same(rows_of(together, [row]), alone)


@every_solver
@given(seed=st.integers(0, 10_000), order=st.permutations(range(7)))
@few
def test_the_order_of_the_batch_does_not_matter(
    solver: Solver, seed: int, order: list[int]
) -> None:
    inputs = uneven(7, seed)
    straight = solve(inputs, solver)
    permuted = solve(tuple(tensor[order] for tensor in inputs), solver)
    assert_same(permuted, rows_of(straight, order))
    assert permuted.calls == straight.calls
    assert permuted.rows_evaluated == straight.rows_evaluated


@every_solver
@given(seed=st.integers(0, 10_000), batch=st.integers(1, 12))
@few
def test_leaving_the_batch_changes_no_result(solver: Solver, seed: int, batch: int) -> None:
    inputs = uneven(batch, seed)
    leaving = solve(inputs, solver, trace=True)
    staying = solve(inputs, solver, drop_converged=False, trace=True)
    assert_same(leaving, staying)
    assert leaving.trace is not None
    assert staying.trace is not None
    torch.testing.assert_close(leaving.trace, staying.trace, rtol=1e-4, atol=1e-14, equal_nan=True)
    assert staying.rows_evaluated == staying.calls * batch
    assert int(leaving.evaluations.sum()) <= leaving.rows_evaluated <= staying.rows_evaluated


@every_solver
@pytest.mark.parametrize("drop", [True, False])
def test_a_nan_in_one_sample_leaves_the_others_alone(solver: Solver, drop: bool) -> None:
    problem = breaking(after=3, sample=2)
    healthy = tanh_deq()
    broken = fixed_point(
        problem.f, problem.z0, problem.inputs, solver=solver, tol=1e-9, drop_converged=drop
    )
    whole = fixed_point(
        healthy.f, healthy.z0, healthy.inputs, solver=solver, tol=1e-9, drop_converged=drop
    )
    others = [0, 1, 3, 4]
    assert broken.statuses()[2] == Status.NON_FINITE
    assert_same(rows_of(broken, others), rows_of(whole, others))


@every_solver
def test_a_sample_of_infinite_inputs_leaves_the_others_alone(solver: Solver) -> None:
    rate, x = uneven(5, seed=3)
    expected = solve((rate, x), solver)
    spoilt = rate.clone()
    spoilt[1] = torch.inf  # inf times z_0 = 0 is NaN at once
    found = solve((spoilt, x), solver)
    others = [0, 2, 3, 4]
    assert found.statuses()[1] == Status.NON_FINITE
    assert_same(rows_of(found, others), rows_of(expected, others))


@every_solver
def test_decided_samples_leave_the_batch_together_with_their_inputs(solver: Solver) -> None:
    batch = 10
    rate, x = uneven(batch, seed=5)
    number = torch.arange(batch, dtype=torch.float64).unsqueeze(1)
    seen: list[list[int]] = []

    def f(z: Tensor, rate: Tensor, extra: dict[str, Tensor], name: str) -> Tensor:
        assert name == "kept"  # what is no tensor passes unchanged
        rows = [int(n) for n in extra["number"]]
        assert torch.equal(extra["x"], x[rows])
        assert len(z) == len(rate) == len(rows)
        seen.append(rows)
        return mixing(z, rate, extra["x"])

    solution = fixed_point(
        f,
        torch.zeros_like(x),
        (rate, {"x": x, "number": number}, "kept"),
        solver=solver,
        tol=1e-9,
        max_steps=60,
    )
    sizes = [len(rows) for rows in seen]
    assert sizes[0] == batch
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] < batch / 2
    assert solution.calls == len(sizes)
    assert solution.rows_evaluated == sum(sizes)
    for rows, step in zip(seen, range(len(seen)), strict=True):
        running = {row for row in range(batch) if solution.evaluations[row] > step}
        assert running <= set(rows)  # nobody leaves before being decided
        # Fewer than a fifth of the batch may wait for others to leave with.
        assert len(rows) - len(running) < max(1, 0.2 * len(rows))


@every_solver
def test_drop_converged_false_keeps_the_whole_batch(solver: Solver) -> None:
    sizes = []

    def f(z: Tensor, *inputs: Tensor) -> Tensor:
        sizes.append(len(z))
        return mixing(z, *inputs)

    rate, x = uneven(10, seed=5)
    fixed_point(f, torch.zeros_like(x), (rate, x), solver=solver, tol=1e-9, drop_converged=False)
    assert set(sizes) == {10}


@every_solver
def test_a_decided_sample_that_stays_keeps_a_finite_state(solver: Solver) -> None:
    """A diverged or broken sample must not feed ever larger numbers into f."""
    problem = breaking(after=2, sample=0)
    states: list[Tensor] = []

    def f(z: Tensor, *inputs: Tensor) -> Tensor:
        states.append(z.clone())
        return problem.f(z, *inputs)

    fixed_point(f, problem.z0, problem.inputs, solver=solver, tol=1e-9, drop_converged=False)
    assert all(torch.isfinite(state).all() for state in states)


def test_work_is_saved_where_samples_differ() -> None:
    """One slow sample among nine fast ones does not make them all pay."""
    rate = torch.full((10, 1), 0.1, dtype=torch.float64)
    rate[4] = 0.93
    x = normal(10, 6)
    solution = solve((rate, x), Picard(), max_steps=400)
    assert solution.converged.all()
    slow = int(solution.evaluations[4])
    assert slow > 3 * int(solution.evaluations[0])
    assert solution.rows_evaluated < 0.4 * 10 * slow


def test_what_is_one_for_all_samples_is_not_copied_for_each() -> None:
    """An operator that all share goes in as ``w.expand(B, ...)``."""
    (rates, x), operator = uneven(8, seed=3), torch.eye(6, dtype=torch.float64)
    seen = set()

    def f(z: Tensor, rate: Tensor, x: Tensor, w: Tensor) -> Tensor:
        seen.add((w.data_ptr(), w.stride(0), len(w) == len(z)))
        return mixing(torch.bmm(z.unsqueeze(1), w).squeeze(1), rate, x)

    shared = operator.expand(8, 6, 6)
    solution = fixed_point(f, torch.zeros_like(x), (rates, x, shared), tol=1e-9, max_steps=60)
    assert solution.rows_evaluated < 8 * solution.calls
    assert seen == {(operator.data_ptr(), 0, True)}
    assert_same(solution, solve((rates, x), Anderson()))
