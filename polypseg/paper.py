"""The figures of the HyperPolypDEQ paper (JST 2024), to stand beside one's own."""

from __future__ import annotations

from collections.abc import Iterable

from polypseg.scores import SummaryRow

Cells = tuple[float, float]  # mDice, mIoU in per cent

# Tables 2 and 3: by method, (mDice, mIoU) of each data set, of NeoPolyp also of each target.
SETS = ("Kvasir", "CVC-ClinicDB", "CVC-ColonDB", "EndoScene", "ETIS-Larib")
TABLE_2: dict[str, tuple[Cells, ...]] = {
    "MDEQ, explicit": ((84.6, 77.3), (83.6, 76.9), (58.5, 48.7), (78.7, 69.3), (48.5, 40.4)),
    "MDEQ, implicit": ((87.3, 80.3), (81.1, 74.3), (72.4, 64.4), (82.7, 74.0), (65.4, 57.9)),
    "SegFormer-B0": ((89.7, 83.9), (86.2, 80.7), (73.5, 65.7), (88.2, 80.3), (65.7, 58.3)),
    "PolypDEQ-add, implicit": (
        (90.4, 84.6), (89.5, 83.9), (74.2, 66.4), (87.3, 79.3), (68.9, 60.8),
    ),
    "PolypDEQ-res, implicit": (
        (90.5, 84.7), (88.8, 83.2), (74.2, 66.6), (87.6, 79.3), (68.3, 60.5),
    ),
    "HyperPolypDEQ": ((90.7, 84.9), (88.9, 83.3), (73.8, 66.3), (88.3, 80.4), (67.6, 59.7)),
}  # fmt: skip
TARGETS = ("neoplastic", "non_neoplastic", "polyp")
TABLE_3: dict[str, tuple[Cells, ...]] = {
    "MDEQ, explicit": ((75.6, 70.1), (72.7, 69.5), (85.3, 76.9)),
    "MDEQ, implicit": ((81.5, 76.6), (78.4, 75.9), (87.7, 80.2)),
    "SegFormer-B0": ((85.2, 81.0), (79.3, 77.1), (89.2, 82.4)),
    "PolypDEQ-add, implicit": ((83.6, 80.3), (81.6, 79.4), (90.8, 84.8)),
    "HyperPolypDEQ": ((82.8, 79.1), (81.4, 78.9), (89.9, 83.4)),
}
# The folders' names in the field's usual copy of the data, where they differ.
ALIASES = {"CVC-300": "EndoScene", "ETIS-LaribPolypDB": "ETIS-Larib", "ETIS": "ETIS-Larib"}
NEOPOLYP = "NeoPolyp-Small"
CAVEAT = (
    "The paper's rows are copied from its tables 2 and 3: other training schedules, another "
    "pretraining of the encoder, and for NeoPolyp-Small its own test images. It says neither at "
    "which size nor at which threshold it scores; protocol paper (the training size, 0.5, means "
    "of each image's scores) is our reading of it."
)


def beside_the_paper(rows: Iterable[SummaryRow]) -> tuple[list[str], list[list[str]]] | None:
    """A table of one's own figures above the paper's, a column a test set and target.

    Returns:
        Header and rows of "mDice / mIoU" in per cent; None where the paper has none of the sets.
    """
    rows = list(rows)
    # The paper's networks trained on NeoPolyp's classes; one of one class may never have seen it.
    classes = {row.data for row in rows if row.target != "polyp"}
    rows = [row for row in rows if row.data != NEOPOLYP or row.data in classes]
    columns: dict[tuple[str, str], None] = {}
    for row in rows:
        if _published(row.data, row.target):
            columns.setdefault((row.data, row.target))
    if not columns:
        return None
    header = ["", *(name if target == "polyp" else f"{name}, {target}" for name, target in columns)]
    own: dict[str, dict[tuple[str, str], Cells]] = {}
    for row in rows:
        cells = own.setdefault(f"this run, {row.solver}, protocol {row.protocol}", {})
        cells[row.data, row.target] = (100 * row.mDice, 100 * row.mIoU)
    table = [
        [name, *(_cell(cells.get(column)) for column in columns)] for name, cells in own.items()
    ]
    published = [_published(*column) for column in columns]
    for method in TABLE_2:
        cells_of = [_cell(found.get(method)) for found in published]
        table.append([f"paper, {method}", *cells_of])
    return header, table


def _published(data: str, target: str) -> dict[str, Cells]:
    """The paper's figures by method; empty where it has none."""
    if data == NEOPOLYP and target in TARGETS:
        return {name: cells[TARGETS.index(target)] for name, cells in TABLE_3.items()}
    data = ALIASES.get(data, data)
    if data in SETS and target == "polyp":
        return {name: cells[SETS.index(data)] for name, cells in TABLE_2.items()}
    return {}


def _cell(cells: Cells | None) -> str:
    return "–" if cells is None else f"{cells[0]:.1f} / {cells[1]:.1f}"
