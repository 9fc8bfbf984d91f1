"""Colours, markers, panels and legends that all plots of the benchmarks share."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import LogLocator, NullFormatter

from benchmarks import machine
from benchmarks.methods import OURS, SCIPY, TORCHDEQ
from benchmarks.results import Results, Row

# Okabe & Ito's colours, which the colour-blind can tell apart.
COLOURS = {
    "Picard": "#009E73",
    "Anderson": "#0072B2",
    "Anderson, type I": "#999933",
    "Broyden": "#E69F00",
    "HyperSolver": "#D55E00",
    "HyperSolver, then Anderson": "#882255",
    "HyperSolver, preconditioned": "#000000",
    "Anderson with our initializer": "#56B4E9",
    "Newton-Krylov": "#CC79A7",
}
# Of backward passes, in hues that no solver has, but for Broyden's.
PASSES = {
    "implicit, tol 1e-2": "#C9B3E6",
    "implicit, tol 1e-4": "#8C5FC7",
    "implicit, tol 1e-6": "#4A1F87",
    "implicit by Broyden, tol 1e-4": COLOURS["Broyden"],
    "phantom, 5 steps": "#8B5A2B",
    "Jacobian-free": "#E15759",
    "SHINE": "#BCBD22",
    "unrolled": "#000000",
}
LIBRARIES: dict[str, dict[str, Any]] = {
    OURS: {"linestyle": "-", "marker": "o"},
    TORCHDEQ: {"linestyle": "--", "marker": "s", "markerfacecolor": "white"},
    SCIPY: {"linestyle": ":", "marker": "^", "markerfacecolor": "white"},
}


def panels(
    count: int, title: str, columns: int = 3, width: float = 4.2
) -> tuple[Figure, list[Axes]]:
    """A figure with ``count`` panels, at most ``columns`` beside each other."""
    columns = min(count, columns)
    lines = -(-count // columns)
    figure = Figure(figsize=(max(width * columns, 9), 3.5 * lines + 1.6), layout="constrained")
    grid = figure.subplots(lines, columns, squeeze=False)
    axes = list(grid.flat)
    for panel in axes[count:]:
        panel.remove()
    for panel in axes[:count]:
        panel.grid(alpha=0.3, which="major")
        panel.spines[["top", "right"]].set_visible(False)
        panel.title.set_fontsize(9)
    figure.suptitle(title, fontsize=12, fontweight="bold")
    return figure, axes[:count]


def label_logarithms(panel: Axes) -> None:
    """Plain numbers; within few decades at 1, 2 and 5 too."""
    for axis in (panel.xaxis, panel.yaxis):
        if axis.get_scale() != "log":
            continue
        low, high = sorted(axis.get_view_interval())
        few = math.log10(high / low) < 2
        axis.set_major_locator(LogLocator(subs=(1, 2, 5) if few else (1,)))
        axis.set_minor_formatter(NullFormatter())
        axis.set_major_formatter(lambda value, _: f"{value:g}")


def line_style(method: str, library: str) -> dict[str, Any]:
    """How a solver of a library is drawn everywhere."""
    return {"color": COLOURS[method], "markersize": 4, "linewidth": 1.4, **LIBRARIES[library]}


def method_legend(figure: Figure, rows: Sequence[Row], results: Results) -> None:
    """A legend of the solvers in the rows; those without a library are all ours."""
    pairs = dict.fromkeys((row.key["method"], row.key.get("library")) for row in rows)
    handles = [
        Line2D(
            [],
            [],
            label=f"{method}, {library}" if library else method,
            **line_style(method, library or OURS),
        )
        for method, library in pairs
    ]
    legend(figure, handles, results)


def legend(figure: Figure, handles: list[Line2D], results: Results) -> None:
    """Below the panels, with the machine and versions as its title."""
    _, when, where, what = machine.lines(results.header)
    drawn = figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=min(len(handles), 4),
        title=f"{where}\n{what}; {when}",
        fontsize=8,
        title_fontsize=7,
        frameon=False,
    )
    drawn.get_title().set_multialignment("center")
