"""Half precision: what it can reach, and how solver algebra stays out of it."""

from __future__ import annotations

import contextlib
import warnings
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

# Smallest relative residual that a state of this precision can be expected to reach (measured).
_PRECISION_FLOOR = {
    torch.float64: 1e-15,
    torch.float32: 3e-7,
    torch.float16: 6e-4,
    torch.bfloat16: 5e-3,
    torch.complex64: 3e-7,
    torch.complex128: 1e-15,
}


def coarsest(dtypes: tuple[torch.dtype, ...], autocast: torch.dtype | None) -> torch.dtype:
    """Of the dtypes of a state and the one that autocast lets f compute in, if any."""
    return max((*dtypes, autocast or dtypes[0]), key=precision_floor)


def precision_floor(dtype: torch.dtype) -> float:
    """The smallest relative residual that can be expected of this precision."""
    return _PRECISION_FLOOR[dtype]


def warn_below_floor(
    tol: float | None, dtypes: tuple[torch.dtype, ...], autocast: torch.dtype | None
) -> None:
    """Warn where a relative tolerance is below what the state or f under autocast can reach."""
    if not tol:
        return
    dtype = coarsest(dtypes, autocast)
    if tol < precision_floor(dtype):
        warnings.warn(
            f"tol={tol:g} is below what {dtype} can reach, about "
            f"{precision_floor(dtype):g}; samples will end as stalled or at the step limit",
            stacklevel=5,
        )


def autocast_enabled(device_type: str) -> bool:
    """Whether autocast is on for this kind of device; "meta" does not have it."""
    return device_type != "meta" and torch.is_autocast_enabled(device_type)


def widen(state: Any) -> Any:
    """``state`` with half-precision tensors made fp32 where autocast may have chosen that."""

    def one(leaf: Any) -> Any:
        half = isinstance(leaf, Tensor) and leaf.dtype in (torch.float16, torch.bfloat16)
        return leaf.float() if half and autocast_enabled(leaf.device.type) else leaf

    return pytree.tree_map(one, state)


class Autocast:
    """Keeps solver algebra out of autocast while f runs under whatever the caller set."""

    def __init__(self, example: Any):
        tensors = [leaf for leaf in pytree.tree_leaves(example) if isinstance(leaf, Tensor)]
        self.device_type = tensors[0].device.type if tensors else "cpu"
        enabled = autocast_enabled(self.device_type)
        self.dtype = torch.get_autocast_dtype(self.device_type) if enabled else None

    def suspended(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, enabled=False)

    def restored(self) -> contextlib.AbstractContextManager[Any]:
        if self.dtype is None:
            return contextlib.nullcontext()
        return torch.autocast(self.device_type, dtype=self.dtype)

    def forgetting(self) -> contextlib.AbstractContextManager[Any]:
        """Around a solve, so that no cached weight outlives it, also where f raises."""
        return contextlib.nullcontext() if self.dtype is None else _Forgetting()


class _Forgetting:
    # Not a generator, which torch 2.6 cannot compile as a context manager.
    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        # Half-precision weights cached without gradients must not serve a later call that needs
        # them.
        if not torch.is_grad_enabled():
            torch.clear_autocast_cache()
