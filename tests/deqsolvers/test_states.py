"""Nested, complex and half-precision states, and what is said to bad ones."""

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from deqsolvers import (
    Anderson,
    AndersonTypeI,
    Broyden,
    HyperSolver,
    NewtonKrylov,
    Picard,
    Solver,
    fixed_point,
)
from deqsolvers.state import Layout
from tests.deqsolvers.maps import LinearMap, TanhMap, normal
from tests.problems import convolution_deq, tanh_deq

SOLVERS: list[Solver] = [
    Picard(),
    Picard(damping=0.5),
    Anderson(),
    AndersonTypeI(),
    Broyden(),
    NewtonKrylov(),
]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)


class Pair(NamedTuple):
    first: Tensor
    second: Tensor


NESTINGS: dict[str, Callable[[Tensor, Tensor], Any]] = {
    "tuple": lambda a, b: (a, b),
    "list": lambda a, b: [a, b],
    "dict": lambda a, b: {"a": a, "b": b},
    "ordered dict": lambda a, b: OrderedDict(a=a, b=b),
    "named tuple": lambda a, b: Pair(a, b),
    "nested": lambda a, b: {"deep": [(a,)], "flat": b},
}


def split(name: str, state: Tensor) -> Any:
    """A flat (B, 16) state as one of shapes (B, 2, 3) and (B, 10), nested as ``name`` says."""
    return NESTINGS[name](state[:, :6].reshape(-1, 2, 3), state[:, 6:])


def join(state: Any) -> Tensor:
    leaves = torch.utils._pytree.tree_leaves(state)
    return torch.cat([leaf.flatten(1) for leaf in leaves], dim=1)


@pytest.mark.parametrize("name", NESTINGS)
@every_solver
def test_a_nested_state_is_solved_like_the_flat_one(solver: Solver, name: str) -> None:
    problem = tanh_deq()
    flat = fixed_point(problem.f, problem.z0, problem.inputs, solver=solver, tol=1e-8)
    nested = fixed_point(
        lambda z, x: split(name, problem.f(join(z), x)),
        split(name, problem.z0),
        problem.inputs,
        solver=solver,
        tol=1e-8,
    )
    assert type(nested.z) is type(split(name, problem.z0))
    assert torch.equal(nested.steps, flat.steps)
    torch.testing.assert_close(nested.residual, flat.residual)
    torch.testing.assert_close(nested.z, split(name, flat.z))


def test_the_order_in_which_f_builds_a_dict_does_not_matter() -> None:
    solution = fixed_point(
        lambda z: {"b": 0.5 * z["b"] + 2, "a": 0.5 * z["a"] + 1},
        {"a": torch.zeros(2, 3), "b": torch.zeros(2, 3)},
        solver=Picard(),
    )
    torch.testing.assert_close(solution.z["a"], torch.full((2, 3), 2.0), rtol=1e-3, atol=0)
    torch.testing.assert_close(solution.z["b"], torch.full((2, 3), 4.0), rtol=1e-3, atol=0)


@every_solver
def test_mixed_dtypes_come_back_as_they_were(solver: Solver) -> None:
    def f(z: dict[str, Tensor]) -> dict[str, Tensor]:
        total = z["wide"] + z["narrow"].double()
        return {"wide": 0.3 * total + 1, "narrow": (0.2 * total - 1).to(z["narrow"].dtype)}

    z0 = {
        "wide": torch.zeros(3, 4, dtype=torch.float64),
        "narrow": torch.zeros(3, 4, dtype=torch.float32),
    }
    solution = fixed_point(f, z0, solver=solver, tol=1e-6, max_steps=200)
    assert solution.converged.all(), solution.describe()
    assert solution.z["wide"].dtype == torch.float64
    assert solution.z["narrow"].dtype == torch.float32
    # w = .3 (w + n) + 1 and n = .2 (w + n) - 1 have the solution w = 1, n = -1.
    torch.testing.assert_close(solution.z["wide"], torch.ones(3, 4).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(solution.z["narrow"], -torch.ones(3, 4), rtol=0, atol=1e-5)


@every_solver
@pytest.mark.parametrize(("dtype", "tol"), [(torch.bfloat16, 2e-2), (torch.float16, 2e-3)])
def test_half_precision_states_report_the_residual_of_what_they_return(
    solver: Solver, dtype: torch.dtype, tol: float
) -> None:
    f = TanhMap(16, norm=0.8, dtype=torch.float32)
    x = normal(4, 16, seed=7, dtype=torch.float32)

    def narrow(z: Tensor, x: Tensor) -> Tensor:
        assert z.dtype == dtype
        return f(z.float(), x).to(dtype)

    z0 = torch.zeros(4, 16, dtype=dtype)
    solution = fixed_point(narrow, z0, (x,), solver=solver, tol=tol)
    assert solution.converged.all(), solution.describe()
    assert solution.z.dtype == dtype
    assert solution.residual.dtype == torch.float32
    with torch.no_grad():
        fz = narrow(solution.z, x).float()
    size = torch.linalg.vector_norm(fz - solution.z.float(), dim=1)
    torch.testing.assert_close(solution.residual, size / torch.linalg.vector_norm(fz, dim=1))


@pytest.mark.parametrize("solver", [Anderson(), NewtonKrylov()], ids=repr)
def test_f_runs_under_the_autocast_of_the_caller(solver: Solver) -> None:
    f = LinearMap()
    x = normal(4, 32, dtype=torch.float32)
    dtypes = []

    def watched(z: Tensor, x: Tensor) -> Tensor:
        fz = f(z, x)
        dtypes.append((z.dtype, fz.dtype))
        return fz

    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = fixed_point(watched, torch.zeros_like(x), (x,), solver=solver, tol=2e-2)
        assert torch.is_autocast_enabled("cpu")
    assert set(dtypes) == {(torch.float32, torch.bfloat16)}
    assert solution.converged.all(), solution.describe()
    assert solution.z.dtype == torch.float32
    exact = fixed_point(f, torch.zeros_like(x), (x,))
    torch.testing.assert_close(solution.z, exact.z, rtol=0, atol=5e-2)


# Newton-Krylov knows of autocast on purpose: its finite differences follow the rounding of f.
@pytest.mark.parametrize(
    "solver", [*SOLVERS[:4], HyperSolver.for_vectors(16)], ids=lambda solver: type(solver).__name__
)
def test_solver_algebra_is_out_of_reach_of_autocast(solver: Solver) -> None:
    """This map has no product that autocast would touch, so nothing may change."""
    x = normal(4, 16, dtype=torch.float32)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return 0.5 * torch.tanh(z.roll(1, dims=1)) + x

    def solve() -> Tensor:
        return fixed_point(f, torch.zeros_like(x), (x,), solver=solver, tol=None, max_steps=8).z

    outside = solve()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = solve()
    assert torch.equal(inside, outside)


def test_autocast_does_not_lose_later_parameter_gradients() -> None:
    """Weights that autocast cached while gradients were off would be cut from the graph."""
    f = LinearMap()
    x = normal(4, 32, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = fixed_point(f, torch.zeros_like(x), (x,), tol=1e-2)
        f(solution.z, x).sum().backward()
    for name, parameter in f.named_parameters():
        assert parameter.grad is not None, name
        assert parameter.grad.abs().sum() > 0, name


@every_solver
@pytest.mark.parametrize("dtype", [torch.complex64, torch.complex128])
def test_a_complex_state_is_solved_like_the_equivalent_real_one(
    solver: Solver, dtype: torch.dtype
) -> None:
    real = dtype.to_real()
    matrix = torch.complex(normal(5, 5, seed=1), normal(5, 5, seed=2)).to(dtype)
    matrix = 0.8 * matrix / torch.linalg.matrix_norm(matrix, 2)
    b = torch.complex(normal(3, 5, seed=3), normal(3, 5, seed=4)).to(dtype)
    tol = 1e-5 if real == torch.float32 else 1e-9

    def f(z: Tensor, b: Tensor) -> Tensor:
        return z @ matrix.T + b + 0.1 * z.conj()

    def pairs(z: Tensor, b: Tensor) -> Tensor:
        state = torch.view_as_complex(z.reshape(len(z), 5, 2).contiguous())
        return torch.view_as_real(f(state, b)).reshape(len(z), 10)

    options: dict[str, Any] = {"solver": solver, "tol": tol, "max_steps": 200}
    found = fixed_point(f, torch.zeros_like(b), (b,), **options)
    expected = fixed_point(pairs, torch.zeros(3, 10, dtype=real), (b,), **options)
    assert found.converged.all(), found.describe()
    assert found.z.dtype == dtype
    assert found.residual.dtype == real
    assert torch.equal(found.steps, expected.steps)
    torch.testing.assert_close(torch.view_as_real(found.z).reshape(3, 10), expected.z)
    # (I - A) z - 0.1 conj z = b
    torch.testing.assert_close(f(found.z, b), found.z, rtol=0, atol=20 * tol)


def test_a_conjugate_view_is_a_state_like_any_other() -> None:
    z0 = torch.complex(normal(2, 3), normal(2, 3, seed=1)).conj()
    solution = fixed_point(lambda z: 0.5 * z, z0, tol=None, max_steps=1, final="last")
    torch.testing.assert_close(solution.z, 0.5 * z0)


def test_an_image_state_keeps_its_shape() -> None:
    problem = convolution_deq()
    solution = fixed_point(problem.f, problem.z0, problem.inputs, tol=1e-9)
    assert solution.z.shape == (3, 3, 6, 5)
    torch.testing.assert_close(solution.z, problem.solution, rtol=0, atol=1e-7)


def test_a_non_contiguous_state() -> None:
    problem = convolution_deq()
    z0 = problem.z0.to(memory_format=torch.channels_last)
    x = problem.inputs[0].to(memory_format=torch.channels_last)
    solution = fixed_point(problem.f, z0, (x,), tol=1e-9)
    torch.testing.assert_close(solution.z, problem.solution, rtol=0, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.complex64])
def test_solver_algebra_has_single_precision_or_better(dtype: torch.dtype) -> None:
    assert Layout.of(torch.zeros(2, 3, dtype=dtype)).dtype == torch.float32
    double = torch.zeros(2, 3, dtype=torch.float64)
    assert Layout.of((torch.zeros(2, 3, dtype=dtype), double)).dtype == torch.float64


@pytest.mark.parametrize("name", NESTINGS)
def test_flatten_and_unflatten_are_inverse(name: str) -> None:
    a = torch.complex(normal(4, 2, 3), normal(4, 2, 3, seed=1))
    b = normal(4, 5, seed=2).to(torch.bfloat16)
    state = NESTINGS[name](a, b)
    layout = Layout.of(state)
    matrix = layout.flatten(state)
    assert matrix.shape == (4, 2 * 6 + 5)
    assert matrix.dtype == torch.float64
    torch.testing.assert_close(layout.unflatten(matrix), state, rtol=0, atol=0)
