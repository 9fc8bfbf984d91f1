"""Fixtures shared by the tests of the application."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from polypseg.checkpoint import save_weights
from polypseg.config import make_config
from polypseg.data import find_pairs, make_synthetic, read_image, resize_image, to_tensor
from polypseg.models import build_hypersolver, build_model


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


@pytest.fixture(scope="session")
def synthetic_data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A data folder with TestDataset/Synthetic: six drawn images of 80 x 80 pixels."""
    root = tmp_path_factory.mktemp("synthetic") / "data"
    make_synthetic(root, train=1, test=6, size=80)
    return root


@pytest.fixture(scope="session")
def tiny_run(tmp_path_factory: pytest.TempPathFactory, synthetic_data: Path) -> Path:
    """A run directory with random weights for every solver; about half of an image is "polyp"."""
    run = tmp_path_factory.mktemp("runs") / "tiny"
    run.mkdir()
    settings = ["data.size=64", "solve.max_steps=6", "solve.tol=0.05"]
    config = make_config(overrides=[*settings, "solve.hyper_steps=2", "solve.hyper_tol=0"])
    (run / "config.yaml").write_text(config.to_yaml())
    (run / "versions.json").write_text('{"torch": "of this test"}')
    pairs = find_pairs(synthetic_data / "TestDataset" / "Synthetic")
    images = torch.stack([to_tensor(resize_image(read_image(p.image), 64)) for p in pairs])
    with torch.random.fork_rng(), torch.no_grad():
        for phase, seed in (("explicit", 1), ("implicit", 2)):
            torch.manual_seed(seed)
            model = build_model(config.model).eval()
            model.head[-1].bias -= model.explicit(images).logits.median()
            save_weights(run / f"{phase}.safetensors", model.state_dict(), {})
        hyper = build_hypersolver(model, config.hyper)
        save_weights(run / "hyper.safetensors", hyper.state_dict(), {})
    return run


@pytest.fixture
def copy_run(tiny_run: Path, tmp_path: Path) -> Callable[[], Path]:
    """Copy the tiny run to a place where it may be changed."""
    return lambda: Path(shutil.copytree(tiny_run, tmp_path / "run"))
