"""Memory that a process keeps after freeing it."""

from __future__ import annotations

import ctypes
import os
import sys

# Of glibc's malloc.h.
_TRIM_THRESHOLD, _MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let glibc's malloc return nothing to the system, so that the next step finds it mapped.

    By default it maps every block above 32 MiB anew, and cuts freed memory off its end; a training
    on a CPU then waits for the same page faults in every step, MDEQ's for a quarter of its time.
    Does nothing where malloc is another one, or where the environment has settings for it.
    """
    chosen = any(name.startswith("MALLOC_") for name in os.environ)
    if chosen or "glibc.malloc" in os.environ.get("GLIBC_TUNABLES", ""):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if sys.platform == "linux" else None
    if mallopt is not None:
        mallopt(_MMAP_MAX, 0)
        mallopt(_TRIM_THRESHOLD, -1)  # never
