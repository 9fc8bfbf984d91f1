"""Two evaluations compared image by image."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from polypseg import cli
from polypseg.evaluate import evaluate_run
from polypseg.testsets import NOTES, find_test_sets


@pytest.fixture(scope="module")
def evaluated(tiny_run, synthetic_data, tmp_path_factory):
    out = tmp_path_factory.mktemp("compared") / "out"
    twice = {name: 2 * pairs for name, pairs in find_test_sets([synthetic_data]).items()}
    evaluate_run(
        tiny_run, twice, ["explicit", "hyper"], out, protocols=["default", "pranet"]
    )  # twelve images, so that there are intervals
    return out


def column(path, name, protocol):
    with open(path, newline="") as file:
        return np.array([float(r[name]) for r in csv.DictReader(file) if r["protocol"] == protocol])


def test_every_metric_is_compared_under_every_protocol(evaluated, tmp_path, capsys):
    path = tmp_path / "c.json"
    assert cli.compare([f"{evaluated}:explicit", str(evaluated), "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert f"A: explicit of {evaluated}\nB: hyper of {evaluated}" in printed
    record = json.loads(path.read_text())
    lines = record["comparisons"]
    assert [(line["protocol"], line["metric"]) for line in lines] == [
        (protocol, metric)
        for protocol in ("default", "pranet")
        for metric in ("dice", "iou", "hd95")
    ]
    for line in lines:
        a, b = (
            column(evaluated / f"Synthetic-{solver}.csv", line["metric"], line["protocol"])
            for solver in ("explicit", "hyper")
        )
        assert line["difference"] == pytest.approx((b - a).mean())
        assert line["higher"] == (b > a).sum()
        assert line["p_value"] == pytest.approx(stats.wilcoxon(b, a, zero_method="zsplit").pvalue)
        assert line["low"] <= line["difference"] <= line["high"]
    first = lines[0]
    assert f"{100 * first['difference']:+.2f} [{100 * first['low']:+.2f}" in printed
    assert "the interval is of the mean difference, p of the ranks" in printed


def test_few_images_have_no_interval_and_a_note(tiny_run, synthetic_data, tmp_path, capsys):
    out, path = tmp_path / "out", tmp_path / "c.json"
    evaluate_run(tiny_run, find_test_sets([synthetic_data]), ["explicit", "hyper"], out)
    record = json.loads((out / "summary.json").read_text())
    (note,) = record["notes"]
    assert note.startswith("Synthetic: no intervals; those of 6 images")
    (out / "summary.json").write_text(json.dumps({**record, "notes": []}))  # of an older version
    assert cli.compare([f"{out}:explicit", str(out), "--json", str(path)]) == 0
    printed = capsys.readouterr().out
    assert " [–] " in printed
    assert f"Note on A and B: {note}" in printed
    assert json.loads(path.read_text())["comparisons"][0]["low"] is None


def test_the_notes_of_both_are_told_once_and_whose_they_are(evaluated, tmp_path, capsys):
    a, b = (Path(shutil.copytree(evaluated, tmp_path / name)) for name in "ab")
    for folder, notes in ((a, ["of both"]), (b, ["of both", "of one"])):
        path = folder / "summary.json"
        path.write_text(json.dumps({**json.loads(path.read_text()), "notes": notes}))
    out = tmp_path / "c.json"
    assert cli.compare([str(a), str(b), "--json", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "\n\nNote on A and B: of both\n\n" in printed
    assert printed.endswith("\n\nNote on B: of one\n")
    record = json.loads(out.read_text())
    assert record["a"]["notes"][0] == "of both"
    assert record["b"]["notes"][:2] == ["of both", "of one"]


def test_a_known_set_has_its_caveat_whatever_an_older_version_noted(
    tiny_run, synthetic_data, tmp_path, capsys
):
    sets = {"CVC-ClinicDB": find_test_sets([synthetic_data])["Synthetic"]}
    evaluate_run(tiny_run, sets, ["explicit", "hyper"], tmp_path, limit=2)
    path = tmp_path / "summary.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "notes": ["older"]}))
    assert cli.compare([f"{tmp_path}:explicit", str(tmp_path)]) == 0
    printed = capsys.readouterr().out
    assert f"Note on A and B: {NOTES['CVC-ClinicDB']}\n\nNote on A and B: older" in printed


def test_what_cannot_be_compared_is_said(evaluated, tiny_run, synthetic_data, tmp_path, capsys):
    folder = str(evaluated)
    other = tmp_path / "other"
    evaluate_run(tiny_run, find_test_sets([synthetic_data]), ["explicit"], other, limit=2)
    changed = Path(shutil.copytree(evaluated, tmp_path / "changed"))
    path = changed / "Synthetic-explicit.csv"
    lines = path.read_text().splitlines()
    cells = lines[1].split(",")
    cells[3] = str(int(cells[3]) + 1)
    path.write_text("\n".join([lines[0], ",".join(cells), *lines[2:]]))
    released = Path(shutil.copytree(evaluated, tmp_path / "released"))
    (released / "Synthetic-hyper.csv").unlink()
    elsewhere = tmp_path / "elsewhere"
    sets = {"Other": find_test_sets([synthetic_data])["Synthetic"]}
    evaluate_run(tiny_run, sets, ["explicit"], elsewhere, limit=1)
    for arguments, message in (
        ([folder, f"{folder}:newton"], "solver 'newton' was not evaluated; known: explicit, hyper"),
        ([folder, str(tmp_path)], "holds no evaluation; make one with polypseg-evaluate"),
        ([folder, str(released)], "a released model comes without its scores per image. Score it"),
        ([folder, str(other)], "the two evaluations differ in 4 images"),
        (
            [f"{folder}:explicit", f"{changed}:explicit"],
            "the true mask of synthetic_0001 has changed",
        ),
        ([folder, str(elsewhere)], "no test folder and protocol in common: Synthetic and Other"),
    ):
        assert cli.compare(arguments) == 1
        assert message in capsys.readouterr().err
