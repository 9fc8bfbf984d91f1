"""Evaluating a run on images that its network was trained on."""

import csv
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from PIL import Image

from polypseg import cli
from polypseg.data import DataError, Pair, Split, find_pairs, make_synthetic, random_split
from polypseg.evaluate import evaluate_run
from polypseg.lineage import Lineage, Origin, make_lineage, write_lineage
from polypseg.starting import Start
from polypseg.testsets import find_test_sets


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder of ten images."""
    make_synthetic(tmp_path / "data", train=10, test=1, size=64)
    return (tmp_path / "data" / "TrainDataset").rename(tmp_path / "Mine")


@pytest.fixture
def split(folder: Path) -> Split:
    """Nine of them train, one validates."""
    return random_split(find_pairs(folder), 0.1, seed=0)


@pytest.fixture
def run(copy_run, split: Split) -> Path:
    """A run that was trained on the folder."""
    run = copy_run()
    write_lineage(run, make_lineage(split, Start()))
    return run


def evaluate(run: Path, *folders: Path) -> None:
    data = [text for folder in folders for text in ("--data", str(folder))]
    assert cli.evaluate([str(run), *data, "--solvers", "explicit"]) == 0


def record(run: Path) -> dict:
    return json.loads((run / "evaluation" / "summary.json").read_text())


def notes(run: Path) -> list[str]:
    """All but those on intervals, for which the sets here are too small."""
    return [note for note in record(run)["notes"] if "intervals" not in note]


def stems(run: Path, name: str) -> list[str]:
    with open(run / "evaluation" / f"{name}-explicit.csv", newline="") as file:
        return [row["stem"] for row in csv.DictReader(file)]


def test_of_its_training_folder_only_the_held_out_images_are_scored(run, folder, split, capsys):
    moved = folder.rename(folder.with_name("Moved"))
    evaluate(run, moved)
    assert stems(run, "validation") == [pair.stem for pair in split.val]
    assert list(record(run)["data"]) == ["validation"]
    (note,) = notes(run)
    assert note.startswith(f"validation: the images of {moved} that the run held out")
    assert note in capsys.readouterr().out


def test_the_trainings_own_evaluation_is_the_same(run, split):
    evaluate_run(run, {"validation": split.val}, ["explicit"])
    assert stems(run, "validation") == [pair.stem for pair in split.val]
    assert notes(run) == []


@pytest.mark.parametrize("change", ["one more", "no validation image", "trained on all"])
def test_other_folders_with_training_images_are_scored_with_a_note(
    change, run, folder, split, tmp_path, capsys
):
    trained = 9
    if change == "one more":
        new = tmp_path / "data" / "TestDataset" / "Synthetic"
        for path in (*new.glob("images/*"), *new.glob("masks/*")):
            shutil.copy(path, folder / path.parent.name / f"new{path.suffix}")
    elif change == "no validation image":
        split.val[0].image.unlink()
        split.val[0].mask.unlink()
    else:
        write_lineage(run, make_lineage(split.with_validation_in_training(), Start()))
        trained = 10
    evaluate(run, folder)
    count = len(find_pairs(folder))
    assert len(stems(run, "Mine")) == count
    (note,) = notes(run)
    assert note.startswith(f"Mine: {trained} of {count} images were trained on")
    assert note in capsys.readouterr().out
    assert note in (run / "report.html").read_text()


def test_images_that_trained_an_earlier_network_are_counted_under_any_name(run, split, tmp_path):
    parent = make_lineage(split, Start())
    start = Origin("explicit.safetensors", "", "parent", Lineage(None, parent.training, {}))
    write_lineage(run, Lineage(start, {}, {}))
    copies = tmp_path / "Copies"
    for pair in split.train[:2] + split.val:
        for path, part in ((pair.image, "images"), (pair.mask, "masks")):
            (copies / part).mkdir(parents=True, exist_ok=True)
            shutil.copy(path, copies / part / f"copy_{path.name}")
    evaluate(run, copies)
    (note,) = notes(run)
    assert note.startswith("Copies: 2 of 3 images were trained on")


def save_anew(pairs: list[Pair], to: Path, stem: Callable[[int, str], str]) -> None:
    for number, pair in enumerate(pairs):
        for path, part in ((pair.image, "images"), (pair.mask, "masks")):
            (to / part).mkdir(parents=True, exist_ok=True)
            Image.open(path).save(to / part / f"{stem(number, pair.stem)}.bmp")


def test_images_saved_anew_are_told_by_their_names(run, folder, split, tmp_path, capsys):
    save_anew(find_pairs(folder), tmp_path / "Anew", lambda _, stem: stem)
    evaluate(run, tmp_path / "Anew")
    (note,) = notes(run)
    assert note.startswith("Anew: 9 of 10 images have the names of training images and other bytes")
    assert note in capsys.readouterr().out


def test_names_that_agree_by_accident_give_no_note(run, folder, split, tmp_path):
    save_anew(split.train, tmp_path / "Few", lambda n, stem: stem if n < 4 else f"new_{n}")
    numbered = Lineage(None, {str(number): ["", ""] for number in range(100)}, {})
    save_anew(split.train, tmp_path / "Numbers", lambda number, _: str(number))
    evaluate(run, tmp_path / "Few")
    assert notes(run) == []
    write_lineage(run, numbered)
    evaluate(run, tmp_path / "Numbers")
    assert notes(run) == []


def test_a_run_without_a_record_scores_all_without_a_note(copy_run, folder):
    run = copy_run()
    evaluate(run, folder)
    assert len(stems(run, "Mine")) == 10
    assert notes(run) == []


def test_two_sets_of_one_name_are_refused(run, folder):
    shutil.copytree(folder.parent / "data" / "TestDataset" / "Synthetic", folder / "validation")
    sets = find_test_sets([folder / "validation", folder])
    with pytest.raises(DataError, match=f'{folder}: another folder, too, .* "validation"'):
        evaluate_run(run, sets, ["explicit"])
