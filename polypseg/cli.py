"""The console commands: errors told to people, and exit codes to scripts.

0 means success, 1 that something given was wrong or the machine failed, 2 that the command line was
wrong or a package is missing, 130 that the user interrupted.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from importlib import import_module

INTERRUPTED = 130

# The extras of the commands that need more than "polypseg".
_EXTRAS = {"export": "polypseg,export", "demo": "demo"}


def train(argv: Sequence[str] | None = None) -> int:
    """`polypseg-train`: train a network into a run directory."""
    return _run("train", "the run is resumed by the same command", argv)


def evaluate(argv: Sequence[str] | None = None) -> int:
    """`polypseg-evaluate`: score a run on test folders."""
    return _run("evaluate", "nothing was written", argv)


def predict(argv: Sequence[str] | None = None) -> int:
    """`polypseg-predict`: segment images with a run."""
    return _run("predict", "the masks and tables written so far are complete", argv)


def check(argv: Sequence[str] | None = None) -> int:
    """`polypseg-check`: find all that is wrong with a data set."""
    return _run("check", "no file was changed", argv)


def compare(argv: Sequence[str] | None = None) -> int:
    """`polypseg-compare`: compare two evaluated models image by image."""
    return _run("compare", "nothing was written", argv)


def export(argv: Sequence[str] | None = None) -> int:
    """`polypseg-export`: write a run's network for use without this package."""
    return _run("export", "no file was written", argv)


def demo(argv: Sequence[str] | None = None) -> int:
    """`polypseg-demo`: a web page that segments an image dropped into it."""
    return _run("demo", "the page is closed", argv)


def _run(name: str, on_interrupt: str, argv: Sequence[str] | None) -> int:
    program = f"polypseg-{name}"
    try:
        return _call(name, argv)
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package in ("polypseg", "deqsolvers"):
            raise  # a fault of this installation that no extra cures
        extras = _EXTRAS.get(name, "polypseg")
        _tell(
            f'polypseg needs its extra packages: pip install "deqsolvers[{extras}]" '
            f"({package} is missing)"
        )
        return 2
    except KeyboardInterrupt:
        _tell(f"\n{program}: interrupted; {on_interrupt}")
        return INTERRUPTED


def _call(name: str, argv: Sequence[str] | None) -> int:
    # Imported late, so that a missing package or an early Ctrl-C makes no traceback.
    main: Callable[[Sequence[str] | None], int] = import_module(f"polypseg.{name}").main
    from polypseg.checkpoint import CheckpointError

    try:
        return main(argv)
    except OSError as error:
        message = error.strerror or str(error)
        _tell(f"polypseg-{name}: error: {f'{error.filename}: ' if error.filename else ''}{message}")
    except (CheckpointError, ValueError, FloatingPointError, MemoryError) as error:
        _tell(f"polypseg-{name}: error: {error}")
    return 1


def _tell(message: str) -> None:
    print(message, file=sys.stderr)
