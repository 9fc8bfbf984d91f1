"""The documentation builds without a warning and describes every public name."""

import importlib
import inspect
import pkgutil
import subprocess
import sys
import zlib
from pathlib import Path
from types import ModuleType

import pytest

import deqsolvers
import polypseg
from tests.docs.pages import ROOT

for package in ("sphinx", "furo", "myst_parser", "sphinx_autodoc_typehints"):
    pytest.importorskip(package, reason='no Sphinx here: pip install -e ".[docs]"')


@pytest.fixture(scope="module")
def described(tmp_path_factory: pytest.TempPathFactory) -> set[str]:
    """Every name that the built documentation describes."""
    out = tmp_path_factory.mktemp("html")
    command = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    done = subprocess.run([*command, ROOT / "docs", out], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return inventory(out / "objects.inv")


def inventory(path: Path) -> set[str]:
    """The Python names in a Sphinx inventory (version 2: four lines of header, then zlib)."""
    content = path.read_bytes().split(b"\n", 4)[4]
    lines = zlib.decompress(content).decode().splitlines()
    return {line.split()[0] for line in lines if " py:" in line}


def test_every_name_of_the_library_is_described(described: set[str]) -> None:
    missing = {name for name in deqsolvers.__all__ if f"deqsolvers.{name}" not in described}
    assert missing <= documented_as_data(deqsolvers, missing)


def documented_as_data(module: ModuleType, names: set[str]) -> set[str]:
    """Constants: autodoc shows one only where a comment beside it documents it."""
    return {name for name in names if isinstance(getattr(module, name), (dict, str, int, tuple))}


def test_every_name_of_the_application_is_described(described: set[str]) -> None:
    missing = []
    for found in pkgutil.walk_packages(polypseg.__path__, "polypseg."):
        if found.ispkg or found.name == "polypseg.demo":
            continue
        module = importlib.import_module(found.name)
        assert found.name in described
        for name, value in vars(module).items():
            own = getattr(value, "__module__", None) == found.name
            documented = inspect.isfunction(value) or inspect.isclass(value)
            if own and documented and value.__doc__ and not name.startswith("_"):
                missing += [f"{found.name}.{name}"] * (f"{found.name}.{name}" not in described)
    assert missing == []
