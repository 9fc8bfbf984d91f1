"""What torch is doing around us: compiling, transforming (torch.func) or recording."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor
from torch.autograd import forward_ad


def transforming() -> bool:
    """Whether a transform of torch.func (grad, vjp, jvp, vmap, ...) is under way."""
    return not torch.compiler.is_compiling() and torch._C._are_functorch_transforms_active()


def forward_mode() -> bool:
    """Whether tangents may flow: inside of jvp, or of ``torch.autograd.forward_ad.dual_level``."""
    return not torch.compiler.is_compiling() and forward_ad._current_level >= 0


def differentiations() -> int:
    """How many transforms of torch.func that differentiate, or dual levels, surround this."""
    kinds = [level.key() for level in torch._C._functorch.get_interpreter_stack() or ()]
    forward = torch._C._functorch.TransformType.Jvp
    backward = kinds.count(torch._C._functorch.TransformType.Grad)
    return backward + max(kinds.count(forward), int(forward_mode()))


def may_look(tensor: Tensor) -> bool:
    """Whether the host may branch on values without waiting for a device or breaking a trace."""
    return tensor.is_cpu and not torch.compiler.is_compiling() and not transforming()


def may_overwrite() -> bool:
    """Whether buffers may be written in place: nothing that is recorded can need them again."""
    if torch.compiler.is_compiling():
        return False
    return not (torch.is_grad_enabled() or forward_mode() or transforming())


@contextlib.contextmanager
def undifferentiated() -> Iterator[None]:
    """Neither gradients nor tangents are recorded in this block."""
    with torch.no_grad():
        if forward_mode():
            with forward_ad._set_fwd_grad_enabled(False):
                yield
        else:
            yield


def physical(tensor: Tensor) -> Any:
    """The tensor below the wrappers of torch.func, vmapped dimensions included."""
    while transforming() and torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
