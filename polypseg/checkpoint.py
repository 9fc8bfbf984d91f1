"""Checkpoints that survive a full disk, a kill and a hostile file.

Weights are safetensors files. The state of a training (optimiser, random generators, progress) is
a file of `torch.save`, read back with `weights_only=True`, so that loading never runs code.
"""

import contextlib
import errno
import io
import os
import pickle
import secrets
import shutil
import warnings
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn

LAST = "last.pt"
PREVIOUS = "previous.pt"

_NAMED = 40  # characters of a file's name, its last ones, that its temporary file bears
_LISTED = 10  # how many keys of each kind an error message names


class CheckpointError(RuntimeError):
    """A checkpoint is missing, damaged, unsafe to load or made for another model."""


class OutOfSpaceError(OSError):
    """The disk or the quota is full. The file that was to be replaced is untouched."""


def write_atomic(path: Path, data: bytes, *, keep_as: Path | None = None) -> None:
    """Replace `path` by `data` so that a reader sees all of the old file or all of the new one.

    With `keep_as`, a file in the same folder, the one that is replaced lives on under that name. It
    moves only after the new bytes are on disk, so one complete file exists at every instant.

    Raises:
        OutOfSpaceError: the disk is full; says how many bytes were needed and how many are free.
        OSError: the file cannot be written for another reason.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    # The random part keeps two writers of one path out of each other's temporary file. A name may
    # already be as long as the system takes, so that not all of it has room here.
    temporary = path.with_name(f".{path.name[-_NAMED:]}.{secrets.token_hex(4)}.tmp")
    try:
        with open(temporary, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        if keep_as is not None and path.exists():
            os.replace(path, keep_as)
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(path.parent).free
            missing = f", {len(data) - free:,} are missing" if len(data) > free else ""
            raise OutOfSpaceError(
                error.errno,
                f"no room to write {len(data):,} bytes ({free:,} are free on the disk{missing}); "
                "what was there before is untouched",
                str(path),
            ) from error
        raise
    _sync_folder(path.parent)


def _sync_folder(folder: Path) -> None:
    """Make a rename durable. Not every system can, and the data are safe either way."""
    with contextlib.suppress(OSError):
        descriptor = os.open(folder, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)


def remove_unfinished(folder: Path) -> None:
    """Delete what writers that were killed have left in a folder; nobody else may write there."""
    for pattern in (".*.tmp", ".*.partial"):  # of this module; of deqsolvers
        for path in folder.glob(pattern):
            path.unlink()


def save_weights(path: Path, state_dict: Mapping[str, Tensor], metadata: dict[str, str]) -> None:
    """Write a state dict and its metadata as one safetensors file, atomically.

    Tensors may be on any device, strided, or share memory: each is stored whole under its own key.

    Raises:
        CheckpointError: an entry is not a tensor.
        OSError: the file cannot be written; see `write_atomic`.
    """
    strangers = [key for key, value in state_dict.items() if not isinstance(value, Tensor)]
    if strangers:
        raise CheckpointError(f"{path}: only tensors can be stored, and {_some(strangers)} are not")
    # The format refuses shared memory and strides; a copy has neither.
    tensors = {
        key: value.detach().cpu().clone(memory_format=torch.contiguous_format)
        for key, value in state_dict.items()
    }
    write_atomic(path, safetensors.torch.save(tensors, metadata))


def load_weights(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors, on the CPU, and the metadata of a safetensors file.

    Raises:
        CheckpointError: the file is missing, cut short or not a safetensors file.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such weights file")
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118 (no dict)
            return tensors, dict(file.metadata() or {})
    except (SafetensorError, OSError) as error:
        raise CheckpointError(
            f"{path}: not a complete safetensors file ({error}); copy or download it again"
        ) from error


def load_into(
    module: nn.Module,
    path: Path,
    *,
    what: str,
    adapt: Callable[[dict[str, Tensor]], dict[str, Tensor]] | None = None,
) -> dict[str, str]:
    """Load a weights file into a module, all of it or nothing, and return the file's metadata.

    `what` names the module in messages, for example "encoder". Every key and shape is compared
    before the first value is copied. `adapt` makes the module's tensors of those of the file.

    Raises:
        CheckpointError: the file cannot be read, or its keys or shapes are not the module's.
    """
    tensors, metadata = load_weights(path)
    own = module.state_dict()
    tensors = adapt(tensors) if adapt is not None else tensors
    faults = {
        "missing in the file": [key for key in own if key not in tensors],
        "unknown to the model": [key for key in tensors if key not in own],
        "of another shape": [
            f"{key} (file {tuple(tensors[key].shape)}, model {tuple(value.shape)})"
            for key, value in own.items()
            if key in tensors and tensors[key].shape != value.shape
        ],
    }
    lines = [f"  {len(keys)} {fault}: {_some(keys)}" for fault, keys in faults.items() if keys]
    if lines:
        made_for = f" (they are of {metadata['model']})" if "model" in metadata else ""
        head = f"{path}: these weights do not fit the {what}{made_for}; nothing was loaded"
        raise CheckpointError("\n".join([head, *lines]))
    module.load_state_dict(tensors)
    return metadata


def save_state(path: Path, state: dict[str, Any], *, keep_previous: bool = False) -> None:
    """Write the state of a training atomically; `load_state` reads it.

    The state may hold tensors and plain Python values: numbers, strings, tuples, lists and dicts.
    With `keep_previous`, the file that is replaced stays beside it as `previous.pt`.

    Raises:
        CheckpointError: the state holds something that `load_state` would refuse.
        OSError: the file cannot be written; see `write_atomic`.
    """
    buffer = io.BytesIO()
    torch.save(state, buffer)
    data = buffer.getvalue()
    # A checkpoint that cannot be read back must not take the place of one that can.
    _decode(data, f"{path}: not written")
    write_atomic(path, data, keep_as=path.with_name(PREVIOUS) if keep_previous else None)


def load_state(path: Path) -> dict[str, Any]:
    """Read a file of `save_state`, tensors on the CPU, without running any code it may hold.

    Raises:
        CheckpointError: the file is missing, damaged, or holds more than tensors and plain values.
    """
    try:
        data = path.read_bytes()
    except FileNotFoundError:
        raise CheckpointError(f"{path}: there is no such checkpoint") from None
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return _decode(data, str(path))


def load_latest(folder: Path) -> dict[str, Any]:
    """Read `last.pt` of a folder or, with a warning, `previous.pt` where that cannot be read.

    Raises:
        CheckpointError: neither can be read; says why for each.
    """
    try:
        return load_state(folder / LAST)
    except CheckpointError as error:
        last_error = error
    try:
        state = load_state(folder / PREVIOUS)
    except CheckpointError as error:
        raise CheckpointError(f"nothing to go on from:\n  {last_error}\n  {error}") from error
    warnings.warn(f"{last_error}; going on from {folder / PREVIOUS}", stacklevel=2)
    return state


def _decode(data: bytes, where: str) -> dict[str, Any]:
    """Unpickle under torch's allow-list. Its own messages advise to lift it: ours do not."""
    try:
        state = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f"{where}: refused, because it holds something other than tensors and plain Python "
            "values, and such a file could run code when loaded"
        ) from error
    except (RuntimeError, EOFError, ValueError, LookupError) as error:
        raise CheckpointError(f"{where}: cut short or damaged") from error
    if not isinstance(state, dict):
        raise CheckpointError(f"{where}: expected a dict, found {type(state).__name__}")
    return state


def _some(keys: Iterable[str]) -> str:
    """The first few keys, and how many more there are."""
    keys = list(keys)
    rest = len(keys) - _LISTED
    return ", ".join(keys[:_LISTED]) + (f" and {rest} more" if rest > 0 else "")
