"""Gradients under DistributedDataParallel: two processes give those of one."""

import gc
import os
import socket
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from deqsolvers import DEQ, Implicit
from tests.deqsolvers.maps import TanhMap, normal


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


def work(rank: int, port: int, out: str) -> None:
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    model = DistributedDataParallel(Model())
    model(samples()[3 * rank : 3 * rank + 3]).square().mean().backward()
    if rank == 0:
        torch.save(gradients(model), out)
    # A process that leaves while the other still talks to it makes that one abort.
    del model
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's threads now and then abort while an interpreter shuts down


def test_two_processes_give_the_gradients_of_one(tmp_path: Path) -> None:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = tmp_path / "gradients.pt"
    mp.spawn(work, (port, str(out)), nprocs=2)
    found = torch.load(out, weights_only=True)
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
