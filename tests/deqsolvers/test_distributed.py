"""Gradients under DistributedDataParallel: two processes give those of one."""

from pathlib import Path

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from deqsolvers import DEQ, Implicit
from tests.deqsolvers.maps import TanhMap, normal
from tests.two_processes import run_in_two


class Model(nn.Module):
    """A DEQ between two ordinary layers; its samples need different numbers of steps."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.before = nn.Linear(8, 8, dtype=torch.float64)
        self.deq = DEQ(TanhMap(8, norm=0.8), backward=Implicit(tol=1e-12, max_steps=100), tol=1e-12)
        self.after = nn.Linear(8, 1, dtype=torch.float64)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        z, _ = self.deq(self.before(x))
        return self.after(z)


def samples() -> torch.Tensor:
    return normal(6, 8) * torch.tensor([[0.1], [1.0], [3.0]] * 2, dtype=torch.float64)


def gradients(model: nn.Module) -> list[torch.Tensor]:
    return [p.grad for p in model.parameters() if p.grad is not None]


def work(rank: int) -> list[torch.Tensor]:
    model = DistributedDataParallel(Model())
    model(samples()[3 * rank : 3 * rank + 3]).square().mean().backward()
    return gradients(model)


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    found = run_in_two(work, tmp_path)
    model = Model()
    model(samples()).square().mean().backward()
    expected = gradients(model)
    assert len(found) == len(expected) == len(list(model.parameters()))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-10)


def test_activation_checkpointing_gives_the_same_gradients() -> None:
    plain, checkpointed = Model(), Model()
    x = samples()
    plain(x).square().mean().backward()
    y = torch.utils.checkpoint.checkpoint(checkpointed, x, use_reentrant=False)
    y.square().mean().backward()
    torch.testing.assert_close(gradients(checkpointed), gradients(plain), rtol=1e-9, atol=1e-12)
