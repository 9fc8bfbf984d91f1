"""The command line of `polypseg-train`."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from polypseg.config import Config
from polypseg.training_run import PHASES


def parse(argv: list[str] | None) -> argparse.Namespace:
    """The arguments; exits with a message where they make no sense together."""
    parser = _parser()
    arguments = parser.parse_intermixed_args(argv)
    if arguments.run is not None and not arguments.run.exists() and _is_setting(arguments):
        arguments.set.insert(0, str(arguments.run))  # KEY=VALUE without a run
        arguments.run = None
    if arguments.recipe != "list" and not arguments.print_config and arguments.run is None:
        parser.error("RUN, the run directory, is needed")
    if arguments.config is not None and (arguments.recipe or arguments.demo):
        parser.error("--config cannot go with --recipe or --demo; change settings by KEY=VALUE")
    return arguments


def _is_setting(arguments: argparse.Namespace) -> bool:
    """Whether what stands in the place of RUN is KEY=VALUE and no name of a new folder."""
    key, equals, _ = str(arguments.run).partition("=")
    if not equals or Path(key).name != key:
        return False
    # A section is enough: a key that it lacks is then named as a mistake, not made a folder. So is
    # any key where nothing is made.
    known = {field.name for field in dataclasses.fields(Config)}
    return arguments.print_config or key.partition(".")[0] in known


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polypseg-train",
        description="Train a polyp-segmentation DEQ: explicit, then implicit, then its "
        "HyperSolver. Repeating the command resumes an unfinished run.",
    )
    parser.add_argument(
        "run", type=Path, nargs="?", metavar="RUN", help="run directory, made if needed"
    )
    parser.add_argument("set", nargs="*", metavar="KEY=VALUE", help="settings, e.g. data.size=192")
    parser.add_argument(
        "--data", type=Path, metavar="DIR", help="holds TrainDataset/ or images/ and masks/"
    )
    parser.add_argument(
        "--config",
        type=Path,
        metavar="FILE",
        help="YAML file of settings that differ from the defaults",
    )
    parser.add_argument(
        "--recipe",
        metavar="NAME",
        help="settings that come with the package, for example polypdeq-add-paper; 'list' shows "
        "all of them",
    )
    parser.add_argument(
        "--print-config",
        action="store_true",
        help="print all settings, as a file for --config, and do nothing",
    )
    start = parser.add_mutually_exclusive_group()
    start.add_argument(
        "--encoder-weights",
        type=Path,
        metavar="FILE",
        help="SegFormer encoder, .safetensors or .pth",
    )
    start.add_argument(
        "--start-from",
        type=Path,
        metavar="RUN",
        help="fine-tune the network of another run or of a released model",
    )
    parser.add_argument(
        "--phases",
        type=_phases,
        help="comma-separated; default: explicit,implicit,hyper, as far as the network has them",
    )
    parser.add_argument(
        "--demo",
        action="store_true",
        help="small quick settings and, without --data, synthetic images",
    )
    parser.add_argument(
        "--no-evaluate",
        dest="evaluate",
        action="store_false",
        help="do not score the run at the end and write no report",
    )
    parser.add_argument(
        "--tensorboard", action="store_true", help="write the epochs to RUN/tensorboard too"
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    return parser


def _phases(text: str) -> tuple[str, ...]:
    wanted = text.split(",")
    unknown = [phase for phase in wanted if phase not in PHASES]
    if unknown:
        raise argparse.ArgumentTypeError(
            f"unknown phase {', '.join(unknown)}; choose from {', '.join(PHASES)}"
        )
    return tuple(phase for phase in PHASES if phase in wanted)
