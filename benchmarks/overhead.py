"""What a step of a solver costs beyond f, and the least that it could cost."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor

from benchmarks.apart import Apart
from benchmarks.methods import OURS, TORCHDEQ, torchdeq_solver
from benchmarks.settings import Settings
from benchmarks.timing import Effort, Quartiles, turns
from deqsolvers import Anderson, Broyden, Picard, Solver, fixed_point

STEPS = 30
MEMORY = 6  # differences, of memory + 1 pairs of z and f(z)


@dataclass(frozen=True)
class Case:
    """States (batch, features); ``memory`` counts differences."""

    method: str
    batch: int
    features: int
    memory: int = MEMORY


@dataclass(frozen=True)
class Overhead:
    """Of `STEPS` steps at one size, all over runs that took turns, each library in its own process.

    Attributes:
        ours, torchdeq: seconds of a step beyond f; negative where the noise of f is larger.
        ratio: torchdeq / ours; None for a solver that torchdeq lacks.
        least: seconds of copying the bytes that a step must move.
        limit: least / ours; 1 is the most that memory allows. It and the ratio are None where ours
            is not positive.
    """

    ours: Quartiles
    torchdeq: Quartiles | None
    ratio: Quartiles | None
    least: Quartiles
    limit: Quartiles | None
    megabytes: float


def contraction(batch: int, features: int, settings: Settings) -> tuple[Tensor, Tensor]:
    """Rates and shifts of ``z -> rates z + shift``, so cheap that the solver's own work shows."""
    generator = torch.Generator().manual_seed(0)
    rates = torch.linspace(0, 0.9, features).expand(batch, features).contiguous()
    shift = torch.randn(batch, features, generator=generator)
    return tuple(x.to(settings.device, settings.dtype) for x in (rates, shift))  # type: ignore


def solver(method: str, memory: int) -> Solver:
    if method == "Picard":
        return Picard()
    return Anderson(memory) if method == "Anderson" else Broyden(STEPS)


def least_states(method: str, memory: int) -> float:
    """States (B, n) that must be read or written in `STEPS` steps beyond f.

    Every method reads z and f(z). Anderson in difference form also reads the last f(z) and
    residual, writes a column of each history, reads the older columns of the one for inner products
    and of the other to combine them, and writes z. Broyden with one vector a step reads all
    steps twice, since the combination needs the inner products first, and writes the step and z.
    Vectors that a cleverer order of work might keep in cache are counted once.
    """
    total = 0
    for step in range(STEPS):
        total += 2
        if method == "Anderson" and step:
            older = min(step, memory) - 1
            total += 2 + 2 + 2 * older + 1
        if method == "Broyden":
            total += 2 * step + 2
    return total


def libraries() -> list[str]:
    """Which libraries can be measured here, ours first."""
    return [OURS, TORCHDEQ] if importlib.util.find_spec("torchdeq") else [OURS]


def functions(library: str, case: Case, settings: Settings) -> dict[str, Callable[[], object]]:
    """What is timed: the solve, f alone and, for ours, a copy of the least bytes."""
    rates, shift = contraction(case.batch, case.features, settings)
    z0 = torch.zeros_like(shift)

    def f(z: Tensor) -> Tensor:
        return torch.addcmul(shift, rates, z)

    @torch.no_grad()
    def alone() -> object:
        z = z0
        for _ in range(STEPS):
            z = f(z)
        return z

    found: dict[str, Callable[[], object]] = {"solve": _solve(library, case, f, z0), "f": alone}
    if library == OURS:
        least = least_states(case.method, case.memory) * z0.numel() * z0.element_size()
        history = 2 * (case.memory + 1) * z0.numel()
        found["copy"] = _copies(least, history=history, like=z0)
    return found


def _solve(
    library: str, case: Case, f: Callable[[Tensor], Tensor], z0: Tensor
) -> Callable[[], object]:
    if library == OURS:
        ours = solver(case.method, case.memory)
        return lambda: fixed_point(f, z0, solver=ours, tol=None, max_steps=STEPS, final="last")
    theirs = torchdeq_solver(case.method)
    # torchdeq's m counts pairs of z and f(z), our memory the differences between them.
    extra = {"m": case.memory + 1} if case.method == "Anderson" else {}
    # At tol=0 it takes every step, as ours does.
    return torch.no_grad()(lambda: theirs(f, z0, max_iter=STEPS, tol=0.0, stop_mode="rel", **extra))


def measure(case: Case, settings: Settings, apart: Apart) -> Overhead:
    """Both libraries, each in its own process, take turns."""
    # Of runs of seconds two have to do in a hurry, and caches play no part in them.
    slow = settings.quick and case.batch * case.features > 1_000_000

    def beyond(library: str) -> dict[Hashable, float]:
        seconds = apart.seconds(library, case, settle=not slow)
        found: dict[Hashable, float] = {library: seconds["solve"] - seconds["f"]}
        if library == OURS:
            found["copy"] = seconds["copy"]
        return found

    effort = Effort(2, 0, 2) if slow else settings.effort
    timings = turns({name: partial(beyond, name) for name in apart.libraries}, effort)
    step = 1 / STEPS
    found = TORCHDEQ in apart.libraries
    positive = timings.of(OURS).median > 0
    states = least_states(case.method, case.memory) / STEPS
    return Overhead(
        ours=timings.of(OURS).scaled(step),
        torchdeq=timings.of(TORCHDEQ).scaled(step) if found else None,
        ratio=timings.ratio(TORCHDEQ, OURS) if found and positive else None,
        least=timings.of("copy").scaled(step),
        limit=timings.ratio("copy", OURS) if positive else None,
        megabytes=states * case.batch * case.features * settings.dtype.itemsize / 1e6,
    )


def _copies(total: float, history: int, like: Tensor):  # type: ignore[no-untyped-def]
    """Copies that read and write ``total`` bytes within as many elements as a history has.

    The same working set as the solver's, so that what fits a cache there fits it here.
    """
    half = max(1, history // 2)
    source, target = like.new_zeros(half), like.new_zeros(half)
    elements = int(total / like.element_size() / 2)
    whole, rest = divmod(elements, half)

    def run() -> None:
        for _ in range(whole):
            target.copy_(source)
        target[:rest].copy_(source[:rest])

    return run
