"""Named fixed-point problems with known answers, for the tests of `deqsolvers`.

Every entry of `PROBLEMS` is a function that builds its problem anew, because some maps count their
evaluations. All states are batch first and, unless said otherwise, in double precision.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import scipy.optimize
import torch
from torch import Tensor

from deqsolvers import Solver, fixed_point
from tests.deqsolvers.maps import ConvolutionMap, PerceptronMap, TanhMap, normal


@dataclass(frozen=True)
class Problem:
    """A fixed-point problem ``z = f(z, *inputs)``.

    Attributes:
        name: what the problem is called in the parametrised tests.
        f: the map, called as ``f(z, *inputs)``.
        z0: initial state, batch first.
        inputs: further arguments of f, batch first.
        solution: the fixed point, None where it is not known in closed form or there is none.
        relative: whether a relative residual makes sense (False where the fixed point is zero).
        dtype: of the state.
        condition: a bound of ``||(I - J)^-1||`` at the solution, which turns a residual into an
            error.
    """

    name: str
    f: Callable[..., Any]
    z0: Tensor
    inputs: tuple[Any, ...] = ()
    solution: Tensor | None = None
    relative: bool = True
    dtype: torch.dtype = torch.float64
    condition: float = 2e3


def iterates(problem: Problem, solver: Solver, steps: int) -> list[Tensor]:
    """The states z_0 .. z_steps of a solve without a tolerance."""
    seen: list[Tensor] = []
    fixed_point(
        problem.f,
        problem.z0,
        problem.inputs,
        solver=solver,
        tol=None,
        max_steps=steps,
        callback=lambda info: seen.append(info.z.clone()),
    )
    return seen


def orthogonal(size: int, seed: int = 0) -> Tensor:
    """A random orthogonal (size, size) matrix."""
    return torch.linalg.qr(normal(size, size, seed=seed))[0]


def rotation(size: int, angle: float, radius: float) -> Tensor:
    """A block-diagonal matrix whose eigenvalues are ``radius exp(+-i angle)``."""
    block = torch.tensor(
        [[math.cos(angle), -math.sin(angle)], [math.sin(angle), math.cos(angle)]],
        dtype=torch.float64,
    )
    return radius * torch.block_diag(*[block] * (size // 2))


def with_spectrum(eigenvalues: Tensor, seed: int = 0) -> Tensor:
    """A random symmetric matrix with these eigenvalues."""
    basis = orthogonal(len(eigenvalues), seed)
    return basis @ torch.diag(eigenvalues) @ basis.T


def linear(name: str, matrix: Tensor, batch: int = 4, seed: int = 1) -> Problem:
    """``z -> A z + b`` with one random b a sample; the fixed point is ``(I - A)^-1 b``."""
    size = matrix.shape[0]
    b = normal(batch, size, seed=seed)
    identity = torch.eye(size, dtype=torch.float64)
    return Problem(
        name=name,
        f=lambda z, b: z @ matrix.T + b,
        z0=torch.zeros(batch, size, dtype=torch.float64),
        inputs=(b,),
        solution=torch.linalg.solve(identity - matrix, b.T).T,
    )


def symmetric(radius: float) -> Problem:
    """A linear contraction with real eigenvalues spread over [-radius / 2, radius]."""
    spectrum = radius * torch.linspace(-0.5, 1, 12, dtype=torch.float64)
    return linear(f"symmetric {radius:g}", with_spectrum(spectrum))


def rotating() -> Problem:
    """A linear contraction whose eigenvalues are complex, of modulus 0.95 and angle 1 and 2.5."""
    matrix = torch.block_diag(rotation(6, 1.0, 0.95), rotation(6, 2.5, 0.95))
    basis = orthogonal(12)
    return linear("rotating", basis @ matrix @ basis.T)


def non_normal() -> Problem:
    """A contraction of spectral radius 0.5 whose powers grow before they fall."""
    matrix = 0.5 * torch.eye(6, dtype=torch.float64)
    return linear("non-normal", matrix + torch.full_like(matrix, 1.5).triu(diagonal=1))


def expanding() -> Problem:
    """A linear map that expands one direction by 1.5 and contracts the others."""
    spectrum = torch.tensor([1.5, 0.5, 0.3, 0.1, -0.2, -0.5], dtype=torch.float64)
    return linear("expanding", with_spectrum(spectrum))


def expanding_rotation() -> Problem:
    """A linear map that turns every plane by 2 radians and expands it by 1.2."""
    return linear("expanding rotation", rotation(6, 2.0, 1.2))


def dottie() -> Problem:
    """``cos z = z``; every sample starts elsewhere."""
    root = scipy.optimize.brentq(lambda z: math.cos(z) - z, 0, 1, xtol=1e-15)
    z0 = torch.tensor([[0.0], [1.0], [-3.0], [10.0]], dtype=torch.float64)
    return Problem("dottie", torch.cos, z0, solution=torch.full_like(z0, root))


def kinsol() -> Problem:
    """Three nonlinear equations used as a test of KINSOL, each solved for one of the unknowns.

    ``3 x - cos((y - 1) z) - 1/2 = 0``, ``x^2 - 81 (y - 0.9)^2 + sin z + 1.06 = 0`` and
    ``exp(-x (y - 1)) + 20 z + (10 pi - 3) / 3 = 0`` hold at ``(1/2, 1, -pi/6)``.
    """

    def f(state: Tensor) -> Tensor:
        x, y, z = state.unbind(1)
        return torch.stack(
            [
                (torch.cos((y - 1) * z) + 0.5) / 3,
                torch.sqrt(x.square() + torch.sin(z) + 1.06) / 9 + 0.9,
                -(torch.exp(-x * (y - 1)) + (10 * math.pi - 3) / 3) / 20,
            ],
            dim=1,
        )

    z0 = torch.tensor([[0.1, 0.1, -0.1], [1.0, 0.0, 0.0]], dtype=torch.float64)
    solution = torch.tensor([[0.5, 1.0, -math.pi / 6]], dtype=torch.float64).expand(2, 3)
    return Problem("kinsol", f, z0, solution=solution)


def chandrasekhar(albedo: float = 0.9, points: int = 32) -> Problem:
    """The H-equation of radiative transfer, ``H(m) = 1 / (1 - c/2 int m H(n) / (m + n) dn)``."""
    nodes = (np.arange(points) + 0.5) / points
    kernel = albedo / (2 * points) * nodes[:, None] / (nodes[:, None] + nodes[None, :])
    found = scipy.optimize.root(lambda h: h - 1 / (1 - kernel @ h), np.ones(points), tol=1e-14)
    weights = torch.from_numpy(kernel)
    z0 = torch.ones(2, points, dtype=torch.float64)
    return Problem(
        "chandrasekhar",
        lambda h: 1 / (1 - h @ weights.T),
        z0,
        solution=torch.from_numpy(found.x).expand_as(z0),
    )


def bratu(strengths: tuple[float, ...] = (0.5, 1.0, 3.0), points: int = 31) -> Problem:
    """``-u'' = lambda exp(u)``, u = 0 at both ends; one lambda a sample (the fold is at 3.51)."""
    width = 1 / (points + 1)
    laplace = (2 * np.eye(points) - np.eye(points, k=1) - np.eye(points, k=-1)) / width**2
    solutions = [
        scipy.optimize.root(
            lambda u, s=s: laplace @ u - s * np.exp(u), np.zeros(points), tol=1e-13
        ).x
        for s in strengths
    ]
    inverse = torch.from_numpy(np.linalg.inv(laplace))
    return Problem(
        "bratu",
        lambda u, strength: (strength * torch.exp(u)) @ inverse.T,
        torch.zeros(len(strengths), points, dtype=torch.float64),
        (torch.tensor(strengths, dtype=torch.float64).unsqueeze(1),),
        torch.from_numpy(np.stack(solutions)),
    )


def burgers(viscosity: float = 0.03, points: int = 64) -> Problem:
    """The steady Burgers equation ``u u' = nu u''`` with u(0) = 1 and u(1) = -0.9: a shock.

    The viscous term is inverted; what is left expands strongly, and more so on the way.
    """
    width = 1 / (points + 1)
    laplace = 2 * np.eye(points) - np.eye(points, k=1) - np.eye(points, k=-1)
    inverse = torch.from_numpy(np.linalg.inv(laplace))
    ends = torch.tensor([1.0, -0.9], dtype=torch.float64)
    given = torch.zeros(points, dtype=torch.float64)
    given[0], given[-1] = ends

    def f(u: Tensor, viscosity: float = viscosity) -> Tensor:
        whole = torch.cat([ends[:1].expand(len(u), 1), u, ends[1:].expand(len(u), 1)], dim=1)
        slope = (whole[:, 2:] - whole[:, :-2]) * width / (2 * viscosity)
        return (given - u * slope) @ inverse

    # The root finder follows the solution from viscosities at which it is smooth.
    found = np.zeros(points)
    for stage in (0.2, 0.1, 0.05, viscosity):
        found = scipy.optimize.root(
            lambda u, nu=stage: f(torch.from_numpy(u)[None], nu)[0].numpy() - u, found, tol=1e-13
        ).x
    z0 = torch.zeros(1, points, dtype=torch.float64)
    return Problem("burgers", f, z0, solution=torch.from_numpy(found)[None])


def expanding_many() -> Problem:
    """A linear map of 36 features that expands 28 directions, by 1.2 to 3.2."""
    spectrum = torch.cat([torch.linspace(-0.5, 0.9, 8), torch.linspace(1.2, 3.2, 28)]).double()
    return linear("expanding many", with_spectrum(spectrum), batch=2)


def scipy_quadratic() -> Problem:
    """Function F of SciPy's tests of its nonlinear solvers, with the root zero."""
    d = torch.tensor([3.0, 2, 1.5, 1, 0.5], dtype=torch.float64)
    return Problem(
        "scipy F",
        lambda z: z - d * z - 0.01 * z.square().sum(1, keepdim=True) * z,
        torch.ones(1, 5, dtype=torch.float64),
        solution=torch.zeros(1, 5, dtype=torch.float64),
        relative=False,
    )


def scipy_tridiagonal() -> Problem:
    """Function F3 of SciPy's tests, linear with eigenvalues of f between -2.4 and 0.4."""
    matrix = torch.tensor([[-2.0, 1, 0], [1, -2, 1], [0, 1, -2]], dtype=torch.float64)
    b = torch.tensor([[1.0, 2, 3]], dtype=torch.float64)
    solution = torch.linalg.solve(matrix, b.T).T
    return Problem("scipy F3", lambda z: z + z @ matrix.T - b, b.clone(), solution=solution)


def scipy_powell() -> Problem:
    """Function F4 of SciPy's tests: Powell's badly scaled function, its unknowns 1e-5 and 9.1."""

    def f(z: Tensor) -> Tensor:
        x, y = z.unbind(1)
        first = 1e4 * x * y - 1
        return z + torch.stack([first, torch.exp(-x) + torch.exp(-y) - 1 - 1e-4], dim=1)

    solution = torch.tensor([[1.0981593296997149e-5, 9.106146739867424]], dtype=torch.float64)
    z0 = torch.tensor([[-1.0, -2.0]], dtype=torch.float64)
    return Problem("scipy F4", f, z0, solution=solution)


def scipy_two_unknowns() -> Problem:
    """Function F6 of SciPy's tests."""
    jacobian = torch.tensor([[-4.256, 14.7], [0.8394989, 0.59964207]], dtype=torch.float64)

    def root(z: Tensor) -> Tensor:
        x, y = z.unbind(1)
        first = (x + 3) * (y**5 - 7) + 18
        return torch.stack([first, torch.sin(y * torch.exp(x) - 1)], dim=1)

    # y e^x = 1 and (x + 3)(y^5 - 7) = -18 hold at (0, 1).
    return Problem(
        "scipy F6",
        lambda z: z - torch.linalg.solve(jacobian, root(z).T).T,
        torch.tensor([[-0.5, 1.4]], dtype=torch.float64),
        solution=torch.tensor([[0.0, 1.0]], dtype=torch.float64),
    )


def badly_scaled() -> Problem:
    """A linear contraction whose unknowns have units from 1e-6 to 1e6."""
    base = symmetric(0.9)
    units = torch.logspace(-6, 6, 12, dtype=torch.float64)
    assert base.solution is not None
    return replace(
        base,
        name="badly scaled",
        f=lambda z, *inputs: units * base.f(z / units, *inputs),
        z0=units * base.z0,
        solution=units * base.solution,
        condition=math.inf,  # about 1e12: only the residual says anything
    )


def tanh_deq(size: int = 16, batch: int = 5, dtype: torch.dtype = torch.float64) -> Problem:
    """The smallest deep-equilibrium layer."""
    f = TanhMap(size, dtype=dtype)
    x = normal(batch, size, seed=7, dtype=dtype)
    return Problem("tanh", f, torch.zeros_like(x), (x,), _by_iteration(f, x), dtype=dtype)


def perceptron_deq(size: int = 10, batch: int = 4) -> Problem:
    """A perceptron with GELU and an injected input."""
    f = PerceptronMap(size, 24)
    x = normal(batch, size, seed=7)
    return Problem("perceptron", f, torch.zeros_like(x), (x,), _by_iteration(f, x))


def convolution_deq(batch: int = 3, dtype: torch.dtype = torch.float64) -> Problem:
    """A convolutional deep-equilibrium layer on (B, 3, 6, 5)."""
    f = ConvolutionMap(3, dtype=dtype)
    x = normal(batch, 3, 6, 5, seed=7, dtype=dtype)
    return Problem("convolution", f, torch.zeros_like(x), (x,), _by_iteration(f, x), dtype=dtype)


def scaled(problem: Problem, scale: float) -> Problem:
    """The same problem in other units: ``z -> s f(z / s)``."""
    return replace(
        problem,
        name=f"{problem.name} times {scale:g}",
        f=lambda z, *inputs: scale * problem.f(z / scale, *inputs),
        z0=scale * problem.z0,
        solution=None if problem.solution is None else scale * problem.solution,
    )


def jumping() -> Problem:
    """A discontinuous map without any fixed point: -1 where z >= 0, else 1."""
    z0 = torch.tensor([[0.5, 2.0], [-0.3, 0.1]], dtype=torch.float64)
    return Problem("jumping", lambda z: torch.where(z >= 0, -1.0, 1.0).to(z.dtype), z0)


def breaking(after: int = 4, sample: int = 1) -> Problem:
    """A tanh map that returns NaN for one sample from evaluation ``after`` + 1 on."""
    base = tanh_deq()
    marks = torch.zeros(len(base.z0), 1, dtype=torch.float64)
    marks[sample] = 1
    calls = 0

    def f(z: Tensor, x: Tensor, mark: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        fz = base.f(z, x)
        return torch.where((mark > 0) & (calls > after), torch.nan, fz)

    return Problem("breaking", f, base.z0, (*base.inputs, marks), base.solution)


def solved() -> Problem:
    """A linear contraction that starts at its solution."""
    base = symmetric(0.9)
    assert base.solution is not None
    return replace(base, name="solved", z0=base.solution.clone())


def vanishing() -> Problem:
    """A linear contraction towards zero, where only an absolute residual makes sense."""
    matrix = with_spectrum(0.9 * torch.linspace(-0.5, 1, 8, dtype=torch.float64))
    z0 = normal(3, 8, seed=3)
    return Problem(
        "vanishing", lambda z: z @ matrix.T, z0, solution=torch.zeros_like(z0), relative=False
    )


def _by_iteration(f: Callable[..., Tensor], x: Tensor, steps: int = 400) -> Tensor:
    """The fixed point of a contraction by plain iteration in double precision."""
    with torch.no_grad():
        z = torch.zeros_like(x)
        for _ in range(steps):
            z = f(z, x)
    return z


PROBLEMS: dict[str, Callable[[], Problem]] = {
    "dottie": dottie,
    "kinsol": kinsol,
    "symmetric 0.5": partial(symmetric, 0.5),
    "symmetric 0.9": partial(symmetric, 0.9),
    "symmetric 0.99": partial(symmetric, 0.99),
    "symmetric 0.999": partial(symmetric, 0.999),
    "rotating": rotating,
    "non-normal": non_normal,
    "expanding": expanding,
    "expanding rotation": expanding_rotation,
    "expanding many": expanding_many,
    "badly scaled": badly_scaled,
    "scipy F": scipy_quadratic,
    "scipy F3": scipy_tridiagonal,
    "scipy F4": scipy_powell,
    "scipy F6": scipy_two_unknowns,
    "burgers": burgers,
    "chandrasekhar": chandrasekhar,
    "bratu": bratu,
    "tanh": tanh_deq,
    "perceptron": perceptron_deq,
    "convolution": convolution_deq,
    "tanh times 1e-06": lambda: scaled(tanh_deq(), 1e-6),
    "tanh times 1e+06": lambda: scaled(tanh_deq(), 1e6),
    "jumping": jumping,
    "breaking": breaking,
    "solved": solved,
    "vanishing": vanishing,
}
