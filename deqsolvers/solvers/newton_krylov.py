"""Jacobian-free Newton-Krylov."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from deqsolvers.modes import may_look
from deqsolvers.norms import safe_row_norms
from deqsolvers.solvers.base import Memory, Solver, check_count
from deqsolvers.state import Layout

_LARGEST_FORCING = 0.5  # a step is taken once the linear residual has fallen to this share,
_SMALLEST_FORCING = 1e-3  # or further as the method speeds up, but no further than this
_SUFFICIENT = 1e-4  # a step must lower ||g|| by this share of what a full one promises
_SHORTEST_STEP = 1e-3  # share of the Newton step below which the line search gives up


@dataclass
class _Point(Memory):
    """Where the Jacobian A = dg/dz is taken."""

    z: Tensor  # (B, features)
    g: Tensor  # (B, features)
    size: Tensor  # (B,) float64, ||g||
    probe: Tensor  # (B, 1) how far from z a probe lies


@dataclass
class _NewtonMemory(Memory):
    epsilon: float  # length of a probe relative to z
    # (B, memory, features) orthonormal basis q of the images A v of the directions v that were
    # probed. The first direction is g / ||g||, each further one the newest q.
    basis: Tensor
    triangle: Tensor  # (B, memory, memory) float64, R in A v = q R
    products: Tensor  # (B, memory) float64, q^T g
    length: Tensor  # (B,) how many directions were probed at this point
    probing: Tensor  # (B,) whether the last iterate was a probe, else it was a trial step
    share: Tensor  # (B,) float64, how much of the Newton step is tried; 0 stands for a plain step
    forcing: Tensor  # (B,) float64, the linear residual to aim for, relative to ||g||
    newton: Tensor  # (B, features) the Newton step
    probes: int = 0  # most that any sample can have made
    point: _Point | None = None

    def take(self, rows: Tensor) -> None:
        super().take(rows)
        if self.point is not None:
            self.point.take(rows)


class NewtonKrylov(Solver):
    """Jacobian-free Newton-Krylov: Newton's method on ``g(z) = f(z) - z`` with GMRES inside.

    Every evaluation of f is used in one of two ways. A probe, a short way from the current point,
    gives the product of the Jacobian with one direction of a Krylov space by a finite difference.
    When the linear residual in that space is small enough, or ``memory`` directions were probed,
    the Newton step of least residual is tried, and shortened until the residual falls. How small is
    enough follows from how fast the residuals fall (Eisenstat & Walker 1996, choice 2).

    It takes more evaluations than `Anderson` or `Broyden` where these do well, and is the method to
    try where they do not: the Jacobian is fresh at every step, and the line search keeps it from
    running away, whatever the spectrum of the Jacobian. Probes count as steps; a solve needs
    ``max_steps`` of several times ``memory``, and a ``stall_after`` above it.

    Args:
        memory: dimension of the Krylov space, at least 1; as many vectors are kept.

    Source: Knoll & Keyes, "Jacobian-free Newton-Krylov methods" (2004); the form of GMRES is that
        of Walker & Zhou, "A simpler GMRES" (1994).
    """

    explores = True

    def __init__(self, memory: int = 20):
        self.memory = check_count("memory", memory)

    def __repr__(self) -> str:
        return f"NewtonKrylov(memory={self.memory})"

    def init(self, z: Tensor, layout: Layout) -> _NewtonMemory:
        batch, features = z.shape
        return _NewtonMemory(
            epsilon=math.sqrt(layout.epsilon),
            basis=z.new_zeros(batch, self.memory, features),
            triangle=z.new_zeros(batch, self.memory, self.memory, dtype=torch.float64),
            products=z.new_zeros(batch, self.memory, dtype=torch.float64),
            length=torch.zeros(batch, dtype=torch.int64, device=z.device),
            probing=torch.zeros(batch, dtype=torch.bool, device=z.device),
            share=z.new_zeros(batch, dtype=torch.float64),
            forcing=z.new_full((batch,), _LARGEST_FORCING, dtype=torch.float64),
            newton=torch.zeros_like(z),
        )

    def step(self, memory: _NewtonMemory, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        size = safe_row_norms(g).double()
        if memory.point is None:
            memory.point = _Point(z, g.clone(), size, _probe_length(memory.epsilon, z, fz))
            memory.probing = torch.ones_like(memory.probing)
            return z + memory.point.probe * _normalised(memory.point)
        point = memory.point
        newest, ready = self._use_probe(memory, point, g)
        accepted = self._judge_trial(memory, point, size)
        self._solve(memory, point, ready)

        moved = accepted.unsqueeze(1)
        probe = torch.where(moved, _probe_length(memory.epsilon, z, fz), point.probe)
        memory.point = point = _Point(
            torch.where(moved, z, point.z),
            torch.where(moved, g, point.g),
            torch.where(accepted, size, point.size),
            probe,
        )
        memory.length = torch.where(accepted, 0, memory.length)
        memory.share = torch.where(ready, 1.0, memory.share)
        memory.probing = accepted | (memory.probing & ~ready)

        direction = torch.where(moved, _normalised(point), newest)
        share = memory.share.unsqueeze(1).to(z.dtype)
        trial = torch.where(share > 0, share * memory.newton, point.g)
        probing = memory.probing.unsqueeze(1)
        return point.z + torch.where(probing, probe * direction, trial)

    def _use_probe(self, memory: _NewtonMemory, point: _Point, g: Tensor) -> tuple[Tensor, Tensor]:
        """Add what the probes found; returns the newest q (B, features), and who is ready (B,)."""
        probing = memory.probing
        image = torch.where(probing.unsqueeze(1), (g - point.g) / point.probe, 0.0)
        before = torch.linalg.vector_norm(image, dim=1)
        memory.probes += 1
        filled = min(memory.probes, self.memory)
        used = torch.arange(filled, device=g.device) < memory.length.unsqueeze(1)
        basis = memory.basis[:, :filled]
        column = torch.zeros_like(memory.products)
        for _ in range(2):  # once would leave the basis orthogonal only up to cancellation
            weights = torch.where(used, torch.bmm(basis, image.unsqueeze(2)).squeeze(2), 0.0)
            image = torch.baddbmm(
                image.unsqueeze(1), weights.unsqueeze(1), basis, alpha=-1
            ).squeeze(1)
            column[:, :filled] += weights
        rest = torch.linalg.vector_norm(image, dim=1)
        # An image that is new by no more than its own error ends the Krylov space.
        new = probing & (rest > memory.epsilon * before) & (rest < torch.inf)
        # The quotient that is not taken must be finite too, or its gradient would be NaN.
        newest = torch.where(
            new.unsqueeze(1), image / torch.where(new, rest, 1.0).unsqueeze(1), 0.0
        )

        place = memory.length.clamp_max(self.memory - 1)
        at_place = (torch.arange(self.memory, device=g.device) == place.unsqueeze(1)) & (
            new.unsqueeze(1)
        )
        column = torch.where(at_place, rest.unsqueeze(1).double(), column)
        memory.triangle = torch.where(at_place.unsqueeze(1), column.unsqueeze(2), memory.triangle)
        product = (newest * point.g).sum(1, keepdim=True).double()
        memory.products = torch.where(at_place, product, memory.products)
        if torch.is_grad_enabled():  # autograd may have saved the basis of the step before
            memory.basis = memory.basis.clone()
        rows = torch.arange(len(g), device=g.device)
        kept = memory.basis[rows, place]
        memory.basis[rows, place] = torch.where(new.unsqueeze(1), newest, kept)
        memory.length = memory.length + new

        in_use = torch.arange(self.memory, device=g.device) < memory.length.unsqueeze(1)
        # Of ||g||, whose own square may overflow.
        shares = torch.where(in_use, memory.products / _length(point), 0.0)
        left = (1 - shares.square().sum(1)).clamp_min(0).sqrt()
        enough = (left <= memory.forcing) | (memory.length == self.memory)
        return newest, probing & (enough | ~new)

    def _judge_trial(self, memory: _NewtonMemory, point: _Point, size: Tensor) -> Tensor:
        """Who accepts its trial step (B,); shortens the steps of the others."""
        trying = ~memory.probing
        share = memory.share
        plain = share == 0
        lower = size <= (1 - _SUFFICIENT * share) * point.size
        accepted = trying & (lower | plain)
        # The parabola through ||g||^2 at both ends, whose slope is -2 ||g||^2 for a Newton step.
        ratio = (size / _length(point).squeeze(1)).square()
        shorter = share / (ratio - 1 + 2 * share).clamp_min(1e-300) * share
        shorter = torch.where(shorter < torch.inf, shorter, 0.0)
        shorter = torch.maximum(torch.minimum(shorter, 0.5 * share), 0.1 * share)
        shorter = torch.where(shorter < _SHORTEST_STEP, 0.0, shorter)
        memory.share = torch.where(trying & ~accepted, shorter, share)

        wanted = 0.9 * ratio
        kept = 0.9 * memory.forcing.square()
        wanted = torch.where(kept > 0.1, torch.maximum(wanted, kept), wanted)
        wanted = wanted.clamp(_SMALLEST_FORCING, _LARGEST_FORCING)
        memory.forcing = torch.where(accepted, wanted, memory.forcing)
        return accepted

    def _solve(self, memory: _NewtonMemory, point: _Point, ready: Tensor) -> None:
        """The Newton step of the samples that are ready."""
        if may_look(ready) and not bool(ready.any()):
            return  # the host can look for free here
        filled = min(memory.probes, self.memory)
        used = torch.arange(filled, device=ready.device) < memory.length.unsqueeze(1)
        unused = (~used).double().diag_embed()
        both = used.unsqueeze(1) & used.unsqueeze(2)
        triangle = torch.where(both, memory.triangle[:, :filled, :filled], unused)
        right = torch.where(used, memory.products[:, :filled], 0.0).unsqueeze(2)
        weights = torch.linalg.solve_triangular(triangle, right, upper=True).squeeze(2)
        weights = weights.to(point.g.dtype)
        # Directions: g / ||g||, then every q but the last.
        step = _normalised(point) * weights[:, :1]
        if filled > 1:
            later = memory.basis[:, : filled - 1]
            step = step + torch.bmm(weights[:, None, 1:], later).squeeze(1)
        # Without a single direction the step is a plain one.
        step = torch.where(used[:, :1], -step, point.g)
        memory.newton = torch.where(ready.unsqueeze(1), step, memory.newton)


def _length(point: _Point) -> Tensor:
    """(B, 1) float64, ||g|| there; 1 in place of 0."""
    return torch.where(point.size > 0, point.size, 1.0).unsqueeze(1)


def _normalised(point: _Point) -> Tensor:
    """(B, features) g / ||g|| there."""
    return point.g / _length(point).to(point.g.dtype)


def _probe_length(epsilon: float, z: Tensor, fz: Tensor) -> Tensor:
    """(B, 1): short beside z and f(z), long beside their rounding."""
    # Each by itself, because the sum may overflow.
    size = epsilon * safe_row_norms(z) + epsilon * safe_row_norms(fz)
    return torch.where(size > 0, size, epsilon).unsqueeze(1)
