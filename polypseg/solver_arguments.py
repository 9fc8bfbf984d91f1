"""The arguments that every command with a solver takes."""

from __future__ import annotations

import argparse
from collections.abc import Collection


def add_solver_arguments(parser: argparse.ArgumentParser) -> None:
    """Add ``--tol``, ``--max-steps`` and ``--device``, which `Predictor.from_run` takes."""
    parser.add_argument(
        "--tol", type=float, help="relative residual to stop at; default: the run's own"
    )
    parser.add_argument(
        "--max-steps",
        type=int,
        metavar="N",
        help="most solver steps; default: the run's own",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")


def check_solver_arguments(
    solvers: Collection[str], tol: float | None, max_steps: int | None
) -> None:
    """Raise `ValueError` if ``tol`` or ``max_steps`` is given and no solver heeds it."""
    given = {"tol": tol, "max_steps": max_steps}
    ignored = [name for name, value in given.items() if value is not None]
    if ignored and set(solvers) == {"explicit"}:
        raise ValueError(
            f"{' and '.join(ignored)} cannot be set here: the explicit pass evaluates f once, so "
            "it would have no effect; leave it out or choose another solver"
        )
