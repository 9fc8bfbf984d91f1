"""Changes to a HyperSolver that beyond.py tries."""

from __future__ import annotations

import torch
from beyond_problems import Problem
from torch import Tensor, nn
from torch.nn import functional as F

from deqsolvers import HyperSolver
from deqsolvers.hypersolver.initializers import DeepImageInitializer
from deqsolvers.hypersolver.network import AlphaBetaNetwork

_STEPS = 12


class ByStep(nn.Module):
    """An alpha/beta network that knows the step: an offset a step on its outputs, zero at first."""

    def __init__(self, network: AlphaBetaNetwork):
        super().__init__()
        self.network, self.memory = network, network.memory
        self.offsets = nn.Parameter(torch.zeros(_STEPS, self.memory + 2))
        self.step = 0

    @classmethod
    def of(cls, hyper: HyperSolver, problem: Problem) -> HyperSolver:
        hyper.network = cls(hyper.network)
        return hyper

    def forward(self, series: Tensor) -> tuple[Tensor, Tensor]:
        length = series.shape[1]
        self.step = 0 if length == 1 else min(self.step + 1, _STEPS - 1)
        alpha, beta = self.network(series)
        raw = self.offsets[self.step, :length]
        return alpha + raw - raw.mean(), beta + self.offsets[self.step, -1]


class _GroupNetwork(AlphaBetaNetwork):
    """Alpha (B, G, k) and beta (B, G, 1) for G parts of the channels."""

    def __init__(self, parts: int, **arguments: int):
        super().__init__(**arguments)
        self.parts = parts
        self.read = nn.Linear(self.read.in_features, parts * self.read.out_features)
        nn.init.zeros_(self.read.weight)
        nn.init.zeros_(self.read.bias)

    def forward(self, series: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, features = series.shape
        power = series.square().mean(dim=(1, 2), keepdim=True)
        series = series * torch.where(power > 0, power, 1.0).rsqrt()
        padding = series.new_zeros(batch, self.memory + 1 - length, features)
        mixed = self.mix(torch.cat([series, padding], dim=1).transpose(1, 2))
        out = self.read(mixed.flatten(1)).unflatten(1, (self.parts, -1))
        newest = torch.zeros_like(out[..., :length])
        newest[..., -1] = 1
        raw = out[..., :length] + newest
        return raw + (1 - raw.sum(dim=-1, keepdim=True)) / length, 1 + out[..., -1:]


class PerGroup(HyperSolver):
    """A HyperSolver with an alpha and a beta for each of four groups of channels."""

    @classmethod
    def of(cls, hyper: HyperSolver, problem: Problem) -> HyperSolver:
        network = _GroupNetwork(parts=4, **hyper.network.arguments)
        return cls(hyper.initializer, network, hyper.pool, hyper.preconditioner)

    def step(self, memory, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:  # type: ignore[no-untyped-def]
        if not memory.series.shape[1]:
            memory.past = []
        memory.past = [*memory.past[-self.memory :], (z, g)]
        pooled = self.pool(memory.layout.unflatten(g)).unsqueeze(1)
        memory.series = (
            torch.cat([memory.series[:, -self.memory :], pooled], dim=1)
            if memory.series.shape[1]
            else pooled
        )
        alpha, beta = self.network(memory.series)
        groups = alpha.shape[1]
        states, residuals = (
            torch.stack(each, dim=1).unflatten(2, (groups, -1)).transpose(1, 2)
            for each in zip(*memory.past, strict=True)
        )  # (B, G, k, n / G)
        mixed = (alpha.unsqueeze(-1) * residuals).sum(2)
        memory.mixed = direction = mixed.flatten(1)
        if self.preconditioner is not None:
            layout = memory.layout
            direction = layout.flatten(self.preconditioner(layout.unflatten(direction)))
        combined = (alpha.unsqueeze(-1) * states).sum(2)
        return (combined + beta * direction.unflatten(1, (groups, -1))).flatten(1)


def with_larger_initializer(hyper: HyperSolver, problem: Problem) -> HyperSolver:
    """About 3 % of the parameters of PolypDEQ with the rest of the HyperSolver."""
    channels = hyper.network.features
    hyper.initializer = DeepImageInitializer(channels, channels, width=64, blocks=8)
    return hyper


class CoarseStart(nn.Module):
    """One evaluation of f at half the resolution, interpolated and corrected.

    As in the nested iteration of multigrid methods. Its evaluation of f is not among those counted,
    but takes a quarter of the arithmetic of one.
    """

    def __init__(self, f: nn.Module, channels: int, width: int = 24):
        super().__init__()
        self.f = (f,)  # a tuple, because its weights are not the HyperSolver's
        self.guess = nn.Conv2d(channels, channels, 3, stride=2, padding=1)
        self.context = nn.Conv2d(channels, width, 3, padding=1)
        self.local = nn.Conv2d(channels, width, 3, padding=1, bias=False)
        self.detail = nn.Conv2d(width, channels, 3, padding=1)
        for layer in (self.guess, self.detail):  # untrained, it interpolates f's value at zero
            nn.init.zeros_(layer.weight)
            nn.init.zeros_(layer.bias)

    @classmethod
    def of(cls, hyper: HyperSolver, problem: Problem) -> HyperSolver:
        hyper.initializer = cls(problem.deq.f, hyper.network.features)
        return hyper

    def forward(self, x: Tensor) -> Tensor:
        coarse = self.f[0](self.guess(x), F.avg_pool2d(x, 2))
        both = torch.cat([coarse, self.context(coarse)], dim=1)
        both = F.interpolate(both, size=x.shape[-2:], mode="bilinear", align_corners=False)
        z, context = both.split([coarse.shape[1], both.shape[1] - coarse.shape[1]], dim=1)
        return z + self.detail(F.gelu(context + self.local(x)))


class NextResidual(nn.Module):
    """Predicts ``log ||g_k||`` from what is known before f is evaluated at z_k."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3 + _STEPS, 32), nn.ReLU(), nn.Linear(32, 1))

    def forward(self, logs: Tensor) -> Tensor:
        """(K - 1, B) predictions for k = 1 .. K - 1, of (K, B) logarithms."""
        rates = torch.diff(logs, dim=0, prepend=logs[:1])
        before = torch.cat([rates[:1], rates[:-1]])
        steps = torch.eye(_STEPS)[: len(logs), None].expand(-1, logs.shape[1], -1)
        known = torch.cat([torch.stack([logs, rates, before], dim=-1), steps], dim=-1)
        return (logs + self.layers(known).squeeze(-1))[:-1]


def fit_next_residual(logs: Tensor) -> NextResidual:
    network = NextResidual()
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-2)
    for _ in range(500):
        loss = (network(logs) - logs[1:]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return network


def stopped(indicator: Tensor, distances: Tensor, budget: float) -> Tensor:
    """(B,) distances where each sample stops after the first step whose indicator is small enough.

    Args:
        indicator: (K, B), for stopping after 1 .. K evaluations; the last is never looked at.
        distances: (K + 1, B) after 0 .. K evaluations.
        budget: the mean number of evaluations, to which the threshold is chosen.
    """
    best: tuple[float, Tensor] | None = None
    for threshold in indicator.flatten().quantile(torch.linspace(0, 1, 2001)):
        small = indicator <= threshold
        small[-1] = True
        steps = small.int().argmax(dim=0) + 1
        miss = abs(float(steps.float().mean()) - budget)
        if best is None or miss < best[0]:
            best = miss, distances.gather(0, steps.unsqueeze(0)).squeeze(0)
    assert best is not None
    return best[1]
