"""Drawn colonoscopy-like images with known masks, for trying the programs without any real data.

A network trained on them says nothing about real polyps.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
from PIL import Image
from scipy.ndimage import gaussian_filter

from polypseg.data.faults import DataError, Fault

MIN_SIZE = 32
JPEG_QUALITY = 95
TRAIN_STREAM, TEST_STREAM = 0, 1


def make_synthetic(
    root: Path, train: int = 64, test: int = 16, size: int = 128, seed: int = 0
) -> None:
    """Write a small synthetic data set in the field's folder layout.

    Images go to `root/TrainDataset/images` and `root/TestDataset/Synthetic/images` as JPEG, masks
    (0 and 255) to the `masks` folders beside them as PNG.

    Args:
        root: a folder that does not exist yet or is empty.
        train: number of training images, at least 1.
        test: number of test images, at least 1.
        size: side of the square images in pixels, at least 32.
        seed: non-negative; image k of a seed is the same whatever the numbers of images.

    Raises:
        DataError: `root` is a file or holds something already; nothing is written then.
        ValueError: a number is out of range.
    """
    for name, value, lowest in (
        ("train", train, 1),
        ("test", test, 1),
        ("size", size, MIN_SIZE),
        ("seed", seed, 0),
    ):
        if value < lowest:
            raise ValueError(f"{name} must be at least {lowest}, got {value}")
    root = Path(root)
    if root.exists() and (not root.is_dir() or any(root.iterdir())):
        raise DataError([Fault(root, "exists and is not an empty folder", "give a new folder")])
    _write_set(root / "TrainDataset", train, size, (seed, TRAIN_STREAM))
    _write_set(root / "TestDataset" / "Synthetic", test, size, (seed, TEST_STREAM))


def draw_pair(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """Draw an image (size, size, 3) uint8 of one to three polyps and its mask (size, size) bool."""
    image, light = _mucosa(rng, size)
    mask = np.zeros((size, size), dtype=bool)
    for _ in range(rng.choice([1, 2, 3], p=[0.75, 0.18, 0.07])):
        image, light, polyp = _add_polyp(rng, image, light)
        mask |= polyp
    image = _add_highlights(rng, image, light)
    vignette = _vignette(rng, size)
    image = image * vignette[..., None]
    mask &= vignette > 0.4  # not where the frame of the optics hides the polyp
    image = gaussian_filter(image, (size / 400, size / 400, 0)) + rng.normal(0, 0.008, image.shape)
    return (image.clip(0, 1) * 255).round().astype(np.uint8), mask


def _write_set(folder: Path, count: int, size: int, stream: tuple[int, int]) -> None:
    for name in ("images", "masks"):
        (folder / name).mkdir(parents=True)
    for index in range(count):
        image, mask = draw_pair(np.random.default_rng((*stream, index)), size)
        stem = f"synthetic_{index + 1:04d}"
        Image.fromarray(image).save(folder / "images" / f"{stem}.jpg", quality=JPEG_QUALITY)
        white = mask.astype(np.uint8) * np.uint8(255)
        Image.fromarray(white).save(folder / "masks" / f"{stem}.png")


def _smooth_noise(rng: np.random.Generator, size: int, length: float) -> np.ndarray:
    """Gaussian field with a correlation length given as a fraction of the side; mean 0, std 1."""
    field = gaussian_filter(rng.standard_normal((size, size)), length * size, mode="reflect")
    return (field - field.mean()) / field.std()


def _grid(size: int) -> tuple[np.ndarray, np.ndarray]:
    """Pixel centres as (y, x), each from -1 to 1."""
    axis = (np.arange(size) + 0.5) / size * 2 - 1
    y, x = np.meshgrid(axis, axis, indexing="ij")
    return y, x


def _mucosa(rng: np.random.Generator, size: int) -> tuple[np.ndarray, np.ndarray]:
    """The bowel wall as float RGB (size, size, 3), and how brightly each pixel is lit."""
    y, x = _grid(size)
    angle = rng.uniform(0, 2 * np.pi)
    offset = rng.uniform(0.3, 1.3)
    distance = np.hypot(y - offset * np.sin(angle), x - offset * np.cos(angle))
    # Folds are rings around the lumen, bent by noise: a lit crest with a shaded side behind it.
    phase = 2 * np.pi * (rng.uniform(0.8, 1.8) * distance + 0.12 * _smooth_noise(rng, size, 0.15))
    phase += rng.uniform(0, 2 * np.pi)
    folds = np.exp(2.5 * (np.sin(phase) - 1)) - 0.7 * np.exp(2.5 * (np.sin(phase + 0.9) - 1))
    light = 0.78 + rng.uniform(0.08, 0.22) * folds + 0.06 * _smooth_noise(rng, size, 0.12)
    # Little light comes back from the lumen.
    light *= 1 - 0.85 * np.exp(-((distance / rng.uniform(0.35, 0.6)) ** 2))

    tint = np.array([0.86, 0.52, 0.42]) + rng.normal(0, [0.04, 0.05, 0.05])
    blush = 0.03 * _smooth_noise(rng, size, 0.08) + 0.015 * _smooth_noise(rng, size, 0.02)
    vessels = np.exp(-((_smooth_noise(rng, size, 0.05) / 0.07) ** 2))
    vessels *= rng.uniform(0, 0.1) * (_smooth_noise(rng, size, 0.2) > 0)
    redness = blush + gaussian_filter(vessels, size / 250)
    colour = tint - redness[..., None] * np.array([0.3, 1.0, 0.9])
    return colour * light[..., None], light


def _add_polyp(
    rng: np.random.Generator, image: np.ndarray, light: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Paint one polyp; return the image, the light on it and the polyp's mask."""
    size = len(light)
    y, x = _grid(size)
    radius = rng.uniform(0.16, 0.5)
    dy, dx = y - rng.uniform(-0.6, 0.6), x - rng.uniform(-0.6, 0.6)
    turn, squeeze = rng.uniform(0, np.pi), rng.uniform(0.65, 1.0)
    along = dx * np.cos(turn) + dy * np.sin(turn)
    across = (dy * np.cos(turn) - dx * np.sin(turn)) / squeeze
    theta = np.arctan2(across, along)
    outline = np.ones_like(theta)
    for wave in range(2, 7):
        outline += rng.normal(0, 0.18 / wave) * np.cos(wave * theta + rng.uniform(0, 2 * np.pi))
    reach = np.hypot(along, across) / (radius * outline)  # 0 in the middle, 1 on the outline
    mask = reach < 1

    # A dome lit from one side, which shades the wall on the other.
    side = rng.uniform(0, 2 * np.pi)
    toward = (dy * np.sin(side) + dx * np.cos(side)) / radius
    dome = np.sqrt((1 - reach**2).clip(0, 1))
    shading = 0.68 + 0.38 * dome + rng.uniform(0.05, 0.16) * toward
    shading += 0.03 * _smooth_noise(rng, size, 0.02)
    shadow = np.exp(-(((reach - 1) / 0.22) ** 2)) * (0.6 - 0.5 * toward).clip(0, 1)
    shadow *= rng.uniform(0.15, 0.4)

    # Some polyps are redder than the wall, some paler; the difference may be slight.
    local_tint = image[mask].mean(axis=0)
    brightness = max(float(local_tint.mean()), 0.35) / local_tint.mean()
    kind = rng.choice([-1.0, 1.0], p=[0.35, 0.65])
    shift = kind * rng.uniform(0.02, 0.09) * np.array([-0.2, -1.0, -0.7])
    texture = 0.025 * _smooth_noise(rng, size, 0.03) + 0.02 * _smooth_noise(rng, size, 0.012)
    colour = (local_tint * brightness * 1.1 + shift)[None, None] + texture[..., None]
    surface = 0.25 * image + 0.75 * colour  # what lies under it still shows in its surface
    surface *= shading[..., None]

    cover = gaussian_filter(mask.astype(float), size / 160)[..., None]
    wall = image * (1 - shadow * ~mask)[..., None]
    lit = np.where(mask, shading * light.max(), light)
    return wall * (1 - cover) + surface * cover, lit, mask


def _add_highlights(rng: np.random.Generator, image: np.ndarray, light: np.ndarray) -> np.ndarray:
    """Mirror images of the lamp on wet tissue: small, white, where the surface is well lit."""
    size = len(light)
    glint = _smooth_noise(rng, size, 0.018) + 0.7 * _smooth_noise(rng, size, 0.06)
    glint += 1.5 * (light / light.max() - 1)
    spots = gaussian_filter((glint > rng.uniform(2.4, 3.1)).astype(float), size / 200)[..., None]
    return image * (1 - spots) + 0.97 * spots


def _vignette(rng: np.random.Generator, size: int) -> np.ndarray:
    """Fall-off toward the corners and, in half of the images, the black frame of the optics."""
    y, x = _grid(size)
    fall_off = 1 - rng.uniform(0.1, 0.35) * (x**2 + y**2) / 2
    if rng.random() < 0.5:
        frame = np.maximum(np.abs(x) + np.abs(y) - rng.uniform(1.5, 1.75), 0)
        fall_off *= gaussian_filter((frame == 0).astype(float), size / 160)
    return fall_off
