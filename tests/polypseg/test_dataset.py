"""Items, augmentation and order of the training data."""

import colorsys
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polypseg.data.dataset import PolypDataset, batches
from polypseg.data.faults import DataError
from polypseg.data.folders import find_pairs
from polypseg.data.tensors import resize_image, resize_mask, to_tensor
from polypseg.data.transforms import TrainTransform

WritePairs = Callable[..., Path]
STEMS = [f"s{i}" for i in range(7)]


def same(a: dict, b: dict) -> bool:
    return torch.equal(a["image"], b["image"]) and torch.equal(a["mask"], b["mask"])


def test_evaluation_item_is_the_resized_normalised_image(write_pairs: WritePairs) -> None:
    pairs = find_pairs(write_pairs(STEMS))
    item = PolypDataset(pairs, 32, train=False, seed=0)[2]
    picture = Image.open(pairs[2].image).resize((32, 32), Image.Resampling.BILINEAR)
    pixels = np.asarray(picture).astype(np.float64) / 255
    expected = (pixels - [0.485, 0.456, 0.406]) / [0.229, 0.224, 0.225]
    np.testing.assert_allclose(item["image"].permute(1, 2, 0).numpy(), expected, atol=1e-5)
    assert item["image"].dtype == item["mask"].dtype == torch.float32
    assert item["mask"].shape == (1, 32, 32)
    assert set(item["mask"].unique().tolist()) == {0.0, 1.0}
    assert item["index"] == 2
    truth = np.asarray(Image.open(pairs[2].mask)) > 0
    assert item["mask"].mean().item() == pytest.approx(truth.mean(), abs=0.02)


def test_augmentation_depends_on_seed_epoch_and_index_alone(write_pairs: WritePairs) -> None:
    pairs = find_pairs(write_pairs(STEMS))
    first = PolypDataset(pairs, 32, train=True, seed=4)
    first.set_epoch(3)
    items = [first[i] for i in range(7)]
    resumed = PolypDataset(pairs, 32, train=True, seed=4, cache=False)
    resumed.set_epoch(3)
    np.random.seed(99)  # noqa: NPY002  # the global state must not matter
    torch.manual_seed(99)
    assert all(same(resumed[i], items[i]) for i in reversed(range(7)))
    resumed.set_epoch(4)
    assert not any(same(resumed[i], items[i]) for i in range(7))
    other = PolypDataset(pairs, 32, train=True, seed=5)
    other.set_epoch(3)
    assert not any(same(other[i], items[i]) for i in range(7))


def test_two_indices_of_one_picture_are_augmented_differently(write_pairs: WritePairs) -> None:
    pair = find_pairs(write_pairs(["a"]))[0]
    dataset = PolypDataset([pair, pair], 32, train=True, seed=0)
    assert not same(dataset[0], dataset[1])


def test_image_and_mask_move_together() -> None:
    mask = np.zeros((100, 100), np.uint8)
    mask[20:50, 30:90] = 1
    mask[50:80, 30:45] = 1
    image = np.where(mask[..., None] > 0, 230, 40).astype(np.uint8).repeat(3, axis=2)
    transform = TrainTransform(80)
    for seed in range(60):
        moved, moved_mask = transform(image, mask, (seed,))
        assert moved.shape == (80, 80, 3)
        assert moved.dtype == moved_mask.dtype == np.uint8
        assert set(np.unique(moved_mask)) == {0, 1}
        grey = moved.mean(axis=2)
        bright = grey > (grey[moved_mask > 0].mean() + np.median(grey[moved_mask == 0])) / 2
        overlap = 2 * (bright & (moved_mask > 0)).sum() / (bright.sum() + moved_mask.sum())
        assert overlap > 0.93


@pytest.mark.parametrize("size", [96, 256])
def test_a_mask_lies_where_its_image_does(size: int) -> None:
    """By the centroids of discs: brightness weighs the image, and the nearest pixel the mask."""
    transform = TrainTransform(size)
    side = transform.source_size
    rng = np.random.default_rng(0)
    rows, columns = np.mgrid[:side, :side]
    offsets = []
    for seed in range(200):
        row, column = side / 2 + rng.uniform(-side / 6, side / 6, 2)
        mask = np.hypot(rows - row, columns - column) <= rng.uniform(side / 12, side / 7)
        image = 200 * mask[..., None].repeat(3, axis=2).astype(np.uint8)
        moved, moved_mask = transform(image, mask.astype(np.uint8), (seed,))
        grey = moved.mean(axis=2)
        centroids = [
            np.mgrid[:size, :size].reshape(2, -1) @ weights.ravel() / weights.sum()
            for weights in (grey - np.median(grey[moved_mask == 0]), moved_mask.astype(float))
        ]
        offsets.append(centroids[1] - centroids[0])
    assert np.abs(np.mean(offsets, axis=0)).max() < 0.05


def test_rotation_and_scale_stay_in_their_ranges() -> None:
    bar = np.zeros((200, 200), np.uint8)
    bar[95:105, 60:140] = 1
    transform = TrainTransform(160)
    angles, areas = [], []
    for seed in range(150):
        _, moved = transform(np.zeros((200, 200, 3), np.uint8), bar, (seed,))
        y, x = np.nonzero(moved)
        values, vectors = np.linalg.eigh(np.cov(x, y))
        long_axis = vectors[:, values.argmax()]
        # Flips and the transposition turn by multiples of 90 degrees or mirror.
        angle = np.degrees(np.arctan2(long_axis[1], long_axis[0])) % 90
        angles.append(min(angle, 90 - angle))
        areas.append(moved.sum() / (bar.sum() * 0.8**2))
    assert 24 < max(angles) < 30
    assert 0.8**2 * 0.9 < min(areas) < 0.75
    assert 1.4 < max(areas) < 1.25**2 * 1.1


def test_steps_are_drawn_independently() -> None:
    """A corner patch shows its symmetry by its place, moving by its shape, jitter by its colour."""
    image = np.full((40, 40, 3), [180, 90, 60], np.uint8)
    mask = np.zeros((40, 40), np.uint8)
    mask[:20, :20] = 1
    transform = TrainTransform(40)
    seen = set()
    for seed in range(250):
        moved, moved_mask = transform(image, mask, (seed,))
        quadrants = moved_mask.reshape(2, 20, 2, 20).mean(axis=(1, 3))
        shifted = sorted(quadrants.ravel()) != [0, 0, 0, 1]
        jittered = not (moved[20, 20] == [180, 90, 60]).all()
        seen.add((int(quadrants.argmax()), shifted, jittered))
    assert len(seen) == 16


def test_all_eight_symmetries_of_a_square_are_drawn() -> None:
    """Told by where two unlike corners of the mask end up."""
    mask = np.zeros((40, 40), np.uint8)
    mask[:20, :20] = 1
    mask[:10, 20:] = 1
    transform = TrainTransform(40)
    seen = set()
    for seed in range(120):
        _, moved = transform(np.zeros((40, 40, 3), np.uint8), mask, (seed,))
        halves = moved.reshape(4, 10, 4, 10).mean(axis=(1, 3))
        if set(halves.ravel()) == {0, 1}:  # neither turned nor scaled
            seen.add(tuple(halves.ravel()))
    assert len(seen) == 8


def test_colours_change_a_little() -> None:
    """Of an even picture brightness is the jitter's, whose contrast and saturation leave grey."""
    transform = TrainTransform(16)
    mask = np.zeros((16, 16), np.uint8)
    factors, hues = [], []
    for seed in range(400):
        for colour, found in (([100, 100, 100], factors), ([200, 100, 60], hues)):
            moved, _ = transform(np.full((16, 16, 3), colour, np.uint8), mask, (seed,))
            if (moved == moved[0, 0]).all():  # no border was moved in
                found.append(moved[0, 0] / 255)
    brightness = np.array(factors)[:, 0] * 2.55
    assert 0.69 < brightness.min() < 0.75
    assert 1.25 < brightness.max() < 1.31
    shifts = [colorsys.rgb_to_hsv(*one)[0] - colorsys.rgb_to_hsv(200, 100, 60)[0] for one in hues]
    assert 0.02 < max(shifts) < 0.045
    assert -0.045 < min(shifts) < -0.02


def test_shrinking_is_antialiased_and_mask_is_cut_at_half() -> None:
    stripes = np.tile(np.array([0, 255], np.uint8), (64, 32))
    small = resize_image(stripes[..., None].repeat(3, axis=2), 16)
    assert np.abs(small.astype(int)[:, 1:-1] - 127).max() <= 2
    mask = np.zeros((64, 64), np.uint8)
    mask[:, :33] = 1
    assert resize_mask(mask, 16)[:, :8].all()
    assert not resize_mask(mask, 16)[:, 9:].any()
    with pytest.raises(ValueError, match=r"\(H, W, 3\) uint8"):
        to_tensor(np.zeros((3, 8, 8), np.float32))


def test_cache_spares_the_files_and_no_cache_reads_them_again(write_pairs: WritePairs) -> None:
    root = write_pairs(STEMS)
    pairs = find_pairs(root)
    cached = PolypDataset(pairs, 32, train=True, seed=0)
    uncached = PolypDataset(pairs, 32, train=True, seed=0, cache=False)
    before = cached[1]
    cached.fill_cache()
    assert same(uncached[1], before)
    for pair in pairs:
        pair.image.unlink()
    assert same(cached[1], before)
    with pytest.raises(DataError, match=r"s1\.jpg"):
        uncached[1]


def test_fill_cache_names_all_bad_files(write_pairs: WritePairs) -> None:
    root = write_pairs(STEMS)
    pairs = find_pairs(root)
    (root / "images" / "s2.jpg").write_bytes(b"rubbish")
    Image.new("L", (5, 5)).save(root / "masks" / "s5.png")
    with pytest.raises(DataError) as caught:
        PolypDataset(pairs, 32, train=False, seed=0).fill_cache()
    assert {fault.path.name for fault in caught.value.faults} == {"s2.jpg", "s5.png"}


def test_bad_arguments() -> None:
    for wrong, message in (
        ({"pairs": []}, "pairs is empty"),
        ({"size": 0}, "size must be at least 1"),
        ({"seed": -1}, "seed must not be negative"),
    ):
        arguments: dict = {"pairs": [None], "size": 32, "train": False, "seed": 0} | wrong
        with pytest.raises(ValueError, match=message):
            PolypDataset(**arguments)


def order(dataset: PolypDataset, *, shuffle: bool, seed: int, epoch: int) -> list[int]:
    loader = batches(dataset, 3, shuffle, seed, epoch)
    return [i for batch in loader for i in batch["index"].tolist()]


def test_order_is_a_function_of_seed_and_epoch(write_pairs: WritePairs) -> None:
    pairs = find_pairs(write_pairs([f"s{i}" for i in range(20)]))
    dataset = PolypDataset(pairs, 16, train=True, seed=0)
    orders = {(s, e): order(dataset, shuffle=True, seed=s, epoch=e) for s in (0, 1) for e in (0, 1)}
    torch.manual_seed(7)
    assert order(dataset, shuffle=True, seed=1, epoch=0) == orders[1, 0]
    assert len({tuple(o) for o in orders.values()}) == 4
    assert all(sorted(o) == list(range(20)) for o in orders.values())
    assert order(dataset, shuffle=False, seed=1, epoch=0) == list(range(20))
    torch.manual_seed(7)
    state = torch.get_rng_state()
    order(dataset, shuffle=True, seed=0, epoch=0)
    assert torch.equal(torch.get_rng_state(), state)


def test_last_batch(write_pairs: WritePairs) -> None:
    dataset = PolypDataset(find_pairs(write_pairs(STEMS)), 16, train=False, seed=0)
    sizes = [len(b["index"]) for b in batches(dataset, 3, False, 0, 0)]
    assert sizes == [3, 3, 1]
    sizes = [len(b["index"]) for b in batches(dataset, 3, False, 0, 0, drop_last=True)]
    assert sizes == [3, 3]


def test_workers_give_the_same_batches(write_pairs: WritePairs) -> None:
    pairs = find_pairs(write_pairs(STEMS))
    alone = list(batches(PolypDataset(pairs, 16, train=True, seed=1), 3, True, 1, 2))
    shared = list(batches(PolypDataset(pairs, 16, train=True, seed=1), 3, True, 1, 2, workers=2))
    assert all(same(a, b) for a, b in zip(alone, shared, strict=True))


def test_a_bad_file_met_by_a_worker_is_named(write_pairs: WritePairs) -> None:
    root = write_pairs(STEMS)
    (root / "images" / "s4.jpg").write_bytes(b"rubbish")
    dataset = PolypDataset(find_pairs(root), 16, train=True, seed=0, cache=False)
    with pytest.raises(RuntimeError, match=r"s4\.jpg: cannot be decoded"):
        list(batches(dataset, 3, False, 0, 0, workers=1))


def test_only_augmentation_needs_albumentations() -> None:
    code = (
        "import sys; sys.modules['albumentations'] = None\n"
        "from polypseg.data import PolypDataset, list_images, read_image, split_for, to_tensor\n"
        "PolypDataset([None], 32, train=False, seed=0)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_real_images(real_data: Path) -> None:
    pairs = find_pairs(real_data / "TestDataset" / "Kvasir")[:4]
    batch = next(iter(batches(PolypDataset(pairs, 96, train=True, seed=0), 4, True, 0, 0)))
    assert batch["image"].shape == (4, 3, 96, 96)
    assert batch["image"].std() > 0.3
    assert 0 < batch["mask"].mean() < 1
