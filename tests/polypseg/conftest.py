"""Fixtures shared by the tests of the application."""

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session")
def real_data() -> Path:
    """The folder of real colonoscopy images, from POLYPSEG_DATA."""
    default = Path(__file__).resolve().parents[2].parent / "shared" / "data"
    folder = Path(os.environ.get("POLYPSEG_DATA", default))
    if not (folder / "TrainDataset").is_dir():
        pytest.skip(f"no real images: {folder} holds no TrainDataset; set POLYPSEG_DATA")
    return folder


@pytest.fixture
def write_pairs(tmp_path: Path) -> Callable[..., Path]:
    """Write smooth random images, each with a rectangle for a mask, and return their folder."""

    def write(stems: list[str], size: tuple[int, int] = (40, 60)) -> Path:
        height, width = size
        rng = np.random.default_rng(0)
        for name in ("images", "masks"):
            (tmp_path / name).mkdir(exist_ok=True)
        for stem in stems:
            coarse = rng.integers(0, 256, (4, 5, 3), dtype=np.uint8)
            image = Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC)
            image.save(tmp_path / "images" / f"{stem}.jpg", quality=95)
            mask = np.zeros((height, width), np.uint8)
            top, left = rng.integers(0, height // 2), rng.integers(0, width // 2)
            mask[top : top + height // 3, left : left + width // 3] = 255
            Image.fromarray(mask).save(tmp_path / "masks" / f"{stem}.png")
        return tmp_path

    return write
