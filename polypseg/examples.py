"""Predictions beside the truth, and how solvers did on their images."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw, ImageFont

from polypseg.data import Pair, read_image, read_pair
from polypseg.drawing import PREDICTION, TRUTH, encode, fit, overlay
from polypseg.metrics import score_masks
from polypseg.predictor import Predictor

PICTURES = 12
TRACED_EVALUATIONS = 20


@dataclass(frozen=True)
class Example:
    """An image (H, W, 3) uint8 with its true and its predicted mask (H, W) bool."""

    name: str
    image: np.ndarray
    truth: np.ndarray
    prediction: np.ndarray
    dice: float


def worst_examples(predictor: Predictor, pairs: Iterable[Pair], classes: int = 1) -> list[Example]:
    """Predict the pairs and return up to 12 with the lowest Dice, worst first."""
    # A generator, so that no more than these are in memory.
    return heapq.nsmallest(
        PICTURES, _examples(predictor, pairs, classes), key=lambda example: example.dice
    )


def _examples(predictor: Predictor, pairs: Iterable[Pair], classes: int) -> Iterator[Example]:
    for pair in pairs:
        image, mask = read_pair(pair, classes)
        truth, prediction = mask > 0, predictor.predict(image).mask
        yield Example(pair.stem, image, truth, prediction, score_masks(prediction, truth).dice)


def residual_traces(
    predictors: Mapping[str, Predictor], pairs: Sequence[Pair]
) -> dict[str, list[np.ndarray]]:
    """For each iterative solver and each pair, the residual at every evaluation of f."""
    images = [read_image(pair.image) for pair in pairs]
    return {
        name: [predictor.residuals(image, TRACED_EVALUATIONS) for image in images]
        for name, predictor in predictors.items()
        if predictor.deq is not None
    }


def contact_sheet(examples: Sequence[Example], side: int = 256) -> bytes:
    """Lay out a row per example: image, true mask (green) and predicted mask (yellow).

    Args:
        examples: at least one.
        side: of the square box, in pixels, that each picture is fitted into.

    Returns:
        The bytes of a PNG file.
    """
    if not examples:
        raise ValueError("examples is empty; a contact sheet needs at least one")
    gap, text = 6, 20
    font = ImageFont.load_default(13)
    columns = ("image", "truth", "prediction")
    images = [fit(example.image, side, side) for example in examples]
    width = gap + len(columns) * (side + gap)
    height = text + sum(len(image) + text + gap for image in images)
    sheet = Image.new("RGB", (width, height), "white")
    draw = ImageDraw.Draw(sheet)
    for column, label in enumerate(columns):
        draw.text((gap + column * (side + gap), 3), label, "black", font)
    top = text
    for image, example in zip(images, examples, strict=True):
        panels = (
            image,
            overlay(image, fit(example.truth, side, side), TRUTH),
            overlay(image, fit(example.prediction, side, side), PREDICTION),
        )
        for column, panel in enumerate(panels):
            left = gap + column * (side + gap) + (side - image.shape[1]) // 2
            sheet.paste(Image.fromarray(panel), (left, top))
        caption = f"{example.name}   Dice {100 * example.dice:.1f} %"
        draw.text((gap, top + len(image) + 2), caption, "black", font)
        top += len(image) + text + gap
    return encode(np.array(sheet), "PNG")
