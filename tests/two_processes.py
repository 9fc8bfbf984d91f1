"""Running a function in two processes that talk to each other through gloo."""

from __future__ import annotations

import gc
import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp


def run_in_two(compute: Callable[[int], Any], folder: Path) -> Any:
    """What ``compute(rank)``, a function of a module, returns in the first of two processes.

    The result is read back with weights_only, so it holds tensors and plain values.
    """
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    out = folder / "result.pt"
    mp.spawn(_work, (compute, port, str(out)), nprocs=2)
    return torch.load(out, weights_only=True)


def _work(rank: int, compute: Callable[[int], Any], port: int, out: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=2)
    found = compute(rank)
    if rank == 0:
        torch.save(found, out)
    # A process that leaves while the other still talks to it makes that one abort.
    gc.collect()
    dist.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's threads now and then abort while an interpreter shuts down
