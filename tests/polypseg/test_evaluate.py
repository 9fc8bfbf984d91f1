"""Scoring a run on test folders."""

import csv
import hashlib
import json
import shutil
import statistics
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polypseg import cli
from polypseg.data import DataError, find_pairs
from polypseg.evaluate import evaluate_models, evaluate_run
from polypseg.predictor import Predictor
from polypseg.result import Result
from polypseg.testsets import find_test_sets


def read_csv(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def snapshot(folder: Path) -> dict[str, str]:
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


@pytest.fixture
def test_set(synthetic_data, tmp_path) -> Path:
    """A copy of the synthetic test folder, to be changed."""
    return Path(shutil.copytree(synthetic_data / "TestDataset" / "Synthetic", tmp_path / "Set"))


@pytest.fixture(scope="module")
def evaluated(tiny_run, synthetic_data, tmp_path_factory) -> Path:
    """The folder of an evaluation of the tiny run with its default solvers."""
    out = tmp_path_factory.mktemp("evaluated") / "out"
    evaluate_run(tiny_run, find_test_sets([synthetic_data]), out=out, command="the command")
    return out


def test_every_solver_of_the_run_gets_a_file_per_folder(evaluated):
    solvers = ["explicit", "broyden", "anderson", "hyper"]
    files = {f"Synthetic-{solver}.csv" for solver in solvers} | {"summary.csv", "summary.json"}
    assert {path.name for path in evaluated.iterdir()} == files
    summary = read_csv(evaluated / "summary.csv")
    assert [row["solver"] for row in summary] == solvers


@pytest.mark.parametrize("solver", ["explicit", "broyden", "anderson", "hyper"])
def test_rows_hold_the_scores_of_the_masks_at_their_own_resolution(
    evaluated, tiny_run, synthetic_data, solver
):
    rows = read_csv(evaluated / f"Synthetic-{solver}.csv")
    folder = synthetic_data / "TestDataset" / "Synthetic"
    assert [row["stem"] for row in rows] == [f"synthetic_{i:04d}" for i in range(1, 7)]
    predictor = Predictor.from_run(tiny_run, solver)
    for row in rows:
        truth = np.asarray(Image.open(folder / "masks" / f"{row['stem']}.png")) > 127
        image = np.asarray(Image.open(folder / "images" / f"{row['stem']}.jpg"))
        prediction = predictor.predict(image).mask
        both, either = (prediction & truth).sum(), (prediction | truth).sum()
        assert int(row["tp"]) == both
        assert int(row["fp"]) == (prediction & ~truth).sum()
        assert int(row["fn"]) == (truth & ~prediction).sum()
        assert sum(int(row[name]) for name in ("tp", "fp", "fn", "tn")) == 80 * 80
        assert float(row["dice"]) == pytest.approx(2 * both / (prediction.sum() + truth.sum()))
        assert float(row["iou"]) == pytest.approx(both / either)
        assert float(row["seconds"]) > 0
        assert (row["residual"] == "") == (solver == "explicit")


def test_the_summary_is_that_of_the_rows(evaluated):
    for summary in read_csv(evaluated / "summary.csv"):
        rows = read_csv(evaluated / f"{summary['data']}-{summary['solver']}.csv")

        def column(name, rows=rows):
            return [float(row[name]) for row in rows]

        expected = {
            "images": len(rows),
            "mDice": statistics.mean(column("dice")),
            "mIoU": statistics.mean(column("iou")),
            "seconds_median": statistics.median(column("seconds")),
            "steps_mean": statistics.mean(column("steps")),
            "steps_max": max(column("steps")),
            "evaluations_mean": statistics.mean(column("evaluations")),
        }
        if summary["solver"] != "explicit":
            residuals = column("residual")
            expected["residual_median"] = statistics.median(residuals)
            expected["residual_worst"] = max(residuals)
            expected["converged_share"] = sum(r <= 1e-3 for r in residuals) / len(residuals)
        assert {name: float(summary[name]) for name in expected} == pytest.approx(expected)


def test_the_record_says_what_made_the_numbers(evaluated, tiny_run, synthetic_data):
    def no_constant(name):
        raise AssertionError(f"{name} is not JSON")

    record = json.loads((evaluated / "summary.json").read_text(), parse_constant=no_constant)
    assert record["command"] == "the command"
    assert record["run"] == str(tiny_run)
    assert record["config"]["data"]["size"] == 64
    assert record["versions"]["torch"] in torch.__version__
    assert record["solvers"]["explicit"] == {}
    assert record["solvers"]["anderson"]["tol"] == 0.05
    assert record["solvers"]["anderson"]["max_steps"] == 6
    assert record["data"] == {"Synthetic": str(synthetic_data / "TestDataset" / "Synthetic")}
    table = read_csv(evaluated / "summary.csv")
    assert [row["mDice"] for row in record["summary"]] == [float(row["mDice"]) for row in table]
    assert record["summary"][0]["residual_median"] is None


def test_solvers_take_turns_image_by_image(test_set):
    calls = []

    class Recorder(Predictor):
        def __init__(self, name):
            self.name = name

        def predict(self, image, *, measure=False):
            calls.append(self.name)
            return Result(
                np.ones((1, *image.shape[:2]), np.float32),
                np.ones((1, 64, 64), np.float32),
                1, 1, 0.1, "CONVERGED", 0.1,
            )  # fmt: skip

    rows = evaluate_models({name: Recorder(name) for name in "abc"}, find_pairs(test_set))
    assert calls == list("abcbcacababcbcacab")
    assert [row.stem for row in rows["b"]] == [f"synthetic_{i:04d}" for i in range(1, 7)]
    assert all(row.fn == 0 and row.tn == 0 for row in rows["c"])


def test_the_command_prints_a_table_and_writes_a_report(copy_run, synthetic_data, capsys):
    run = copy_run()
    arguments = [str(run), "--data", str(synthetic_data), "--limit", "2"]
    assert cli.evaluate([*arguments, "--solvers", "explicit,anderson", "--max-steps", "2"]) == 0
    printed = capsys.readouterr().out
    summary = read_csv(run / "evaluation" / "summary.csv")
    assert [row["images"] for row in summary] == ["2", "2"]
    assert [row["steps_max"] for row in summary] == ["1", "2"]
    for row in summary:
        assert f"{100 * float(row['mDice']):.2f} [" in printed
    assert (run / "report.html").is_file()
    record = json.loads((run / "evaluation" / "summary.json").read_text())
    assert record["command"].startswith(f"polypseg-evaluate {run} --data")
    assert record["limit"] == 2


def test_another_output_folder_leaves_the_run_alone(tiny_run, test_set, tmp_path, capsys):
    before = snapshot(tiny_run)
    arguments = [str(tiny_run), "--data", str(test_set), "--solvers", "explicit", "--limit", "1"]
    assert cli.evaluate([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert snapshot(tiny_run) == before
    assert (tmp_path / "out" / "Set-explicit.csv").is_file()  # named after the folder


def test_figures_on_clinicdb_come_with_their_caveat(tiny_run, test_set, tmp_path, capsys):
    clinic = test_set.rename(tmp_path / "CVC-ClinicDB")
    arguments = [str(tiny_run), "--data", str(clinic), "--solvers", "explicit", "--limit", "1"]
    assert cli.evaluate([*arguments, "--out", str(tmp_path / "out")]) == 0
    assert "All 62 test frames" in capsys.readouterr().out
    note = json.loads((tmp_path / "out" / "summary.json").read_text())["notes"][0]
    assert "each next to a training frame" in note


def test_an_earlier_evaluation_is_replaced_and_nothing_else(tiny_run, test_set, tmp_path):
    out = tmp_path / "out"
    evaluate_run(tiny_run, find_test_sets([test_set]), ["explicit", "anderson"], out, limit=1)
    (out / "my notes.csv").write_text("mine")
    first = read_csv(out / "Set-explicit.csv")
    evaluate_run(tiny_run, find_test_sets([test_set]), ["explicit"], out)
    assert {path.name for path in out.iterdir()} == {
        "Set-explicit.csv", "summary.csv", "summary.json", "my notes.csv",
    }  # fmt: skip
    assert len(first) == 1
    assert len(read_csv(out / "Set-explicit.csv")) == 6
    assert (out / "my notes.csv").read_text() == "mine"


def test_a_foreign_output_folder_is_refused_before_any_work(tiny_run, test_set, tmp_path, capsys):
    out = tmp_path / "out"
    for content in ("{}", "no json", '{"program": "other", "files": []}', '["program"]'):
        out.mkdir(exist_ok=True)
        (out / "summary.json").write_text(content)
        before = snapshot(out)
        arguments = [str(tiny_run), "--data", str(test_set), "--out", str(out)]
        assert cli.evaluate(arguments) == 1
        assert "does not hold an earlier evaluation" in capsys.readouterr().err
        assert snapshot(out) == before
    for occupied in (test_set, tiny_run, tmp_path / "out" / "summary.json"):
        with pytest.raises(DataError, match="does not hold an earlier evaluation"):
            evaluate_run(tiny_run, find_test_sets([test_set]), out=occupied)


def test_an_interrupted_evaluation_leaves_the_earlier_one(
    tiny_run, test_set, tmp_path, monkeypatch, capsys
):
    out = tmp_path / "out"
    arguments = [str(tiny_run), "--data", str(test_set), "--out", str(out), "--solvers", "explicit"]
    assert cli.evaluate(arguments) == 0
    before = snapshot(out)
    predict = Predictor.predict
    calls = []

    def interrupted(self, image, **options):
        calls.append(image)
        if len(calls) == 5:
            raise KeyboardInterrupt
        return predict(self, image, **options)

    monkeypatch.setattr(Predictor, "predict", interrupted)
    assert cli.evaluate(arguments) == 130
    assert "nothing was written" in capsys.readouterr().err
    assert snapshot(out) == before


def test_all_faults_of_all_folders_are_named_and_nothing_is_written(
    tiny_run, test_set, tmp_path, capsys
):
    (test_set / "masks" / "synthetic_0002.png").unlink()
    empty = tmp_path / "Empty"
    (empty / "images").mkdir(parents=True)
    (empty / "masks").mkdir()
    arguments = [str(tiny_run), "--out", str(tmp_path / "out")]
    for folder in (test_set, empty, tmp_path / "nowhere"):
        arguments += ["--data", str(folder)]
    assert cli.evaluate(arguments) == 1
    message = capsys.readouterr().err
    assert message.startswith("polypseg-evaluate: error: ")
    assert "synthetic_0002.jpg: image without mask" in message
    assert f"{empty / 'images'}: holds no image files" in message
    assert f"{tmp_path / 'nowhere'}: there is no such folder" in message
    assert not (tmp_path / "out").exists()


def test_files_that_cannot_be_used_are_named_before_the_first_prediction(
    tiny_run, test_set, tmp_path, capsys
):
    (test_set / "images" / "synthetic_0003.jpg").write_bytes(b"no picture")
    Image.new("L", (40, 80)).save(test_set / "masks" / "synthetic_0005.png")
    arguments = [str(tiny_run), "--data", str(test_set), "--out", str(tmp_path / "out")]
    assert cli.evaluate(arguments) == 1
    message = capsys.readouterr().err
    assert "synthetic_0003.jpg: cannot be decoded" in message
    assert "synthetic_0005.png: mask is 40 x 80 pixels but its image" in message
    assert "Traceback" not in message
    assert not (tmp_path / "out").exists()


def test_warnings_do_not_stop_an_evaluation(tiny_run, test_set, tmp_path, capsys):
    for number in range(1, 7):
        Image.new("L", (80, 80)).save(test_set / "masks" / f"synthetic_{number:04d}.png")
    evaluate_run(tiny_run, find_test_sets([test_set]), ["explicit"], tmp_path / "out")
    assert capsys.readouterr().err.count("mask is empty") == 6


def test_runs_and_options_that_cannot_work_are_refused(tiny_run, test_set, tmp_path, capsys):
    data = ["--data", str(test_set), "--out", str(tmp_path / "out")]
    for arguments, message in (
        ([str(tmp_path / "nowhere"), *data], "nowhere: there is no such folder"),
        ([str(test_set), *data], "holds no trained weights"),
        ([str(test_set), *data, "--solvers", "anderson"], "not a run of polypseg-train"),
        ([str(tiny_run), *data, "--solvers", "explicit,newton"], "got 'newton'"),
        ([str(tiny_run), *data, "--protocols", "default,median"], "got 'median'"),
        ([str(tiny_run), *data, "--limit", "0"], "limit must be at least 1 image, got 0"),
        ([str(tiny_run), *data, "--tol", "-1"], "tol must be"),
        ([str(tiny_run), *data, "--tol", "inf"], "tol must be at least 0 and below 1"),
        (
            [str(tiny_run), *data, "--solvers", "explicit", "--tol", "1e-3"],
            "tol cannot be set here: the explicit pass",
        ),
        ([str(tiny_run), *data, "--device", "warp"], "device 'warp' cannot be used"),
    ):
        assert cli.evaluate(arguments) == 1
        assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()


def test_two_folders_of_one_name_are_refused(test_set, tmp_path):
    other = Path(shutil.copytree(test_set, tmp_path / "other" / "Set"))
    with pytest.raises(DataError, match=f"{other}: has the same name as {test_set}"):
        find_test_sets([test_set, other])


def test_the_fields_folder_layout_is_found(real_data):
    sets = find_test_sets([real_data])
    assert {name: len(pairs) for name, pairs in sets.items()} == {"CVC-ClinicDB": 62, "Kvasir": 100}


def test_real_images_are_scored_at_their_own_sizes(tiny_run, real_data, tmp_path):
    evaluate_run(
        tiny_run,
        find_test_sets([real_data / "TestDataset" / "Kvasir"]),
        ["hyper"],
        tmp_path,
        limit=3,
    )
    for row in read_csv(tmp_path / "Kvasir-hyper.csv"):
        path = real_data / "TestDataset" / "Kvasir" / "masks" / f"{row['stem']}.png"
        pixels = np.asarray(Image.open(path)).size
        assert sum(int(row[name]) for name in ("tp", "fp", "fn", "tn")) == pixels
