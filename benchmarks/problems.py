"""The fixed-point problems that solvers are measured on, with z* from double precision."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial

import torch
from torch import Tensor, nn

from benchmarks.maps import AttentionMap, ConvolutionMap, LinearMap, PerceptronMap
from benchmarks.settings import Settings
from deqsolvers import Anderson, fixed_point, spectral_radius


@dataclass(frozen=True)
class Problem:
    """``z = f(z, x)`` in the working precision.

    Attributes:
        name: of the map.
        f, z0, x: the map, the start (zeros) and its further argument, batch first.
        exact: z* from a solve in double precision.
        radius: largest spectral radius of df/dz at z* in the batch.
    """

    name: str
    f: nn.Module
    z0: Tensor
    x: Tensor
    exact: Tensor
    radius: float

    @property
    def features(self) -> int:
        return self.z0[0].numel()

    def residual(self, z: Tensor) -> float:
        """Worst ``||f(z) - z|| / ||f(z)||`` in the batch, apart from all solvers."""
        with torch.no_grad():
            fz = self.f(z, self.x)
        return float(((fz - z).flatten(1).norm(dim=1) / fz.flatten(1).norm(dim=1)).max())

    def distance(self, z: Tensor) -> float:
        """Worst ``||z - z*|| / ||z*||`` in the batch."""
        difference = (z.double() - self.exact.double()).flatten(1).norm(dim=1)
        return float((difference / self.exact.double().flatten(1).norm(dim=1)).max())


def make(name: str, f: nn.Module, x: Tensor, settings: Settings, tol: float = 1e-9) -> Problem:
    """A problem from a map and an input, both in double precision on the CPU.

    ``tol`` is the relative residual of z*, far below those that solvers are asked for.
    """
    f = f.eval().requires_grad_(False).to(settings.device)
    x = x.to(settings.device)
    working = copy.deepcopy(f).to(settings.dtype)
    x_working = x.to(settings.dtype)
    start = torch.zeros_like(x_working)
    # Most of the way in the working precision, in which a PolypDEQ takes a third of the time.
    near = _solve(working, start, x_working, tol=3e-6)
    exact = _solve(f, near.double(), x, tol)
    with torch.no_grad():
        fz = f(exact, x)
    residual = float(((fz - exact).flatten(1).norm(dim=1) / fz.flatten(1).norm(dim=1)).max())
    if not residual < 10 * tol:  # measured by hand, whatever the solver claims
        raise RuntimeError(f"{name}: z* was not found, residual {residual:.1e}")
    radius = float(spectral_radius(working, exact.to(x_working), (x_working,)).max())
    return Problem(name, working, start, x_working, exact, radius)


def _solve(f: nn.Module, z0: Tensor, x: Tensor, tol: float) -> Tensor:
    # The safeguard, because a trained network far from its images can hold plain Anderson up.
    careful = Anderson(10, safeguard=1.0)
    return fixed_point(f, z0, (x,), solver=careful, tol=tol, max_steps=2000, stall_after=200).z


@cache
def _linear(radius: float, settings: Settings) -> Problem:
    torch.manual_seed(0)
    f = LinearMap(1000, radius).double()
    return make(f"linear, radius {radius}", f, _normal(8, 1000), settings)


@cache
def _perceptron(settings: Settings) -> Problem:
    torch.manual_seed(0)
    return make("MLP", PerceptronMap(256, 2.0).double(), _normal(8, 256), settings)


@cache
def _convolution(settings: Settings) -> Problem:
    torch.manual_seed(0)
    return make("convolution", ConvolutionMap(32, 0.25).double(), _normal(2, 32, 32, 32), settings)


@cache
def _attention(settings: Settings) -> Problem:
    torch.manual_seed(0)
    return make("attention", AttentionMap(64, 4, 2.0).double(), _normal(4, 64, 64), settings)


def _normal(*shape: int) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


PROBLEMS: dict[str, Callable[[Settings], Problem]] = {
    **{f"linear {radius}": partial(_linear, radius) for radius in (0.5, 0.9, 0.99)},
    "mlp": _perceptron,
    "convolution": _convolution,
    "attention": _attention,
}
