"""The arguments that every command with a solver takes."""

from __future__ import annotations

import argparse


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
