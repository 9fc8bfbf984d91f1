"""What the results were measured on: machine, versions, commit. No host name, no path."""

from __future__ import annotations

import os
import platform
from datetime import datetime, timezone
from importlib import metadata
from typing import Any

import torch

from polypseg.runs import versions

_PEERS = ("torchdeq", "scipy", "jax", "jaxopt", "optimistix")


def header(command: str, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """Command, date, machine and versions, for the head of every output."""
    known = versions()
    found: dict[str, Any] = {
        "command": command,
        "seconds": None,  # the run took; known at its end
        "date": datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC"),
        "commit": known["git_commit"],
        "uncommitted_changes": known["git_dirty"],
        "device": device.type,
        "gpu": torch.cuda.get_device_name(device) if device.type == "cuda" else None,
        "dtype": str(dtype).removeprefix("torch."),
        "cpu": known["cpu"],
        "cores": known["cpu_count"],
        "memory_GB": _memory(),
        "threads": torch.get_num_threads(),
        "system": f"{platform.system()} {platform.machine()}",
    }
    for package in ("python", "deqsolvers", "torch", "timm", "numpy"):
        found[package] = known[package]
    for package in _PEERS:
        found[package] = _installed(package)
    return found


def lines(header: dict[str, Any]) -> list[str]:
    """The header as a few lines of text."""
    commit = str(header["commit"])[:12] + (" and changes" if header["uncommitted_changes"] else "")
    packages = ("python", "deqsolvers", "torch", *_PEERS)
    took = f", took {header['seconds']} s" if header.get("seconds") is not None else ""
    return [
        header["command"],
        f"{header['date']}{took}, commit {commit}",
        f"{header['gpu'] or header['cpu']}, {header['cores']} cores, {header['memory_GB']} GB, "
        f"{header['threads']} threads, {header['dtype']}, {header['system']}",
        ", ".join(f"{name} {header[name]}" for name in packages if header[name]),
    ]


def _memory() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9)
    except (AttributeError, ValueError, OSError):  # not on every system
        return None


def _installed(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
