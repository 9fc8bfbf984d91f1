"""Every solver on every named problem, and what a solver owes to the loop."""

import math

import pytest
import torch

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
from deqsolvers.solvers import History
from deqsolvers.state import Layout
from tests.deqsolvers.maps import normal
from tests.problems import PROBLEMS, Problem, linear, rotation, scaled, symmetric, tanh_deq

SOLVERS: dict[str, Solver] = {
    "picard": Picard(),
    "picard damped": Picard(damping=0.5),
    "anderson 5": Anderson(memory=5),
    "anderson 1": Anderson(memory=1),
    "type one 5": AndersonTypeI(memory=5),
    "type one 1": AndersonTypeI(memory=1),
    "broyden 20": Broyden(memory=20),
    "broyden 1": Broyden(memory=1),
    "newton-krylov 20": NewtonKrylov(memory=20),
    "newton-krylov 1": NewtonKrylov(memory=1),
}
TOL = 1e-9
STEPS = 300

# Pairs that cannot succeed in 300 steps, and how each sample may end instead. Plain iteration
# shrinks the error by the spectral radius a step, which misses 1e-9 for radii above 0.93 (damped:
# 0.87), and grows it for radii above 1. A memory of one sees one direction at a time.
# Many expanding directions, and the shock of Burgers' equation, take a Krylov space and a line
# search.
_SLOW = {Status.STEP_LIMIT}
_ANY_FAILURE = {Status.STEP_LIMIT, Status.STALLED, Status.DIVERGED}
WIDE = ("expanding many", "burgers")
HOPELESS: dict[tuple[str, str], set[Status]] = {
    ("picard", "symmetric 0.99"): _SLOW,
    ("picard", "symmetric 0.999"): _SLOW,
    ("picard", "rotating"): _SLOW,
    ("picard", "expanding"): {Status.DIVERGED},
    ("picard", "expanding rotation"): {Status.DIVERGED},
    ("picard damped", "symmetric 0.9"): _SLOW,
    ("picard damped", "symmetric 0.99"): _SLOW,
    ("picard damped", "symmetric 0.999"): _SLOW,
    ("picard damped", "vanishing"): _SLOW,
    ("picard damped", "expanding"): {Status.DIVERGED},
    ("anderson 1", "symmetric 0.99"): _SLOW,
    ("anderson 1", "symmetric 0.999"): _SLOW,
    ("type one 1", "symmetric 0.99"): _SLOW,
    ("type one 1", "symmetric 0.999"): _SLOW,
    ("type one 1", "rotating"): _SLOW,
    ("type one 1", "expanding rotation"): _SLOW,
    ("type one 1", "badly scaled"): _ANY_FAILURE | {Status.CONVERGED},
    ("type one 1", "scipy F4"): {Status.STALLED},
    ("broyden 1", "symmetric 0.99"): _SLOW,
    ("broyden 1", "symmetric 0.999"): _SLOW,
    ("broyden 1", "rotating"): _SLOW,
    ("broyden 1", "non-normal"): _ANY_FAILURE,
    ("broyden 1", "expanding"): _ANY_FAILURE | {Status.CONVERGED},
    ("broyden 1", "expanding rotation"): _SLOW,
    ("newton-krylov 1", "symmetric 0.99"): _SLOW,
    ("newton-krylov 1", "symmetric 0.999"): _SLOW,
    ("newton-krylov 1", "non-normal"): _ANY_FAILURE,
    ("newton-krylov 1", "expanding"): _SLOW,
    ("picard damped", "badly scaled"): _ANY_FAILURE,
    ("broyden 1", "badly scaled"): _ANY_FAILURE | {Status.CONVERGED},
    ("newton-krylov 1", "badly scaled"): _ANY_FAILURE,
    ("picard", "scipy F"): {Status.DIVERGED},
    ("picard", "scipy F3"): {Status.DIVERGED},
    ("picard", "scipy F4"): {Status.DIVERGED},
    ("picard damped", "scipy F4"): {Status.DIVERGED},
    ("anderson 1", "scipy F4"): {Status.STALLED},
    ("broyden 1", "scipy F4"): {Status.NON_FINITE},
    # A line search follows the curved valley of Powell's function in small steps.
    ("newton-krylov 20", "scipy F4"): _SLOW,
    ("newton-krylov 1", "scipy F4"): {Status.STALLED},
    **{(s, p): _ANY_FAILURE for s in SOLVERS for p in WIDE if s != "newton-krylov 20"},
    # Its path is chaotic: a change of 1e-12 in z0 decides how it ends.
    ("anderson 5", "burgers"): _ANY_FAILURE | {Status.CONVERGED},
    # So is its: f expands a thousandfold, and after a restart nothing holds it.
    ("type one 5", "scipy F4"): _ANY_FAILURE | {Status.NON_FINITE, Status.CONVERGED},
    **{(solver, "jumping"): {Status.STALLED} for solver in SOLVERS},
}
BROKEN_SAMPLE = {"breaking": 1}


def solve(problem: Problem, solver: Solver, **options: object) -> Solution:
    options = {"tol": TOL, "max_steps": STEPS, "relative": problem.relative, **options}
    return fixed_point(problem.f, problem.z0, problem.inputs, solver=solver, **options)  # type: ignore[arg-type]


def flat_norm(state: torch.Tensor) -> torch.Tensor:
    return torch.linalg.vector_norm(state.flatten(1), dim=1)


@pytest.mark.parametrize("name", PROBLEMS)
@pytest.mark.parametrize("solver", SOLVERS)
def test_solver_on_problem(solver: str, name: str) -> None:
    problem = PROBLEMS[name]()
    solution = solve(problem, SOLVERS[solver])
    assert torch.isfinite(solution.z).all()
    assert torch.isfinite(solution.residual).all()
    assert solution.z.dtype == problem.dtype
    assert solution.z.shape == problem.z0.shape
    if (solver, name) in HOPELESS:
        assert set(solution.statuses()) <= HOPELESS[solver, name]
        return
    expected = Status.STARTED_CONVERGED if name == "solved" else Status.CONVERGED
    good = torch.ones(len(problem.z0), dtype=torch.bool)
    if name in BROKEN_SAMPLE:
        good[BROKEN_SAMPLE[name]] = False
        assert solution.statuses()[BROKEN_SAMPLE[name]] == Status.NON_FINITE
    assert (solution.status[good] == expected).all(), solution.describe()
    assert (solution.residual[good] <= TOL).all()
    assert problem.solution is not None
    scale = flat_norm(problem.solution) if problem.relative else torch.ones(len(problem.z0))
    error = flat_norm(solution.z - problem.solution) / scale
    assert (error[good] <= problem.condition * TOL).all()


@pytest.mark.parametrize("name", WIDE)
@pytest.mark.parametrize(
    "solver", [Anderson(20), Anderson(20, safeguard=2.0), Anderson(5, damping=0.3), Broyden(60)]
)
def test_newton_krylov_solves_what_larger_memories_and_damping_do_not(
    solver: Solver, name: str
) -> None:
    assert solve(PROBLEMS[name](), solver).failed.any()
    assert solve(PROBLEMS[name](), NewtonKrylov()).converged.all()


@pytest.mark.parametrize("name", ["tanh", "perceptron", "convolution", "bratu", "kinsol"])
def test_acceleration_pays_on_smooth_problems(name: str) -> None:
    calls = {
        solver: solve(PROBLEMS[name](), SOLVERS[solver]).calls
        for solver in ("picard", "anderson 5", "broyden 20")
    }
    assert calls["anderson 5"] <= calls["picard"]
    assert calls["broyden 20"] <= calls["picard"]


@pytest.mark.parametrize("solver", [name for name in SOLVERS if "newton" not in name])
def test_one_step_is_a_damped_plain_step(solver: str) -> None:
    problem = tanh_deq()
    method = SOLVERS[solver]
    solution = solve(problem, method, tol=None, max_steps=1, final="last")
    damping = method.damping  # type: ignore[attr-defined]
    plain = problem.f(problem.z0, *problem.inputs)
    torch.testing.assert_close(solution.z, damping * plain + (1 - damping) * problem.z0)
    assert solution.calls == 1


@pytest.mark.parametrize("solver", SOLVERS)
def test_max_steps_one_returns_the_better_of_two_iterates(solver: str) -> None:
    problem = tanh_deq()
    solution = solve(problem, SOLVERS[solver], max_steps=1)
    assert solution.calls == 2
    assert solution.statuses() == [Status.STEP_LIMIT] * len(problem.z0)
    assert (solution.steps == 1).all()
    assert (solution.residual < 1).all()


@pytest.mark.parametrize("scale", [1e-6, 1e6])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("solver", SOLVERS)
def test_units_do_not_matter(solver: str, dtype: torch.dtype, scale: float) -> None:
    problem = tanh_deq(dtype=dtype)
    tol = 1e-9 if dtype == torch.float64 else 1e-5
    here = solve(problem, SOLVERS[solver], tol=tol)
    there = solve(scaled(problem, scale), SOLVERS[solver], tol=tol)
    assert there.statuses() == here.statuses() == [Status.CONVERGED] * len(problem.z0)
    assert (there.steps - here.steps).abs().max() <= (0 if dtype == torch.float64 else 1)
    torch.testing.assert_close(there.z / scale, here.z, rtol=0, atol=20 * tol)


@pytest.mark.parametrize(
    ("solver", "scale"),
    [
        *((solver, scale) for solver in SOLVERS for scale in (1e-15, 1e15)),
        # The squares of these residuals leave the range of fp32, the residuals do not. Anderson
        # and Broyden work with the squares, the loop and Picard must not mind.
        *((solver, scale) for solver in ("picard", "picard damped") for scale in (1e-30, 1e30)),
    ],
)
def test_extreme_units_in_single_precision(solver: str, scale: float) -> None:
    problem = tanh_deq(dtype=torch.float32)
    solution = solve(scaled(problem, scale), SOLVERS[solver], tol=1e-5)
    assert solution.statuses() == [Status.CONVERGED] * len(problem.z0)
    assert problem.solution is not None
    torch.testing.assert_close(solution.z / scale, problem.solution, rtol=0, atol=2e-4)


@pytest.mark.parametrize(
    ("dtype", "scale"),
    [
        (torch.float32, 1e-30),
        (torch.float32, 1e30),
        (torch.float64, 1e-200),
        (torch.float64, 1e200),
    ],
)
def test_newton_krylov_goes_the_same_way_where_squares_leave_the_range(
    dtype: torch.dtype, scale: float
) -> None:
    """Plain steps, which it takes without a Jacobian, would be twice as many here."""
    problem = tanh_deq(dtype=dtype)
    here = solve(problem, NewtonKrylov(4), tol=1e-5)
    there = solve(scaled(problem, scale), NewtonKrylov(4), tol=1e-5)
    assert there.statuses() == here.statuses() == [Status.CONVERGED] * len(problem.z0)
    assert (there.steps - here.steps).abs().max() <= (0 if dtype == torch.float64 else 1)
    torch.testing.assert_close(there.z / scale, here.z, rtol=0, atol=2e-4)


@pytest.mark.parametrize("solver", ["anderson 5", "broyden 20"])
def test_a_wide_state_takes_the_path_of_a_narrow_one(solver: str) -> None:
    """Above a certain width the history is multiplied in another way."""
    narrow = symmetric(0.9)
    copies = 1000

    def f(z: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
        blocks = z.reshape(len(z) * copies, -1)
        return narrow.f(blocks, b.reshape(len(b) * copies, -1)).reshape(z.shape)

    wide = fixed_point(
        f,
        narrow.z0.repeat(1, copies),
        tuple(b.repeat(1, copies) for b in narrow.inputs),
        solver=SOLVERS[solver],
        tol=TOL,
    )
    expected = solve(narrow, SOLVERS[solver])
    assert wide.statuses() == expected.statuses()
    assert wide.steps.tolist() == expected.steps.tolist()
    torch.testing.assert_close(wide.z[:, :12], expected.z, rtol=0, atol=1e-7)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_step_writes_into_none_of_its_arguments(solver: str) -> None:
    problem = linear("rotation", rotation(6, 2.0, 0.7))
    method = SOLVERS[solver]
    z = problem.z0
    memory = method.init(z, Layout.of(z))
    for _ in range(4):
        fz = problem.f(z, *problem.inputs)
        g = fz - z
        before = [tensor.clone() for tensor in (z, fz, g)]
        following = method.step(memory, z, fz, g)
        for tensor, copy in zip((z, fz, g), before, strict=True):
            torch.testing.assert_close(tensor, copy, rtol=0, atol=0)
        z = following


@pytest.mark.parametrize("width", [5, 9000])
@pytest.mark.parametrize("recorded", [False, True])
def test_history_is_a_ring_of_the_newest_entries(recorded: bool, width: int) -> None:
    pushed = [normal(2, width, seed=seed) for seed in range(5)]
    weights = normal(2, 3, seed=9)
    probe = normal(2, width, seed=10)
    with torch.set_grad_enabled(recorded):
        history = History(3, pushed[0])
        for value in pushed:
            history.push(value)
        newest_first = torch.stack(pushed[:1:-1], dim=1)
        order = history.ages()
        assert sorted(order.tolist()) == [0, 1, 2]
        entries = newest_first[:, order]
        dots = torch.einsum("bkn,bn->bk", entries, probe)
        torch.testing.assert_close(history.dot(probe), dots)
        sums = torch.einsum("bkn,bk->bn", entries, weights)
        torch.testing.assert_close(history.combine(weights), sums)
        history.take(torch.tensor([1]))
        torch.testing.assert_close(history.dot(probe[1:]), dots[1:])


@pytest.mark.parametrize("method", [Picard, Anderson, AndersonTypeI, Broyden])
@pytest.mark.parametrize("damping", [0, -0.5, 1.5, math.nan])
def test_damping_out_of_range(method: type[Solver], damping: float) -> None:
    with pytest.raises(ValueError, match=r"damping must be above 0 and at most 1"):
        method(damping=damping)  # type: ignore[call-arg]


@pytest.mark.parametrize("method", [Anderson, AndersonTypeI, Broyden, NewtonKrylov])
@pytest.mark.parametrize("memory", [0, -1, 2.5, True])
def test_memory_out_of_range(method: type[Solver], memory: object) -> None:
    with pytest.raises(ValueError, match=r"memory must be an integer of at least 1"):
        method(memory=memory)  # type: ignore[call-arg]


def test_regularization_out_of_range() -> None:
    with pytest.raises(ValueError, match=r"regularization must lie in \[0, 1\)"):
        Anderson(regularization=1.0)


@pytest.mark.parametrize("method", [Picard, Anderson, Broyden, NewtonKrylov])
def test_unknown_hyperparameter(method: type[Solver]) -> None:
    with pytest.raises(TypeError, match="momentum"):
        method(momentum=0.9)  # type: ignore[call-arg]
