"""A progress bar that needs no package."""

from __future__ import annotations

import sys

from torch import Tensor

from deqsolvers.hypersolver.record import FitEpoch


class Bar:
    """Progress on standard error: tqdm where it is installed, else a line an epoch."""

    def __init__(self, total: int, initial: int, shown: bool):
        self.shown, self.bar = shown, None
        if shown:
            try:
                from tqdm import tqdm
            except ImportError:
                return
            self.bar = tqdm(total=total, initial=initial, desc="fit", dynamic_ncols=True)

    def expect(self, total: int) -> None:
        """Correct how many updates there will be."""
        if self.bar is not None:
            self.bar.total = total

    def update(self, loss: Tensor) -> None:
        if self.bar is not None:
            self.bar.update()
            self.bar.set_postfix(loss=f"{float(loss):.4f}", refresh=False)

    def epoch(self, record: FitEpoch) -> None:
        text = f"fit epoch {record.epoch}: loss {record.loss:.4f}, distance to z* " + " ".join(
            f"{distance:.1e}" for distance in record.distances
        )
        if self.bar is not None:
            self.bar.write(text, file=sys.stderr)
        elif self.shown:
            print(text, file=sys.stderr)

    def close(self) -> None:
        if self.bar is not None:
            self.bar.close()
