"""Peak memory of a solve, and of training against the number of forward steps."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from benchmarks.goals import record

BATCH, FEATURES, MEMORY = 16, 250_000, 6

# A process each, because the peak of one that has run before is no measure of what follows.
SOLVE = f"""
import resource, torch
from deqsolvers import Anderson, fixed_point
torch.set_num_threads(2)
z0 = torch.zeros({BATCH}, {FEATURES})
rates = torch.linspace(0, 0.9, {FEATURES})
f = lambda z: torch.addcmul(torch.ones(()), rates, z)
f(z0)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
fixed_point(f, z0, solver=Anderson({MEMORY}), tol=None, max_steps=30)
print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * 1024)
"""

TRAIN = """
import resource, torch
from deqsolvers import DEQ, Picard
torch.set_num_threads(2)
torch.manual_seed(0)
cell = torch.nn.Linear(256, 256)
deq = DEQ(lambda z, x: torch.tanh(0.3 * cell(z) + x), Picard(), tol=None, max_steps={steps})
x = torch.randn(4096, 256)
deq(x)[0].sum().backward()
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


def measure(program: str) -> float:
    return float(subprocess.check_output([sys.executable, "-c", program], text=True))


def test_anderson_history(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("measured on the CPU, by the process's peak memory")
    state = BATCH * FEATURES * 4
    states = measure(SOLVE) / state
    print(f"\nAnderson({MEMORY}): {states:.1f} states of {state / 1e6:.0f} MB")
    record("Anderson: peak memory in states", states, "<", 2 * (MEMORY + 1) + 4)


def test_training_memory_does_not_grow_with_steps(device: torch.device) -> None:
    if device.type != "cpu":
        pytest.skip("measured on the CPU, by the process's peak memory")
    few, many = (measure(TRAIN.format(steps=steps)) for steps in (10, 100))
    print(f"\ntraining: {few / 1e6:.0f} MB with 10 forward steps, {many / 1e6:.0f} MB with 100")
    record("training memory, 100 / 10 forward steps", many / few, "<", 1.05)
