"""Weight and spectral normalisation inside f.

torch's parametrizations do the work; applied to all layers of f they are two lines::

    for layer in [m for m in f.modules() if isinstance(m, (nn.Linear, nn.Conv2d))]:
        torch.nn.utils.parametrizations.weight_norm(layer)  # or spectral_norm(layer)

What torch cannot know is where a solve begins. A parametrized weight is computed anew at every
access, and in training mode ``spectral_norm`` improves its estimate of the norm each time, so that
f would change between the evaluations of one solve. A `DEQ` and `fixed_point` therefore compute
the parametrized weights of f once per solve, by `cached_weights`.

``spectral_norm`` bounds the norm of a weight by 1, of a convolution's kernel reshaped to a matrix
rather than of the convolution; neither alone makes f a contraction.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, cast

import torch
from torch import nn
from torch.nn.utils import parametrize

from deqsolvers.modules import modules_of


def cached_weights(f: Any) -> contextlib.AbstractContextManager[None]:
    """Within this block every parametrized weight of ``f`` is computed once.

    ``torch.nn.utils.parametrize.cached`` alone would lose gradients without a word: it keeps what
    the solve computes first, which is not recorded. Here the weights are computed at the start of
    the block, in the caller's grad mode, so that all of f's evaluations in it, recorded or not,
    share one recorded weight.

    A `DEQ` does this by itself for its solves and their gradients, and `fixed_point` for a solve.
    Use the block where more should see the same weights, such as a regulariser on f at the
    solution. A pass that is itself differentiated (``create_graph``) evaluates f after the block
    and computes the weights again.

    torch keeps one cache for all threads: while one thread trains f, another must not evaluate it.

    Args:
        f: a module whose submodules are parametrized, or a function, a bound method or a
            functools.partial that calls such modules. They are looked for in what f closes over,
            in its defaults, its globals and its attributes; what only a list or a dict holds is
            left alone.

    Raises:
        RuntimeError: another thread evaluates f without gradients, so that this one would lose
            its own.
    """
    modules = [module for root in modules_of(f) for module in root.modules()]
    parametrized = [module for module in modules if parametrize.is_parametrized(module)]
    # The compiler of torch 2.6 can trace the latter alone.
    return _cached(parametrized) if parametrized else contextlib.nullcontext()


@contextlib.contextmanager
def _cached(parametrized: list[nn.Module]) -> Iterator[None]:
    with parametrize.cached():
        for module in parametrized:
            for name, made_of in cast(nn.ModuleDict, module.parametrizations).items():
                trained = any(weight.requires_grad for weight in made_of.parameters())
                recorded = getattr(module, name).requires_grad
                if torch.is_grad_enabled() and trained and not recorded:
                    raise RuntimeError(
                        f"the parametrized weight {name!r} of {type(module).__name__} is in use by "
                        "a solve without gradients in another thread; give each thread a copy of f"
                    )
        yield


@contextlib.contextmanager
def forget_unrecorded_weights() -> Iterator[None]:
    """Around a solve without gradients: weights that it alone computed must not serve what follows.

    Within `cached_weights` torch keeps the weights of all modules, also of those that f calls
    unseen. The recorded call of f would find theirs without gradients.
    """
    if torch.compiler.is_compiling():
        yield
        return
    before = set(parametrize._cache)
    yield
    for key in set(parametrize._cache) - before:
        weight = parametrize._cache[key]
        if weight is not None and not weight.requires_grad:
            del parametrize._cache[key]
