"""Every code block of every page runs or, where it is a command line, parses."""

import argparse
import doctest
import re
import shlex
import shutil
from collections.abc import Callable
from dataclasses import fields
from importlib import import_module
from pathlib import Path

import pytest
import torch
import yaml

from deqsolvers import Status
from polypseg.config import make_config
from polypseg.predict import PredictionRow
from polypseg.result import EXPLICIT
from polypseg.scores import TABLE_HEADER, ImageRow, SummaryRow
from polypseg.validation import CONVERGED
from tests.docs.pages import PAGES, ROOT, blocks, name

try:
    import tomllib
except ModuleNotFoundError:  # Python 3.10, where pytest brings it
    import tomli as tomllib

PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
# What else a block may be: text that is only looked at, and directives of the pages themselves.
OTHER = {"text", "{eval-rst}", "{toctree}", "{doctest}"}


def with_blocks(*languages: str) -> list:
    found = [page for page in PAGES if blocks(page, *languages)]
    return [pytest.param(page, id=name(page)) for page in found]


@pytest.fixture
def workplace(tmp_path: Path, tiny_run: Path, synthetic_data: Path, monkeypatch) -> Path:
    """A folder with what the pages assume: a trained run, photographs and a data folder."""
    shutil.copytree(tiny_run, tmp_path / "runs" / "mine")
    shutil.copytree(synthetic_data / "TestDataset" / "Synthetic" / "images", tmp_path / "photos")
    shutil.copytree(synthetic_data, tmp_path / "DATA")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.filterwarnings("error::deqsolvers.ConvergenceWarning")
@pytest.mark.parametrize("page", with_blocks("python"))
def test_python_blocks_run_one_after_the_other(page: Path, workplace: Path) -> None:
    torch.manual_seed(0)
    names: dict = {"__name__": "page"}
    for block in blocks(page, "python"):
        # The empty lines make line numbers in a traceback those of the page.
        source = "\n" * (block.line - 1) + block.text
        exec(compile(source, str(page), "exec"), names)
    if page.name == "README.md":
        assert names["solution"].converged.all()
        assert names["cell"].weight.grad.abs().sum() > 0
        assert names["fast"](names["x"])[1].calls == 3


@pytest.mark.parametrize("page", with_blocks("{doctest}"))
def test_doctests(page: Path) -> None:
    torch.manual_seed(0)
    runner = doctest.DocTestRunner(optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    names: dict = {}
    for block in blocks(page, "{doctest}"):
        example = doctest.DocTestParser().get_doctest(
            block.text, names, str(block), str(page), block.line
        )
        runner.run(example, clear_globs=False)
        names = example.globs
    assert runner.summarize().failed == 0


@pytest.mark.parametrize("page", with_blocks("sh"))
def test_command_lines_are_right(page: Path) -> None:
    for block in blocks(page, "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):  # DATA=DIR make demo
                words.pop(0)
            if words:
                check_command(words, f"{block}: {line}")


@pytest.mark.parametrize("page", with_blocks("sh"))
def test_no_two_predictions_of_a_page_go_to_one_folder(page: Path) -> None:
    """The second would be refused."""
    folders = []
    for block in blocks(page, "sh"):
        for line in block.text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == ["polypseg-predict"]:
                folders.append(
                    words[words.index("--out") + 1] if "--out" in words else "predictions"
                )
    for block in blocks(page, "python"):
        folders += re.findall(r"predict_files\(.*Path\(\"(\w+)\"\)\)", block.text)
    assert len(folders) == len(set(folders))


def test_the_guide_names_the_column_of_small_residuals_as_printed() -> None:
    page = (ROOT / "docs" / "polypseg" / "results.md").read_text()
    section = page.partition("## Reading the table\n")[2].partition("\n## ")[0]
    rows = [line.split("|") for line in section.splitlines() if "converged_share" in line]
    assert [row[1].strip() for row in rows] == [TABLE_HEADER[-1]]
    assert float(re.search(r"at most ([\d.e-]+)", rows[0][2])[1]) == CONVERGED


def test_the_guide_explains_every_column_and_status() -> None:
    page = (ROOT / "docs" / "polypseg" / "results.md").read_text()
    section = page.partition("## Statuses and columns\n")[2].partition("\n## ")[0]
    titles = [
        re.findall(r"`(\w+)`", line.split("|")[1]) for line in section.splitlines() if "|" in line
    ]
    named = {word for words in titles for word in words}
    columns = {
        field.name for kind in (ImageRow, SummaryRow, PredictionRow) for field in fields(kind)
    }
    statuses = {status.name for status in Status} | {EXPLICIT}
    assert named == columns | statuses


def check_command(words: list[str], where: str) -> None:
    program, *arguments = words
    if program in PROJECT["scripts"]:
        module = import_module("polypseg." + program.removeprefix("polypseg-").replace("-", "_"))
        parse(module.main, arguments, where)
    elif program == "make":
        targets = re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE)
        assert {word for word in arguments if "=" not in word} <= set(targets), where
    elif program == "pip":
        for extras in re.findall(r"\[([a-z,]+)\]", " ".join(arguments)):
            assert set(extras.split(",")) <= set(PROJECT["optional-dependencies"]), where
    elif program in ("python", "pytest"):
        if arguments[0] != "-m":
            assert (ROOT / arguments[0]).exists(), where
    else:
        assert program in ("git", "cd", "mkdir", "cp"), where


class Parsed(Exception):
    """Carries what a command was told, in place of doing it."""


def parse(main: Callable[[list[str]], object], arguments: list[str], where: str) -> None:
    """Let a command read its command line, and stop it there."""

    def stop_after(read: Callable) -> Callable:
        def reading(parser: argparse.ArgumentParser, *given) -> None:
            raise Parsed(read(parser, *given))

        return reading

    with pytest.MonkeyPatch.context() as patch:
        for name in ("parse_args", "parse_intermixed_args"):
            patch.setattr(
                argparse.ArgumentParser, name, stop_after(getattr(argparse.ArgumentParser, name))
            )
        try:
            main(arguments)
        except Parsed as parsed:
            (options,) = parsed.args
        except SystemExit:
            pytest.fail(f"{where}: the command line is not accepted")
    if getattr(options, "set", None):
        make_config({}, options.set)


@pytest.mark.parametrize("page", with_blocks("yaml"))
def test_settings_are_accepted(page: Path) -> None:
    for block in blocks(page, "yaml"):
        make_config(yaml.safe_load(block.text))


@pytest.mark.parametrize("page", [pytest.param(page, id=name(page)) for page in PAGES])
def test_no_block_escapes_the_tests(page: Path) -> None:
    for block in blocks(page):
        assert block.language in {"python", "sh", "yaml"} | OTHER, f"{block}: {block.language!r}"


@pytest.mark.parametrize("page", [pytest.param(page, id=name(page)) for page in PAGES])
def test_links_lead_somewhere(page: Path) -> None:
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.DOTALL | re.MULTILINE)
    for link in re.findall(r"\]\(([^)#:\s]+)(?:#[^)]*)?\)", text):
        assert (page.parent / link).exists(), link


def test_parser_fault_is_seen() -> None:
    with pytest.raises(pytest.fail.Exception):
        check_command(["polypseg-predict", "--no-such-option"], "here")
    with pytest.raises(AssertionError):
        check_command(["make", "nothing"], "here")
