"""Results on disk and as text, and what two of them say together."""

from __future__ import annotations

import csv
import json
import math
from pathlib import Path

import pytest
import torch

from benchmarks import plots
from benchmarks.compare import compare, main
from benchmarks.machine import header, lines
from benchmarks.results import Goal, Results, Value
from benchmarks.settings import parse_sizes
from benchmarks.tables import align, as_text, number, render, render_goals
from benchmarks.timing import Quartiles


def around(median: float) -> Quartiles:
    return Quartiles(median, 0.98 * median, 1.02 * median, 5)


def results(ours: float, peer: float = 10.0, evaluations: float = 12.0) -> Results:
    """One solve by us and by a peer."""
    found = Results(header("pytest benchmarks", torch.device("cpu"), torch.float32))
    for library, time in (("deqsolvers", ours), ("torchdeq", peer)):
        found.add(
            "work-precision",
            {
                "problem": "MLP",
                "radius": 0.9,
                "batch": 8,
                "features": 256,
                "method": "Anderson",
                "library": library,
                "tolerance": 1e-3,
            },
            {
                "evaluations": evaluations,
                "time [ms]": around(time),
                "distance": 1e-3,
                "reached": True,
            },
        )
    return found


def test_what_is_written_is_read_again(tmp_path: Path) -> None:
    found = results(4.0)
    found.add("other", {"batch": 1}, {"ratio": math.inf, "note": "none", "peak [MB]": None})
    found.goal("speed", 3.0, ">=", 2.0)
    found.write(tmp_path)
    again = Results.read(tmp_path / "results.json")
    assert again.header == found.header
    assert again.rows[:2] == found.rows[:2]
    assert again.rows[2].values == {"ratio": None, "note": "none", "peak [MB]": None}
    assert again.goals == found.goals
    with open(tmp_path / "work-precision.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert [row["library"] for row in rows] == ["deqsolvers", "torchdeq"]
    assert float(rows[0]["time [ms] q3"]) == pytest.approx(4.08)


def test_the_header_tells_no_host_and_no_path() -> None:
    import platform

    found = json.dumps(results(1.0).header)
    assert platform.node() not in found
    assert str(Path.cwd()) not in found
    assert len(lines(results(1.0).header)) == 4


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ("{", "not a results.json"),
        ('{"rows": [1]}', "not a results.json"),
    ],
)
def test_an_unfit_file_is_named(tmp_path: Path, content: str | None, message: str) -> None:
    path = tmp_path / "some.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(ValueError, match=rf"some\.json: {message}"):
        Results.read(path)


@pytest.mark.parametrize(
    ("goal", "ratio", "verdict"),
    [
        (Goal("a", 3.0, ">=", 2.0), 1.5, "met"),
        (Goal("a", 1.0, ">=", 2.0), 0.5, "MISSED"),
        (Goal("a", 1.0, "<=", 2.0), 2.0, "met"),
        (Goal("a", 4.0, "<=", 2.0), 0.5, "MISSED"),
        (Goal("a", 2.0, "<=", 2.0), 1.0, "met"),
        (Goal("a", math.nan, ">=", 2.0), None, "MISSED"),
        (Goal("a", None, ">=", 2.0, "no run"), None, "not measured"),
    ],
)
def test_goals(goal: Goal, ratio: float | None, verdict: str) -> None:
    assert goal.verdict == verdict
    if ratio is not None:
        assert goal.ratio == ratio
    shown = render_goals([goal])[1]
    assert shown.endswith(f"{verdict} (no run)" if goal.note else verdict)


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "-"),
        (True, "yes"),
        (7, "7"),
        (0.0, "0.000"),
        (0.0123, "0.012"),
        (1.234, "1.23"),
        (56.78, "56.8"),
        (1234.5, "1234"),
        (1.5e-7, "1.5e-07"),
        (math.inf, "inf"),
        (math.nan, "-"),
        (Quartiles(2.0, 1.0, 3.0, 5), "2.00 (1.00..3.00)"),
    ],
)
def test_numbers_are_short(value: Value, text: str) -> None:
    assert number(value) == text


def test_columns_line_up() -> None:
    assert align([["name", "ms"], ["Anderson", "1.00"], ["x", "10.0"]]) == [
        "name        ms",
        "Anderson  1.00",
        "x         10.0",
    ]


def test_a_tolerance_that_was_missed_shows_as_a_dash() -> None:
    found = results(4.0)
    found.add(
        "work-precision",
        {**found.rows[0].key, "tolerance": 1e-6},
        {**found.rows[0].values, "reached": False},
    )
    ((_, table),) = render(found)
    assert table[0].split()[-2:] == ["0.001", "1e-06"]
    assert table[1].split()[-4:] == ["12.0", "/", "4.00", "-"]


def test_the_text_holds_machine_tables_and_goals() -> None:
    found = results(4.0)
    found.goal("speed", 3.0, ">=", 2)
    text = as_text(found).splitlines()
    assert text[0] == "== benchmarks"
    assert text[1] == "pytest benchmarks"
    assert any(line.startswith("  MLP") for line in text)
    assert text[-1].split() == ["speed", ">=", "2", "3.00", "1.50", "met"]


def test_plots_are_drawn(tmp_path: Path) -> None:
    plots.write(results(4.0), tmp_path)
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"work_precision.png", "tolerance_time.png", "tolerance_evaluations.png"}


def test_a_slower_solve_is_worse_and_a_faster_one_better() -> None:
    slower = compare(results(4.0), results(5.0), 0.1)
    assert [(c.column, c.ratio) for c in slower.worse] == [("time [ms]", 1.25)]
    assert not slower.better
    faster = compare(results(5.0), results(4.0), 0.1)
    assert not faster.worse
    assert len(faster.better) == 1


def test_a_slower_machine_is_no_regression() -> None:
    found = compare(results(4.0, peer=10.0), results(6.0, peer=15.0), 0.1)
    assert found.drift == pytest.approx(1.5)
    assert not found.worse
    hidden = compare(results(4.0, peer=10.0), results(4.0, peer=5.0), 0.1)
    assert len(hidden.worse) == 1  # the machine was twice as fast, and we were not


def test_overlapping_quartiles_are_noise() -> None:
    old, new = results(4.0), results(4.0)
    noisy = {**new.rows[0].values, "time [ms]": Quartiles(5.0, 3.9, 6.0, 5)}
    new.rows[0] = type(new.rows[0])("work-precision", new.rows[0].key, noisy)
    assert not compare(old, new, 0.1).worse


def test_more_evaluations_are_worse_whatever_the_machine() -> None:
    found = compare(results(4.0, 10.0, 12), results(4.0, 10.0, 14), 0.1)
    assert [change.column for change in found.worse] == ["evaluations"]


def test_a_tolerance_no_longer_reached_is_worse(tmp_path: Path) -> None:
    old, new = results(4.0), results(4.0)
    failed = {**new.rows[0].values, "time [ms]": None, "reached": False}
    new.rows[0] = type(new.rows[0])("work-precision", new.rows[0].key, failed)
    (told,) = compare(old, new, 0.1).failed
    assert "Anderson" in told
    assert not compare(new, old, 0.1).failed
    for name, found in (("old", old), ("new", new)):
        found.write(tmp_path / name)
    old_path, new_path = (str(tmp_path / name / "results.json") for name in ("old", "new"))
    assert main([old_path, new_path]) == 1
    assert main([new_path, old_path]) == 0


def test_rows_are_matched_whatever_radius_was_found() -> None:
    old, new = results(4.0), results(5.0)
    key = {**new.rows[0].key, "radius": 0.901}
    new.rows[0] = type(new.rows[0])("work-precision", key, new.rows[0].values)
    assert len(compare(old, new, 0.1).worse) == 1


def test_lost_rows_are_told() -> None:
    new = results(4.0)
    del new.rows[0]
    found = compare(results(4.0), new, 0.1)
    assert len(found.lost) == 3
    assert found.compared == 0


def test_the_command_says_worse_by_its_exit_code(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, time in (("old", 4.0), ("new", 5.0)):
        results(time).write(tmp_path / name)
    old, new = (str(tmp_path / name / "results.json") for name in ("old", "new"))
    assert main([old, new]) == 1
    assert "1 worse, 0 better" in capsys.readouterr().out
    assert main([old, old]) == 0
    assert main([old, new, "--threshold", "0.5"]) == 0
    with pytest.raises(SystemExit) as ended:
        main([old, str(tmp_path / "nothing.json")])
    assert ended.value.code == 2
    assert "nothing.json: cannot be read" in capsys.readouterr().err


def test_sizes() -> None:
    assert parse_sizes("1x1000, 16x250000") == ((1, 1000), (16, 250000))
    with pytest.raises(ValueError, match="'1000' is no size; give BATCHxFEATURES"):
        parse_sizes("1x10,1000")
