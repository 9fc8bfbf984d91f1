"""Exit codes and messages of the console commands."""

import errno
import runpy
import subprocess
import sys
from types import SimpleNamespace

import pytest

from polypseg import cli
from polypseg.checkpoint import CheckpointError, OutOfSpaceError
from polypseg.data import DataError, Fault

COMMANDS = {
    "train": cli.train,
    "evaluate": cli.evaluate,
    "predict": cli.predict,
    "check": cli.check,
    "compare": cli.compare,
    "export": cli.export,
    "demo": cli.demo,
}


@pytest.fixture(params=COMMANDS)
def command(request, monkeypatch):
    """The name of a command, and a function that runs it with another main."""

    def run(main):
        monkeypatch.setattr(cli, "import_module", lambda name: SimpleNamespace(main=main))
        return COMMANDS[request.param](["argument"])

    return request.param, run


def raising(error):
    def main(argv):
        raise error

    return main


def test_arguments_and_the_exit_code_are_passed_on(command):
    _, run = command
    seen = []
    assert run(lambda argv: seen.append(argv) or 7) == 7
    assert seen == [["argument"]]


@pytest.mark.parametrize(
    ("error", "message"),
    [
        (CheckpointError("weights: cut short"), "weights: cut short"),
        (ValueError("size must be 32"), "size must be 32"),
        (DataError([Fault("a.png", "is bad", "mend it")] * 2), "a.png: is bad; mend it\na.png: is"),
        (OutOfSpaceError(errno.ENOSPC, "no room", "file.csv"), "file.csv: no room"),
        (PermissionError(errno.EACCES, "Permission denied", "out"), "out: Permission denied"),
        (OSError("something"), "something"),
    ],
)
def test_known_errors_are_a_short_message_and_exit_code_1(command, error, message, capsys):
    name, run = command
    assert run(raising(error)) == 1
    captured = capsys.readouterr()
    assert captured.err.startswith(f"polypseg-{name}: error: {message}")
    assert "Traceback" not in captured.err
    assert captured.out == ""


@pytest.mark.parametrize("name", COMMANDS)
@pytest.mark.filterwarnings("ignore:.*found in sys.modules:RuntimeWarning")
def test_a_module_run_by_name_is_its_command(name, monkeypatch):
    monkeypatch.setattr(cli, name, lambda: 7)
    with pytest.raises(SystemExit) as stopped:
        runpy.run_module(f"polypseg.{name}", run_name="__main__")
    assert stopped.value.code == 7


def test_a_fault_of_the_program_is_not_hidden(command):
    _, run = command
    with pytest.raises(ZeroDivisionError):
        run(raising(ZeroDivisionError()))
    with pytest.raises(ModuleNotFoundError):
        run(raising(ModuleNotFoundError("no module", name="polypseg.nothing")))


def test_an_interrupt_says_how_to_go_on(command, capsys):
    name, run = command
    assert run(raising(KeyboardInterrupt())) == 130
    message = capsys.readouterr().err
    assert f"polypseg-{name}: interrupted; " in message
    assert ("resumed by the same command" in message) == (name == "train")


@pytest.mark.parametrize("package", ["timm", "safetensors"])
def test_a_missing_package_is_named_with_the_way_to_install_it(package):
    code = f"import sys; sys.modules[{package!r}] = None; from polypseg import cli; "
    code += "sys.exit(cli.predict(['image.png', '--run', 'run', '--out', 'out']))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stderr == (
        'polypseg needs its extra packages: pip install "deqsolvers[polypseg]" '
        f"({package} is missing)\n"
    )


@pytest.mark.parametrize("arguments", [[], ["--unknown"]])
def test_a_wrong_command_line_is_exit_code_2(arguments, capsys):
    for command in (cli.evaluate, cli.predict, cli.check, cli.compare, cli.export):
        with pytest.raises(SystemExit) as stopped:
            command(arguments)
        assert stopped.value.code == 2
        assert "usage: polypseg-" in capsys.readouterr().err
