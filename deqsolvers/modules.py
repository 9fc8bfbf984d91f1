"""The modules behind a callable: whose parameters, buffers and parametrizations f uses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from functools import partial
from types import CodeType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import nn

_OPENED = (nn.Module, FunctionType, MethodType, partial)


def modules_of(f: Any) -> list[nn.Module]:
    """The modules that ``f`` calls, as far as Python shows them; their submodules go unnamed.

    A module stands for itself. Others are looked for in the object of a bound method, in what a
    function closes over, has as a default or reads from the globals of its file, in the parts of a
    functools.partial and in the attributes of a callable object; not in lists or dicts, nor while
    torch.compile traces, which cannot follow.
    """
    if isinstance(f, nn.Module):
        return [f]
    if torch.compiler.is_compiling():
        return []
    found: list[nn.Module] = []
    waiting = [f]
    seen = set()
    while waiting:
        part = waiting.pop()
        if id(part) in seen:
            continue
        seen.add(id(part))
        if isinstance(part, nn.Module):
            found.append(part)
        else:
            waiting.extend(_parts(part))
    return found


def _parts(part: Any) -> Iterable[Any]:
    """What ``part``, no module itself, is made of."""
    if isinstance(part, MethodType):
        return part.__self__, part.__func__
    if isinstance(part, partial):
        return part.func, *part.args, *part.keywords.values()
    if isinstance(part, FunctionType):
        # Not what a decorator brings: torch.compile's would lead through all of torch.
        wrapped = getattr(part, "__wrapped__", None)
        return _values(part) if wrapped is None else (wrapped,)
    if isinstance(part, (type, ModuleType)):
        return ()
    # Of an object the attributes that may lead to a module, and not theirs in turn.
    attributes = getattr(part, "__dict__", {}).values()
    return [value for value in attributes if isinstance(value, _OPENED)]


def _values(function: FunctionType) -> Iterator[Any]:
    """What the free variables, defaults and globals of ``function`` stand for."""
    for cell in function.__closure__ or ():
        try:
            yield cell.cell_contents
        except ValueError:  # a variable that is not set yet
            continue
    yield from function.__defaults__ or ()
    yield from (function.__kwdefaults__ or {}).values()
    for name in _names(function.__code__):
        value = function.__globals__.get(name)
        # Of functions those of the same file alone: a library's would lead through all of it.
        if isinstance(value, _OPENED) and (
            not isinstance(value, FunctionType) or value.__globals__ is function.__globals__
        ):
            yield value


def _names(code: CodeType) -> Iterator[str]:
    """The global names in ``code`` and in the functions inside of it; attributes are among them."""
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from _names(constant)
