"""Training in several processes, started by torchrun: who is who, and shared batch statistics."""

from __future__ import annotations

import gc
import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

# The others wait while the first process checks the data or validates.
_PATIENCE = timedelta(hours=6)


@dataclass(frozen=True)
class Processes:
    """This process (``rank``, from 0) among ``world``; the first one alone writes files."""

    rank: int = 0
    world: int = 1

    @property
    def first(self) -> bool:
        return self.rank == 0

    def wait(self) -> None:
        """Until all processes are here."""
        if self.world > 1:
            dist.barrier()


def choose_device(name: str | None) -> torch.device:
    """The device of that name, by default a GPU where there is one.

    Raises:
        ValueError: this machine has no such device, or torch cannot use it.
    """
    name = name or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:  # torch raises either
        reason = str(error).splitlines()[0]
        if name.startswith("cuda") and not torch.cuda.is_available():
            reason = f"torch {torch.__version__} finds no CUDA GPU on this machine"
        raise ValueError(f"--device {name} cannot be used: {reason}; try --device cpu") from error
    return device


def join_processes(device: torch.device) -> tuple[Processes, torch.device]:
    """Meet the other processes of a torchrun, and get this one's device; alone without torchrun."""
    if "RANK" not in os.environ or int(os.environ.get("WORLD_SIZE", "1")) == 1:
        return Processes(), device
    if device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=_PATIENCE)
    return Processes(dist.get_rank(), dist.get_world_size()), device


def leave_processes(processes: Processes) -> None:
    """The end of what the processes do together."""
    if processes.world > 1:
        gc.collect()  # whatever still holds the group would wait for the others at exit, for ever
        dist.destroy_process_group()


class SharedBatchNorm2d(nn.BatchNorm2d):
    """Batch normalisation by the statistics of all processes, on any device.

    Every process must hold equally many values. Not for use inside a fixed-point function, whose
    evaluations differ in number between processes: they would wait for each other for ever.
    """

    def forward(self, x: Tensor) -> Tensor:
        if not (self.training and dist.is_initialized() and dist.get_world_size() > 1):
            return super().forward(x)
        work = x.float()
        moments = torch.stack([work.mean((0, 2, 3)), work.square().mean((0, 2, 3))])
        mean, square = _Sum.apply(moments) / dist.get_world_size()
        variance = (square - mean.square()).clamp_min(0)
        self._follow(mean.detach(), variance.detach(), x.numel() // x.shape[1])
        scale = (variance + self.eps).rsqrt() * self.weight
        out = (work - mean[:, None, None]) * scale[:, None, None] + self.bias[:, None, None]
        return out.to(x.dtype)

    @torch.no_grad()
    def _follow(self, mean: Tensor, variance: Tensor, values: int) -> None:
        assert self.running_mean is not None
        assert self.running_var is not None
        assert self.num_batches_tracked is not None
        count = values * dist.get_world_size()
        self.running_mean.lerp_(mean, self.momentum or 0.1)
        self.running_var.lerp_(variance * (count / (count - 1)), self.momentum or 0.1)
        self.num_batches_tracked += 1


class _Sum(torch.autograd.Function):
    """The sum over all processes, whose gradient is the sum of their gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        total = x.clone()
        dist.all_reduce(total)
        return total

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tensor:
        return _Sum.forward(ctx, gradients[0])


def share_batch_statistics(model: nn.Module) -> None:
    """Turn every batch normalisation of a model into a `SharedBatchNorm2d`, in place."""
    for module in model.modules():
        if type(module) is nn.BatchNorm2d:
            module.__class__ = SharedBatchNorm2d
