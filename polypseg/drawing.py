"""Masks drawn on images, and pictures encoded for files and web pages."""

from __future__ import annotations

import io
from typing import Literal

import cv2
import numpy as np
from PIL import Image

from polypseg.data.classes import CLASS_COLOURS

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


def overlay_labels(image: np.ndarray, labels: np.ndarray, classes: int) -> np.ndarray:
    """Tint and outline each class of polyps: yellow for one, the classes' own colours for three.

    Args:
        image: (H, W, 3) uint8 RGB.
        labels: (H, W) uint8 class numbers, 0 for background.
        classes: 1 or 3.
    """
    if classes == 1:
        return overlay(image, labels > 0)
    for number in range(1, classes):
        image = overlay(image, labels == number, CLASS_COLOURS[number])
    return image


def encode_labels(labels: np.ndarray, classes: int) -> bytes:
    """Class numbers (H, W) uint8 as a PNG: 0 and 255 of one class, NeoPolyp's colours of three."""
    if classes == 1:
        return encode((labels > 0).astype(np.uint8) * np.uint8(255), "PNG")
    picture = Image.fromarray(labels)
    picture.putpalette([value for colour in CLASS_COLOURS for value in colour])
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    return buffer.getvalue()


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
