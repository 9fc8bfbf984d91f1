"""How fast training images are read, cached and augmented: `python -m benchmarks.loading DATA`."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from polypseg.data import PolypDataset, batches, find_pairs, training_folder

EVERY = 6  # of the images, enough to measure
BATCH = 16


def main(data: Path) -> None:
    pairs = find_pairs(training_folder(data))[::EVERY]
    for size in (256, 352):
        dataset = PolypDataset(pairs, size, train=True, seed=0)
        started = time.perf_counter()
        dataset.fill_cache()
        seconds = time.perf_counter() - started
        print(f"{size} px, read and shrunk, once a run: {len(pairs) / seconds:.0f} images/s")
        for workers in (0, 2):
            started = time.perf_counter()
            epoch = batches(dataset, BATCH, True, 0, 0, workers=workers, drop_last=True)
            seen = sum(len(batch["index"]) for batch in epoch)
            speed = seen / (time.perf_counter() - started)
            print(f"{size} px, augmented with {workers} workers: {speed:.0f} images/s")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
