"""The configuration that a run directory keeps: of older versions too, and what may change."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from polypseg.config import (
    Config,
    ConfigError,
    as_settings,
    flat,
    make_config,
    read_settings,
)

# Settings that came after the first runs, with the values at which a run does what it did without
# them. Defaults may change; these must not.
_AS_BEFORE: dict[str, Any] = {
    "data.train_on": "split",
    "data.group": "",
    "explicit.accumulate": 1,
    "implicit.accumulate": 1,
    "implicit.correction": 0.0,
    "implicit.correction_steps": 4,  # only of a correction
    "implicit.warm_lr": 1e-3,  # only of warm epochs
    "solve.hyper_tol": 0.0,
}


def load_run_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration that a run directory keeps: complete, unless an older version wrote it.

    What it lacks then takes the value at which a run is what it was before, never today's default.

    Raises:
        ConfigError: as `load_config`, or the file lacks what every version has written.
    """
    settings = read_settings(path)
    for key, value in added_settings(path).items():
        section, _, name = key.partition(".")
        settings[section][name] = value
    return make_config(settings, overrides, where=f"{path}: ")


def added_settings(path: Path) -> dict[str, Any]:
    """What a run's own configuration lacks because it is older, with the values that it gets.

    Raises:
        ConfigError: as `load_run_config`.
    """
    present = flat(read_settings(path))
    lacking = [key for key in flat(as_settings(make_config())) if key not in present]
    lost = [key for key in lacking if key not in _AS_BEFORE]
    if lost:
        raise ConfigError(
            f"{path}: lacks {', '.join(lost)}; a run's own file holds every setting. The metadata "
            "'config' of its .safetensors files is a copy"
        )
    return {key: _AS_BEFORE[key] for key in lacking}


# What may change when a run is resumed: how its work is done, not what is computed.
_FREE = ("data.workers", "explicit.accumulate", "implicit.accumulate")


def differences(before: Config, after: Config) -> list[str]:
    """The settings that keep ``after`` from resuming a run of ``before``, one text each."""
    old, new = flat(as_settings(before)), flat(as_settings(after))
    return [
        f"{key} was {old[key]}, now {new[key]}"
        for key in old
        if old[key] != new[key] and key not in _FREE
    ]
