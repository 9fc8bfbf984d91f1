"""Draws docs/pictures/predictions.jpg: a trained run's predictions on four Kvasir-SEG test images.

Usage: python docs/pictures/make_predictions.py RUN

The images are every second one in samples/, which is every 25th test image by name: no choice by
result.
"""

import io
import sys
from pathlib import Path

from PIL import Image

from polypseg.data import find_pairs, read_pair
from polypseg.examples import Example, contact_sheet
from polypseg.metrics import score_masks
from polypseg.predictor import Predictor

SAMPLES = Path(__file__).parents[2] / "samples"


def main(run: Path) -> None:
    predictor = Predictor.from_run(run)
    examples = []
    for pair in find_pairs(SAMPLES)[::2]:
        image, mask = read_pair(pair)
        truth, prediction = mask.astype(bool), predictor.predict(image).mask
        dice = score_masks(prediction, truth).dice
        examples.append(Example(pair.stem, image, truth, prediction, dice))
    sheet = Image.open(io.BytesIO(contact_sheet(examples))).convert("RGB")
    sheet.save(Path(__file__).with_name("predictions.jpg"), quality=85)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
