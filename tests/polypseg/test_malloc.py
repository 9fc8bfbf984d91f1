"""Memory that is kept after it was freed, seen by the page faults of a process of its own."""

import ctypes
import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"),
    reason="only glibc can be asked",
)

MEBIBYTES = 48  # above what glibc ever keeps by itself
SCRIPT = f"""
import resource, sys
import torch
from polypseg.malloc import keep_freed_memory

if sys.argv[1] == "keep":
    keep_freed_memory()
for _ in range(20):  # until small blocks that lie between are used again too
    torch.ones({MEBIBYTES}, 2**20, dtype=torch.uint8)
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(5):
    torch.ones({MEBIBYTES}, 2**20, dtype=torch.uint8)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(mode: str, **settings: str) -> int:
    """How often the system had to find a page for memory that was freed a moment ago."""
    environment = {k: v for k, v in os.environ.items() if not k.startswith(("MALLOC_", "GLIBC_"))}
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT, mode],
        env=environment | settings,
        capture_output=True,
        text=True,
        check=True,
    )
    return int(done.stdout)


def test_memory_that_was_freed_is_there_for_the_next_tensor() -> None:
    assert faults("keep") * 10 < faults("as usual")


def test_settings_of_the_environment_stay() -> None:
    mapped = faults("as usual", MALLOC_MMAP_THRESHOLD_="65536")
    assert faults("keep", MALLOC_MMAP_THRESHOLD_="65536") > mapped / 2
