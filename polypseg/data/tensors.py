"""From uint8 pixels to what a network reads: resizing and ImageNet normalisation.

Nothing here needs the augmentation library, so prediction does not either.
"""

from __future__ import annotations

import numpy as np
import torch
from PIL import Image

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """Resize an image (H, W, 3) uint8 to (size, size, 3): bilinear, antialiased when it shrinks."""
    return np.array(Image.fromarray(image).resize((size, size), Image.Resampling.BILINEAR))


def resize_mask(mask: np.ndarray, size: int) -> np.ndarray:
    """Resize a mask (H, W) uint8 of class numbers to (size, size).

    A pixel takes the class that covers most of it; of two that cover half each, the higher one.
    """
    soft = [_cover(mask == number, size) for number in range(1, int(mask.max(initial=0)) + 1)]
    if not soft:
        return np.zeros((size, size), np.uint8)
    if len(soft) == 1:
        return (soft[0] >= 128).astype(np.uint8)
    cover = np.stack([_cover(mask == 0, size), *soft])[::-1]
    return (len(cover) - 1 - cover.argmax(axis=0)).astype(np.uint8)


def _cover(region: np.ndarray, size: int) -> np.ndarray:
    """How much of each of (size, size) pixels a boolean region covers, 0 to 255."""
    full = Image.fromarray(region.astype(np.uint8) * np.uint8(255))
    return np.asarray(full.resize((size, size), Image.Resampling.BILINEAR))


def normalize(image: torch.Tensor) -> torch.Tensor:
    """Subtract ImageNet's mean and divide by its standard deviation, per channel.

    Args:
        image: (..., 3, H, W) float RGB, values 0 to 1.

    Returns:
        The same shape and dtype.
    """
    mean = torch.tensor(IMAGENET_MEAN, dtype=image.dtype, device=image.device)[:, None, None]
    std = torch.tensor(IMAGENET_STD, dtype=image.dtype, device=image.device)[:, None, None]
    return (image - mean) / std


def to_tensor(image: np.ndarray) -> torch.Tensor:
    """Turn an image (H, W, 3) uint8 RGB into a normalised (3, H, W) float32 tensor."""
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
    channels_first = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))
    return normalize(channels_first.float().div_(255))
