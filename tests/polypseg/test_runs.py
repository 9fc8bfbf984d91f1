"""The files of a run directory."""

import csv
import io
import logging
import subprocess
import sys

import numpy as np
import pytest
import torch
from PIL import Image
from tqdm import tqdm

from polypseg import runs
from polypseg.runs import ResultsCsv, plot_curves, setup_log, versions

FIELDS = ["phase", "epoch", "train_loss", "val_dice"]


def test_versions_are_those_of_the_modules_and_of_the_repository():
    found = versions()
    assert torch.__version__.startswith(str(found["torch"]))  # less the build tag
    assert found["numpy"] == np.__version__
    assert found["python"] == sys.version.split()[0]
    assert found["threads"] == torch.get_num_threads()
    assert found["cpu"]


def git(folder, *arguments):
    identity = ["-c", "user.name=t", "-c", "user.email=t@example.org"]
    command = ["git", "-C", str(folder), *identity, *arguments]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()


def test_versions_tell_the_commit_and_whether_it_was_changed(tmp_path, monkeypatch):
    source = tmp_path / "repo" / "polypseg" / "runs.py"
    source.parent.mkdir(parents=True)
    source.write_text("one")
    monkeypatch.setattr(runs, "__file__", str(source))
    unknown = {"git_commit": None, "git_dirty": None}
    assert versions().items() >= unknown.items()

    git(tmp_path / "repo", "init", "-q")
    assert versions().items() >= unknown.items()  # no commit yet
    git(tmp_path / "repo", "add", ".")
    git(tmp_path / "repo", "commit", "-q", "-m", "first")
    commit = git(tmp_path / "repo", "rev-parse", "HEAD")
    assert versions().items() >= {"git_commit": commit, "git_dirty": False}.items()
    source.write_text("two")
    assert versions().items() >= {"git_commit": commit, "git_dirty": True}.items()


def test_versions_do_not_tell_the_commit_of_a_surrounding_repository(tmp_path, monkeypatch):
    source = tmp_path / "venv" / "site-packages" / "polypseg" / "runs.py"
    source.parent.mkdir(parents=True)
    source.touch()
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-q", "-m", "theirs")
    monkeypatch.setattr(runs, "__file__", str(source))
    assert versions()["git_commit"] is None


def test_results_have_one_header_and_one_line_per_epoch_across_restarts(tmp_path):
    path = tmp_path / "run" / "results.csv"
    ResultsCsv(path, FIELDS).append({"phase": "explicit", "epoch": 0, "train_loss": 0.5})
    ResultsCsv(path, FIELDS).append({"phase": "explicit", "epoch": 1, "val_dice": 0.25})
    assert path.read_text() == (
        "phase,epoch,train_loss,val_dice\nexplicit,0,0.5,\nexplicit,1,,0.25\n"
    )


def test_resuming_drops_the_rows_after_the_checkpoint(tmp_path):
    path = tmp_path / "results.csv"
    results = ResultsCsv(path, FIELDS)
    for phase, epochs in (("explicit", 12), ("implicit", 3)):
        for epoch in range(epochs):
            results.append({"phase": phase, "epoch": epoch})

    def left():
        with open(path) as file:
            return [(row["phase"], int(row["epoch"])) for row in csv.DictReader(file)]

    explicit = [("explicit", epoch) for epoch in range(12)]
    results.truncate_from("hyper", 0)
    assert left() == [*explicit, ("implicit", 0), ("implicit", 1), ("implicit", 2)]
    results.truncate_from("implicit", 1)
    assert left() == [*explicit, ("implicit", 0)]
    results.truncate_from("explicit", 10)  # as numbers: "9" is not after "10"
    assert left() == explicit[:10]
    results.append({"phase": "explicit", "epoch": 10})
    assert left() == explicit[:11]


def test_a_line_cut_short_by_a_kill_is_dropped(tmp_path):
    path = tmp_path / "results.csv"
    ResultsCsv(path, FIELDS).append({"phase": "explicit", "epoch": 0, "train_loss": 0.5})
    with open(path, "a") as file:
        file.write("explicit,1,0.")
    ResultsCsv(path, FIELDS).append({"phase": "explicit", "epoch": 1, "train_loss": 0.4})
    assert path.read_text().splitlines()[1:] == ["explicit,0,0.5,", "explicit,1,0.4,"]

    path.write_text("phase,ep")
    ResultsCsv(path, FIELDS)
    assert path.read_text() == "phase,epoch,train_loss,val_dice\n"


def test_a_table_with_other_columns_is_not_touched(tmp_path):
    path = tmp_path / "results.csv"
    path.write_text("phase,epoch,loss\nexplicit,0,1\n")
    with pytest.raises(ValueError, match="has the columns phase, epoch, loss; this run writes"):
        ResultsCsv(path, FIELDS)
    assert path.read_text() == "phase,epoch,loss\nexplicit,0,1\n"
    with pytest.raises(ValueError, match="epoch"):
        ResultsCsv(path, ["phase", "loss"])


def test_a_run_directory_serves_one_training_at_a_time(tmp_path):
    with (
        runs.lock_folder(tmp_path),
        pytest.raises(ValueError, match="another training is at work in this run directory"),
    ):
        runs.lock_folder(tmp_path)
    runs.lock_folder(tmp_path).close()


def test_a_row_with_an_unknown_column_is_refused(tmp_path):
    results = ResultsCsv(tmp_path / "results.csv", FIELDS)
    with pytest.raises(ValueError, match="val_iou"):
        results.append({"phase": "explicit", "epoch": 0, "val_iou": 1})


@pytest.fixture
def _restore_logger():
    logger = logging.getLogger("polypseg")
    propagate, level = logger.propagate, logger.level
    yield
    for handler in logger.handlers[:]:
        logger.removeHandler(handler)
        handler.close()
    logger.propagate, logger.level = propagate, level


@pytest.mark.usefixtures("_restore_logger")
def test_log_goes_to_file_and_stderr_once_and_is_appended(tmp_path, capsys):
    setup_log(tmp_path / "other.txt").info("elsewhere")
    setup_log(tmp_path / "run" / "log.txt").info("first")
    setup_log(tmp_path / "run" / "log.txt")
    logging.getLogger("polypseg.train").warning("secönd")
    lines = (tmp_path / "run" / "log.txt").read_text(encoding="utf-8").splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["INFO first", "WARNING secönd"]
    captured = capsys.readouterr()
    assert captured.err == "elsewhere\nfirst\nsecönd\n"
    assert captured.out == ""


@pytest.mark.usefixtures("_restore_logger")
def test_log_lines_do_not_run_into_a_progress_bar(tmp_path, monkeypatch):
    screen = io.StringIO()
    monkeypatch.setattr(sys, "stderr", screen)
    log = setup_log(tmp_path / "log.txt")
    with tqdm(total=2, desc="epoch", file=screen) as bar:
        bar.update()
        log.info("message")
    start = screen.getvalue().index("message\n")
    cleared = screen.getvalue()[:start].rpartition("\r")
    assert cleared[2] == ""  # the cursor is at the start of a line that was blanked
    assert cleared[0].rpartition("\r")[2].strip() == ""


def drawn_lines(tmp_path, monkeypatch, fields, rows):
    """Draw a table; return the figure's axes and check the picture that was written."""
    figures = []

    class Spy(runs.Figure):
        def __init__(self, *arguments, **options):
            super().__init__(*arguments, **options)
            figures.append(self)

    monkeypatch.setattr(runs, "Figure", Spy)
    results = ResultsCsv(tmp_path / "results.csv", fields)
    for row in rows:
        results.append(dict(zip(fields, row, strict=True)))
    plot_curves(tmp_path / "results.csv", tmp_path / "curves.png")
    with Image.open(tmp_path / "curves.png") as picture:
        assert picture.format == "PNG"
        assert np.asarray(picture.convert("L")).std() > 1
    return figures[0].axes


def test_curves_show_every_phase(tmp_path, monkeypatch):
    fields = ["phase", "epoch", "train_loss", "val_dice", "residual_median"]
    rows = [
        ("explicit", 0, 0.9, 0.5, ""),
        ("explicit", 1, 0.7, "", ""),
        ("explicit", 2, 0.6, 0.7, ""),
        ("implicit", 0, 0.5, 0.8, 1e-3),
    ]
    axes = drawn_lines(tmp_path, monkeypatch, fields, rows)
    lines = [
        {line.get_label(): (list(line.get_xdata()), list(line.get_ydata())) for line in axis.lines}
        for axis in axes
    ]
    assert [axis.get_title() for axis in axes[:2]] == ["explicit", "implicit"]
    assert lines[0] == {"train_loss": ([0, 1, 2], [0.9, 0.7, 0.6])}
    assert lines[1] == {"train_loss": ([0], [0.5])}
    np.testing.assert_equal(lines[2]["val_dice"], ([0, 1, 2], [0.5, np.nan, 0.7]))
    assert lines[4] == {}
    assert lines[5] == {"residual_median": ([0], [1e-3])}
    assert axes[5].get_yscale() == "log"
    assert axes[2].get_ylim() == axes[3].get_ylim()


def test_curves_have_no_residual_panel_without_residuals(tmp_path, monkeypatch):
    axes = drawn_lines(tmp_path, monkeypatch, FIELDS, [("explicit", 0, 1.0, 0.5)])
    assert [axis.get_ylabel() for axis in axes] == ["loss", "dice"]


def test_curves_of_an_empty_table_are_refused(tmp_path):
    ResultsCsv(tmp_path / "results.csv", FIELDS)
    with pytest.raises(ValueError, match="no rows"):
        plot_curves(tmp_path / "results.csv", tmp_path / "curves.png")
    assert not (tmp_path / "curves.png").exists()
