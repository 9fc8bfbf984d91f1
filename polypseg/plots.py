"""The plots of a run's report, as PNG files."""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from polypseg.scores import SummaryRow

DPI = 110


def residual_plot(traces: Mapping[str, Sequence[np.ndarray]]) -> bytes:
    """Relative residuals against evaluations of f: a thin line an image, a thick one the median.

    Args:
        traces: residuals (evaluations,) of images, by solver.
    """
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for index, (solver, curves) in enumerate(traces.items()):
        evaluations = np.arange(1, len(curves[0]) + 1)
        for residuals in curves:
            axis.plot(evaluations, residuals, color=f"C{index}", alpha=0.25, linewidth=0.8)
        middle = np.median(np.stack(list(curves)), axis=0)
        axis.plot(evaluations, middle, color=f"C{index}", linewidth=2, label=solver)
    axis.set(xlabel="evaluations of f", ylabel="relative residual", yscale="log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend()
    return _png(figure)


def accuracy_against_time(rows: Sequence[SummaryRow]) -> bytes:
    """mDice, with its 95 % interval, against seconds an image, a panel a test set.

    Args:
        rows: of one protocol and target.
    """
    sets = list(dict.fromkeys(row.data for row in rows))
    solvers = list(dict.fromkeys(row.solver for row in rows))
    figure = Figure(figsize=(1 + 3.6 * len(sets), 3.6), layout="constrained")
    panels = figure.subplots(1, len(sets), squeeze=False)[0]
    for axis, name in zip(panels, sets, strict=True):
        for row in (row for row in rows if row.data == name):
            errors = [[row.mDice - row.mDice_low], [row.mDice_high - row.mDice]]
            axis.errorbar(
                row.seconds_median,
                100 * row.mDice,
                yerr=100 * np.array(errors),
                fmt="o",
                capsize=3,
                color=f"C{solvers.index(row.solver)}",
                label=row.solver,
            )
        axis.set(title=name, xlabel="seconds an image (median)", ylabel="mDice, %")
        axis.set_xlim(left=0)
        axis.grid(alpha=0.3)
    panels[0].legend(fontsize="small")
    return _png(figure)


def _png(figure: Figure) -> bytes:
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=DPI)
    return picture.getvalue()
