"""A web page on this machine: drop an image, see its mask and how each solver got there."""

from __future__ import annotations

import argparse
import io
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image

from polypseg import cli
from polypseg.data import DataError, read_image
from polypseg.drawing import encode_labels, overlay_labels
from polypseg.examples import TRACED_EVALUATIONS
from polypseg.plots import residual_plot
from polypseg.predict import find_polyps
from polypseg.predictor import Predictor, available_solvers
from polypseg.released import released_run, sample_images
from polypseg.result import DISCLAIMER

if TYPE_CHECKING:
    import gradio

SMALLEST_SIDE = 32
SAMPLE_SOURCE = (
    "Samples: Kvasir-SEG test images, part of HyperKvasir (Borgli et al. 2020), CC BY 4.0"
)
HEADER = ("solver", "polyps", "polyp area", "evaluations of f", "residual", "status", "seconds")


@dataclass(frozen=True)
class Answer:
    """What the page shows about one image.

    Attributes:
        contour: (H, W, 3) uint8, the image with the polyps of the last solver tinted and outlined.
        mask: (H, W, 3) uint8, the same polyps as a picture of their own.
        rows: cells of a line for each solver, under `HEADER`.
        curves: (h, w, 3) uint8, a plot of the relative residual against evaluations of f of each
            iterative solver; None if there is none.
    """

    contour: np.ndarray
    mask: np.ndarray
    rows: list[list[str]]
    curves: np.ndarray | None


def answer(predictors: Mapping[str, Predictor], file: Path | str | None) -> Answer:
    """Segment an image file with every solver.

    Args:
        predictors: by solver, at least one; the last one's mask is shown.
        file: an image, or None where none was given.

    Raises:
        ValueError: there is no image, it cannot be read, or a side is shorter than 32 pixels; the
            message is for the person before the page.
    """
    if file is None:
        raise ValueError("There is no image yet: drop one into the field first.")
    try:
        image = read_image(file)
    except DataError as error:
        # The name alone: the folder is one that the page keeps uploads in.
        path = Path(file)
        told = (f"{fault.problem}; {fault.remedy}" for fault in error.faults)
        raise ValueError(" ".join(told).replace(str(path), path.name)) from error
    height, width = image.shape[:2]
    if min(height, width) < SMALLEST_SIDE:
        raise ValueError(
            f"The image is {width} x {height} pixels; both sides need at least {SMALLEST_SIDE}."
        )
    results = {name: each.predict(image, measure=True) for name, each in predictors.items()}
    rows = [
        [
            name,
            str(len(find_polyps(result.mask))),
            f"{result.mask.mean():.1%}",
            str(result.evaluations),
            "–" if np.isnan(result.residual) else f"{result.residual:.1e}",
            result.status,
            f"{result.seconds:.3f}",
        ]
        for name, result in results.items()
    ]
    traces = {
        name: [each.residuals(image, TRACED_EVALUATIONS)]
        for name, each in predictors.items()
        if each.deq is not None
    }
    shown = list(results.values())[-1]
    classes = len(shown.probabilities)
    return Answer(
        contour=overlay_labels(image, shown.labels, classes),
        mask=_pixels(encode_labels(shown.labels, classes)),
        rows=rows,
        curves=_pixels(residual_plot(traces)) if traces else None,
    )


def build_page(
    predictors: Mapping[str, Predictor], title: str, samples: Sequence[Path] = ()
) -> gradio.Blocks:
    """Lay out the page; needs gradio, and asks nothing of other machines.

    Args:
        predictors: as `answer` takes them.
        title: what the page says is shown.
        samples: images to try, of Kvasir-SEG; a click on one segments it.
    """
    # gradio reads it while it is imported and again at the launch.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    last = list(predictors)[-1]

    def show(file: str | None) -> tuple[object, ...]:
        try:
            found = answer(predictors, file)
        except ValueError as error:
            # Empty fields, for an older image's mask must not stand beside a new one.
            return f"**{error}**", None, None, [], None
        return "", found.contour, found.mask, found.rows, found.curves

    def take(index: int) -> tuple[object, ...]:
        return str(samples[index]), *show(str(samples[index]))

    # gradio's button "share" would send the picture to a public site.
    output: dict[str, Any] = {
        "format": "png",
        "interactive": False,
        "buttons": ["download", "fullscreen"],
    }
    # Images of patients do not stay: what is older than ten minutes, and all of it at the end.
    with gradio.Blocks(title=title, analytics_enabled=False, delete_cache=(600, 600)) as page:
        gradio.Markdown(f"# {title}\n{DISCLAIMER} Images stay on the machine that runs this page.")
        with gradio.Row():
            image: Any = gradio.Image(
                label="Image", sources=["upload", "clipboard"], buttons=["fullscreen"]
            )
            # Its own reading fails on a damaged file with a traceback and no word to the person.
            image.preprocess = lambda upload: None if upload is None else upload.path
            contour = gradio.Image(label=f"Contour ({last})", **output)
            mask = gradio.Image(label=f"Mask ({last})", **output)
        if samples:
            offered = gradio.Dataset(
                components=[image], samples=[[str(sample)] for sample in samples], type="index",
                label=SAMPLE_SOURCE, samples_per_page=len(samples),
            )  # fmt: skip
        message = gradio.Markdown()
        button = gradio.Button("Find polyps", variant="primary")
        table = gradio.Dataframe(headers=list(HEADER), label="Solvers", interactive=False)
        gradio.Markdown(f"Residual against evaluations of f, the first {TRACED_EVALUATIONS}:")
        curves = gradio.Image(show_label=False, **output)
        shown = [message, contour, mask, table, curves]
        for event in (image.upload, image.clear, button.click):
            event(show, image, shown, api_visibility="private")
        if samples:
            offered.click(take, offered, [image, *shown], api_visibility="private")
    return page


def _pixels(png: bytes) -> np.ndarray:
    return np.array(Image.open(io.BytesIO(png)).convert("RGB"))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="polypseg-demo",
        description="Serve a web page, for this machine only, that finds polyps in an image. "
        f"{DISCLAIMER}",
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="directory polypseg-train wrote; default: the released model",
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `polypseg-demo` until it is interrupted; errors are raised (see `polypseg.cli`)."""
    options = _parser().parse_args(argv)
    run = released_run() if options.run is None else options.run
    predictors = {solver: Predictor.from_run(run, solver) for solver in available_solvers(run)}
    page = build_page(predictors, f"polypseg: {run.resolve().name}", sample_images())
    _, address, _ = page.launch(
        share=False, quiet=True, prevent_thread_lock=True, footer_links=[], run_history=False
    )
    print(f"Open {address} in a browser; Ctrl-C ends it.", flush=True)
    page.block_thread()
    return 0


if __name__ == "__main__":
    sys.exit(cli.demo())
