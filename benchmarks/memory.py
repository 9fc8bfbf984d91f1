"""Peak memory of named cases, measured in a process of its own.

``python -m benchmarks.memory DEVICE CASE ...`` prints as JSON the peaks in bytes, above what was
held before each case.
"""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from functools import partial
from mmap import PAGESIZE
from pathlib import Path

import torch

from benchmarks import gradients
from benchmarks.methods import OURS, TORCHDEQ, torchdeq_solver
from benchmarks.overhead import MEMORY, STEPS, contraction, solver
from benchmarks.problems import PROBLEMS
from benchmarks.settings import Settings
from deqsolvers import DEQ, Picard, fixed_point

BATCH, FEATURES = 16, 250_000
# The system hands out whole pages.
STATE = -(-BATCH * FEATURES * 4 // PAGESIZE) * PAGESIZE

Case = Callable[[Settings], Callable[[], object]]


def forward(method: str, library: str, settings: Settings) -> Callable[[], object]:
    """`STEPS` steps of a solver at (16, 250k) in single precision."""

    def case(features: int) -> Callable[[], object]:
        rates, shift = contraction(BATCH, features, settings)
        z0 = torch.zeros_like(shift)

        def f(z: torch.Tensor) -> torch.Tensor:
            return torch.addcmul(shift, rates, z)

        if library == OURS:
            ours = solver(method, MEMORY)
            return lambda: fixed_point(f, z0, solver=ours, tol=None, max_steps=STEPS)
        solve = torchdeq_solver(method)
        return torch.no_grad()(
            lambda: solve(f, z0, max_iter=STEPS, tol=0.0, stop_mode="rel", m=MEMORY)
        )

    # What libraries set up once is no part of a solve; at this size it takes milliseconds.
    case(10_000)()
    return case(FEATURES)


def training(steps: int, settings: Settings) -> Callable[[], object]:
    """Forward and backward pass of a perceptron's layer with so many forward steps."""
    torch.manual_seed(0)
    cell = torch.nn.Linear(256, 256).to(settings.device)
    deq = DEQ(lambda z, x: torch.tanh(0.3 * cell(z) + x), Picard(), tol=None, max_steps=steps)
    x = torch.randn(4096, 256).to(settings.device)
    return _warmed(lambda: deq(x)[0].sum().backward())


def backward(problem: str, place: int, settings: Settings) -> Callable[[], object]:
    """A backward pass with the forward solve before it."""
    mode = gradients.modes()[place]
    f, x, v = gradients.trainable(PROBLEMS[problem](settings))
    return _warmed(lambda: gradients.gradient(mode, f, x, v))


def _warmed(run: Callable[[], object]) -> Callable[[], object]:
    run()
    return run


CASES: dict[str, Case] = {
    **{
        f"forward {method} {library}": partial(forward, method, library)
        for method in ("Picard", "Anderson", "Broyden")
        for library in (OURS, TORCHDEQ)
    },
    **{f"training {steps}": partial(training, steps) for steps in (10, 100)},
    **{
        f"backward {problem} {place}": partial(backward, problem, place)
        for problem in PROBLEMS
        for place in range(len(gradients.modes()))
    },
}


def peaks(cases: Sequence[str], device: torch.device) -> dict[str, float]:
    """Peak bytes of cases, by name.

    Raises:
        RuntimeError: they cannot be measured here; says why.
    """
    return in_own_process(["-m", "benchmarks.memory", str(device), *cases])


def in_own_process(arguments: Sequence[str]) -> dict[str, float]:
    """What Python, given these arguments, prints as JSON; it can tell peak memory by `peak`.

    Raises:
        RuntimeError: it failed; says why.
    """
    # Blocks of 64 kB and more come from the system and go back to it at once, so that the process
    # holds what tensors hold.
    environment = {**os.environ, "MALLOC_MMAP_THRESHOLD_": "65536"}
    root = str(Path(__file__).resolve().parent.parent)
    done = subprocess.run(
        [sys.executable, *arguments],
        env=environment,
        cwd=root,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(done.stderr.strip().splitlines()[-1])
    return json.loads(done.stdout)


def peak(run: Callable[[], object], device: torch.device) -> float:
    """Most bytes that a call holds at a time, above what was held before it."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        before = torch.cuda.memory_allocated(device)
        run()
        return torch.cuda.max_memory_allocated(device) - before
    before = _status("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # resets the peak
    run()
    return _status("VmHWM") - before


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"this system does not tell {field}")


if __name__ == "__main__":
    where = torch.device(sys.argv[1])
    settings = Settings(device=where, dtype=torch.float32, quick=True)
    print(json.dumps({case: peak(CASES[case](settings), where) for case in sys.argv[2:]}))
