"""One self-contained web page about a run, and a contact sheet of its predictions."""

from __future__ import annotations

import base64
import csv
import heapq
import html
import io
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from PIL import Image, ImageDraw, ImageFont

from polypseg.checkpoint import write_atomic
from polypseg.data import Pair, read_image, read_pair
from polypseg.drawing import PREDICTION, TRUTH, draw_contour, encode, fit, overlay
from polypseg.metrics import score_masks
from polypseg.predictor import Predictor
from polypseg.scores import TABLE_HEADER, SummaryRow, read_rows, table_cells

EVALUATION = "evaluation"
PICTURES = 12
PICTURE_SIDE = 420
TRACED_EVALUATIONS = 20
DISCLAIMER = "Research use only, not a medical device."


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


def write_report(
    run: Path,
    examples: Mapping[str, Sequence[Example]] | None = None,
    traces: Mapping[str, Sequence[np.ndarray]] | None = None,
) -> Path:
    """Write `report.html` into a run directory, made of what the run holds by now.

    The page needs no other file and no network. Parts that the run does not have yet (curves,
    evaluation) are said to be missing.

    Args:
        run: directory that `polypseg-train` wrote.
        examples: pictures to show by solver, as `worst_examples`.
        traces: residuals after each evaluation of f, by solver, as `residual_traces`.

    Returns:
        The path of the page.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: an evaluation in the run was written by another version.
    """
    run = Path(run)
    sections = [
        ("Evaluation", _evaluation(run / EVALUATION)),
        ("Images", _pictures(examples) if examples else ""),
        ("Residual against evaluations of f", _traces(traces) if traces else ""),
        ("Training", _training(run)),
        ("Configuration", _preformatted(run / "config.yaml")),
        ("Versions", _preformatted(run / "versions.json")),
    ]
    name = html.escape(run.resolve().name)
    body = "\n".join(f"<h2>{title}</h2>\n{content}" for title, content in sections if content)
    page = f"""<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>polypseg: {name}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{name}</h1>
<p class="disclaimer">{DISCLAIMER}</p>
{body}
</body>
</html>
"""
    path = run / "report.html"
    write_atomic(path, page.encode())
    return path


_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; color: #1a1a1a; background: #fff;
       max-width: 70rem; margin: 2rem auto; padding: 0 1rem; }
h2 { border-bottom: 1px solid #ccc; margin-top: 2.5rem; }
.disclaimer { background: #fff3cd; border-left: 4px solid #b58900; padding: .5rem 1rem; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ddd; text-align: right;
         white-space: nowrap; }
th:first-child, td:first-child, .names td:nth-child(2), .names th:nth-child(2)
  { text-align: left; }
img { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 14px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { font-size: 14px; overflow-wrap: anywhere; }
.key { display: inline-block; width: 1.4em; height: .35em; margin: 0 .3em .2em .8em; }
"""


def _evaluation(folder: Path) -> str:
    if not (folder / "summary.csv").is_file():
        return "<p>Not evaluated yet: run <code>polypseg-evaluate</code>.</p>"
    rows = read_rows(folder / "summary.csv", SummaryRow)
    record = json.loads((folder / "summary.json").read_bytes())
    remarks = [
        *(f"Protocol {name}: {text}" for name, text in record["protocols"].items()),
        f"Intervals: {record['intervals']}. HD95: {record['hd95']}. Seconds: {record['seconds']}.",
        *record["notes"],
        f"Command: {record['command']}",
    ]
    return _table(TABLE_HEADER, map(table_cells, rows), "names") + "".join(
        f"<p>{html.escape(remark)}</p>" for remark in remarks
    )


def _pictures(examples: Mapping[str, Sequence[Example]]) -> str:
    keys = "".join(
        f'<span class="key" style="background: rgb{colour}"></span>{label}'
        for label, colour in (("truth", TRUTH), ("prediction", PREDICTION))
    )
    parts = [f"<p>Those with the lowest Dice, worst first. Contours:{keys}</p>"]
    for solver, shown in examples.items():
        figures = "".join(map(_figure, shown))
        parts.append(f'<h3>{html.escape(solver)}</h3>\n<div class="grid">{figures}</div>')
    return "\n".join(parts)


def _figure(example: Example) -> str:
    image = fit(example.image, PICTURE_SIDE, PICTURE_SIDE)
    for mask, colour in ((example.truth, TRUTH), (example.prediction, PREDICTION)):
        image = draw_contour(image, fit(mask, PICTURE_SIDE, PICTURE_SIDE), colour)
    caption = html.escape(f"{example.name}: Dice {100 * example.dice:.1f} %")
    source = _data_uri(encode(image, "JPEG"), "image/jpeg")
    return f'<figure><img src="{source}" alt="">\n<figcaption>{caption}</figcaption></figure>\n'


def _traces(traces: Mapping[str, Sequence[np.ndarray]]) -> str:
    figure = Figure(figsize=(8, 4.5), layout="constrained")
    axis = figure.subplots()
    for index, (solver, curves) in enumerate(traces.items()):
        for residuals in curves:
            evaluations = np.arange(1, len(residuals) + 1)
            axis.plot(evaluations, residuals, color=f"C{index}", alpha=0.4, linewidth=1)
        axis.plot([], [], color=f"C{index}", label=solver)
    axis.set(xlabel="evaluations of f", ylabel="relative residual", yscale="log")
    axis.xaxis.set_major_locator(MaxNLocator(integer=True))
    axis.grid(alpha=0.3)
    axis.legend()
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=110)
    source = _data_uri(picture.getvalue(), "image/png")
    return f'<p>One line per image.</p><img src="{source}" alt="residual curves">'


def _training(run: Path) -> str:
    parts = []
    if (run / "results.csv").is_file():
        with open(run / "results.csv", newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        last = {row["phase"]: row for row in rows}  # later rows of a phase replace earlier ones
        if rows:
            parts.append("<p>The last epoch of each phase:</p>")
            parts.append(_table(rows[0], (map(_short, row.values()) for row in last.values())))
    if (run / "curves.png").is_file():
        source = _data_uri((run / "curves.png").read_bytes(), "image/png")
        parts.append(f'<p><img src="{source}" alt="training curves"></p>')
    return "".join(parts) or "<p>No epoch has been finished yet.</p>"


def _short(cell: str) -> str:
    """Four significant digits of a cell that holds a fraction."""
    try:
        return cell if cell.isdecimal() else f"{float(cell):.4g}"
    except ValueError:
        return cell


def _preformatted(path: Path) -> str:
    return f"<pre>{html.escape(path.read_text(encoding='utf-8'))}</pre>"


def _table(header: Iterable[str], rows: Iterable[Iterable[str]], kind: str = "") -> str:
    head = "".join(f"<th>{html.escape(cell)}</th>" for cell in header)
    lines = "".join(
        "<tr>" + "".join(f"<td>{html.escape(cell)}</td>" for cell in row) + "</tr>\n"
        for row in rows
    )
    return f'<div class="scroll"><table class="{kind}"><tr>{head}</tr>\n{lines}</table></div>'


def _data_uri(data: bytes, kind: str) -> str:
    return f"data:{kind};base64,{base64.b64encode(data).decode()}"


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
