"""The figures on the pages are those of the measurements in results/."""

import csv
import importlib.util
from types import ModuleType

import pytest

from polypseg.testsets import NOTES
from tests.docs.pages import ROOT


def script(name: str) -> ModuleType:
    """A script of results/, as a module."""
    spec = importlib.util.spec_from_file_location(f"result_{name}", ROOT / "results" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def tables() -> ModuleType:
    return script("pages")


def test_no_page_is_stale(tables: ModuleType, capsys: pytest.CaptureFixture) -> None:
    assert tables.main(check=True) == 0, f"{capsys.readouterr().out}: python results/pages.py"


def test_the_dice_shown_is_the_mean_of_the_images(tables: ModuleType) -> None:
    """From the rows of the images, which the script does not read."""
    images = ROOT / "results" / tables.RUN / "evaluation" / "Kvasir-hyper.csv"
    with images.open(newline="") as file:
        dice = [
            float(row["dice"])
            for row in csv.DictReader(file)
            if (row["protocol"], row["target"]) == ("default", "polyp")
        ]
    line = next(line for line in tables.readme().splitlines() if line.startswith("| HyperSolver"))
    shown = float(line.split("|")[2])
    assert abs(shown - 100 * sum(dice) / len(dice)) < 0.051


def test_every_table_with_clinicdb_has_its_caveat() -> None:
    text = (ROOT / "results" / "tables.md").read_text(encoding="utf-8")
    sections = [part for part in text.split("\n## ") if "| CVC-ClinicDB" in part]
    assert len(sections) == 4
    for section in sections:
        assert NOTES["CVC-ClinicDB"] in section


def test_the_coverage_of_the_intervals_is_what_the_script_finds() -> None:
    coverage = script("coverage")
    lines = (ROOT / "docs" / "polypseg" / "results.md").read_text(encoding="utf-8").splitlines()
    (row,) = [n for n, line in enumerate(lines) if line.startswith("| intervals that hold")]
    sizes, shares = ([int(cell) for cell in lines[n].split("|")[2:-1]] for n in (row - 2, row))
    assert sizes == list(coverage.SIZES)
    for images in (4, 15):
        assert shares[sizes.index(images)] == round(100 * coverage.coverage(images))


def test_a_stale_page_is_seen(tables: ModuleType) -> None:
    page = "a\n<!-- x: made -->\nold\n<!-- x end -->\nb\n"
    assert tables.filled(page, "x", "new") == page.replace("old", "new")
    with pytest.raises(ValueError, match="must stand there once"):
        tables.filled(page, "y", "new")
