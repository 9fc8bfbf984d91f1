"""Splits by patient or video."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from polypseg import cli
from polypseg.check import check_folders
from polypseg.config import ConfigError, make_config
from polypseg.data import DataError, Pair, find_pairs, make_synthetic, split_for
from polypseg.data.random_splits import group_split

PATIENT = r"^(p\d+)_"


def pairs_of(sizes: dict[str, int]) -> list[Pair]:
    stems = [f"{name}_{i}" for name, count in sizes.items() for i in range(count)]
    return [Pair(stem, Path(f"i/{stem}.png"), Path(f"m/{stem}.png")) for stem in stems]


def patient(pair: Pair) -> str:
    return pair.stem.split("_")[0]


@given(
    st.lists(st.integers(1, 30), min_size=2, max_size=12),
    st.floats(0.05, 0.6),
    st.integers(0, 50),
)
def test_no_group_is_parted(counts: list[int], fraction: float, seed: int) -> None:
    pairs = pairs_of({f"p{i}": count for i, count in enumerate(counts)})
    split = group_split(Path("data"), pairs, PATIENT, fraction, seed)
    sides = [{patient(pair) for pair in side} for side in (split.train, split.val)]
    assert all(sides)
    assert not sides[0] & sides[1]
    assert sorted(p.stem for p in split.train + split.val) == sorted(p.stem for p in pairs)
    assert len(split.val) <= max(round(fraction * len(pairs)), min(counts))
    again = group_split(Path("data"), pairs[::-1], PATIENT, fraction, seed)
    assert {pair.stem for pair in again.val} == {pair.stem for pair in split.val}


def test_single_images_as_groups_fill_the_fraction() -> None:
    pairs = pairs_of({f"p{i}": 1 for i in range(50)})
    drawn = {
        pair.stem
        for seed in range(60)
        for pair in group_split(Path("data"), pairs, PATIENT, 0.1, seed).val
    }
    assert len(group_split(Path("data"), pairs, PATIENT, 0.1, 0).val) == 5
    assert len(drawn) == 50  # the seed decides


def test_names_without_a_group_are_all_named() -> None:
    pairs = [*pairs_of({"p1": 3, "p2": 3}), *pairs_of({"q": 2})]
    with pytest.raises(DataError) as caught:
        group_split(Path("data"), pairs, PATIENT, 0.1, 0)
    assert [fault.path.name for fault in caught.value.faults] == ["q_0.png", "q_1.png"]
    with pytest.raises(DataError, match="one group in all 3 names: p1"):
        group_split(Path("data"), pairs[:3], PATIENT, 0.1, 0)


@pytest.mark.parametrize(
    ("pattern", "reason"), [("(p", "no regular expression"), ("p", "0 groups"), ("(p)(q)", "2 gr")]
)
def test_a_bad_pattern_is_refused_in_words(pattern, reason, tmp_path, capsys):
    with pytest.raises(ConfigError, match=f"data.group must be .* got .*{reason}"):
        make_config({"data": {"group": pattern}})
    with pytest.raises(SystemExit):
        cli.check([str(tmp_path), "--group", pattern])
    assert reason in capsys.readouterr().err


@pytest.fixture
def patients(tmp_path: Path) -> Path:
    """Ten images of each of two patients and four of a third."""
    make_synthetic(tmp_path / "drawn", train=24, test=1, size=64)
    folder = tmp_path / "patients"
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
        files = sorted((tmp_path / "drawn" / "TrainDataset" / kind).iterdir())
        for index, file in enumerate(files):
            file.rename(folder / kind / f"p{index // 10}_{index % 10}{file.suffix}")
    return folder


def test_a_training_keeps_patients_together(patients, tmp_path, capsys):
    run = tmp_path / "run"
    settings = ["explicit.epochs=1", "data.size=32", "explicit.batch=4", "data.scales=[1.0]"]
    arguments = [str(run), "--data", str(patients), "--phases", "explicit", "--no-evaluate"]
    assert cli.train([*arguments, *settings, f"data.group={PATIENT}"]) == 0
    log = (run / "train.log").read_text()
    assert "20 training and 4 validation images" in log
    assert rf"random by group {PATIENT}: 1 of 3 groups with 4 of 24 held out" in log
    assert cli.train([*arguments, *settings, "data.group=''"]) != 0
    assert f"data.group was {PATIENT}, now" in capsys.readouterr().err


def test_twins_within_a_patient_are_no_fault_of_a_split_by_patient(patients):
    assert check_folders([patients]).faults == []
    split = split_for(patients)
    held_out = split.val[0]
    mate = next(pair for pair in split.train if patient(pair) == patient(held_out))
    mate.image.write_bytes(held_out.image.read_bytes())
    assert any("near-twin" in fault.problem for fault in check_folders([patients]).faults)
    faults = check_folders([patients], group=PATIENT).faults
    assert not any("near-twin" in fault.problem for fault in faults)
    (fault,) = (
        f for f in check_folders([patients], group="(p)").faults if "one group" in f.problem
    )
    assert fault.severity == "error"


def test_every_pair_is_kept(patients):
    split = split_for(patients, seed=3, group=PATIENT)
    assert sorted(p.stem for p in [*split.train, *split.val]) == [
        pair.stem for pair in find_pairs(patients)
    ]
