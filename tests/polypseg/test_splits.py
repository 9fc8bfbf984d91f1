"""Splits are reproducible, complete, and keep whole video sequences together."""

from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from polypseg.data import neopolyp, splits
from polypseg.data.faults import DataError
from polypseg.data.folders import Pair, find_pairs

SEQUENCE_ENDS = [25, 50, 67, 78, 103, 126, 151, 177, 199, 205, 227, 252, 277, 297, 317]
SEQUENCE_ENDS += [342, 363, 383, 408, 428, 447, 466, 478, 503, 528, 546, 571, 591, 612]


def made_up(count: int) -> list[Pair]:
    return [Pair(f"s{i}", Path(f"images/s{i}.jpg"), Path(f"masks/s{i}.png")) for i in range(count)]


def sequence_by_search(frame: int) -> int:
    return next(number for number, end in enumerate(SEQUENCE_ENDS) if frame <= end)


def test_sequence_of_every_clinic_frame() -> None:
    for frame in range(1, 613):
        assert splits.clinic_sequence(f"clinic_{frame}") == sequence_by_search(frame)
    for frame in (0, 613):
        with pytest.raises(ValueError, match="frames 1 to 612"):
            splits.clinic_sequence(f"clinic_{frame}")


def test_committed_list_has_the_promised_composition() -> None:
    stems = splits.published_validation_stems()
    clinic = [stem for stem in stems if stem.startswith("clinic_")]
    assert len(stems) == len(set(stems)) == 145
    assert len(clinic) == 55


def test_committed_list_is_what_the_function_makes(real_data: Path) -> None:
    stems = [pair.stem for pair in find_pairs(real_data / "TrainDataset")]
    assert splits.make_validation_list(stems) == splits.published_validation_stems()
    assert splits.make_validation_list(stems[::-1]) == splits.published_validation_stems()
    assert splits.make_validation_list(stems, seed=99) != splits.published_validation_stems()


@pytest.mark.parametrize("folder", ["", "TrainDataset"])
def test_real_data_gets_the_published_split_without_shared_sequences(
    real_data: Path, folder: str
) -> None:
    split = splits.split_for(real_data / folder, seed=5)
    assert split.rule.startswith("published")
    assert (len(split.train), len(split.val)) == (1305, 145)
    assert not {pair.stem for pair in split.train} & {pair.stem for pair in split.val}
    sequences = [
        {sequence_by_search(int(p.stem[7:])) for p in part if p.stem.startswith("clinic_")}
        for part in (split.train, split.val)
    ]
    assert not sequences[0] & sequences[1]
    assert len(sequences[0] | sequences[1]) == 29


def test_no_validation_image_is_a_test_image(real_data: Path) -> None:
    validation = set(splits.published_validation_stems())
    for folder in splits.test_folders(real_data).values():
        assert not validation & {pair.stem for pair in find_pairs(folder)}


def test_the_last_training_gets_the_validation_images_too(
    write_pairs: Callable[..., Path],
) -> None:
    root = write_pairs([f"s{i}" for i in range(12)])
    split = splits.split_for(root, seed=1)
    whole = split.with_validation_in_training()
    assert [pair.stem for pair in whole.train] == [pair.stem for pair in find_pairs(root)]
    assert whole.val == split.val
    assert split.val
    assert whole.rule != split.rule


def test_published_split_refuses_any_other_set(real_data: Path) -> None:
    pairs = find_pairs(real_data / "TrainDataset")
    with pytest.raises(ValueError, match=r"\(1449\) are not the field's standard"):
        splits.published_split(pairs[1:])


def test_neopolyp_is_parted_by_its_lists(real_data: Path) -> None:
    root = real_data / "NeoPolyp-Small"
    split = splits.split_for(root, seed=5)
    parts = [{pair.stem for pair in part} for part in (split.train, split.val, split.test)]
    assert [len(part) for part in parts] == [720, 80, 200]
    assert set.union(*parts) == {pair.stem for pair in find_pairs(root)}
    with pytest.raises(ValueError, match=r"\(999\) are not the 1000 images of NeoPolyp"):
        splits.neopolyp_split(find_pairs(root)[1:])


@pytest.mark.slow
def test_neopolyp_lists_are_what_the_function_makes(real_data: Path) -> None:
    pairs = find_pairs(real_data / "NeoPolyp-Small")
    test, validation = neopolyp.make_lists(pairs)
    assert test == splits.read_list("neopolyp_test.txt")
    assert validation == splits.read_list("neopolyp_val.txt")
    side = dict.fromkeys(test, 1) | dict.fromkeys(validation, 2)
    for group in neopolyp.near_duplicates(pairs).values():
        assert len({side.get(stem, 0) for stem in group}) == 1


def test_a_changed_list_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "lists").mkdir()
    path = tmp_path / "lists" / "x.txt"
    monkeypatch.setattr(splits.resources, "files", lambda package: tmp_path)
    path.write_text("\n".join([splits.list_head(["a", "b"]), "a", "b", ""]))
    assert splits.read_list("x.txt") == ["a", "b"]
    path.write_text(path.read_text().replace("\nb", "\nc"))
    with pytest.raises(ValueError, match=r"x\.txt: the stems do not match"):
        splits.read_list("x.txt")


def test_random_split_parts_everything_reproducibly() -> None:
    pairs = made_up(50)
    split = splits.random_split(pairs, 0.1, seed=3)
    assert len(split.val) == 5
    assert [p for p in pairs if p in split.train or p in split.val] == pairs
    assert not set(split.train) & set(split.val)
    again = splits.random_split(pairs[::-1], 0.1, seed=3)
    assert set(again.val) == set(split.val)
    assert set(splits.random_split(pairs, 0.1, seed=4).val) != set(split.val)


def test_random_split_draws_all_pairs_evenly() -> None:
    pairs = made_up(20)
    drawn = Counter(
        p.stem for seed in range(400) for p in splits.random_split(pairs, 0.25, seed).val
    )
    # Binomial(400, 1/4): mean 100, standard deviation 8.7; five of them on either side.
    assert len(drawn) == 20
    assert all(56 < count < 144 for count in drawn.values())


@pytest.mark.parametrize(
    ("count", "fraction", "held_out"), [(2, 0.01, 1), (2, 0.99, 1), (3, 0.5, 2)]
)
def test_random_split_leaves_neither_side_empty(count: int, fraction: float, held_out: int) -> None:
    split = splits.random_split(made_up(count), fraction, seed=0)
    assert (len(split.train), len(split.val)) == (count - held_out, held_out)


@pytest.mark.parametrize(("count", "fraction"), [(1, 0.5), (5, 0.0), (5, 1.0), (5, float("nan"))])
def test_random_split_refuses(count: int, fraction: float) -> None:
    with pytest.raises(ValueError, match=r"needs at least 2|between 0 and 1"):
        splits.random_split(made_up(count), fraction, seed=0)


def make_folder(root: Path, stems: list[str]) -> None:
    for folder, suffix in (("images", "jpg"), ("masks", "png")):
        (root / folder).mkdir(parents=True)
        for stem in stems:
            (root / folder / f"{stem}.{suffix}").touch()


@pytest.mark.parametrize("folder", ["", "TrainDataset"])
def test_any_other_folder_gets_a_random_tenth(tmp_path: Path, folder: str) -> None:
    make_folder(tmp_path / folder, [f"x{i}" for i in range(30)])
    split = splits.split_for(tmp_path, seed=1)
    assert (len(split.train), len(split.val)) == (27, 3)
    assert split.rule == "random: 3 of 30 held out, seed 1"


def test_a_single_pair_cannot_be_parted(tmp_path: Path) -> None:
    make_folder(tmp_path / "TrainDataset", ["only"])
    with pytest.raises(DataError, match=r"TrainDataset: holds a single pair, only; add images"):
        splits.split_for(tmp_path)


def test_test_folders_by_name(tmp_path: Path) -> None:
    for name in ("Set10", "Set9"):
        make_folder(tmp_path / "TestDataset" / name, ["a"])
    (tmp_path / "TestDataset" / "README.md").touch()
    found = splits.test_folders(tmp_path)
    assert list(found) == ["Set9", "Set10"]
    assert found["Set9"] == tmp_path / "TestDataset" / "Set9"


def test_test_folders_name_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"TestDataset: there is no such folder"):
        splits.test_folders(tmp_path)
    (tmp_path / "TestDataset").mkdir()
    with pytest.raises(DataError, match="holds no test set"):
        splits.test_folders(tmp_path)
    for name in ("A", "B"):
        (tmp_path / "TestDataset" / name / "images").mkdir(parents=True)
    with pytest.raises(DataError) as caught:
        splits.test_folders(tmp_path)
    assert [fault.path.name for fault in caught.value.faults] == ["A", "B"]
