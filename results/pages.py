"""Writes the figures of measured results into the pages that show them.

Usage: python results/pages.py [--check]

Between the lines <!-- NAME: ... --> and <!-- NAME end --> of README.md and docs/hypersolver.md
stands what this script makes of the CSV files in results/ and benchmarks/results/, so that no
figure is typed by hand. With --check nothing is written, and the exit code is 1 where a page is
stale.
"""

from __future__ import annotations

import csv
import json
import math
import re
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from polypseg.paper import NEOPOLYP, SETS, TABLE_2, TABLE_3, TARGETS
from polypseg.run_config import load_run_config
from polypseg.runs import read_epochs
from polypseg.scores import SummaryRow, read_rows

RESULTS = Path(__file__).parent
ROOT = RESULTS.parent
RUN = "polypdeq-res-352-more"  # the run whose figures the README shows
# The first run, and those that went on from the implicit weights of the one before, up to RUN.
BEFORE = ("polypdeq-res-256-long", "polypdeq-res-352")
# By the paper's name of each system: the run and the solver that stand beside it.
SYSTEMS = {
    "MDEQ, explicit": ("mdeq-256-all", "explicit"),
    "MDEQ, implicit": ("mdeq-256-all", "anderson"),
    "SegFormer-B0": ("segformer-b0-256-all", "explicit"),
    "PolypDEQ-add, implicit": ("polypdeq-add-256-all-zero", "anderson"),
    "PolypDEQ-res, implicit": (RUN, "anderson"),
    "HyperPolypDEQ": (RUN, "hyper"),
    "PolypDEQ-add, HyperSolver": ("polypdeq-add-256-all-zero", "hyper"),
}
NEOPOLYP_SYSTEMS = {
    "MDEQ, explicit": ("mdeq-neopolyp-256", "explicit"),
    "MDEQ, implicit": ("mdeq-neopolyp-256", "anderson"),
    "SegFormer-B0": ("segformer-b0-neopolyp-256", "explicit"),
    "PolypDEQ-add, implicit": ("polypdeq-add-neopolyp-256", "anderson"),
    "PolypDEQ-res, implicit": ("polypdeq-res-neopolyp-256", "anderson"),
    "HyperPolypDEQ": ("polypdeq-res-neopolyp-256", "hyper"),
    "PolypDEQ-add, HyperSolver": ("polypdeq-add-neopolyp-256", "hyper"),
}
# Of the table about starts: name, solver, folder in results/hypersolver.
STARTS = (
    ("HyperSolver from a guess", "HyperSolver", "short-learned-start"),
    ("HyperSolver from zero", "HyperSolver", "short-zero-start"),
    ("Anderson, from zero", "Anderson", "short-zero-start"),
)
OVERHEAD = ROOT / "benchmarks" / "results" / "cpu-2-cores" / "overhead.csv"
TIMED = ("Anderson", "Broyden")
SOLVERS = {
    "explicit": "explicit, one evaluation",
    "broyden": "implicit, Broyden",
    "anderson": "implicit, Anderson",
    "hyper": "HyperSolver",
}


def _read(path: Path) -> list[dict[str, str]]:
    """The rows of a CSV file."""
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def _scores(run: str) -> dict[tuple[str, str], SummaryRow]:
    """What an evaluation found by protocol default, by data set and solver."""
    rows = read_rows(RESULTS / run / "evaluation" / "summary.csv", SummaryRow)
    return {(row.data, row.solver): row for row in rows if row.protocol == "default"}


def readme() -> str:
    """Accuracy and time of the run, beside the paper."""
    run = RESULTS / RUN
    found = _scores(RUN)
    lines = [
        "| | Kvasir Dice | ClinicDB Dice | seconds an image (Kvasir) | evaluations of f "
        "| residual, median (worst) |",
        "|---|---|---|---|---|---|",
    ]
    for solver, words in SOLVERS.items():
        kvasir, clinic = found["Kvasir", solver], found["CVC-ClinicDB", solver]
        residual = f"{kvasir.residual_median:.0e} ({kvasir.residual_worst:.1e})"
        residual = "" if solver == "explicit" else residual.replace("e-0", "e-")
        lines.append(
            f"| {words} | {100 * kvasir.mDice:.1f} | {100 * clinic.mDice:.1f} "
            f"| {kvasir.seconds_median:.3f} | {kvasir.evaluations_mean:.3g} | {residual} |"
        )
    config = load_run_config(run / "config.yaml")
    last = {row["phase"]: row for row in read_epochs(run / "results.csv")}
    epochs = " + ".join(row["epoch"] for row in last.values())
    before = [load_run_config(RESULTS / name / "config.yaml") for name in BEFORE]
    earlier = [
        f"{each.explicit.epochs} + {each.implicit.epochs} at {each.data.size} px" for each in before
    ]
    text = (
        f"All three phases at {config.data.size} px, {epochs} epochs, after "
        f"{' and '.join(earlier)}:\n\n"
    )
    text += "\n".join(lines)
    closing = ""
    if config.data.train_on != "all":  # else the network has seen the validation images
        dice = {phase: 100 * float(row["val_dice"]) for phase, row in last.items()}
        closing = (
            f"On the validation images the Dice is {dice['explicit']:.1f} explicit, "
            f"{dice['implicit']:.1f} implicit and {dice['hyper']:.1f} with the HyperSolver. "
        )
    paper = dict(zip(SETS, TABLE_2["HyperPolypDEQ"], strict=True))
    published = [paper[data][0] for data in ("Kvasir", "CVC-ClinicDB")]
    own = [100 * found[data, "hyper"].mDice for data in ("Kvasir", "CVC-ClinicDB")]
    change = [f"{a - b:+.1f}".replace("-", "−") for a, b in zip(own, published, strict=True)]
    timed = {row["solver"]: row for row in _read(RESULTS / "hypersolver" / RUN / "timing.csv")}
    passes, faster = (
        [timed[f"HyperSolver, {count} evaluations"][f"{key}, batch 1"] for count in (2, 3)]
        for key in ("times an explicit pass", "faster than Broyden-100")
    )
    closing += (
        f"Two and three evaluations take {float(passes[0]):.1f} and {float(passes[1]):.1f} times "
        f"an explicit pass, and {float(faster[0]):.0f} and {float(faster[1]):.0f} times less than "
        "Broyden-100. "
        f"The paper's HyperPolypDEQ reaches {published[0]} and {published[1]} after 100 + 100 + 8 "
        f"epochs on a GPU; ours differs from it by {change[0]} and {change[1]}."
    )
    return "\n\n".join([text, textwrap.fill(closing, 105), _systems(), _commands()])


def _commands() -> str:
    """What trains the run from the pretrained encoder."""
    lines, start = ["```sh"], "--encoder-weights mit_b0_ade20k.safetensors"
    for number, name in enumerate([*BEFORE, RUN], start=1):
        run = f"runs/{number}"
        config = f"--config results/{name}/config.yaml"
        lines.append(f"polypseg-train {run} --data DATA {start} {config}")
        if name != RUN:
            weights = f"{run}/config.yaml {run}/implicit.safetensors"
            lines.append(f"mkdir runs/from-{number} && cp {weights} runs/from-{number}")
            start = f"--start-from runs/from-{number}"
    return "\n".join([*lines, f"polypseg-evaluate {run} --data DATA", "```"])


def _short(distance: float) -> str:
    """Three decimals, or two digits where those would say little."""
    return f"{distance:.3f}" if distance >= 0.01 else f"{distance:.1e}".replace("e-0", "e-")


def _systems() -> str:
    """Every system that was trained, as ours / the paper's."""
    lines = [
        "Dice of each system as ours / the paper's (NeoPolyp: on 200 images held out of the public "
        "1000, the paper's on 200 of its own; our MDEQ starts from random weights):\n",
        "| | Kvasir | ClinicDB | NeoPolyp neoplastic | non-neoplastic | polyp |",
        "|---" * 6 + "|",
    ]
    for name, system in SYSTEMS.items():
        cells = _cells(system, SETS[:2], ("polyp",), TABLE_2.get(name, ())[:2])
        run = NEOPOLYP_SYSTEMS.get(name)
        cells += _cells(run, (NEOPOLYP,), TARGETS, TABLE_3.get(name, ()))
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _cells(
    system: tuple[str, str] | None,
    sets: Sequence[str],
    targets: Sequence[str],
    published: Sequence[tuple[float, float]],
) -> list[str]:
    own = {}
    if system is not None and (RESULTS / system[0]).exists():
        path = RESULTS / system[0] / "evaluation" / "summary.csv"
        own = {
            (row.data, row.target): f"{100 * row.mDice:.1f}"
            for row in read_rows(path, SummaryRow)
            if row.protocol == "default" and row.solver == system[1]
        }
    columns = [(data, target) for data in sets for target in targets]
    theirs = [f"{dice}" for dice, _ in published] or ["–"] * len(columns)
    return [f"{own.get(c, '–')} / {paper}" for c, paper in zip(columns, theirs, strict=True)]


def hypersolver() -> str:
    """Mean distances to z* on every polyp model in results/hypersolver."""
    counts = {"HyperSolver": (1, 2, 3), "Anderson": (1, 2, 3, 4, 6)}
    head = [f"{solver} {count}" for solver, each in counts.items() for count in each]
    lines = [f"| model | spectral radius | {' | '.join(head)} |", "|---" * (len(head) + 2) + "|"]
    for path in sorted(RESULTS.glob("hypersolver/*/curves.csv")):
        distance = {
            (row["solver"], int(row["evaluations"])): float(row["distance"]) for row in _read(path)
        }
        radius = json.loads(path.with_suffix(".json").read_text())["spectral_radius"]["mean"]
        cells = [_short(distance[s, n]) for s, each in counts.items() for n in each]
        lines.append(f"| `{path.parent.name}` | {radius:.2f} | {' | '.join(cells)} |")
    return "\n".join(lines)


def starts() -> str:
    """What a start is worth after two and three evaluations, on images that nothing has seen."""
    lines = [
        "| solver | evaluations | distance to z*, mean (worst) | Dice lost, mean (worst image) |",
        "|---|---|---|---|",
    ]
    for name, solver, folder in STARTS:
        for row in _read(RESULTS / "hypersolver" / folder / "stopping.csv"):
            count = float(row["evaluations"])
            if row["solver"] == solver and not row["tolerance"] and count in (2, 3):
                distance = f"{float(row['distance to z*']):.3f} ({float(row['worst']):.2f})"
                lost = f"{float(row['Dice points lost']):.2f} ({float(row['worst loss']):.1f})"
                lines.append(f"| {name} | {count:.0f} | {distance} | {lost} |")
    return "\n".join(lines)


def released() -> str:
    """Dice of the released networks on z* and with either HyperSolver, and what it costs."""
    lines = [
        "| network | set | z* | HyperSolver from a guess (evaluations) | from zero (evaluations) |",
        "|---|---|---|---|---|",
    ]
    for network in ("polypdeq-add", "polypdeq-res"):
        guess, zero = _scores(f"{network}-256-all"), _scores(f"{network}-256-all-zero")
        for data in SETS[:2]:
            cells = [f"{100 * zero[data, 'anderson'].mDice:.2f}"]
            cells += [
                f"{100 * row.mDice:.2f} ({row.evaluations_mean:.1f})"
                for row in (guess[data, "hyper"], zero[data, "hyper"])
            ]
            lines.append(f"| {network} | {data} | {' | '.join(cells)} |")
    return "\n".join(lines)


def speed() -> str:
    """What a step costs beyond f, beside torchdeq."""
    head = [f"{method}: {each}" for method in TIMED for each in ("ours", "torchdeq", "ratio")]
    lines = [f"| batch x features | {' | '.join(head)} |", "|---" * (len(head) + 1) + "|"]
    found = {
        (row["method"], int(row["batch"]), int(row["features"])): row for row in _read(OVERHEAD)
    }
    for batch, features in sorted({key[1:] for key in found}, key=math.prod):
        cells = []
        for method in TIMED:
            row = found[method, batch, features]
            cells += [f"{float(row[f'{each} [ms]']):.3g} ms" for each in ("ours", "torchdeq")]
            cells.append(f"{float(row['torchdeq / ours']):.1f}")
        lines.append(f"| {batch} x {features:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


TABLES = {
    "speed": (ROOT / "README.md", speed),
    "results": (ROOT / "README.md", readme),
    "distances": (ROOT / "docs" / "hypersolver.md", hypersolver),
    "starts": (ROOT / "docs" / "hypersolver.md", starts),
    "released": (ROOT / "docs" / "hypersolver.md", released),
}


def filled(page: str, name: str, text: str) -> str:
    """The page with `text` between the marks of `name`.

    Raises:
        ValueError: the page lacks the marks.
    """
    marks = re.compile(rf"(<!-- {name}: [^\n]* -->\n).*?(\n<!-- {name} end -->)", re.DOTALL)
    new, count = marks.subn(lambda found: found[1] + text + found[2], page)
    if count != 1:
        raise ValueError(f"<!-- {name}: ... --> and <!-- {name} end --> must stand there once")
    return new


def main(check: bool) -> int:
    stale = 0
    for name, (path, make) in TABLES.items():
        page = path.read_text(encoding="utf-8")
        new = filled(page, name, make())
        if new != page:
            stale = 1
            print(f"{path.relative_to(ROOT)}: {'stale' if check else 'written'}")
            if not check:
                path.write_text(new, encoding="utf-8")
    return stale if check else 0


if __name__ == "__main__":
    sys.exit(main("--check" in sys.argv[1:]))
