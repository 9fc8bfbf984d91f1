"""Masks drawn on images, and pictures encoded for files and web pages."""

from __future__ import annotations

import io
from typing import Literal

import cv2
import numpy as np
from PIL import Image

Colour = tuple[int, int, int]

PREDICTION: Colour = (255, 230, 0)  # yellow
TRUTH: Colour = (0, 230, 0)  # green

TINT = 0.2
PIXELS_PER_LINE_WIDTH = 160
JPEG_QUALITY = 92


def draw_contour(image: np.ndarray, mask: np.ndarray, colour: Colour) -> np.ndarray:
    """Draw the border of a mask, holes included, on a copy of an image.

    The line is one pixel wide for every 160 of the longer side, so it stays visible when the
    picture is scaled down.

    Args:
        image: (H, W, 3) uint8 RGB.
        mask: (H, W) bool.
        colour: RGB, 0 to 255.
    """
    _check(image, mask)
    drawn = np.ascontiguousarray(image).copy()
    contours, _ = cv2.findContours(mask.astype(np.uint8), cv2.RETR_LIST, cv2.CHAIN_APPROX_NONE)
    width = max(1, round(max(mask.shape) / PIXELS_PER_LINE_WIDTH))
    cv2.drawContours(drawn, contours, -1, colour, width)
    return drawn


def overlay(image: np.ndarray, mask: np.ndarray, colour: Colour = PREDICTION) -> np.ndarray:
    """Tint what a mask covers and draw its border; arguments as `draw_contour`."""
    _check(image, mask)
    tinted = image.copy()
    mixed = (1 - TINT) * image[mask] + TINT * np.array(colour)
    tinted[mask] = mixed.round().astype(np.uint8)
    return draw_contour(tinted, mask, colour)


def fit(image: np.ndarray, width: int, height: int) -> np.ndarray:
    """Scale an image (H, W, 3) or a boolean mask (H, W), aspect kept, to just fit a box."""
    scale = min(width / image.shape[1], height / image.shape[0])
    size = (max(1, round(image.shape[1] * scale)), max(1, round(image.shape[0] * scale)))
    if image.dtype == bool:
        resized = Image.fromarray(image).resize(size, Image.Resampling.NEAREST)
    else:
        resized = Image.fromarray(image).resize(size, Image.Resampling.BICUBIC)
    return np.array(resized)


def encode(image: np.ndarray, kind: Literal["PNG", "JPEG"]) -> bytes:
    """Encode an image (H, W, 3) or (H, W) uint8 as the bytes of a file."""
    buffer = io.BytesIO()
    # Full chroma resolution: thin coloured lines would fade otherwise.
    Image.fromarray(image).save(buffer, kind, quality=JPEG_QUALITY, subsampling=0)
    return buffer.getvalue()


def _check(image: np.ndarray, mask: np.ndarray) -> None:
    if image.dtype != np.uint8 or image.ndim != 3 or image.shape[2] != 3:
        raise ValueError(f"image must be (H, W, 3) uint8, got {image.shape} {image.dtype}")
    if mask.dtype != bool or mask.shape != image.shape[:2]:
        raise ValueError(
            f"mask must be boolean and of the image's size {image.shape[:2]}, "
            f"got {mask.shape} {mask.dtype}"
        )
