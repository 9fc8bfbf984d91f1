"""The configuration of a training: typed, complete, and documented in defaults.yaml."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

import yaml

from polypseg.config_limits import out_of_range


class ConfigError(ValueError):
    """A setting is unknown, of the wrong type or out of range."""


@dataclass(frozen=True)
class ModelConfig:
    name: str = "polypdeq-add"
    encoder: str = "b0"
    classes: int = 1


@dataclass(frozen=True)
class DataConfig:
    size: int
    scales: tuple[float, ...]
    train_on: str
    group: str
    workers: int


@dataclass(frozen=True)
class PhaseConfig:
    """What the explicit and the implicit phase share."""

    epochs: int
    batch: int
    accumulate: int
    lr: float
    final_lr: float
    warmup: float
    weight_decay: float
    clip: float
    ema: float
    precision: str


@dataclass(frozen=True)
class ImplicitConfig(PhaseConfig):
    warm_epochs: int
    warm_lr: float
    solver: str
    memory: int
    tol: float
    max_steps: int
    backward: str
    backward_steps: int
    jacobian: float
    jacobian_share: float
    correction: float
    correction_steps: int


@dataclass(frozen=True)
class HyperConfig:
    epochs: int
    batch: int
    lr: float
    final_lr: float
    memory: int
    initializer: str
    width: int
    rank: int
    steps: int
    mode: str
    tol: float
    max_steps: int
    alternate: int
    alternate_updates: int


@dataclass(frozen=True)
class SolveConfig:
    tol: float
    max_steps: int
    memory: int
    anderson_memory: int
    hyper_steps: int
    hyper_tol: float


@dataclass(frozen=True)
class Config:
    """All settings of a run; each is explained in ``polypseg/defaults.yaml``."""

    seed: int
    model: ModelConfig
    data: DataConfig
    explicit: PhaseConfig
    implicit: ImplicitConfig
    hyper: HyperConfig
    solve: SolveConfig

    def to_yaml(self) -> str:
        """The settings as a file that `load_config` reads back to an equal configuration."""
        return yaml.safe_dump(as_settings(self), sort_keys=False)


def make_config(
    changes: Mapping[str, Any] = {}, overrides: Iterable[str] = (), *, where: str = ""
) -> Config:
    """The defaults with ``changes`` (nested, as in a file) and then ``overrides``
    ("section.key=value"); messages begin with ``where``.

    Raises:
        ConfigError: names every unknown key, wrong type and value out of range at once.
    """
    text = resources.files("polypseg").joinpath("defaults.yaml").read_text()
    defaults = yaml.safe_load(text)
    settings = copy.deepcopy(defaults)
    faults: list[str] = []
    _merge(settings, changes, "", faults)
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals:
            faults.append(f"{override!r} is not of the form section.key=value")
            continue
        nested: Any = _value(text)
        for part in reversed(key.split(".")):
            nested = {part: nested}
        _merge(settings, nested, "", faults)
    config = _build(Config, settings, defaults, "", faults)
    faults += out_of_range(config)  # defaults stand in for what is of a wrong type
    if faults:
        listed = "\n".join(f"  {fault}" for fault in faults)
        raise ConfigError(f"{where}the configuration has faults:\n{listed}")
    return config


def load_config(path: Path, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a YAML file, which may leave out what stays at its default.

    Raises:
        ConfigError: the file is missing, is not YAML, or holds faulty settings.
    """
    return make_config(read_settings(path), overrides, where=f"{path}: ")


def read_settings(path: Path) -> dict[str, Any]:
    """What a YAML file holds, unchecked; errors as `load_config`."""
    try:
        settings = yaml.safe_load(path.read_text())
    except FileNotFoundError:
        raise ConfigError(f"{path}: there is no such configuration file") from None
    except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
        raise ConfigError(f"{path}: cannot be read as YAML ({error})") from error
    if not isinstance(settings, (dict, type(None))):
        raise ConfigError(f"{path}: it must hold settings as 'key: value' lines")
    return settings or {}


def flat(settings: Mapping[str, Any], where: str = "") -> dict[str, Any]:
    """Nested settings as "section.key": value."""
    found = {}
    for key, value in settings.items():
        if isinstance(value, Mapping):
            found.update(flat(value, f"{where}{key}."))
        else:
            found[where + key] = value
    return found


def recipes() -> dict[str, str]:
    """The recipes that come with the package: what each is for, by name."""
    folder = resources.files("polypseg") / "recipes"
    texts = {
        file.name.removesuffix(".yaml"): file.read_text(encoding="utf-8")
        for file in folder.iterdir()
        if file.name.endswith(".yaml")
    }
    return {name: texts[name].partition("\n")[0].lstrip("# ") for name in sorted(texts)}


def load_recipe(name: str, overrides: Iterable[str] = ()) -> Config:
    """The configuration of a recipe of the package, with overrides on top.

    Raises:
        ConfigError: there is no such recipe, or an override is faulty.
    """
    known = recipes()
    if name not in known:
        raise ConfigError(f"there is no recipe {name!r}; known: {', '.join(known)}")
    with resources.as_file(resources.files("polypseg") / "recipes" / f"{name}.yaml") as path:
        return load_config(path, overrides)


def _value(text: str) -> Any:
    if not text.strip():
        return ""  # data.group= empties a pattern; YAML would have null there
    try:
        value = yaml.safe_load(text)
    except yaml.YAMLError:
        return text  # such as a regular expression, [a-z]+(\d+)
    if isinstance(value, str):  # YAML 1.1 takes 1e-3 for a string
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _merge(
    settings: dict[str, Any], changes: Mapping[str, Any], where: str, faults: list[str]
) -> None:
    for key, value in changes.items():
        name = f"{where}{key}"
        if key not in settings:
            faults.append(f"{name} is not a setting; known here: {', '.join(settings)}")
        elif isinstance(settings[key], dict):
            if isinstance(value, Mapping):
                _merge(settings[key], value, f"{name}.", faults)
            else:
                faults.append(f"{name} is a section; set {name}.KEY")
        else:
            settings[key] = value


def _build(
    kind: type,
    settings: Mapping[str, Any],
    defaults: Mapping[str, Any],
    where: str,
    faults: list[str],
) -> Any:
    """A section of the configuration, with the default where a value is of a wrong type."""
    hints = get_type_hints(kind)
    values = {}
    for field in dataclasses.fields(kind):
        expected, value, default = (found[field.name] for found in (hints, settings, defaults))
        name = f"{where}{field.name}"
        if dataclasses.is_dataclass(expected):
            values[field.name] = _build(expected, value, default, f"{name}.", faults)  # type: ignore[arg-type]
            continue
        values[field.name], wanted = _typed(expected, value)
        if wanted is not None:
            faults.append(f"{name} must be {wanted}, got {values[field.name]!r}")
            values[field.name], _ = _typed(expected, default)
    return kind(**values)


def _typed(expected: Any, value: Any) -> tuple[Any, str | None]:
    """A value as a setting of that type holds it; with what it must be, where it is not."""
    if expected == tuple[float, ...]:
        numbers = tuple(value) if isinstance(value, (list, tuple)) else (value,)
        fine = all(_is(float, number) for number in numbers)
        return (numbers, None) if fine else (value, "a list of numbers")
    if expected is float and isinstance(value, str):
        value = _value(value)
    if not _is(expected, value):
        return value, f"of type {expected.__name__}"
    return (float(value) if expected is float else value), None


def _is(kind: type, value: Any) -> bool:
    if isinstance(value, bool):
        return False
    return isinstance(value, (int, float) if kind is float else kind)


def as_settings(value: Any) -> Any:
    """A configuration as nested plain values, as a file holds them."""
    if dataclasses.is_dataclass(value):
        return {
            field.name: as_settings(getattr(value, field.name))
            for field in dataclasses.fields(value)
        }
    return list(value) if isinstance(value, tuple) else value
