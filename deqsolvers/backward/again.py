"""Evaluating f again as it was, whatever parameters its modules have by then."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from deqsolvers.modules import modules_of


def keep_tensors(call: Callable[..., Any], f: Callable[..., Any]) -> Callable[..., Any]:
    """``call``, which evaluates ``f``, with the parameters and buffers that f's modules have now.

    `torch.func.functional_call` takes the tensors that it lent to a module away again when it
    returns, and a backward pass that evaluates f comes later. Tensors are held, not their values.
    """
    if torch.compiler.is_compiling():  # which could not follow
        return call
    roots = nn.ModuleList(modules_of(f))
    then = _tensors(roots)

    def again(*args: Any) -> Any:
        now = _tensors(roots)
        if now.keys() == then.keys() and all(now[name] is then[name] for name in then):
            return call(*args)
        # A copy, for the tensors that f puts in place of others are written into it. Tied ones all
        # have their names in it.
        return functional_call(_Call(call, roots), dict(then), args, tie_weights=False)

    return again


def _tensors(roots: nn.ModuleList) -> dict[str, Tensor]:
    """By name the parameters and buffers of all modules, each module under one of its names."""
    return {
        f"roots.{path}.{name}": tensor
        for path, module in roots.named_modules()
        for tensors in (module._parameters, module._buffers)
        for name, tensor in tensors.items()
        if tensor is not None
    }


class _Call(nn.Module):
    """A function as a module, so that `functional_call` reaches the modules that it calls."""

    def __init__(self, call: Callable[..., Any], roots: nn.ModuleList):
        super().__init__()
        self.call = call
        self.roots = roots

    def forward(self, *args: Any) -> Any:
        return self.call(*args)
