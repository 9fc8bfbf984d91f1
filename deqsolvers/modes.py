"""What torch is doing around us: compiling, transforming (torch.func) or recording."""

from __future__ import annotations

import contextlib
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
    if torch.compiler.is_compiling() or torch.is_grad_enabled():
        return False
    return not (forward_mode() or transforming())


def undifferentiated() -> contextlib.AbstractContextManager[Any]:
    """A context in which neither gradients nor tangents are recorded."""
    if not forward_mode():  # which a compiler can trace, unlike a stack
        return torch.no_grad()
    stack = contextlib.ExitStack()
    stack.enter_context(torch.no_grad())
    stack.enter_context(forward_ad._set_fwd_grad_enabled(False))
    return stack


def values(tensor: Tensor) -> list[Any]:
    """The entries of a (B,) tensor on the host, those of vmapped dimensions in one row."""
    entries = physical(tensor.detach()).cpu().reshape(-1)
    # Not tolist, which torch 2.6 does not know inside of a transform.
    return [entry.item() for entry in entries.unbind()]


def physical(tensor: Tensor) -> Any:
    """The tensor below the wrappers of torch.func, vmapped dimensions included."""
    if torch.compiler.is_compiling():
        return tensor
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return tensor
