"""Two small DEQs that train in about a minute on a CPU: one on vectors, one on sequences."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deqsolvers import DEQ, Anderson, jacobian_regularizer


class VectorMap(nn.Module):
    """``LayerNorm(W2 gelu(W1 (z + x)) + x)`` on (B, 128)."""

    def __init__(self, size: int = 128, hidden: int = 2048):
        super().__init__()
        self.inner, self.outer = nn.Linear(size, hidden), nn.Linear(hidden, size)
        self.norm = nn.LayerNorm(size)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return self.norm(self.outer(F.gelu(self.inner(z + x))) + x)


class SequenceMap(nn.Module):
    """A transformer block with input injection on (B, T, C), as in DEQ sequence models."""

    def __init__(self, size: int = 192, heads: int = 4):
        super().__init__()
        self.heads = heads
        self.qkv, self.project = nn.Linear(size, 3 * size), nn.Linear(size, size)
        self.inner, self.outer = nn.Linear(size, 4 * size), nn.Linear(4 * size, size)
        self.norm1, self.norm2 = nn.LayerNorm(size), nn.LayerNorm(size)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        batch, length, size = z.shape
        qkv = self.qkv(z + x).reshape(batch, length, 3, self.heads, -1)
        query, key, value = qkv.permute(2, 0, 3, 1, 4)
        weights = (query @ key.transpose(-1, -2) / math.sqrt(query.shape[-1])).softmax(-1)
        mixed = (weights @ value).transpose(1, 2).reshape(batch, length, size)
        y = self.norm1(z + x + self.project(mixed))
        return self.norm2(y + self.outer(F.gelu(self.inner(y))))


class VectorModel(nn.Module):
    """Tells ten classes of noisy prototypes apart; its quality is the accuracy."""

    quality_name = "accuracy"

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(16, 128), nn.Linear(128, 10)
        self.deq = DEQ(VectorMap(), Anderson(), tol=1e-3, max_steps=30)

    def features(self, x: Tensor) -> Tensor:
        return self.embed(x)

    @staticmethod
    def data(count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        prototypes = 1.5 * torch.randn(40, 16, generator=torch.Generator().manual_seed(7))
        which = torch.randint(0, 40, (count,), generator=generator)
        noise = 0.7 * torch.randn(count, 16, generator=generator)
        return prototypes[which] + noise, which % 10

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.head(z), y)

    def quality(self, z: Tensor, y: Tensor) -> list[float]:
        return (self.head(z).argmax(1) == y).float().tolist()


class SequenceModel(nn.Module):
    """Removes noise from the sum of two sines; its quality is minus the mean squared error."""

    quality_name = "minus mean squared error"
    length = 24

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Conv1d(1, 192, 5, padding=2), nn.Linear(192, 1)
        self.position = nn.Parameter(0.5 * torch.randn(self.length, 192))
        self.deq = DEQ(SequenceMap(), Anderson(), tol=1e-3, max_steps=30)

    def features(self, x: Tensor) -> Tensor:
        return self.embed(x.transpose(1, 2)).transpose(1, 2) + self.position

    @classmethod
    def data(cls, count: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        frequency = 0.1 + 0.8 * torch.rand(count, 2, 1, generator=generator)
        phase = 2 * math.pi * torch.rand(count, 2, 1, generator=generator)
        clean = torch.sin(frequency * torch.arange(cls.length) + phase).sum(1).unsqueeze(-1)
        return clean + 0.7 * torch.randn(clean.shape, generator=generator), clean

    def loss(self, z: Tensor, y: Tensor) -> Tensor:
        return F.mse_loss(self.head(z), y)

    def quality(self, z: Tensor, y: Tensor) -> list[float]:
        return (-(self.head(z) - y).square().mean(dim=(1, 2))).tolist()


def train(model: VectorModel | SequenceModel, jacobian: float, updates: int, batch: int) -> None:
    """AdamW through implicit gradients; ``jacobian`` weighs the regulariser."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    generator = torch.Generator().manual_seed(1)
    for update in range(updates):
        for group in optimizer.param_groups:
            warm = min(1.0, (update + 1) / 40)
            group["lr"] = 1e-3 * warm * (1 + math.cos(math.pi * update / updates)) / 2
        x, y = model.data(batch, generator)
        e = model.features(x)
        z, solution = model.deq(e)
        loss = model.loss(z, y)
        if jacobian:
            loss = loss + jacobian * jacobian_regularizer(model.deq.f, solution.z, (e,))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
    model.eval().requires_grad_(False)
