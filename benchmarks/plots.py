"""Results as PNG plots. A method has one colour and a library one marker in all of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D

from benchmarks.methods import OURS, TORCHDEQ
from benchmarks.results import Results, Row
from benchmarks.style import (
    COLOURS,
    LIBRARIES,
    PASSES,
    label_logarithms,
    legend,
    line_style,
    method_legend,
    panels,
)
from benchmarks.timing import Quartiles

# Columns of tables that set both libraries side by side.
LIBRARY_COLUMNS = {OURS: "ours [ms]", TORCHDEQ: "torchdeq [ms]"}


def write(results: Results, folder: Path) -> None:
    """Draw every plot that the results have rows for."""
    drawings: dict[str, tuple[str, Callable[[Results], Figure]]] = {
        "work_precision.png": ("work-precision", work_precision),
        "tolerance_time.png": ("work-precision", tolerance_time),
        "tolerance_evaluations.png": ("work-precision", tolerance_evaluations),
        "overhead.png": ("overhead", overhead),
        "scaling.png": ("scaling", scaling),
        "backward.png": ("backward", backward),
        "hypersolver.png": ("hypersolver", hypersolver),
    }
    for name, (table, draw) in drawings.items():
        if results.table(table):
            figure = draw(results)
            for panel in figure.axes:
                label_logarithms(panel)
            figure.savefig(folder / name, dpi=120)


def work_precision(results: Results) -> Figure:
    """Time against the distance to z* that it bought."""
    return _by_problem(
        results,
        "Work and precision: time for a distance to the fixed point (left and low is better)",
        ("time of a solve [ms]", "time [ms]"),
        ("||z - z*|| / ||z*||, worst in the batch", "distance"),
    )


def tolerance_time(results: Results) -> Figure:
    return _by_problem(
        results,
        "Time to reach a tolerance (low is better; a line ends where a method fails)",
        ("relative residual asked for", "tolerance"),
        ("time of a solve [ms]", "time [ms]"),
    )


def tolerance_evaluations(results: Results) -> Figure:
    return _by_problem(
        results,
        "Evaluations of f to reach a tolerance (low is better; a line ends where a method fails)",
        ("relative residual asked for", "tolerance"),
        ("evaluations of f, mean a sample", "evaluations"),
    )


def _by_problem(
    results: Results, title: str, horizontal: tuple[str, str], vertical: tuple[str, str]
) -> Figure:
    rows = [row for row in results.table("work-precision") if row.values["reached"]]
    problems = list(dict.fromkeys(row.key["problem"] for row in rows))
    figure, axes = panels(len(problems), title)
    for panel, problem in zip(axes, problems, strict=True):
        mine = [row for row in rows if row.key["problem"] == problem]
        first = mine[0].key
        known = "" if "radius" in problem else f", radius {first['radius']:.2f}"
        panel.set_title(f"{problem}\n({first['batch']} x {first['features']}{known})", fontsize=9)
        for (method, library), line in _groups(mine, "method", "library").items():
            x, y = ([_number(row, column) for row in line] for _, column in (horizontal, vertical))
            panel.plot(x, y, **line_style(method, library))
        panel.set(xscale="log", yscale="log", xlabel=horizontal[0], ylabel=vertical[0])
        if horizontal[1] == "tolerance":
            panel.invert_xaxis()
    method_legend(figure, rows, results)
    return figure


def overhead(results: Results) -> Figure:
    """A step beyond f, with quartiles, and the floor that memory sets."""
    rows = results.table("overhead")
    methods = list(dict.fromkeys(row.key["method"] for row in rows))
    figure, axes = panels(
        len(methods), "Time of a step beyond f (low is better; bars are quartiles)"
    )
    for panel, method in zip(axes, methods, strict=True):
        mine = [row for row in rows if row.key["method"] == method]
        for place, row in enumerate(mine):
            for library, column in LIBRARY_COLUMNS.items():
                time = row.values[column]
                if isinstance(time, Quartiles) and time.median > 0:
                    spread = [[time.median - time.q1], [time.q3 - time.median]]
                    style = {**line_style(method, library), "linestyle": "", "markersize": 8}
                    panel.errorbar(place, time.median, yerr=spread, capsize=5, **style)
            floor = _number(row, "least [ms]")
            panel.plot([place - 0.3, place + 0.3], [floor, floor], color="black")
            if _number(row, "ours [ms]") <= 0:
                text = "ours: less than\nthe noise of f"
                panel.annotate(
                    text,
                    (place, floor),
                    (0, -4),
                    textcoords="offset points",
                    ha="center",
                    va="top",
                    fontsize=7,
                    color=COLOURS[method],
                )
        labels = [f"{row.key['batch']} x {row.key['features']:,}" for row in mine]
        panel.set_xticks(range(len(mine)), labels, fontsize=8)
        panel.set(yscale="log", title=method, ylabel="ms a step", xlabel="batch x features")
    handles = [
        Line2D([], [], color="grey", label=library, **{**LIBRARIES[library], "linestyle": ""})
        for library in LIBRARY_COLUMNS
    ]
    handles.append(Line2D([], [], color="black", label="copying the bytes that must move"))
    legend(figure, handles, results)
    return figure


def scaling(results: Results) -> Figure:
    rows = results.table("scaling")
    series = list(dict.fromkeys(row.key["varied"] for row in rows))
    figure, axes = panels(len(series), "Time of a step beyond f (low is better)")
    for panel, varied in zip(axes, series, strict=True):
        mine = [row for row in rows if row.key["varied"] == varied]
        fixed = [name for name in ("batch", "features", "memory") if name != varied]
        for (method,), line in _groups(mine, "method").items():
            for library, column in LIBRARY_COLUMNS.items():
                known = [row for row in line if row.values[column] is not None]
                panel.plot(
                    [row.key[varied] for row in known],
                    [_number(row, column) for row in known],
                    **line_style(method, library),
                )
        same = ", ".join(f"{name} {mine[0].key[name]:,}" for name in fixed)
        panel.set(xscale="log", yscale="log", xlabel=varied, ylabel="ms a step", title=same)
    keys = [
        Row("", {"method": row.key["method"], "library": library}, {})
        for row in rows
        for library in LIBRARY_COLUMNS
    ]
    method_legend(figure, keys, results)
    return figure


def backward(results: Results) -> Figure:
    """Time of the backward pass against the error of the gradient, a point a mode."""
    rows = results.table("backward")
    problems = list(dict.fromkeys(row.key["problem"] for row in rows))
    figure, axes = panels(len(problems), "Backward passes (left and low is better)", 2, 5.6)
    names = list(dict.fromkeys(row.key["backward"] for row in rows))
    for panel, problem in zip(axes, problems, strict=True):
        for row in rows:
            if row.key["problem"] == problem:
                style = dict(LIBRARIES[row.key["library"]], linestyle="")
                x, y = _number(row, "both [ms]"), _number(row, "gradient error")
                panel.plot(x, y, color=PASSES[row.key["backward"]], markersize=8, **style)
        panel.set(
            xscale="log",
            yscale="log",
            title=problem,
            xlabel="forward and backward [ms]",
            ylabel="relative error of the gradient",
        )
    handles = [
        Line2D([], [], linestyle="", marker="o", color=PASSES[name], label=name) for name in names
    ]
    for library in dict.fromkeys(row.key["library"] for row in rows):
        style = dict(LIBRARIES[library], linestyle="")
        handles.append(Line2D([], [], color="grey", label=library, **style))
    legend(figure, handles, results)
    return figure


def hypersolver(results: Results) -> Figure:
    """Distance to z* against evaluations, mean (line) and worst sample (thin line)."""
    rows = results.table("hypersolver")
    problems = list(dict.fromkeys(row.key["problem"] for row in rows))
    axes: Sequence[Axes]
    figure, axes = panels(
        2 * len(problems),
        "Distance to z* (left and low is better): mean thick, worst sample thin",
        columns=2,
    )
    for place, problem in enumerate(problems):
        mine = [row for row in rows if row.key["problem"] == problem]
        for column, panel in (
            ("evaluations", axes[2 * place]),
            ("time [ms]", axes[2 * place + 1]),
        ):
            for (method,), line in _groups(mine, "method").items():
                x = [row.key[column] if column in row.key else _number(row, column) for row in line]
                for distance, width in (("mean distance", 2.0), ("worst distance", 0.6)):
                    style = line_style(method, OURS)
                    style.update(linewidth=width, markersize=4 if width > 1 else 0)
                    panel.plot(x, [_number(row, distance) for row in line], **style)
            label = "evaluations of f" if column == "evaluations" else column
            panel.set(yscale="log", xlabel=label, ylabel="||z - z*|| / ||z*||", title=problem)
    method_legend(figure, rows, results)
    return figure


def _groups(rows: Sequence[Row], *names: str) -> dict[tuple[Any, ...], list[Row]]:
    groups: dict[tuple[Any, ...], list[Row]] = {}
    for row in rows:
        groups.setdefault(tuple(row.key[name] for name in names), []).append(row)
    return groups


def _number(row: Row, column: str) -> float:
    value = row.values[column] if column in row.values else row.key[column]
    return value.median if isinstance(value, Quartiles) else value  # type: ignore[return-value]
