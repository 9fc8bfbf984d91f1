"""A HyperSolver as one safetensors file: weights, configuration, and what it was fitted on."""

from __future__ import annotations

import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import nn

from deqsolvers.hypersolver import initializers, network, preconditioners
from deqsolvers.solvers.hand_over import HandOver
from deqsolvers.solvers.hyper import FittedOn, HyperSolver

_KEY = "hypersolver"  # of the file's metadata
_PARTS = ("initializer", "network", "preconditioner")
_MODULES: dict[str, type[nn.Module]] = {
    kind.__name__: kind
    for kind in (
        initializers.VectorInitializer,
        initializers.SequenceInitializer,
        initializers.ImageInitializer,
        initializers.DeepImageInitializer,
        initializers.MultiScaleInitializer,
        network.AlphaBetaNetwork,
        preconditioners.VectorPreconditioner,
        preconditioners.ImagePreconditioner,
    )
}
_POOLS = {
    pool.__name__: pool
    for pool in (
        network.pool_vectors,
        network.pool_sequences,
        network.pool_images,
        network.pool_scales,
    )
}


def hypersolver_metadata(hyper: HyperSolver) -> dict[str, str]:
    """The configuration and `FittedOn` of ``hyper``, as metadata of a safetensors file."""
    record: dict[str, Any] = {
        "pool": _name(hyper.pool, _POOLS),
        "fitted_on": None if hyper.fitted_on is None else asdict(hyper.fitted_on),
        "dtype": str(next(hyper.parameters()).dtype).removeprefix("torch."),
    }
    for part in _PARTS:
        module = getattr(hyper, part)
        record[part] = module and {
            "class": _name(type(module), _MODULES),
            "arguments": getattr(module, "arguments", None),
        }
    return {_KEY: json.dumps(record)}


def _name(thing: Any, ours: dict[str, Any]) -> str:
    """By which a file knows it: the bare name for one of ours alone."""
    name = getattr(thing, "__name__", type(thing).__name__)
    if ours.get(name) is thing:
        return name
    return f"{getattr(thing, '__module__', type(thing).__module__)}.{name}"


def save_hypersolver(hyper: HyperSolver, path: str | Path) -> None:
    """Write ``hyper`` with its configuration, so that `load_hypersolver` can build it again.

    The file is replaced as a whole or not at all. Needs the package safetensors.
    """
    if not isinstance(hyper, HyperSolver):
        hint = "; save its first" if isinstance(hyper, HandOver) else ""
        raise TypeError(f"hyper must be a HyperSolver, got a {type(hyper).__name__}{hint}")
    save_file = _safetensors().torch.save_file
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    tensors = {key: value.contiguous() for key, value in hyper.state_dict().items()}
    try:
        save_file(tensors, partial, metadata=hypersolver_metadata(hyper))
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def load_hypersolver(path: str | Path, *, into: HyperSolver | None = None) -> HyperSolver:
    """The HyperSolver of a file, on the CPU and in evaluation mode.

    It serves any f whose state has the channels (or features) that it was made for; its
    ``fitted_on`` says which f, state and distances it was fitted to.

    Args:
        path: written by `save_hypersolver`.
        into: a HyperSolver that gets the weights instead of a new one; needed where one of its
            modules is not of this package.

    Raises:
        ImportError: safetensors is not installed.
        ValueError: the file is not of a HyperSolver, has modules of its own and ``into`` is
            missing, or its weights do not fit ``into``, which then stays as it was.
        OSError: the file cannot be read.
    """
    safetensors = _safetensors()
    try:
        with safetensors.safe_open(path, framework="pt") as file:
            record = json.loads((file.metadata() or {}).get(_KEY, "null"))
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{path}: not a complete safetensors file ({error})") from error
    if record is None:
        raise ValueError(f"{path}: holds no HyperSolver (save one with save_hypersolver)")
    hyper = _build(record, path) if into is None else into
    try:
        check_fit(hyper, tensors)
    except ValueError as error:
        raise ValueError(f"{path}: {error}; nothing was loaded") from None
    hyper.load_state_dict(tensors)
    fitted = record["fitted_on"]
    hyper.fitted_on = None if fitted is None else FittedOn.from_record(fitted)
    return hyper.eval()


def _build(record: dict[str, Any], path: str | Path) -> HyperSolver:
    named = [record[part]["class"] for part in _PARTS if record[part]]
    strangers = [name for name in named if name not in _MODULES]
    strangers += [record["pool"]] if record["pool"] not in _POOLS else []
    if strangers:
        raise ValueError(
            f"{path}: its {', '.join(strangers)} are not of this package; build the HyperSolver "
            "from your own modules and give it as into="
        )
    parts = {
        part: record[part] and _MODULES[record[part]["class"]](**record[part]["arguments"])
        for part in _PARTS
    }
    hyper = HyperSolver(pool=_POOLS[record["pool"]], **parts)
    return hyper.to(getattr(torch, record.get("dtype", "float32")))


def check_fit(hyper: HyperSolver, tensors: dict[str, Any]) -> None:
    """ValueError unless ``tensors`` are a state dict of such a HyperSolver."""
    own = hyper.state_dict()
    wrong = sorted(own.keys() ^ tensors.keys())
    wrong += [key for key in own.keys() & tensors.keys() if own[key].shape != tensors[key].shape]
    if wrong:
        raise ValueError(
            f"the weights do not fit the HyperSolver; {len(wrong)} are missing, unknown or of "
            f"another shape: {', '.join(wrong[:5])}"
        )


def _safetensors() -> Any:
    try:
        import safetensors
        import safetensors.torch
    except ImportError as error:
        raise ImportError(
            "saving and loading a HyperSolver needs safetensors: pip install safetensors"
        ) from error
    return safetensors
