"""What a step of a solver costs beyond f, and the least that it could cost."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from benchmarks.methods import torchdeq_solver
from benchmarks.settings import Settings
from benchmarks.timing import Effort, Quartiles, paired
from deqsolvers import Anderson, Broyden, Picard, Solver, fixed_point

STEPS = 30
MEMORY = 6  # differences, of memory + 1 pairs of z and f(z)


@dataclass(frozen=True)
class Overhead:
    """Of `STEPS` steps at one size, all over runs that took turns.

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


def measure(
    method: str, batch: int, features: int, settings: Settings, memory: int = MEMORY
) -> Overhead:
    """Our solver, torchdeq's, f alone and a copy of the least bytes, taking turns."""
    rates, shift = contraction(batch, features, settings)
    z0 = torch.zeros_like(shift)
    ours = solver(method, memory)

    def f(z: Tensor) -> Tensor:
        return torch.addcmul(shift, rates, z)

    def run_ours() -> object:
        return fixed_point(f, z0, solver=ours, tol=None, max_steps=STEPS, final="last")

    @torch.no_grad()
    def run_f() -> object:
        z = z0
        for _ in range(STEPS):
            z = f(z)
        return z

    functions = {"ours": run_ours, "f": run_f}
    least = least_states(method, memory) * z0.numel() * z0.element_size()
    functions["copy"] = _copies(least, history=2 * (memory + 1) * z0.numel(), like=z0)
    theirs = _torchdeq(method, memory)
    if theirs is not None:
        functions["torchdeq"] = lambda: theirs(f, z0)
    effort = settings.effort
    slow = settings.quick and z0.numel() > 1_000_000
    if slow:  # torchdeq takes seconds, of which it gets no more than it needs
        effort = Effort(2, 0, 2)
        for name in ("ours", "f", "copy"):
            functions[name]()
    timings = paired(functions, settings.device, effort, warm=slow, settle=not slow)
    step = 1 / STEPS
    found = theirs is not None
    beyond = timings.beyond("ours", "f")
    positive = beyond.median > 0
    return Overhead(
        ours=beyond.scaled(step),
        torchdeq=timings.beyond("torchdeq", "f").scaled(step) if found else None,
        ratio=timings.ratio("torchdeq", "ours", "f") if found and positive else None,
        least=timings.of("copy").scaled(step),
        limit=timings.share("copy", "ours", "f") if positive else None,
        megabytes=least / STEPS / 1e6,
    )


def _torchdeq(method: str, memory: int):  # type: ignore[no-untyped-def]
    try:
        solve = torchdeq_solver(method)
    except ImportError:
        return None
    # torchdeq's m counts pairs of z and f(z), our memory the differences between them.
    extra = {"m": memory + 1} if method == "Anderson" else {}
    # At tol=0 it takes every step, as ours does.
    return torch.no_grad()(
        lambda f, z0: solve(f, z0, max_iter=STEPS, tol=0.0, stop_mode="rel", **extra)
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
