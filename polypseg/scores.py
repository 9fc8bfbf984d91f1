"""What an evaluation records for every image, and how it is summed up and printed."""

from __future__ import annotations

import csv
import io
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, TypeVar, get_type_hints

import numpy as np

from polypseg.metrics import Confusion
from polypseg.statistics import mean_interval
from polypseg.validation import CONVERGED


@dataclass(frozen=True)
class ImageRow:
    """One target of one image under one solver and protocol, and the solve.

    See `polypseg.protocols.Scored` for the scores and `polypseg.result.Result` for the rest.
    """

    stem: str
    protocol: str
    target: str
    tp: int
    fp: int
    fn: int
    tn: int
    dice: float
    iou: float
    mae: float
    hd95: float
    steps: int
    evaluations: int
    residual: float
    status: str
    seconds: float


@dataclass(frozen=True)
class SummaryRow:
    """One target of all images of one test folder under one solver and protocol.

    Attributes:
        mDice, mIoU: means over images of each image's score, 0 to 1.
        mDice_low, mDice_high, mIoU_low, mIoU_high: their 95 % confidence intervals over images;
            NaN where there are fewer than 10.
        precision, recall, mae: means over images of each image's, 0 to 1.
        negatives: images that show nothing of the target.
        false_positives: of these, those on which some is marked all the same.
        hd95_mean: mean of the 95 % Hausdorff distances, in pixels.
        seconds_q1, seconds_median, seconds_q3: quartiles of the seconds per image.
        converged_share: of images with a residual of at most 1e-3. The residuals, and this share,
            are NaN for explicit passes, which measure none.

    What the files of older versions lack is NaN.
    """

    data: str
    solver: str
    protocol: str
    target: str
    images: int
    mDice: float
    mDice_low: float
    mDice_high: float
    mIoU: float
    mIoU_low: float
    mIoU_high: float
    precision: float
    recall: float
    mae: float
    negatives: float
    false_positives: float
    hd95_mean: float
    seconds_median: float
    seconds_q1: float
    seconds_q3: float
    steps_mean: float
    steps_max: int
    evaluations_mean: float
    residual_median: float
    residual_worst: float
    converged_share: float


def by_kind(rows: Sequence[ImageRow]) -> dict[tuple[str, str], list[ImageRow]]:
    """Rows by (protocol, target), in the order in which these first occur."""
    kinds: dict[tuple[str, str], list[ImageRow]] = {}
    for row in rows:
        kinds.setdefault((row.protocol, row.target), []).append(row)
    return kinds


def summarise(data: str, solver: str, rows: Sequence[ImageRow]) -> SummaryRow:
    """Sum up rows of one folder, solver, protocol and target; there must be at least one."""
    if not rows:
        raise ValueError("rows is empty; a summary needs at least one image")
    kinds = {(row.protocol, row.target) for row in rows}
    if len(kinds) > 1:
        raise ValueError(f"rows mix protocols or targets: {sorted(kinds)}; sum up each by itself")
    dice, iou = [row.dice for row in rows], [row.iou for row in rows]
    dice_interval, iou_interval = mean_interval(dice), mean_interval(iou)
    q1, median, q3 = np.percentile([row.seconds for row in rows], [25, 50, 75]).tolist()
    residuals = np.array([row.residual for row in rows])
    measured = not np.isnan(residuals).any()
    counts = [Confusion(row.tp, row.fp, row.fn, row.tn) for row in rows]
    negatives = [count for count in counts if count.tp + count.fn == 0]
    return SummaryRow(
        data=data,
        solver=solver,
        protocol=rows[0].protocol,
        target=rows[0].target,
        images=len(rows),
        mDice=float(np.mean(dice)),
        mDice_low=dice_interval[0],
        mDice_high=dice_interval[1],
        mIoU=float(np.mean(iou)),
        mIoU_low=iou_interval[0],
        mIoU_high=iou_interval[1],
        precision=float(np.mean([count.precision for count in counts])),
        recall=float(np.mean([count.recall for count in counts])),
        mae=float(np.mean([row.mae for row in rows])),
        negatives=len(negatives),
        false_positives=sum(count.fp > 0 for count in negatives),
        hd95_mean=float(np.mean([row.hd95 for row in rows])),
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


def json_values(value: Any) -> Any:
    """What JSON can hold: it knows neither NaN nor infinity."""
    if isinstance(value, dict):
        return {key: json_values(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [json_values(entry) for entry in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


TABLE_HEADER = (
    "data", "solver", "protocol", "target", "images", "mDice [95 %]", "mIoU [95 %]", "precision",
    "recall", "MAE", "false positives", "HD95",
    "s/image [quartiles]", "steps (max)", "evaluations", "residual (worst)", "≤ 1e-3",
)  # fmt: skip
NONE = "–"  # where there is no figure
NAMES = 4  # columns of names before those of numbers


def table_cells(row: SummaryRow) -> tuple[str, ...]:
    """A summary row as the cells under `TABLE_HEADER`."""
    measured = row.residual_median == row.residual_median
    return (
        row.data,
        row.solver,
        row.protocol,
        row.target,
        str(row.images),
        per_cent(row.mDice, row.mDice_low, row.mDice_high),
        per_cent(row.mIoU, row.mIoU_low, row.mIoU_high),
        _known(row.precision, f"{100 * row.precision:.2f}"),
        _known(row.recall, f"{100 * row.recall:.2f}"),
        _known(row.mae, f"{row.mae:.4f}"),
        f"{row.false_positives:.0f} of {row.negatives:.0f}" if row.negatives > 0 else NONE,
        f"{row.hd95_mean:.1f} px",
        f"{row.seconds_median:.3f} [{row.seconds_q1:.3f}, {row.seconds_q3:.3f}]",
        f"{row.steps_mean:.1f} ({row.steps_max})",
        f"{row.evaluations_mean:.1f}",
        f"{row.residual_median:.1e} ({row.residual_worst:.1e})" if measured else NONE,
        f"{100 * row.converged_share:.0f} %" if measured else NONE,
    )


def _known(value: float, text: str) -> str:
    return NONE if math.isnan(value) else text


def per_cent(mean: float, low: float, high: float) -> str:
    """A mean of scores from 0 to 1 with its interval, where it has one."""
    interval = NONE if math.isnan(low) else f"{100 * low:.1f}, {100 * high:.1f}"
    return f"{100 * mean:.2f} [{interval}]"


def text_table(rows: Sequence[SummaryRow]) -> str:
    """The summary as an aligned table for a terminal.

    Protocol and target are left out where all rows have the same, false positives where every
    image shows the target.
    """
    table = [TABLE_HEADER, *map(table_cells, rows)]
    place = TABLE_HEADER.index("false positives")
    if all(cells[place] == NONE for cells in table[1:]):
        table = [cells[:place] + cells[place + 1 :] for cells in table]
    return text_columns(table, NAMES, ("protocol", "target"))


def text_columns(
    table: Sequence[tuple[str, ...]], names: int, optional: tuple[str, ...] = ()
) -> str:
    """Align a table, header first, for a terminal.

    Args:
        table: rows of equally many cells.
        names: how many of the first columns hold names, set to the left; numbers go to the right.
        optional: titles of such columns that are left out where all rows have the same.
    """
    columns = list(zip(*table, strict=True))
    shown = [column for column in columns if column[0] not in optional or len(set(column[1:])) > 1]
    names -= len(columns) - len(shown)
    widths = [max(map(len, column)) for column in shown]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if index < names else cell.rjust(width)
            for index, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in zip(*shown, strict=True)
    )


Row = TypeVar("Row", ImageRow, SummaryRow)
# Columns that files of older versions lack.
_LATER = ("precision", "recall", "mae", "negatives", "false_positives")


def read_rows(path: Path, kind: type[Row]) -> list[Row]:
    """Read a file of `to_csv` back: `summary.csv`, or one of a folder and solver.

    Scores that an older version did not measure are NaN.

    Raises:
        ValueError: the file has other columns or values than this version writes.
        OSError: the file cannot be read.
    """
    kinds = get_type_hints(kind)
    unknown = {name: math.nan for name in _LATER if name in kinds}
    try:
        with open(path, newline="", encoding="utf-8") as file:
            return [
                kind(**unknown | {name: kinds[name](cell or "nan") for name, cell in line.items()})
                for line in csv.DictReader(file)
            ]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"{path}: not written by this version of polypseg-evaluate; evaluate the run again"
        ) from error
