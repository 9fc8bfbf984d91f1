"""Our solvers inside torchdeq: results, gradients, statistics and conventions."""

import importlib.util
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from deqsolvers import Anderson, fixed_point, jacobian_regularizer
from tests.problems import TanhMap, normal, tanh_deq

torchdeq = pytest.importorskip("torchdeq")
interop = pytest.importorskip("deqsolvers.interop.torchdeq")
interop.register()

NAMES = [
    "deqsolvers_anderson",
    "deqsolvers_broyden",
    "deqsolvers_picard",
    "deqsolvers_newton_krylov",
    "deqsolvers_anderson_type_one",
]
every_solver = pytest.mark.parametrize("name", NAMES)
EXACT: dict[str, Any] = {"f_tol": 1e-10, "b_tol": 1e-10, "f_max_iter": 200, "b_max_iter": 200}


def solver(name: str):  # type: ignore[no-untyped-def]
    return torchdeq.solver.get_solver(name)


def exact_gradients(f: TanhMap, z: Tensor, x: Tensor) -> tuple[Tensor, ...]:
    """Of the sum of squares of z = f(z, x), w.r.t. x and the weight, by dense linear algebra."""
    u = []
    for row, extra in zip(z, x, strict=True):
        jacobian = torch.func.jacrev(lambda z, extra=extra: f(z, extra))(row)
        identity = torch.eye(len(row), dtype=row.dtype)
        u.append(torch.linalg.solve((identity - jacobian).T, 2 * row))
    extra = x.clone().requires_grad_()
    return torch.autograd.grad(f(z, extra), (extra, f.weight), torch.stack(u))


@every_solver
@pytest.mark.parametrize("core", ["indexing", "sliced"])
def test_one_string_is_all_that_changes(name: str, core: str) -> None:
    problem = tanh_deq(size=6, batch=3)
    assert problem.solution is not None
    x = problem.inputs[0].clone().requires_grad_()
    deq = torchdeq.get_deq(core=core, f_solver=name, b_solver=name, ift=True, **EXACT)
    (z,), info = deq(lambda z: problem.f(z, x), torch.zeros_like(x))
    torch.testing.assert_close(z, problem.solution, rtol=0, atol=1e-8)
    assert bool((info["abs_lowest"] <= 1e-10).all())
    found = torch.autograd.grad(z.square().sum(), (x, problem.f.weight))  # type: ignore[attr-defined]
    expected = exact_gradients(problem.f, problem.solution, x.detach())  # type: ignore[arg-type]
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
    deq.eval()
    (z,), info = deq(lambda z: problem.f(z, x), torch.zeros_like(x), sradius_mode=True)
    torch.testing.assert_close(z, problem.solution, rtol=0, atol=1e-8)
    assert info["sradius"].shape == (3,)


@every_solver
def test_phantom_gradients_and_states_on_the_way(name: str) -> None:
    problem = tanh_deq(size=6, batch=3)
    assert problem.solution is not None
    (x,) = problem.inputs
    deq = torchdeq.get_deq(core="indexing", f_solver=name, n_states=3, f_max_iter=60, f_tol=1e-9)
    states, _ = deq(lambda z: problem.f(z, x), torch.zeros_like(x))
    assert len(states) == 3
    assert all(state.requires_grad for state in states)
    torch.testing.assert_close(states[-1], problem.solution, rtol=0, atol=1e-6)


def test_a_list_of_tensors() -> None:
    deq = torchdeq.get_deq(f_solver=NAMES[0], f_tol=1e-9, f_max_iter=60)
    x, y = normal(3, 4), normal(3, 2, 2)
    ((a, b),), _ = deq(
        lambda a, b: [0.5 * a + x, 0.25 * b + y], [torch.zeros(3, 4).double(), 0 * y]
    )
    torch.testing.assert_close(a, 2 * x, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(b, y / 0.75, rtol=1e-6, atol=1e-6)


@every_solver
@pytest.mark.parametrize("mode", ["abs", "rel"])
def test_info_is_torchdeqs_and_true(name: str, mode: str) -> None:
    problem = tanh_deq(size=6, batch=3)
    (x,) = problem.inputs

    def f(z: Tensor) -> Tensor:
        return problem.f(z, x)

    z, states, info = solver(name)(f, problem.z0, max_iter=40, tol=1e-6, stop_mode=mode)
    _, _, theirs = solver("anderson")(f, problem.z0, max_iter=40, tol=1e-6, stop_mode=mode)
    assert states == []
    assert type(info) is type(theirs)
    assert info.keys() == theirs.keys()
    assert {key: value.dim() for key, value in info.items()} == {
        key: value.dim() for key, value in theirs.items()
    }
    size = (f(z) - z).norm(dim=1)
    torch.testing.assert_close(
        info[f"{mode}_lowest"], size if mode == "abs" else size / f(z).norm(dim=1)
    )
    assert bool((info[f"{mode}_lowest"] <= 1e-6).all())
    for kind in ("abs", "rel"):
        torch.testing.assert_close(info[f"{kind}_lowest"], info[f"{kind}_trace"].amin(1))
    first = f(problem.z0).norm(dim=1)  # z0 is zero
    torch.testing.assert_close(info["abs_trace"][:, 0], first)
    torch.testing.assert_close(info["rel_trace"][:, 0], torch.ones(3).double())
    at = info["nstep"].long() - 1
    best = info[f"{mode}_trace"].gather(1, at.unsqueeze(1)).squeeze(1)
    torch.testing.assert_close(best, info[f"{mode}_lowest"])


@every_solver
@pytest.mark.parametrize("max_iter", [1, 2, 7])
@pytest.mark.parametrize("final", [True, False])
def test_max_iter_counts_evaluations(name: str, max_iter: int, final: bool) -> None:
    calls = 0

    def f(z: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return torch.cos(z)

    z, _, info = solver(name)(f, torch.zeros(2, 3), max_iter=max_iter, tol=0, return_final=final)
    assert calls == max_iter
    assert info["abs_trace"].shape == (2, max_iter)
    assert bool((info["nstep"] <= max_iter).all())
    # The iterate of Newton-Krylov after one evaluation is a probe, which is no answer.
    assert bool((z != 0).all()) == (max_iter > 1 or "newton" not in name)


def test_picard_takes_the_steps_it_is_told() -> None:
    z0 = normal(2, 3)
    z, _, _ = solver(NAMES[2])(torch.cos, z0, max_iter=3, return_final=True)
    torch.testing.assert_close(z, z0.cos().cos().cos())
    z, _, _ = solver(NAMES[2])(torch.cos, z0, max_iter=1, tau=0.25)
    torch.testing.assert_close(z, 0.75 * z0 + 0.25 * z0.cos())


def test_options_reach_the_solvers() -> None:
    problem = tanh_deq(size=6, batch=3)
    (x,) = problem.inputs
    options = {"max_iter": 8, "tol": 0}
    z, _, _ = solver(NAMES[0])(lambda z: problem.f(z, x), problem.z0, m=3, tau=0.7, **options)
    same = fixed_point(
        problem.f, problem.z0, (x,), solver=Anderson(memory=2, damping=0.7), tol=0, max_steps=7
    )
    torch.testing.assert_close(z, same.z)
    few, _, _ = solver(NAMES[1])(lambda z: problem.f(z, x), problem.z0, LBFGS_thres=2, **options)
    many, _, _ = solver(NAMES[1])(lambda z: problem.f(z, x), problem.z0, **options)
    assert not torch.equal(few, many)


def test_states_by_index() -> None:
    z0 = torch.zeros(1, 1, dtype=torch.float64)
    z, states, info = solver(NAMES[2])(
        lambda z: 0.5 * z + 1, z0, max_iter=30, tol=0.2, indexing=[1, 3, 30]
    )
    # The states are 0, 1, 1.5, 1.75; the residual of the last, 0.125, meets the tolerance.
    assert info["nstep"].item() == 4
    assert [state.item() for state in states] == [0, 1.5, 1.75]
    assert z.item() == 1.75


def test_states_by_index_are_the_best_so_far() -> None:
    path = iter([2.0, 1.9, 50.0, 1.0])
    visited = []

    def f(z: Tensor) -> Tensor:
        visited.append(z.item())
        return torch.full_like(z, next(path))

    _, states, _ = solver(NAMES[2])(f, torch.ones(1, 1), max_iter=4, tol=0, indexing=[3, 4])
    # Residuals: 1, 0.1, 48.1, 49.
    assert visited == pytest.approx([1.0, 2.0, 1.9, 50.0])
    assert [state.item() for state in states] == [2.0, 2.0]


@every_solver
def test_a_sample_that_breaks_leaves_the_others_alone(name: str) -> None:
    scale = torch.tensor([[1.0], [torch.nan]])
    z, _, info = solver(name)(lambda z: torch.cos(z) * scale, torch.zeros(2, 3), tol=1e-5)
    torch.testing.assert_close(z[0], torch.full((3,), 0.739085), rtol=0, atol=1e-4)
    assert bool(z.isfinite().all())
    assert info["abs_lowest"][0] <= 1e-5


OPTIONS = {
    "deqsolvers_anderson": "m, tau, ",
    "deqsolvers_anderson_type_one": "m, tau, ",
    "deqsolvers_broyden": "LBFGS_thres, ",
    "deqsolvers_newton_krylov": "m, ",
    "deqsolvers_picard": "tau, ",
}


@every_solver
def test_options_that_mean_nothing_here_are_refused(name: str) -> None:
    shared = "max_iter, tol, stop_mode, indexing, return_final"
    says = f"^{name} has no option 'lam'; it takes {OPTIONS[name]}{shared}; leave lam out: "
    with pytest.raises(TypeError, match=says):
        solver(name)(torch.cos, torch.zeros(1, 1), lam=1e-4)
    with pytest.raises(TypeError, match=f"{name} has no option 'alpha'.*return_final$"):
        solver(name)(torch.cos, torch.zeros(1, 1), alpha=1e-4)
    with pytest.raises(ValueError, match="stop_mode"):
        solver(name)(torch.cos, torch.zeros(1, 1), stop_mode="relative")


@pytest.mark.parametrize(
    ("name", "option", "instead"),
    [
        ("deqsolvers_broyden", "m", "LBFGS_thres"),
        ("deqsolvers_broyden", "ls", "newton_krylov has a line search"),
        ("deqsolvers_anderson", "LBFGS_thres", "call their memory m"),
        ("deqsolvers_newton_krylov", "tau", "to damp, take deqsolvers_anderson"),
    ],
)
def test_an_option_of_torchdeq_that_a_solver_has_not(name: str, option: str, instead: str) -> None:
    """torchdeq's own solvers ignore such options; ours are called from inside of it, too."""
    deq = torchdeq.get_deq(f_solver=name)
    with pytest.raises(TypeError, match=f"{name} has no option '{option}'.*{instead}"):
        deq(torch.cos, torch.zeros(1, 1), solver_kwargs={option: 1})


def test_the_weight_of_the_jacobian_regulariser_carries_over() -> None:
    f, x, z = TanhMap(6), normal(3, 6, seed=1), normal(3, 6, seed=2)
    at = z.clone().requires_grad_()
    torch.manual_seed(0)
    theirs = torchdeq.loss.jac_reg(f(at, x), at, vecs=400)
    torch.manual_seed(1)
    ours = sum(jacobian_regularizer(f, z, (x,)) for _ in range(400)) / 400
    torch.testing.assert_close(ours, theirs, rtol=0.05, atol=0)


@pytest.mark.parametrize("relative", [True, False])
def test_info_from_a_solution(relative: bool) -> None:
    problem = tanh_deq(size=6, batch=3)
    options: dict[str, Any] = {"inputs": problem.inputs, "tol": 1e-6, "relative": relative}
    solution = fixed_point(problem.f, problem.z0, trace=True, **options)
    info = interop.info_from_solution(solution, relative)
    kind, other = ("rel", "abs") if relative else ("abs", "rel")
    assert torch.equal(info[f"{kind}_lowest"], solution.residual)
    trace = info[f"{kind}_trace"]
    assert trace.shape == (3, solution.calls)
    for row, (steps, residual) in enumerate(zip(solution.steps, solution.residual, strict=True)):
        assert solution.trace is not None
        assert torch.equal(trace[row, :steps], solution.trace[:steps, row])
        assert bool((trace[row, steps:] == residual).all())
    assert torch.equal(info["nstep"], (solution.steps + 1).double())
    assert info[f"{other}_lowest"].item() == -1
    without = fixed_point(problem.f, problem.z0, **options)
    untraced = interop.info_from_solution(without, relative)
    assert torch.equal(untraced[f"{kind}_trace"], without.residual.unsqueeze(1))


def test_without_torchdeq_the_import_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == "torchdeq"]:
        monkeypatch.setitem(sys.modules, name, None)
    path = Path(interop.__file__)
    spec = importlib.util.spec_from_file_location("fresh_copy", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match="pip install torchdeq"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
