"""What an evaluation records for every image, and how it is summed up and printed."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

import numpy as np

from polypseg.validation import CONVERGED


@dataclass(frozen=True)
class ImageRow:
    """One image under one solver: pixel counts at the mask's own resolution, and the solve.

    See `polypseg.metrics.Confusion` for the counts and `polypseg.predictor.Result` for the rest.
    """

    stem: str
    tp: int
    fp: int
    fn: int
    tn: int
    dice: float
    iou: float
    steps: int
    evaluations: int
    residual: float
    status: str
    seconds: float


@dataclass(frozen=True)
class SummaryRow:
    """All images of one test folder under one solver.

    Attributes:
        mDice, mIoU: means over images of each image's score, 0 to 1.
        seconds_q1, seconds_median, seconds_q3: quartiles of the seconds per image.
        converged_share: of images with a residual of at most 1e-3. The residuals, and this share,
            are NaN for explicit passes, which measure none.
    """

    data: str
    solver: str
    images: int
    mDice: float
    mIoU: float
    seconds_median: float
    seconds_q1: float
    seconds_q3: float
    steps_mean: float
    steps_max: int
    evaluations_mean: float
    residual_median: float
    residual_worst: float
    converged_share: float


def summarise(data: str, solver: str, rows: Sequence[ImageRow]) -> SummaryRow:
    """Sum up the rows of one folder and solver; there must be at least one."""
    if not rows:
        raise ValueError("rows is empty; a summary needs at least one image")
    q1, median, q3 = np.percentile([row.seconds for row in rows], [25, 50, 75]).tolist()
    residuals = np.array([row.residual for row in rows])
    measured = not np.isnan(residuals).any()
    return SummaryRow(
        data=data,
        solver=solver,
        images=len(rows),
        mDice=float(np.mean([row.dice for row in rows])),
        mIoU=float(np.mean([row.iou for row in rows])),
        seconds_median=median,
        seconds_q1=q1,
        seconds_q3=q3,
        steps_mean=float(np.mean([row.steps for row in rows])),
        steps_max=max(row.steps for row in rows),
        evaluations_mean=float(np.mean([row.evaluations for row in rows])),
        residual_median=float(np.median(residuals)),
        residual_worst=float(residuals.max()),
        converged_share=float(np.mean(residuals <= CONVERGED)) if measured else np.nan,
    )


def to_csv(rows: Sequence[Any], kind: type) -> bytes:
    """Write dataclass rows of one kind as a CSV file: its fields are the columns, NaN is empty."""
    text = io.StringIO()
    writer = csv.DictWriter(text, [field.name for field in fields(kind)], lineterminator="\n")
    writer.writeheader()
    for row in rows:
        cells = asdict(row).items()
        writer.writerow({name: "" if value != value else value for name, value in cells})
    return text.getvalue().encode()


TABLE_HEADER = (
    "data", "solver", "images", "mDice", "mIoU", "s/image [quartiles]",
    "steps (max)", "evaluations", "residual (worst)", "≤ 1e-3",
)  # fmt: skip


def table_cells(row: SummaryRow) -> tuple[str, ...]:
    """A summary row as the cells under `TABLE_HEADER`."""
    measured = row.residual_median == row.residual_median
    return (
        row.data,
        row.solver,
        str(row.images),
        f"{100 * row.mDice:.2f} %",
        f"{100 * row.mIoU:.2f} %",
        f"{row.seconds_median:.3f} [{row.seconds_q1:.3f}, {row.seconds_q3:.3f}]",
        f"{row.steps_mean:.1f} ({row.steps_max})",
        f"{row.evaluations_mean:.1f}",
        f"{row.residual_median:.1e} ({row.residual_worst:.1e})" if measured else "–",
        f"{100 * row.converged_share:.0f} %" if measured else "–",
    )


def text_table(rows: Sequence[SummaryRow]) -> str:
    """The summary as an aligned table for a terminal."""
    table = [TABLE_HEADER, *map(table_cells, rows)]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    # Names to the left, numbers to the right.
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < 2 else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in table
    )


def read_summary(path: Path) -> list[SummaryRow]:
    """Read a `summary.csv` back.

    Raises:
        ValueError: the file has other columns or values than this version writes.
        OSError: the file cannot be read.
    """
    kinds = get_type_hints(SummaryRow)
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [
                SummaryRow(**{name: kinds[name](cell or "nan") for name, cell in line.items()})
                for line in csv.DictReader(file)
            ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not a summary of this version of polypseg-evaluate; evaluate the run again"
        ) from error
