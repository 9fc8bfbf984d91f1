"""The three losses of a HyperSolver on unrolled steps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from deqsolvers.deq import DEQ
from deqsolvers.fixed_point import StepInfo, iterate
from deqsolvers.hypersolver.targets import Target
from deqsolvers.options import Options
from deqsolvers.solvers import Solver
from deqsolvers.state import Layout

Unroll = Literal["full", "checkpoint", "truncate"]
UNROLLS: tuple[Unroll, ...] = ("full", "checkpoint", "truncate")


@dataclass(frozen=True)
class LossWeights:
    """Weights of the three losses; the defaults are the ICLR paper's for images (table 2).

    Attributes:
        convergence, initializer, alpha: of the three losses.
        final_alpha: to which the weight of the alpha loss falls, linearly.
        alpha_decay: share of the updates over which it falls; the paper's runs spend 0.3 to 0.5.
    """

    convergence: float = 0.1
    initializer: float = 0.02
    alpha: float = 1e-5
    final_alpha: float = 5e-8
    alpha_decay: float = 0.5

    def alpha_at(self, done: float) -> float:
        """The weight of the alpha loss after the share ``done`` of the updates."""
        left = max(0.0, 1 - done / self.alpha_decay) if self.alpha_decay > 0 else 0.0
        return self.final_alpha + (self.alpha - self.final_alpha) * left


# Bai, Koltun & Kolter (ICLR 2022), table 2. How they scale the norms is in no public text; here all
# distances are relative to ||z*||.
PUBLISHED_WEIGHTS = {
    "wikitext-103": LossWeights(0.1, 0.05, 1e-4),
    "imagenet": LossWeights(0.1, 0.02, 1e-5),
    "cityscapes": LossWeights(0.1, 0.02, 1e-5),
}


def get_weights(weights: LossWeights | str | None) -> LossWeights:
    """A `LossWeights` by the name of the data set that it was published for.

    Raises:
        ValueError: an unknown name; lists the known ones.
    """
    if weights is None:
        return LossWeights()
    if isinstance(weights, LossWeights):
        return weights
    if weights not in PUBLISHED_WEIGHTS:
        known = ", ".join(PUBLISHED_WEIGHTS)
        raise ValueError(f"weights must be a LossWeights or one of {known}, got {weights!r}")
    return PUBLISHED_WEIGHTS[weights]


def weighted_loss(distances: Tensor, mixed: Tensor, weights: LossWeights, done: float) -> Tensor:
    """The sum of the three losses of (steps + 1, B) distances and (steps, B) mixed residuals."""
    distances, mixed = distances.mean(1), mixed.mean(1)
    return (
        weights.convergence * convergence(distances)
        + weights.initializer * distances[0]
        + weights.alpha_at(done) * mixed.sum()
    )


def convergence(distances: Tensor) -> Tensor:
    """``sum_k w_k d_k`` over the steps of (steps + 1,) distances; w_k proportional to k, sum 1."""
    ramp = torch.arange(1, len(distances), device=distances.device, dtype=distances.dtype)
    return (ramp / ramp.sum() * distances[1:]).sum()


@dataclass(frozen=True)
class Unrolled:
    """A solver's way from its start.

    Attributes:
        states: steps + 1 of (B, features).
        distances: (steps + 1, judged) of these to z*, relative to ``||z*||``.
        mixed: (steps, judged) norms of the mixed residuals, relative to the same; zeros for a
            solver that does not keep them.
        residuals: (steps, B) of all states but the last.
    """

    states: list[Tensor]
    distances: Tensor
    mixed: Tensor
    residuals: Tensor


def unroll(solver: Solver, deq: DEQ, target: Target, steps: int, mode: Unroll = "full") -> Unrolled:
    """Take ``steps`` steps from the solver's own start, or the layer's where it has none.

    ``mode`` says what gradients cost: "full" keeps what f computed at every step, "checkpoint"
    computes it again in the backward pass, "truncate" passes no gradient from a step to the steps
    before, so f needs no backward pass.
    """
    start = deq.initial_state(*target.inputs, solver=solver)
    layout, goal = target.layout, target.goal
    layout.check(start, len(goal), name="z*", maker="the initializer")
    start = layout.unflatten(layout.flatten(start))  # an initializer may order a dict otherwise
    scale = torch.linalg.vector_norm(goal, dim=1).clamp_min(torch.finfo(goal.dtype).tiny)
    states, mixed, residuals = [], [], []
    memories: list[Any] = []

    def norm(matrix: Tensor) -> Tensor:
        return torch.linalg.vector_norm(matrix, dim=1) / scale

    def note_mixed() -> None:
        last = getattr(memories[-1], "mixed", None)
        mixed.append(torch.zeros_like(scale) if last is None else norm(last))

    def watch(info: StepInfo) -> None:
        if memories:
            note_mixed()
        memories.append(info.memory)
        states.append(layout.flatten(info.z))
        residuals.append(info.residual)

    f, stepping = _mapped(deq.f, solver, mode if torch.is_grad_enabled() else "full")
    options = Options(tol=None, max_steps=steps, final="last", drop_converged=False)
    solution = iterate(f, start, target.inputs, stepping, options, callback=watch)
    note_mixed()
    states.append(layout.flatten(solution.z))
    distances = torch.stack([norm(z - goal) for z in states])
    return Unrolled(
        states, target.judge(distances), target.judge(torch.stack(mixed)), torch.stack(residuals)
    )


def _mapped(
    f: Callable[..., Any], solver: Solver, mode: Unroll
) -> tuple[Callable[..., Any], Solver]:
    if mode == "checkpoint":
        # Here, because torch 2.6 imports SymPy with it, which takes longer than this library.
        from torch.utils.checkpoint import checkpoint

        return lambda z, *inputs: checkpoint(f, z, *inputs, use_reentrant=False), solver
    if mode == "truncate":
        return torch.no_grad()(f), _Truncated(solver)
    return f, solver


class _Truncated(Solver):
    """A solver each of whose steps starts from a state without a past."""

    def __init__(self, solver: Solver):
        self.solver = solver

    def init(self, z: Tensor, layout: Layout) -> Any:
        return self.solver.init(z, layout)

    def step(self, memory: Any, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        return self.solver.step(memory, z.detach(), fz.detach(), g.detach())
