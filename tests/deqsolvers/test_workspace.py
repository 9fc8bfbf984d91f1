"""Memory that a solve uses again: never under the eyes of anyone who still looks at it."""

import copy
import pickle
import weakref
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
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
    fixed_point,
    workspace,
)
from deqsolvers.solvers import History, history
from deqsolvers.state import Layout
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


@pytest.mark.parametrize("name", ["anderson", "broyden", "hyper"])
def test_the_next_solve_uses_the_memory_of_states_again(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    hyper = HyperSolver.for_vectors(WIDE, memory=2, width=8, initializer=False)
    solver = hyper if name == "hyper" else SOLVERS[name]
    made: list[int] = []

    class Counted(workspace._Piece):
        def __init__(self, *args: Any):
            made[-1] += 1
            super().__init__(*args)

    monkeypatch.setattr(workspace, "_Piece", Counted)
    solver, found = copy.deepcopy(solver), []
    for _ in range(3):
        made.append(0)
        found.append(solve(solver))
    first, *later = made
    assert first >= 4
    assert later == [1, 1]  # a result is its owner's
    for result in found[1:]:
        torch.testing.assert_close(result, found[0], rtol=0, atol=0)


def test_a_result_that_was_given_to_another_process_is_never_written_over() -> None:
    solver = Anderson(3)
    result = solve(solver)
    expected = result.clone()
    there = torch.UntypedStorage._new_shared_fd_cpu(*result.untyped_storage()._share_fd_cpu_())
    other = torch.empty(0).set_(there).view(2, WIDE)  # a look that this process cannot count
    torch.testing.assert_close(other, expected, rtol=0, atol=0)
    del result
    fixed_point(torch.cos, torch.ones(2, WIDE), solver=solver, tol=None, max_steps=8)
    torch.testing.assert_close(other, expected, rtol=0, atol=0)


def test_states_of_another_size_leave_the_workspace() -> None:
    solver = Anderson(3)
    sizes: list[set[int]] = []
    for wide in (WIDE, 2 * WIDE):
        fixed_point(torch.cos, torch.ones(2, wide), solver=solver, tol=None, max_steps=4)
        sizes.append({kept.tensor.numel() for kept in solver.workspace._states})
    assert sizes == [{2 * WIDE}, {4 * WIDE}]


def test_solves_in_two_threads_share_a_solver() -> None:
    solver = Anderson(3)
    starts = [normal(2, WIDE, seed=seed, dtype=torch.float32) for seed in range(8)]

    def run(start: Tensor) -> Tensor:
        return fixed_point(torch.cos, start, solver=solver, tol=None, max_steps=6).z

    expected = [run(start) for start in starts]
    with ThreadPoolExecutor(4) as threads:
        for found, alone in zip(threads.map(run, starts * 4), expected * 4, strict=True):
            torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-6)


@torch.no_grad()
def test_a_solver_that_leaves_out_the_constructor_has_a_workspace() -> None:
    @dataclass(frozen=True)
    class Half(Solver):
        share: float = 0.5

        def init(self, z: Tensor, layout: Layout) -> None:
            return None

        def step(self, memory: None, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
            return torch.add(z, g, alpha=self.share, out=self.workspace.like(z))

    for solver in (Half(), Half(0.8), copy.deepcopy(Half())):
        z = fixed_point(torch.cos, torch.ones(2, WIDE), solver=solver, max_steps=60).z
        torch.testing.assert_close(z, torch.full_like(z, 0.7390851), rtol=0, atol=1e-3)
    hyper = HyperSolver.for_vectors(3)
    assert not list(hyper.buffers())  # of the module
    assert hyper.workspace.like(torch.empty(2, WIDE)) is not None


def test_without_torch_s_count_of_owners_nothing_is_used_again(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    expected = solve(SOLVERS["anderson"])
    monkeypatch.setattr(workspace, "_COUNTS", False)
    assert workspace.Workspace().like(torch.empty(2, WIDE)) is None
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
    monkeypatch.setattr(workspace, "_LONG", 0)


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
