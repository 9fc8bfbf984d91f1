"""Segment images with a trained run and plot mask, contour and the solver's residuals.

Run: python examples/predict.py RUN IMAGE... --out picture.png
"""

import argparse
from pathlib import Path

import matplotlib.pyplot as plt

from polypseg.data import read_image
from polypseg.drawing import overlay
from polypseg.predictor import Predictor, available_solvers


def main(argv: list[str] | None = None) -> Path:
    """Write the picture and return its path."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("run", type=Path)
    parser.add_argument("images", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, default=Path("picture.png"))
    options = parser.parse_args(argv)

    solvers = [name for name in available_solvers(options.run) if name != "explicit"]
    predictors = {name: Predictor.from_run(options.run, name) for name in solvers}
    last = predictors[solvers[-1]]
    rows = len(options.images)
    figure, axes = plt.subplots(rows, 3, figsize=(11, 3.4 * rows), squeeze=False)
    for (left, middle, right), path in zip(axes, options.images, strict=True):
        image = read_image(path)
        result = last.predict(image, measure=True)
        print(f"{path.name}: {result.status}, {result.evaluations} evaluations of f")
        left.imshow(overlay(image, result.mask))
        left.set_title(path.name)
        middle.imshow(result.probability, vmin=0, vmax=1)
        middle.set_title("probability")
        for name, predictor in predictors.items():
            right.semilogy(range(1, 13), predictor.residuals(image, 12), label=name)
        right.set(xlabel="evaluations of f", ylabel="relative residual")
        right.legend()
        left.axis("off")
        middle.axis("off")
    figure.tight_layout()
    figure.savefig(options.out, dpi=110)
    plt.close(figure)
    return options.out


if __name__ == "__main__":
    print(main())
