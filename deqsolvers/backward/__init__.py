"""How gradients pass a fixed point, a file a method."""

from __future__ import annotations

from deqsolvers.backward.base import Backward
from deqsolvers.backward.implicit import Implicit
from deqsolvers.backward.phantom import JacobianFree, Phantom
from deqsolvers.backward.shine import Shine
from deqsolvers.backward.unrolled import Unrolled

BACKWARDS: dict[str, type[Backward]] = {
    "implicit": Implicit,
    "phantom": Phantom,
    "jacobian-free": JacobianFree,
    "shine": Shine,
    "unrolled": Unrolled,
}


def get_backward(backward: str | Backward) -> Backward:
    """The object that ``backward`` names, with its defaults, or ``backward`` itself.

    Raises:
        ValueError: an unknown name; the message lists the known ones.
    """
    if isinstance(backward, Backward):
        return backward
    if not isinstance(backward, str) or backward not in BACKWARDS:
        raise ValueError(
            f"backward must be one of {', '.join(BACKWARDS)}, or an object such as Implicit(), got "
            f"{backward!r}"
        )
    return BACKWARDS[backward]()


__all__ = [
    "BACKWARDS",
    "Backward",
    "Implicit",
    "JacobianFree",
    "Phantom",
    "Shine",
    "Unrolled",
    "get_backward",
]
