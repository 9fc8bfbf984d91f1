"""One self-contained web page about a run, and a contact sheet of its predictions."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np

from polypseg.checkpoint import write_atomic
from polypseg.drawing import PREDICTION, TRUTH, draw_contour, encode, fit
from polypseg.examples import Example
from polypseg.lineage import RECORD, read_lineage
from polypseg.lineage_text import described
from polypseg.paper import CAVEAT, beside_the_paper
from polypseg.plots import accuracy_against_time, residual_plot
from polypseg.protocols import POLYP
from polypseg.result import DISCLAIMER
from polypseg.run_config import load_run_config
from polypseg.runs import is_release, read_epochs
from polypseg.scores import TABLE_HEADER, ImageRow, SummaryRow, by_kind, read_rows, table_cells

EVALUATION = "evaluation"
PICTURE_SIDE = 420


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
        examples: pictures to show by the title above them, as `worst_examples`.
        traces: residuals after each evaluation of f, by solver, as `residual_traces`.

    Returns:
        The path of the page.

    Raises:
        OSError: a file cannot be read or written.
        ValueError: an evaluation in the run was written by another version.
    """
    run = Path(run)
    sections = [
        *_evaluation(run / EVALUATION).items(),
        ("Worst images", _pictures(examples) if examples else ""),
        ("Residual against evaluations of f", _traces(traces) if traces else ""),
        ("Data", _data(run)),
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
th:first-child, td:first-child, .names td:nth-child(-n+4), .names th:nth-child(-n+4)
  { text-align: left; }
img { max-width: 100%; height: auto; }
pre { background: #f5f5f5; padding: 1rem; overflow-x: auto; font-size: 14px; }
.grid { display: grid; grid-template-columns: repeat(auto-fill, minmax(15rem, 1fr)); gap: 1rem; }
figure { margin: 0; }
figcaption { font-size: 14px; overflow-wrap: anywhere; }
summary { cursor: pointer; font-weight: 600; padding: .3rem 0; }
.key { display: inline-block; width: 1.4em; height: .35em; margin: 0 .3em .2em .8em; }
"""


def _evaluation(folder: Path) -> dict[str, str]:
    """The sections on an evaluation, by title."""
    if not (folder / "summary.csv").is_file():
        text = "<p>Not evaluated yet: run <code>polypseg-evaluate</code>.</p>"
        return {"Evaluation": text}
    rows = read_rows(folder / "summary.csv", SummaryRow)
    record = json.loads((folder / "summary.json").read_bytes())
    remarks = [
        *(f"Protocol {name}: {text}" for name, text in record["protocols"].items()),
        f"Intervals: {record['intervals']}. HD95: {record['hd95']}. Seconds: {record['seconds']}.",
        *record["notes"],
        f"Command: {record['command']}",
    ]
    sections = {
        "Evaluation": _table(TABLE_HEADER, map(table_cells, rows), "names") + _paragraphs(remarks)
    }
    beside = beside_the_paper(rows)
    if beside is not None:
        sections["Beside the paper (mDice / mIoU, %)"] = _table(*beside) + _paragraphs([CAVEAT])
    shown = [row for row in rows if (row.protocol, row.target) == (rows[0].protocol, POLYP)]
    sections["Accuracy against time"] = _plot(accuracy_against_time(shown), "accuracy against time")
    sections["Every image, worst first"] = _images(folder, list(record["data"]), rows)
    return sections


def _images(folder: Path, names: Sequence[str], rows: Sequence[SummaryRow]) -> str:
    """A folded table for each test set under the last solver."""
    solver, protocol = rows[-1].solver, rows[0].protocol
    parts = []
    for name in names:
        found = by_kind(read_rows(folder / f"{name}-{solver}.csv", ImageRow))[protocol, POLYP]
        cells = [
            (
                row.stem,
                f"{100 * row.dice:.1f}",
                f"{100 * row.iou:.1f}",
                f"{row.hd95:.1f}",
                str(row.evaluations),
                f"{row.residual:.1e}" if row.residual == row.residual else "–",
                row.status,
            )
            for row in sorted(found, key=lambda row: row.dice)
        ]
        table = _table(
            ("image", "Dice %", "IoU %", "HD95 px", "evaluations", "residual", "status"), cells
        )
        title = html.escape(f"{name}, {solver}: {len(cells)} images")
        parts.append(f"<details><summary>{title}</summary>{table}</details>")
    return "\n".join(parts)


def _paragraphs(texts: Iterable[str]) -> str:
    return "".join(f"<p>{html.escape(text)}</p>" for text in texts)


def _plot(png: bytes, description: str) -> str:
    return f'<p><img src="{_data_uri(png, "image/png")}" alt="{description}"></p>'


def _pictures(examples: Mapping[str, Sequence[Example]]) -> str:
    keys = "".join(
        f'<span class="key" style="background: rgb{colour}"></span>{label}'
        for label, colour in (("truth", TRUTH), ("prediction", PREDICTION))
    )
    parts = [f"<p>Those with the lowest Dice, worst first. Contours:{keys}</p>"]
    for title, shown in examples.items():
        figures = "".join(map(_figure, shown))
        parts.append(f'<h3>{html.escape(title)}</h3>\n<div class="grid">{figures}</div>')
    return "\n".join(parts)


def _figure(example: Example) -> str:
    image = fit(example.image, PICTURE_SIDE, PICTURE_SIDE)
    for mask, colour in ((example.truth, TRUTH), (example.prediction, PREDICTION)):
        image = draw_contour(image, fit(mask, PICTURE_SIDE, PICTURE_SIDE), colour)
    caption = html.escape(f"{example.name}: Dice {100 * example.dice:.1f} %")
    source = _data_uri(encode(image, "JPEG"), "image/jpeg")
    return f'<figure><img src="{source}" alt="">\n<figcaption>{caption}</figcaption></figure>\n'


def _traces(traces: Mapping[str, Sequence[np.ndarray]]) -> str:
    return (
        "<p>A thin line for each of some of the images above, a thick one for their median.</p>"
        f"{_plot(residual_plot(traces), 'residual curves')}"
    )


def _data(run: Path) -> str:
    lineage = read_lineage(run)
    if lineage is None:
        return f"<p>The run has no {RECORD}: what it was trained on is not recorded.</p>"
    config = load_run_config(run / "config.yaml")
    return _paragraphs(described(lineage, config.seed, config.data.group))


def _training(run: Path) -> str:
    if is_release(run):
        return "<p>The folder holds weights and no log of their training.</p>"
    parts = []
    if (run / "results.csv").is_file():
        rows = read_epochs(run / "results.csv")
        last = {row["phase"]: row for row in rows}  # later rows of a phase replace earlier ones
        if rows:
            parts.append("<p>The last epoch of each phase:</p>")
            parts.append(_table(rows[0], (map(_short, row.values()) for row in last.values())))
    if (run / "curves.png").is_file():
        parts.append(_plot((run / "curves.png").read_bytes(), "training curves"))
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
