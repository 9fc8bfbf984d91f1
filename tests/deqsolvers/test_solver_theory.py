"""The solvers against independent implementations and against what theory says of them."""

import math

import numpy as np
import pytest
import scipy.optimize
import scipy.sparse.linalg
import torch

from deqsolvers import Anderson, AndersonTypeI, Broyden, NewtonKrylov, Solver, fixed_point
from deqsolvers.state import Layout
from tests.deqsolvers.maps import normal
from tests.problems import (
    PROBLEMS,
    Problem,
    iterates,
    linear,
    non_normal,
    rotation,
    symmetric,
    tanh_deq,
    with_spectrum,
)


def arrays(problem: Problem, solver: Solver, steps: int) -> list[np.ndarray]:
    """The iterates z_0 .. z_steps as (B, features) arrays."""
    return [z.flatten(1).numpy() for z in iterates(problem, solver, steps)]


def walker_ni(
    problem: Problem,
    memory: int,
    damping: float,
    steps: int,
    kind: type[Anderson],
    safeguard: float = math.inf,
) -> tuple[list[np.ndarray], int]:
    """Anderson acceleration for each sample on its own; type II by orthogonal least squares.

    Also how many plain steps the safeguard has put in place of others.
    """
    paths, objections = [], 0
    for row in range(len(problem.z0)):
        inputs = tuple(tensor[row : row + 1] for tensor in problem.inputs)
        z = problem.z0[row].numpy()
        zs: list[np.ndarray] = []
        gs: list[np.ndarray] = []
        path, smallest = [z], math.inf
        for _ in range(steps):
            with torch.no_grad():
                fz = problem.f(torch.from_numpy(z).unsqueeze(0), *inputs)[0].numpy()
            size = float(np.linalg.norm(fz - z))
            if size > safeguard * smallest:
                zs, gs, smallest, objections = [], [], size, objections + 1
            smallest = min(smallest, size)
            zs, gs = [*zs, z][-memory - 1 :], [*gs, fz - z][-memory - 1 :]
            step = damping * gs[-1]
            if len(gs) > 1:
                dz, dg = np.diff(np.array(zs), axis=0).T, np.diff(np.array(gs), axis=0).T
                if kind is AndersonTypeI:
                    gamma = np.linalg.solve(dz.T @ dg, dz.T @ gs[-1])
                else:
                    gamma = np.linalg.lstsq(dg, gs[-1], rcond=None)[0]
                step = step - (dz + damping * dg) @ gamma
            z = z + step
            path.append(z)
        paths.append(path)
    return [np.stack([path[k] for path in paths]) for k in range(steps + 1)], objections


@pytest.mark.parametrize("problem", [tanh_deq(), non_normal()], ids=lambda p: p.name)
@pytest.mark.parametrize("damping", [1.0, 0.6])
@pytest.mark.parametrize("memory", [1, 3])
@pytest.mark.parametrize("kind", [Anderson, AndersonTypeI])
def test_anderson_is_walker_and_ni_step_by_step(
    kind: type[Anderson], memory: int, damping: float, problem: Problem
) -> None:
    steps = 10
    ours = arrays(problem, kind(memory, damping, regularization=0.0), steps)
    theirs, _ = walker_ni(problem, memory, damping, steps, kind)
    for mine, other in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, other, rtol=0, atol=1e-7 * np.abs(other).max())


@pytest.mark.parametrize("safeguard", [1.0, 1.2])
@pytest.mark.parametrize("kind", [Anderson, AndersonTypeI])
def test_a_safeguard_starts_the_history_of_a_sample_again(
    kind: type[Anderson], safeguard: float
) -> None:
    """From contracting to expanding maps, so that each sample meets it at steps of its own, and one
    whose residual grows first and then falls, but not at once to where it began."""
    matrix = torch.block_diag(rotation(2, 1.0, 0.9), rotation(2, 2.0, 1.0), rotation(2, 2.8, 1.3))
    b, rates = normal(5, 6, seed=1), torch.tensor([[0.5], [0.9], [1.1], [1.3], [2.0]]).double()
    rated = Problem("", lambda z, b, r: r * (z @ matrix.T) + b, torch.zeros_like(b), (b, rates))
    for problem in (rated, non_normal()):
        ours = arrays(problem, kind(3, 0.8, regularization=0.0, safeguard=safeguard), 12)
        theirs, objections = walker_ni(problem, 3, 0.8, 12, kind, safeguard)
        assert 3 <= objections <= 45
        for mine, other in zip(ours, theirs, strict=True):
            np.testing.assert_allclose(mine, other, rtol=1e-7, atol=1e-7)


@pytest.mark.parametrize("kind", [Anderson, AndersonTypeI])
def test_the_ridge_is_that_of_columns_of_length_one(kind: type[Anderson]) -> None:
    problem, ridge = symmetric(0.9), 0.05
    z = arrays(problem, kind(2, regularization=ridge), 3)
    residuals = [problem.f(torch.from_numpy(x), *problem.inputs).numpy() - x for x in z]
    for row in range(len(problem.z0)):
        dz, dg = (np.diff([x[row] for x in xs[:3]], axis=0).T for xs in (z, residuals))
        g, last = residuals[2][row], z[2][row]
        lengths = np.linalg.norm(dg, axis=0)
        left, sign = (
            (dg / lengths, 1) if kind is Anderson else (dz / np.linalg.norm(dz, axis=0), -1)
        )
        system = left.T @ (dg / lengths) + sign * ridge * np.eye(2)
        gamma = np.linalg.solve(system, left.T @ g) / lengths
        np.testing.assert_allclose(z[3][row], last + g - (dz + dg) @ gamma, atol=1e-9)


def test_anderson_matches_scipy_on_one_problem() -> None:
    """SciPy's starts from the Jacobian -1/alpha, here -I, and regularises by w0, here 0."""
    spectrum = 0.9 * torch.linspace(-0.5, 1, 8, dtype=torch.float64)
    problem = linear("one", with_spectrum(spectrum), batch=1)

    def residual(z: np.ndarray) -> np.ndarray:
        state = torch.from_numpy(np.atleast_2d(z))
        return (problem.f(state, *problem.inputs) - state)[0].numpy()

    path: list[np.ndarray] = [problem.z0[0].numpy()]
    scipy.optimize.anderson(
        residual,
        problem.z0[0].numpy(),
        alpha=1.0,
        w0=0.0,
        M=3,
        line_search=None,
        iter=6,
        callback=lambda z, g: path.append(z.copy()),
    )
    ours = arrays(problem, Anderson(memory=3, regularization=0.0), len(path) - 1)
    for mine, theirs in zip(ours, path, strict=True):
        np.testing.assert_allclose(mine[0], theirs, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    "matrix",
    [
        with_spectrum(torch.tensor([0.9, 0.5, 0.1, -0.3, -0.8], dtype=torch.float64)),
        torch.block_diag(rotation(2, 1.0, 0.9), rotation(2, 2.0, 0.8), rotation(2, 0.3, 0.5)),
        with_spectrum(torch.tensor([1.5, 0.5, -2.0, 0.3], dtype=torch.float64)),
    ],
    ids=["symmetric", "rotation", "expanding"],
)
def test_full_memory_anderson_is_gmres(matrix: torch.Tensor) -> None:
    """Walker & Ni (2011), theorem 2.2: step k + 1 is one application of f to GMRES's iterate k."""
    size = len(matrix)
    problem = linear("full memory", matrix, batch=1)
    system, right = (torch.eye(size) - matrix).numpy(), problem.inputs[0][0].numpy()
    ours = arrays(problem, Anderson(memory=size), size + 1)
    for k in range(1, size + 1):
        krylov, _ = scipy.sparse.linalg.gmres(
            system, right, x0=np.zeros(size), rtol=1e-15, restart=k, maxiter=1
        )
        expected = matrix.numpy() @ krylov + right
        np.testing.assert_allclose(ours[k + 1][0], expected, rtol=0, atol=1e-8)
        smallest = np.linalg.norm(matrix.numpy() @ (right - system @ krylov))
        residual = np.linalg.norm(right - system @ ours[k + 1][0])
        np.testing.assert_allclose(residual, smallest, rtol=1e-6, atol=1e-9)
    # n + 1 evaluations determine the solution, the next iterate is it.
    assert problem.solution is not None
    np.testing.assert_allclose(ours[size + 1], problem.solution.numpy(), rtol=0, atol=1e-9)


def arnoldi(system: np.ndarray, right: np.ndarray, size: int) -> np.ndarray:
    """The full orthogonalisation method: x in the Krylov space, residual orthogonal to it."""
    basis = np.linalg.qr(np.stack([right], axis=1))[0]
    while basis.shape[1] < size:
        basis = np.linalg.qr(np.column_stack([basis, system @ basis[:, -1]]))[0]
    return basis @ np.linalg.solve(basis.T @ system @ basis, basis.T @ right)


@pytest.mark.parametrize(
    "matrix",
    [
        with_spectrum(torch.tensor([0.9, 0.5, 0.1, -0.3, -0.8], dtype=torch.float64)),
        torch.block_diag(rotation(2, 1.0, 0.9), rotation(2, 2.0, 0.8), rotation(2, 0.3, 0.5)),
    ],
    ids=["symmetric", "rotating"],
)
def test_type_one_with_full_memory_is_arnoldis_method(matrix: torch.Tensor) -> None:
    """Walker & Ni (2011), section 2: z_(k+1) = f(x_k), x_k the k-th iterate of Arnoldi's method."""
    problem = linear("full memory", matrix, batch=1)
    size = len(matrix)
    system, right = (torch.eye(size) - matrix).numpy(), problem.inputs[0][0].numpy()
    ours = arrays(problem, AndersonTypeI(memory=size), size + 1)
    for k in range(1, size + 1):
        expected = matrix.numpy() @ arnoldi(system, right, k) + right
        np.testing.assert_allclose(ours[k + 1][0], expected, rtol=0, atol=1e-8)
    assert problem.solution is not None
    np.testing.assert_allclose(ours[size + 1], problem.solution.numpy(), rtol=0, atol=1e-9)


@pytest.mark.parametrize("memory", [1, 2, 4])
@pytest.mark.parametrize("name", ["symmetric 0.9", "rotating", "expanding"])
def test_a_newton_step_is_the_iterate_of_gmres(name: str, memory: int) -> None:
    """On a linear map the Newton equation is the problem itself."""
    problem = PROBLEMS[name]()
    size = problem.z0.shape[1]
    matrix = problem.f(torch.eye(size).double(), torch.zeros(size)).T
    ours = arrays(problem, NewtonKrylov(memory), memory + 1)
    # A probe lies as good as at the start; the first iterate that does not is the trial step.
    probes = next(k for k, z in enumerate(ours) if np.linalg.norm(z[0]) > 1e-3) - 1
    expected, _ = scipy.sparse.linalg.gmres(
        (torch.eye(size) - matrix).numpy(),
        problem.inputs[0][0].numpy(),
        x0=np.zeros(size),
        rtol=1e-15,
        restart=probes,
        maxiter=1,
    )
    assert 1 <= probes <= memory
    np.testing.assert_allclose(ours[probes + 1][0], expected, rtol=0, atol=1e-6)


def test_a_newton_step_that_is_too_long_is_cut_to_the_lowest_point_of_a_parabola() -> None:
    """Newton's method for arctan z = 0 leaves 3 for -9.5, and then diverges."""
    start = 3.0
    newton = -(1 + start**2) * math.atan(start)
    problem = Problem("arctan", lambda z: z - torch.atan(z), torch.full((1, 1), start).double())
    _, _, long, short = (float(z[0, 0]) for z in arrays(problem, NewtonKrylov(), 3))
    assert long == pytest.approx(start + newton, rel=1e-6)
    sizes = np.array([math.atan(start), math.atan(start + newton)]) ** 2
    # p(t) = sizes[0] (1 - 2 t) + c t^2 is the square and its slope at 0, and the square at 1.
    c = sizes[1] + sizes[0]
    assert short == pytest.approx(start + newton * sizes[0] / c, rel=1e-6)


def test_single_precision_costs_anderson_no_steps() -> None:
    """Slow modes make successive residuals nearly parallel, where a rough Gram matrix fails."""
    double = symmetric(0.999)
    b = double.inputs[0].float()
    counts = []
    for cast in (torch.Tensor.float, torch.Tensor.double):
        solution = fixed_point(
            lambda z, b: double.f(z.double(), b.double()).to(z.dtype),
            cast(torch.zeros_like(b)),
            (cast(b),),
            solver=Anderson(memory=5),
            tol=1e-5,
            max_steps=100,
        )
        assert solution.converged.all()
        counts.append(int(solution.steps.max()))
    assert counts[0] <= 1.2 * counts[1]


def inverse_jacobians(method: Broyden, memory: object, batch: int, features: int) -> np.ndarray:
    """H of every sample, a row at a time: row i is H^T applied to the i-th unit vector."""
    units = torch.eye(features, dtype=torch.float64)
    rows = [
        method.inverse_transposed(memory, unit.expand(batch, -1))  # type: ignore[arg-type]
        for unit in units
    ]
    return torch.stack(rows, dim=1).numpy()


@pytest.mark.parametrize("damping", [1.0, 0.7])
@pytest.mark.parametrize("problem", [tanh_deq(size=6), non_normal()], ids=lambda p: p.name)
def test_broyden_keeps_the_secant_condition(problem: Problem, damping: float) -> None:
    """After each update, H (g_k - g_(k-1)) = z_k - z_(k-1), with H as it was for all else."""
    method = Broyden(memory=20, damping=damping)
    z = problem.z0
    features = z.shape[1]
    memory = method.init(z, Layout.of(z))
    before: tuple[torch.Tensor, torch.Tensor, np.ndarray] | None = None
    with torch.no_grad():
        for _ in range(10):
            fz = problem.f(z, *problem.inputs)
            g = fz - z
            following = method.step(memory, z, fz, g)
            inverse = inverse_jacobians(method, memory, len(z), features)
            np.testing.assert_allclose(
                (following - z).numpy(),
                -damping * np.einsum("bij,bj->bi", inverse, g.numpy()),
                atol=1e-10,
            )
            if before is not None:
                dz, dg = (z - before[0]).numpy(), (g - before[1]).numpy()
                np.testing.assert_allclose(np.einsum("bij,bj->bi", inverse, dg), dz, atol=1e-8)
                # The least change: H - H_before maps into a single direction, dz - H_before dg.
                change = inverse - before[2]
                assert (np.linalg.matrix_rank(change, tol=1e-8) <= 1).all()
            before = z, g, inverse
            z = following


@pytest.mark.parametrize("problem", [tanh_deq(size=6), non_normal()], ids=lambda p: p.name)
def test_broyden_is_the_dense_method_step_by_step(problem: Problem) -> None:
    """Broyden (1965): B <- B + (dg - B dz) dz^T / (dz^T dz) and z <- z - B^-1 g, from B = -I."""
    steps = 9
    ours = arrays(problem, Broyden(memory=steps), steps)
    for row in range(len(problem.z0)):
        inputs = tuple(tensor[row : row + 1] for tensor in problem.inputs)

        def residual(z: np.ndarray, inputs: tuple[torch.Tensor, ...] = inputs) -> np.ndarray:
            with torch.no_grad():
                return problem.f(torch.from_numpy(z).unsqueeze(0), *inputs)[0].numpy() - z

        z = problem.z0[row].numpy()
        g, jacobian = residual(z), -np.eye(len(z))
        for k in range(steps):
            np.testing.assert_allclose(ours[k][row], z, atol=1e-7 * max(1, np.abs(z).max()))
            dz = -np.linalg.solve(jacobian, g)
            z, previous = z + dz, g
            g = residual(z)
            jacobian = jacobian + np.outer(g - previous - jacobian @ dz, dz) / (dz @ dz)


@pytest.mark.parametrize(
    "matrix",
    [
        with_spectrum(torch.linspace(-0.9, 0.9, 8, dtype=torch.float64)),
        torch.full((6, 6), 1.5, dtype=torch.float64).triu(1)
        + 0.5 * torch.eye(6, dtype=torch.float64),
        with_spectrum(torch.tensor([1.5, 3.0, -2.0, 0.3], dtype=torch.float64)),
    ],
    ids=["symmetric", "non-normal", "expanding"],
)
def test_broyden_solves_n_linear_equations_in_2n_steps(matrix: torch.Tensor) -> None:
    """Gay (1979)."""
    size = len(matrix)
    problem = linear("gay", matrix)
    solution = fixed_point(
        problem.f,
        problem.z0,
        problem.inputs,
        solver=Broyden(memory=2 * size),
        tol=1e-10,
        max_steps=2 * size,
    )
    assert solution.converged.all(), solution.describe()


def test_type_one_starts_again_where_its_system_is_singular() -> None:
    """f(z) = z + S z, S skew, leaves every step orthogonal to its change of the residual."""
    matrix = torch.randn(7, 7, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    problem = linear("skew", torch.eye(7).double() + matrix - matrix.T, batch=1)
    path = arrays(problem, AndersonTypeI(memory=1), 2)
    plain = problem.f(torch.from_numpy(path[1]), *problem.inputs).numpy()
    np.testing.assert_allclose(path[2], plain, rtol=1e-12)


def test_broyden_starts_again_when_its_memory_is_full() -> None:
    problem = symmetric(0.9)
    short, long = (arrays(problem, Broyden(memory=m), 8) for m in (3, 20))
    # Updates 1, 2 and 3 fill the memory; the fourth clears it, so that step 5 is a plain one.
    for k in range(5):
        np.testing.assert_allclose(short[k], long[k], atol=1e-12)
    plain = problem.f(torch.from_numpy(short[4]), *problem.inputs).numpy()
    np.testing.assert_allclose(short[5], plain, atol=1e-12)
    assert not np.allclose(long[5], plain, atol=1e-3)


@pytest.mark.parametrize(
    "method", [Anderson(memory=3), AndersonTypeI(memory=3), Broyden(memory=3)], ids=str
)
def test_a_singular_update_costs_a_plain_step_and_no_more(method: Solver) -> None:
    """f(z) = z + c has the same residual everywhere: no secant equation can be solved."""
    shift = torch.tensor([[1.0, -2.0, 4.0], [0.5, 0.0, 8.0]])
    path = []
    solution = fixed_point(
        lambda z: z + shift,
        torch.zeros_like(shift),
        solver=method,
        relative=False,
        max_steps=10,
        callback=lambda info: path.append(info.z.clone()),
    )
    assert solution.failed.all()
    for k, z in enumerate(path):
        torch.testing.assert_close(z, k * shift)
