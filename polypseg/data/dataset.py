"""The torch data set of polyp images and the order in which training reads it."""

from __future__ import annotations

from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from polypseg.data.faults import DataError, Fault
from polypseg.data.folders import Pair
from polypseg.data.reading import read_pair
from polypseg.data.tensors import resize_image, resize_mask, to_tensor

if TYPE_CHECKING:
    from polypseg.data.transforms import TrainTransform

READING_THREADS = 4


class PolypDataset(Dataset[dict[str, Any]]):
    """Image and mask pairs as tensors of one square size.

    An item is a dict of "image" (3, size, size) float32, normalised with ImageNet's mean and
    standard deviation; "mask" (1, size, size) float32 of class numbers (`read_mask`); "index", the
    position in `pairs`. With `train` the item is augmented, and (seed, epoch, index) decide how, so
    a resumed run sees what an uninterrupted one would have seen.

    Args:
        pairs: the files.
        size: side of the items in pixels.
        train: whether to augment.
        seed: non-negative seed of the augmentation.
        cache: keep decoded and resized pixels in memory. For training that is 6.25 * size**2 bytes
            a pair: 1.1 GB for 1450 pairs at 352 pixels.
        classes: of the masks: 1, or 3 for NeoPolyp's colours.

    Raises:
        DataError: by an item whose files cannot be read or differ in size.
    """

    def __init__(
        self,
        pairs: Sequence[Pair],
        size: int,
        train: bool,
        seed: int,
        cache: bool = True,
        classes: int = 1,
    ) -> None:
        if not pairs:
            raise ValueError("pairs is empty; a data set needs at least one pair")
        if size < 1:
            raise ValueError(f"size must be at least 1 pixel, got {size}")
        if seed < 0:
            raise ValueError(f"seed must not be negative, got {seed}")
        self.pairs = list(pairs)
        self.size = size
        self.classes = classes
        self.seed = seed
        self.epoch = 0
        self._transform: TrainTransform | None = None
        self._stored_size = size
        if train:
            # Here, so that evaluation and prediction run without the augmentation library.
            from polypseg.data.transforms import TrainTransform

            self._transform = TrainTransform(size)
            self._stored_size = self._transform.source_size
        self._cache: list[tuple[np.ndarray, np.ndarray] | None] | None = (
            [None] * len(pairs) if cache else None
        )

    def __len__(self) -> int:
        return len(self.pairs)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch (0, 1, ...) whose augmentations the items show."""
        if epoch < 0:
            raise ValueError(f"epoch must not be negative, got {epoch}")
        self.epoch = epoch

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, mask = self._stored(index)
        if self._transform is not None:
            image, mask = self._transform(image, mask, (self.seed, self.epoch, index))
        return {
            "image": to_tensor(image),
            "mask": torch.from_numpy(mask).float()[None],
            "index": index,
        }

    def fill_cache(self) -> None:
        """Read every pair that is not yet in memory; no-op without a cache.

        Raises:
            DataError: some pairs cannot be read; all of them are named.
        """
        if self._cache is None:
            return
        faults: list[Fault] = []
        missing = [index for index, entry in enumerate(self._cache) if entry is None]
        with ThreadPoolExecutor(READING_THREADS) as pool:
            for found in pool.map(self._try_store, missing):
                faults.extend(found)
        if faults:
            raise DataError(faults)

    def _try_store(self, index: int) -> list[Fault]:
        try:
            self._stored(index)
        except DataError as error:
            return error.faults
        return []

    def _stored(self, index: int) -> tuple[np.ndarray, np.ndarray]:
        entry = None if self._cache is None else self._cache[index]
        if entry is None:
            image, mask = read_pair(self.pairs[index], self.classes)
            entry = resize_image(image, self._stored_size), resize_mask(mask, self._stored_size)
            if self._cache is not None:
                self._cache[index] = entry
        return entry


def batches(
    dataset: PolypDataset,
    batch_size: int,
    shuffle: bool,
    seed: int,
    epoch: int,
    workers: int = 0,
    drop_last: bool = False,
    parts: int = 1,
    rank: int = 0,
    world: int = 1,
) -> DataLoader[dict[str, Any]]:
    """Return the batches of one epoch, in an order that (seed, epoch) alone decides.

    Also sets the data set's epoch. The global random state of torch is neither read nor changed.

    Args:
        dataset: the pairs.
        batch_size: items per batch.
        shuffle: whether to permute the items; otherwise they come in order.
        seed: non-negative seed of the order.
        epoch: 0, 1, ...
        workers: processes that prepare batches; 0 prepares them in this one.
        drop_last: leave out a last, smaller batch.
        parts: equal parts that each batch comes in, one after the other.
        rank, world: this process among those that share each part evenly.

    Raises:
        ValueError: the batches cannot be shared evenly.
        DataError: with `workers`, by any pair that cannot be read.
    """
    share = parts * world
    if share > 1 and (batch_size % share or not drop_last):
        raise ValueError(
            f"batches of {batch_size} cannot be shared evenly by {parts} parts x {world} processes "
            "(drop_last must be set, too)"
        )
    dataset.set_epoch(epoch)
    if workers:
        # What a worker caches dies with it, so fill the cache here, once; forked workers share the
        # pages.
        dataset.fill_cache()
    sequence = np.random.SeedSequence((seed, epoch))
    order = (
        np.random.default_rng(sequence).permutation(len(dataset))
        if shuffle
        else np.arange(len(dataset))
    )
    chunk = batch_size // share
    starts = range(rank * chunk, len(order), world * chunk)
    if drop_last:
        starts = range(rank * chunk, len(order) - len(order) % batch_size, world * chunk)
    return DataLoader(
        dataset,
        batch_sampler=[order[start : start + chunk].tolist() for start in starts],
        num_workers=workers,
        pin_memory=torch.cuda.is_available(),
        generator=torch.Generator().manual_seed(seed),
    )
