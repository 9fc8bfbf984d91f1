"""Memory that a solve uses again: never under the eyes of anyone who still looks at it."""

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from deqsolvers import (
    DEQ,
    Anderson,
    AndersonTypeI,
    Broyden,
    HyperSolver,
    Picard,
    Shine,
    Solution,
    Solver,
    StepInfo,
    buffers,
    fixed_point,
)
from deqsolvers.solvers import History, history
from tests.deqsolvers.maps import normal

WIDE = 40_000  # large enough for memory to be used again, and for rows to be cut
SOLVERS = {"picard": Picard(0.5), "anderson": Anderson(3), "broyden": Broyden(4)}


@pytest.fixture
def four_threads() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    yield
    torch.set_num_threads(before)


def solve(solver: Solver, seen: list[Tensor] | None = None) -> Tensor:
    rates, shift = torch.linspace(-0.9, 0.9, WIDE), normal(2, WIDE, dtype=torch.float32)

    def f(z: Tensor) -> Tensor:
        if seen is not None:
            seen.append(z.view(2, -1, 100)[:, 3:])
        return torch.tanh(rates * z + shift)

    return fixed_point(f, torch.zeros(2, WIDE), solver=solver, tol=None, max_steps=8).z


@pytest.mark.parametrize("name", SOLVERS)
def test_states_that_f_keeps_stay_as_they_were(name: str) -> None:
    kept: list[Tensor] = []
    then: list[Tensor] = []

    class Log(list[Tensor]):
        def append(self, z: Tensor) -> None:
            kept.append(z)
            then.append(z.clone())

    solve(SOLVERS[name], Log())
    for now, before in zip(kept, then, strict=True):
        torch.testing.assert_close(now, before, rtol=0, atol=0)


@pytest.mark.parametrize("name", ["anderson", "broyden"])
def test_states_that_nobody_keeps_share_memory(name: str) -> None:
    places: set[int] = set()

    class Log(list[Tensor]):
        def append(self, z: Tensor) -> None:
            places.add(z.data_ptr())

    solve(SOLVERS[name], Log())
    assert len(places) <= 5


def test_two_solutions_do_not_share_memory() -> None:
    first = solve(SOLVERS["anderson"])
    before = first.clone()
    solve(SOLVERS["anderson"])
    torch.testing.assert_close(first, before, rtol=0, atol=0)


def test_without_torch_s_count_of_owners_nothing_is_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = solve(SOLVERS["anderson"])
    monkeypatch.setattr(buffers, "_COUNTS", False)
    assert buffers.Buffers().like(torch.empty(2, WIDE)) is None
    torch.testing.assert_close(solve(SOLVERS["anderson"]), expected, rtol=0, atol=0)


@pytest.mark.usefixtures("four_threads")
@pytest.mark.parametrize("batch", [1, 3])
@torch.no_grad()
def test_a_history_of_cut_rows_gives_the_same_products(batch: int) -> None:
    entries = normal(3, batch, WIDE, dtype=torch.float64)
    x, weights = normal(batch, WIDE, seed=1), normal(batch, 3, seed=2)
    history = History(3, entries[0])
    for entry in entries:
        history.push(entry)
    out = torch.empty_like(x)
    sums = torch.einsum("kbn,bk->bn", entries, weights)
    torch.testing.assert_close(history.dot(x), torch.einsum("kbn,bn->bk", entries, x))
    torch.testing.assert_close(history.combine(weights), sums)
    torch.testing.assert_close(history.add_to(x, weights), x + sums)
    assert history.subtract_from(x, weights, out=out) is out
    torch.testing.assert_close(out, x - sums)
    across = torch.empty(WIDE, batch, dtype=x.dtype).t()
    assert history.combine(weights, out=across) is across
    torch.testing.assert_close(across, sums)
    assert history.add_to(x, weights, out=across) is across
    torch.testing.assert_close(across, x + sums)


@pytest.mark.usefixtures("four_threads")
@torch.no_grad()
def test_a_hypersolver_takes_a_state_that_is_a_transposed_matrix() -> None:
    torch.manual_seed(0)
    hyper = HyperSolver.for_vectors(WIDE, memory=2, width=8, initializer=False)
    x = normal(WIDE, 2, dtype=torch.float32).t()

    def solve(x: Tensor) -> Tensor:
        deq = DEQ(lambda z, x: torch.tanh(0.5 * z + x), hyper, tol=None, max_steps=3, final="last")
        return deq(x)[0]

    torch.testing.assert_close(solve(x), solve(x.contiguous()))


@pytest.mark.usefixtures("four_threads")
def test_a_sample_alone_takes_the_path_it_takes_in_a_batch() -> None:
    shift = normal(4, WIDE, dtype=torch.float64)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.9 * z.roll(1, dims=1) + x)

    solver = Anderson(4)
    together = fixed_point(f, torch.zeros_like(shift), (shift,), solver=solver, tol=1e-9)
    alone = fixed_point(f, torch.zeros_like(shift[:1]), (shift[:1],), solver=solver, tol=1e-9)
    assert alone.steps[0] == together.steps[0]
    torch.testing.assert_close(alone.z[0], together.z[0], rtol=0, atol=1e-8)


@pytest.fixture
def reserved(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(buffers, "_RETURNED", 0)


def history_of(solver: Solver) -> Tensor:
    """That of a solve, as it was at the end."""
    histories: list[Tensor] = []

    def note(info: StepInfo) -> None:
        memory = info.memory
        histories[:] = [(memory.steps if isinstance(solver, Broyden) else memory.dg).buffer]

    shift = normal(2, 50, dtype=torch.float32)
    fixed_point(lambda z: torch.tanh(0.9 * z + shift), shift, solver=solver, callback=note)
    return histories[0]


with_history = pytest.mark.parametrize("make", [Anderson, AndersonTypeI, Broyden])


@pytest.mark.usefixtures("reserved")
@with_history
def test_the_next_solve_uses_the_memory_of_a_history_again(make: Callable[[int], Solver]) -> None:
    solver = make(4)
    place = history_of(solver).data_ptr()
    assert history_of(solver).data_ptr() == place


@pytest.mark.usefixtures("reserved")
@with_history
def test_a_history_that_is_still_looked_at_is_left_alone(make: Callable[[int], Solver]) -> None:
    solver = make(4)
    kept = history_of(solver)
    before = kept.clone()
    assert history_of(solver).data_ptr() != kept.data_ptr()
    torch.testing.assert_close(kept, before, rtol=0, atol=0, equal_nan=True)


@pytest.mark.usefixtures("reserved")
@with_history
def test_memory_of_a_solve_in_inference_mode_serves_one_outside(
    make: Callable[[int], Solver],
) -> None:
    solver = make(4)
    with torch.inference_mode():
        place = history_of(solver).data_ptr()
    assert history_of(solver).data_ptr() == place


@pytest.mark.usefixtures("reserved")
@with_history
@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))])
def test_a_copied_solver_has_memory_of_its_own(
    make: Callable[[int], Solver], copied: Callable[[Solver], Solver]
) -> None:
    solver = make(4)
    place = history_of(solver).data_ptr()
    other = copied(solver)
    assert repr(other) == repr(solver)
    assert history_of(other).data_ptr() != place


@pytest.mark.usefixtures("reserved")
def test_two_solves_before_their_backward_passes() -> None:
    def gradients(*solvers: Solver) -> list[Tensor]:
        xs = [normal(2, 8, seed=seed).requires_grad_() for seed in range(2)]
        losses = [
            DEQ(lambda z, x: torch.tanh(0.5 * z + x), solver, backward=Shine())(x)[0].sum()
            for x, solver in zip(xs, solvers, strict=True)
        ]
        return list(torch.autograd.grad(losses, xs))

    shared = Broyden()
    torch.testing.assert_close(
        gradients(shared, shared), gradients(Broyden(), Broyden()), rtol=0, atol=0
    )


@pytest.mark.parametrize("method", [Anderson, AndersonTypeI])
@pytest.mark.parametrize("options", [{}, {"damping": 0.6}, {"safeguard": 1.0}], ids=str)
def test_a_history_that_starts_full_of_zeros_changes_no_step(
    method: type[Anderson], options: dict[str, float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where samples leave the batch, and where the history starts again."""
    rates = torch.tensor([[0.1], [0.95], [2.0], [-1.5]], dtype=torch.float64)
    shift = normal(4, 30)

    def solve() -> Solution:
        return fixed_point(
            lambda z, x, rates: torch.tanh(rates * z.roll(1, dims=1) + x),
            torch.zeros_like(shift),
            (shift, rates),
            solver=method(5, **options),
            tol=1e-6,
            max_steps=25,
        )

    found = solve()
    monkeypatch.setattr(history, "_SMALL", 0)
    grown = solve()
    assert torch.equal(found.steps, grown.steps)
    torch.testing.assert_close(found.z, grown.z, rtol=1e-6, atol=1e-6)


def test_a_result_of_f_that_the_solver_forgets_is_gone_when_it_steps() -> None:
    """It is a whole state, at the moment when most of them are alive."""
    returned: list[weakref.ref[Tensor]] = []
    alive: list[int] = []

    class Forgetful(Picard):
        def step(self, memory: Any, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
            alive.append(sum(result() is not None for result in returned))
            return super().step(memory, z, fz, g)

    def f(z: Tensor) -> Tensor:
        result = torch.cos(z)
        returned.append(weakref.ref(result))
        return result

    fixed_point(f, torch.zeros(2, 3), solver=Forgetful(damping=0.5), tol=None, max_steps=4)
    assert alive == [1] * 4
