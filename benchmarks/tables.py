"""Results as text: readable tables for the terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from benchmarks import machine
from benchmarks.results import Goal, Results, Row, Scalar, Value
from benchmarks.timing import Quartiles

TITLES = {
    "work-precision": (
        "Evaluations of f a sample / milliseconds a solve, against the relative residual asked for "
        "(-: not reached)"
    ),
    "overhead": "Time of a step beyond f, and how close it is to copying the bytes it must move",
    "scaling": "Time of a step beyond f against batch, state size and memory",
    "uneven": "A batch whose samples need very different numbers of steps",
    "backward": "Backward passes after a forward solve to 1e-5: time, memory, error of gradient",
    "memory": "Peak memory",
    "hypersolver": "Mean relative distance to z* / milliseconds, after so many evaluations of f",
    "equal-distance": (
        "Evaluations that classic solvers need to come as close as the HyperSolver, and their time "
        "over its"
    ),
    "polypdeq": "Prediction with a trained PolypDEQ: time of a batch, from image to logits",
}

# Tables with a column for every value of one key, and what their cells show.
PIVOTS = {
    "work-precision": ("tolerance", "evaluations", "time [ms]"),
    "hypersolver": ("evaluations", "mean distance", "time [ms]"),
}


def report(results: Results) -> list[tuple[str, list[str]]]:
    """(title, lines) of everything: the machine with all tables, then the goals."""
    body = machine.lines(results.header)
    for title, lines in render(results):
        body += ["", title, *("  " + line for line in lines)]
    sections = [("benchmarks", body)]
    if results.goals:
        sections.append(("goals", render_goals(results.goals)))
    return sections


def as_text(results: Results) -> str:
    """The same as one text."""
    lines = [line for title, body in report(results) for line in (f"== {title}", *body, "")]
    return "\n".join(lines)


def render(results: Results) -> list[tuple[str, list[str]]]:
    """(title, lines) of every table."""
    sections = []
    for name in results.tables:
        rows = results.table(name)
        grid = _pivot(rows, *PIVOTS[name]) if name in PIVOTS else _grid(rows)
        sections.append((TITLES.get(name, name), align(grid)))
    return sections


def render_goals(goals: Sequence[Goal]) -> list[str]:
    grid = [["goal", "wanted", "measured", "ratio", ""]]
    for goal in goals:
        note = f" ({goal.note})" if goal.note else ""
        grid.append(
            [
                goal.what,
                f"{goal.sign} {number(goal.wanted)}",
                number(goal.measured),
                number(goal.ratio),
                goal.verdict + note,
            ]
        )
    return align(grid)


def align(grid: Sequence[Sequence[str]]) -> list[str]:
    """Lines whose columns line up: text to the left, numbers to the right."""
    widths = [max(len(row[column]) for row in grid) for column in range(len(grid[0]))]
    numeric = [
        any(row[column][:1].isdigit() for row in grid[1:])
        and all(row[column][:1] in "0123456789-i<>= " for row in grid[1:] if row[column])
        for column in range(len(grid[0]))
    ]
    lines = []
    for row in grid:
        cells = [
            cell.rjust(width) if right else cell.ljust(width)
            for cell, width, right in zip(row, widths, numeric, strict=True)
        ]
        lines.append("  ".join(cells).rstrip())
    return lines


def number(value: Value) -> str:
    """Three significant digits; a median with its quartiles."""
    if value is None:
        return "-"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, Quartiles):
        return f"{number(value.median)} ({number(value.q1)}..{number(value.q3)})"
    if isinstance(value, str):
        return value
    if isinstance(value, int):
        return str(value)
    if not math.isfinite(value):
        return "inf" if value > 0 else "-"
    size = abs(value)
    if size and (size < 1e-3 or size >= 1e6):
        return f"{value:.1e}"
    digits = 0 if size >= 100 else 1 if size >= 10 else 2 if size >= 1 else 3
    return f"{value:.{digits}f}"


def _grid(rows: Sequence[Row]) -> list[list[str]]:
    keys = list(dict.fromkeys(name for row in rows for name in row.key))
    names = list(dict.fromkeys(name for row in rows for name in row.values))
    grid = [[*keys, *names]]
    for row in rows:
        cells = [number(row.key[key]) if key in row.key else "" for key in keys]
        cells += [number(row.values[name]) if name in row.values else "" for name in names]
        grid.append(cells)
    return grid


def _pivot(rows: Sequence[Row], across: str, *shown: str) -> list[list[str]]:
    """A column for every value of the key ``across``, whose cells show ``shown``."""
    columns = sorted({row.key[across] for row in rows}, reverse=across == "tolerance")
    lines: dict[tuple[str, ...], dict[Scalar, str]] = {}
    for row in rows:
        head = tuple(number(value) for key, value in row.key.items() if key != across)
        cell = "-"
        if row.values.get("reached", True):
            values = (row.values[name] for name in shown)
            cell = " / ".join(number(v.median if isinstance(v, Quartiles) else v) for v in values)
        lines.setdefault(head, {})[row.key[across]] = cell
    heads = [key for key in rows[0].key if key != across]
    grid = [[*heads, *(f"{value:g}" for value in columns)]]
    for head, cells in lines.items():
        grid.append([*head, *(cells.get(value, "") for value in columns)])
    return grid
