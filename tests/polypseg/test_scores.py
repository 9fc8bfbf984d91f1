"""Rows of an evaluation, their summary and the tables made of them."""

import csv
import io
import math
import statistics
from dataclasses import replace

import numpy as np
import pytest

from polypseg.scores import (
    TABLE_HEADER,
    ImageRow,
    SummaryRow,
    by_kind,
    read_rows,
    summarise,
    table_cells,
    text_table,
    to_csv,
)


def row(dice: float, residual: float, seconds: float, steps: int = 3) -> ImageRow:
    solve = (steps, steps + 1, residual, "CONVERGED", seconds)
    return ImageRow(
        f"image, {dice}", "default", "polyp", 1, 2, 3, 4, dice, dice / 2, 0.02, 10 * dice, *solve
    )


ROWS = [
    row(0.5, 1e-3, 0.4),
    row(1.0, 2e-3, 0.1, steps=8),
    row(0.0, 1e-5, 0.2),
    row(0.9, 9e-4, 0.3),
]


def test_a_summary_holds_the_statistics_of_its_rows():
    summary = summarise("Kvasir", "anderson", ROWS)
    seconds = [0.4, 0.1, 0.2, 0.3]
    quartiles = statistics.quantiles(seconds, n=4, method="inclusive")
    assert summary.mDice == pytest.approx(2.4 / 4)
    assert summary.hd95_mean == pytest.approx(6)
    assert math.isnan(summary.mDice_low)  # of four images there is no interval
    more = summarise("Kvasir", "anderson", 3 * ROWS)
    assert more.mDice_low < more.mDice < more.mDice_high
    assert table_cells(summary)[5] == "60.00 [–]"
    assert (
        table_cells(more)[5] == f"60.00 [{100 * more.mDice_low:.1f}, {100 * more.mDice_high:.1f}]"
    )
    assert summary.mIoU == pytest.approx(1.2 / 4)
    assert [summary.seconds_q1, summary.seconds_median, summary.seconds_q3] == pytest.approx(
        quartiles
    )
    assert (summary.images, summary.steps_mean, summary.steps_max) == (4, 17 / 4, 8)
    assert summary.evaluations_mean == 21 / 4
    assert summary.residual_median == pytest.approx((9e-4 + 1e-3) / 2)
    assert summary.residual_worst == 2e-3
    assert summary.converged_share == 3 / 4  # 1e-3 itself counts


def test_residuals_that_were_not_measured_stay_unknown_and_infinite_ones_count():
    unknown = summarise("Kvasir", "explicit", [row(0.5, math.nan, 0.1)])
    assert math.isnan(unknown.residual_median)
    assert math.isnan(unknown.residual_worst)
    assert math.isnan(unknown.converged_share)
    assert table_cells(unknown)[-2:] == ("–", "–")
    broken = summarise("Kvasir", "picard", [row(0.5, math.inf, 0.1), row(0.5, 1e-4, 0.1)])
    assert broken.residual_worst == math.inf
    assert broken.converged_share == 0.5


def test_precision_recall_and_false_positives_come_from_the_pixels():
    # Precision and recall: 3/4 and 3/5; nothing to mark: 1 and 1, marked all the same: 0 and 0;
    # missed altogether: 0 and 0.
    counts = [(3, 1, 2, 9), (0, 0, 0, 15), (0, 2, 0, 13), (0, 0, 4, 11)]
    rows = [
        replace(ROWS[0], tp=tp, fp=fp, fn=fn, tn=tn, mae=mae)
        for (tp, fp, fn, tn), mae in zip(counts, (0.1, 0.2, 0.3, 0.6), strict=True)
    ]
    summary = summarise("Kvasir", "anderson", rows)
    assert summary.precision == pytest.approx((0.75 + 1) / 4)
    assert summary.recall == pytest.approx((0.6 + 1) / 4)
    assert summary.mae == pytest.approx(0.3)
    assert (summary.negatives, summary.false_positives) == (2, 1)
    cells = dict(zip(TABLE_HEADER, table_cells(summary), strict=True))
    assert [cells[name] for name in ("precision", "recall", "MAE", "false positives")] == [
        "43.75", "40.00", "0.3000", "1 of 2",
    ]  # fmt: skip
    # Where every image shows a polyp, the terminal needs no column for it.
    assert "false positives" in text_table([summary])
    assert "false positives" not in text_table([summarise("Kvasir", "anderson", ROWS)])


def test_files_of_older_versions_are_read_without_the_scores_they_lack(tmp_path):
    summary = summarise("Kvasir", "anderson", ROWS)
    later = ("precision", "recall", "mae", "negatives", "false_positives")
    path = tmp_path / "summary.csv"
    lines = list(csv.reader(io.StringIO(to_csv([summary], SummaryRow).decode())))
    kept = [index for index, name in enumerate(lines[0]) if name not in later]
    path.write_text("\n".join(",".join(line[index] for index in kept) for line in lines))
    (row,) = read_rows(path, SummaryRow)
    np.testing.assert_equal(vars(row), vars(replace(summary, **dict.fromkeys(later, math.nan))))
    cells = dict(zip(TABLE_HEADER, table_cells(row), strict=True))
    assert {cells[name] for name in ("precision", "recall", "MAE", "false positives")} == {"–"}


def test_no_rows_have_no_summary():
    with pytest.raises(ValueError, match="at least one image"):
        summarise("Kvasir", "anderson", [])


def test_csv_cells_are_the_fields_and_nan_is_empty():
    text = to_csv([ROWS[0], row(0.25, math.nan, 0.5)], ImageRow).decode()
    first, second = csv.DictReader(io.StringIO(text))
    assert list(first) == [
        "stem", "protocol", "target", "tp", "fp", "fn", "tn", "dice", "iou", "mae", "hd95",
        "steps", "evaluations", "residual", "status", "seconds",
    ]  # fmt: skip
    assert first["stem"] == "image, 0.5"
    assert float(first["residual"]) == 1e-3
    assert second["residual"] == ""


def test_a_summary_is_read_back_as_it_was_written(tmp_path):
    rows = [
        summarise("Kvasir", "anderson", ROWS),
        summarise("a, b", "explicit", [row(0.1, math.nan, 0.1)]),
        summarise("Kvasir", "picard", [row(0.1, math.inf, 0.1)]),
    ]
    path = tmp_path / "summary.csv"
    path.write_bytes(to_csv(rows, SummaryRow))
    np.testing.assert_equal([vars(r) for r in read_rows(path, SummaryRow)], [vars(r) for r in rows])

    path.write_text("data,solver\nKvasir,anderson\n")
    with pytest.raises(ValueError, match=r"summary\.csv: not written by this version"):
        read_rows(path, SummaryRow)


def test_the_table_is_aligned():
    lines = text_table(
        [summarise("Kvasir", "anderson", ROWS), summarise("CVC-ClinicDB", "hyper", ROWS)]
    ).splitlines()
    assert len({len(line) for line in lines}) == 1
    for line in lines[1:]:
        assert line.index("60.00 [") == lines[1].index("60.00 [")
    assert "0.250 [0.175, 0.325]" in lines[1]
    assert lines[0].split()[:3] == ["data", "solver", "images"]  # one protocol, one target
    both = [ROWS[0], replace(ROWS[0], protocol="pranet")]
    table = text_table([summarise("Kvasir", "anderson", [one]) for one in both])
    assert table.splitlines()[0].split()[:4] == ["data", "solver", "protocol", "images"]
    assert TABLE_HEADER[2:4] == ("protocol", "target")


def test_protocols_are_not_averaged_together():
    mixed = [ROWS[0], replace(ROWS[0], protocol="pranet")]
    with pytest.raises(ValueError, match="mix protocols"):
        summarise("Kvasir", "anderson", mixed)
    assert [len(rows) for rows in by_kind([*mixed, *ROWS]).values()] == [5, 1]
