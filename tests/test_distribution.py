"""What pip builds of the tree, and what importing the library costs."""

import shutil
import statistics
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from email import message_from_bytes
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LARGEST_FILE = 100_000  # bytes; weights and pictures would exceed it
IMPORT_LIMIT = 0.3  # seconds of the processor beyond torch's own import


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[zipfile.ZipFile]:
    """Built offline, of the files that git knows: leftovers in build/ would get into it."""
    pytest.importorskip("setuptools", minversion="77")
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("the tree is no clone")
    tree, out = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (tree / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(ROOT / name, tree / name)
    build = "from setuptools import build_meta; import sys; build_meta.build_wheel(sys.argv[1])"
    done = subprocess.run(
        [sys.executable, "-c", build, out], cwd=tree, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (path,) = out.glob("deqsolvers-*-py3-none-any.whl")
    with zipfile.ZipFile(path) as opened:
        yield opened


def test_the_wheel_holds_the_packages_and_nothing_else(wheel: zipfile.ZipFile) -> None:
    names = set(wheel.namelist())
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"deqsolvers", "polypseg"}
    assert max(info.file_size for info in wheel.infolist()) < LARGEST_FILE
    for folder in ("deqsolvers", "polypseg"):
        own = {
            path.relative_to(ROOT).as_posix()
            for path in (ROOT / folder).rglob("*")
            if path.is_file() and path.suffix not in (".pyc", ".png", ".jpg", ".safetensors")
        }
        assert {name for name in names if name.startswith(f"{folder}/")} == own
    for name in (
        "deqsolvers/py.typed", "polypseg/py.typed", "polypseg/defaults.yaml",
        "polypseg/recipes/demo.yaml", "polypseg/data/lists/polyp_val.txt",
    ):  # fmt: skip
        assert name in names


def test_without_an_extra_the_wheel_asks_for_torch_alone(wheel: zipfile.ZipFile) -> None:
    (name,) = (name for name in wheel.namelist() if name.endswith(".dist-info/METADATA"))
    needed = message_from_bytes(wheel.read(name)).get_all("Requires-Dist")
    assert [need for need in needed if "extra ==" not in need] == ["torch>=2.6"]


def test_the_library_alone_imports_torch_alone(wheel: zipfile.ZipFile, tmp_path: Path) -> None:
    """Every module of it but the bridges, with the application and its packages out of reach."""
    wheel.extractall(tmp_path)
    code = """
import importlib, pkgutil, sys
import torch
allowed = {name.partition(".")[0] for name in sys.modules} | sys.stdlib_module_names
allowed.add("deqsolvers")
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] not in allowed:
            raise ModuleNotFoundError(f"{name} is out of reach", name=name)
sys.meta_path.insert(0, Refuse())
import deqsolvers
for module in pkgutil.walk_packages(deqsolvers.__path__, "deqsolvers."):
    if not module.name.startswith("deqsolvers.interop"):
        importlib.import_module(module.name)
print(deqsolvers.__file__)
"""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).is_relative_to(tmp_path)


@pytest.mark.slow
def test_importing_the_library_is_quick() -> None:
    """The median of some processes, each of which measures what torch's import leaves to do.

    Processor time, for the clock would count what else the machine does.
    """
    code = "import torch, time; start = time.process_time(); import deqsolvers; "
    code += "print(time.process_time() - start)"
    seconds = []
    for _ in range(5):
        done = subprocess.run(
            [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
        )
        seconds.append(float(done.stdout))
    assert statistics.median(seconds) < IMPORT_LIMIT, seconds
