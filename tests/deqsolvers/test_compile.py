"""torch.compile: f inside our loop, and a fixed number of steps as one graph."""

from collections.abc import Callable

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
from tests.deqsolvers.maps import TanhMap, normal

SOLVERS: dict[str, Callable[[], Solver]] = {
    "picard": Picard,
    "anderson": lambda: Anderson(3),
    "broyden": lambda: Broyden(4),
    "type one": lambda: AndersonTypeI(2),
    "newton-krylov": lambda: NewtonKrylov(2),
    "hyper": lambda: HyperSolver.for_vectors(6, memory=2).double(),
}


@pytest.mark.parametrize("name", SOLVERS)
def test_a_fixed_number_of_steps_compiles_without_graph_breaks(name: str) -> None:
    torch.manual_seed(0)
    f, solver = TanhMap(6), SOLVERS[name]()
    x = normal(4, 6)

    def solve(x: Tensor) -> Tensor:
        z0 = torch.zeros_like(x)
        return fixed_point(f, z0, (x,), solver=solver, tol=None, max_steps=5, final="last").z

    compiled = torch.compile(solve, backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), solve(x), rtol=1e-9, atol=1e-12)


def test_a_compiled_f_works_inside_the_loop() -> None:
    f, x = TanhMap(6), normal(4, 6)
    compiled = torch.compile(f, backend="eager", fullgraph=True)
    expected = fixed_point(f, torch.zeros_like(x), (x,), tol=1e-9)
    found = fixed_point(compiled, torch.zeros_like(x), (x,), tol=1e-9)
    assert found.converged.all()
    torch.testing.assert_close(found.z, expected.z, rtol=0, atol=1e-12)
