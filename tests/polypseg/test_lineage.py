"""What a run remembers of its images and of the weights that it started from."""

import hashlib
import json
import shutil
from pathlib import Path

import pytest
import torch

from polypseg.checkpoint import save_weights
from polypseg.config import ConfigError, make_config
from polypseg.data import make_synthetic, split_for
from polypseg.lineage import RECORD, make_lineage, read_lineage, write_lineage
from polypseg.models import build_model
from polypseg.starting import Start
from polypseg.train import main

TINY = ["data.size=32", "data.scales=[1.0]", "explicit.epochs=2", "explicit.batch=4"]
COMMON = ["--phases", "explicit", "--no-evaluate", *TINY]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("synthetic") / "data"
    make_synthetic(folder, train=10, test=1, size=32, seed=0)
    return folder


@pytest.fixture(scope="module")
def encoder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A file of encoder weights."""
    path = tmp_path_factory.mktemp("weights") / "encoder.safetensors"
    torch.manual_seed(1)
    save_weights(path, build_model(make_config().model).encoder.state_dict(), {})
    return path


@pytest.fixture(scope="module")
def finished(data: Path, encoder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with its explicit phase trained; to be copied before it is changed."""
    run = tmp_path_factory.mktemp("runs") / "finished"
    weights = ["--encoder-weights", str(encoder)]
    assert main([str(run), "--data", str(data), *weights, *COMMON]) == 0
    return run


def blake(path: Path) -> str:
    return hashlib.blake2b(path.read_bytes(), digest_size=16).hexdigest()


def test_a_run_keeps_the_digests_of_its_images_and_first_weights(
    finished: Path, data: Path, encoder: Path
) -> None:
    record = json.loads((finished / RECORD).read_text())
    split = split_for(data, 0)
    for name, pairs in (("training", split.train), ("validation", split.val)):
        assert record[name] == {pair.stem: [blake(pair.image), blake(pair.mask)] for pair in pairs}
    digest = hashlib.sha256(encoder.read_bytes()).hexdigest()
    assert record["start"] == {
        "file": "encoder.safetensors", "sha256": digest, "run": None, "record": None,
    }  # fmt: skip


def test_a_run_that_starts_from_another_keeps_its_record_too(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    tuned = tmp_path / "tuned"
    assert main([str(tuned), "--data", str(data), "--start-from", str(finished), *COMMON]) == 0
    found = read_lineage(tuned)
    assert found is not None
    assert found.start is not None
    weights = (finished / "explicit.safetensors").read_bytes()
    assert found.start.sha256 == hashlib.sha256(weights).hexdigest()
    assert (found.start.file, found.start.run) == ("explicit.safetensors", "finished")
    assert found.start.record == read_lineage(finished)


def test_training_on_all_images_is_recorded_as_such(data: Path, tmp_path: Path) -> None:
    run = tmp_path / "run"
    assert main([str(run), "--data", str(data), *COMMON, "data.train_on=all"]) == 0
    found = read_lineage(run)
    assert found is not None
    assert found.start is None
    assert (len(found.training), len(found.validation)) == (10, 1)
    assert found.validation.items() <= found.training.items()


def test_a_run_that_an_older_version_began_gets_no_record(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    old = Path(shutil.copytree(finished, tmp_path / "old"))
    (old / RECORD).unlink()
    assert main([str(old), "--data", str(data), *COMMON]) == 0
    assert not (old / RECORD).exists()
    (old / "explicit.safetensors").unlink()  # unfinished, with a checkpoint
    assert main([str(old), "--data", str(data), *COMMON]) == 0
    assert not (old / RECORD).exists()
    assert (old / "explicit.safetensors").exists()


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"start": null, "training": {"a": 1}}'])
def test_a_damaged_record_is_named(content: str, data: Path, tmp_path: Path) -> None:
    write_lineage(tmp_path, make_lineage(split_for(data), Start()))
    assert read_lineage(tmp_path) is not None
    (tmp_path / RECORD).write_text(content)
    with pytest.raises(ConfigError, match=r"data\.json: not a record"):
        read_lineage(tmp_path)


@pytest.fixture
def unfinished(finished: Path, tmp_path: Path) -> Path:
    """The same run as a kill after its last epoch would leave it."""
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    (run / "explicit.safetensors").unlink()
    return run


def resume(run: Path, data: Path, *more: str) -> None:
    assert main([str(run), "--data", str(data), *more, *COMMON]) == 0


def test_images_that_merely_moved_resume_a_run(
    unfinished: Path, data: Path, encoder: Path, tmp_path: Path
) -> None:
    moved = Path(shutil.copytree(data, tmp_path / "moved"))
    weights = Path(shutil.copy(encoder, tmp_path / "renamed.safetensors"))
    before = (unfinished / "train.log").read_text()
    assert before.count("encoder weights from") == 1
    resume(unfinished, moved, "--encoder-weights", str(weights))
    log = (unfinished / "train.log").read_text()
    assert "explicit: resuming after epoch 2" in log
    assert log.count("encoder weights from") == 1  # they were not what it went on from


def test_other_images_do_not_resume_a_run(finished: Path, data: Path, tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished, tmp_path / "run"))
    other = Path(shutil.copytree(data, tmp_path / "other"))
    split = split_for(data, 0)
    train, val = split.train[0].stem, split.val[0].stem
    folder = other / "TrainDataset"
    with open(folder / "masks" / f"{train}.png", "ab") as mask:
        mask.write(b"more")
    with open(folder / "images" / f"{val}.jpg", "ab") as image:
        image.write(b"more")
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(ConfigError, match="started with other data") as caught:
        resume(run, other)
    assert f"1 of the training images with another image or mask ({train})" in str(caught.value)
    assert f"1 of the validation images with another image or mask ({val})" in str(caught.value)
    for part in ("images", "masks"):
        for path in (folder / part).glob(f"{train}.*"):
            path.rename(path.with_stem("zzz"))
    with pytest.raises(ConfigError, match=rf"training images gone \({train}\)"):
        resume(run, other)
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before


def test_an_unfinished_explicit_phase_keeps_its_start(
    unfinished: Path, finished: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"from encoder\.safetensors .*, now from random weights"):
        resume(unfinished, data)
    with pytest.raises(ConfigError, match=r"now from explicit\.safetensors of finished \("):
        resume(unfinished, data, "--start-from", str(finished))
    # Nothing reads the first weights once the phase is over.
    resume(Path(shutil.copytree(finished, tmp_path / "copy")), data)


def test_validation_images_that_trained_the_first_weights_are_told(
    finished: Path, data: Path, tmp_path: Path
) -> None:
    # Another seed holds out another image, under another name here.
    mine = Path(shutil.copytree(data, tmp_path / "mine")) / "TrainDataset"
    for path in (*mine.glob("images/*"), *mine.glob("masks/*")):
        path.rename(path.with_stem(f"my_{path.stem}"))
    seed = next(seed for seed in range(9) if held_out(mine, seed) != held_out(data, 0))
    tuned, start = tmp_path / "tuned", ["--start-from", str(finished)]
    assert main([str(tuned), "--data", str(mine), *start, *COMMON, f"seed={seed}"]) == 0
    log = (tuned / "train.log").read_text()
    told = f"trained on 1 of the 1 validation images (my_{held_out(mine, seed)})"
    assert log.count("WARNING") == log.count(told) == 1
    assert main([str(tuned), "--data", str(mine), *COMMON, f"seed={seed}"]) == 0
    assert (tuned / "train.log").read_text().count(told) == 2  # the start is known without naming

    same = tmp_path / "same"
    assert main([str(same), "--data", str(data), *start, *COMMON]) == 0
    assert "WARNING" not in (same / "train.log").read_text()


def held_out(data: Path, seed: int) -> str:
    """The stem of the validation image, without the prefix of a copy."""
    return split_for(data, seed).val[0].stem.removeprefix("my_")
