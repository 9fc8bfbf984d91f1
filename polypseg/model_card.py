"""The card of a released model: what its configuration, its record and its evaluation tell."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from polypseg.config import Config, ModelConfig
from polypseg.data.classes import CLASS_NAMES
from polypseg.data.splits import TRAIN_DIGEST, stems_digest
from polypseg.lineage import Lineage
from polypseg.lineage_text import trained_too
from polypseg.scores import SummaryRow, per_cent

_NVIDIA = (
    "Weights inherit the conditions of those that they start from: NVIDIA's SegFormer encoders "
    "carry a non-commercial licence."
)
_SOURCES = (
    "CVC-ClinicDB is for research and educational purposes only; Kvasir-SEG is also part of "
    "HyperKvasir (CC BY 4.0)."
)


@dataclass(frozen=True)
class Facts:
    """What a card is made of.

    Attributes:
        config, lineage, versions: of the run; ``lineage`` is None where the run has no record.
        data: what the model was trained on, in words.
        pretraining: what it started from, in words; needed where the record does not tell.
        use: arguments by which `polypseg-predict` finds the release.
        summary, notes: of an evaluation of these very weights.
    """

    config: Config
    lineage: Lineage | None
    versions: dict[str, Any]
    data: str
    pretraining: str | None
    use: str
    summary: list[SummaryRow]
    notes: list[str]


def tells_start(lineage: Lineage | None) -> bool:
    """Whether a record tells all that the weights started from, through every earlier run."""
    if lineage is None:
        return False
    start = lineage.start
    return start is None or start.run is None or tells_start(start.record)


def model_card(facts: Facts, checksums: str) -> str:
    """The text of the card; ``checksums`` names the file beside it."""
    config = facts.config
    commit = facts.versions.get("git_commit")
    training = [
        f"Data: {facts.data}",
        *_counts(facts.lineage),
        *_starts(facts.lineage),
        *([f"Pretraining: {facts.pretraining}"] if facts.pretraining else []),
        "Settings: `config.yaml`; versions and machine: `versions.json`"
        + (f" (commit {commit})." if commit else "."),
        "The weights are those of the end of the training; no checkpoint was chosen by its scores.",
    ]
    notes = f"\n{_items(facts.notes)}\n" if facts.notes else ""
    return f"""# {config.model.name}, released weights

Colon-polyp segmentation by a {_network(config.model)} with a
HyperSolver. **Research use only. It is not a medical device and must not guide diagnosis or
treatment.**

- `implicit.safetensors` is the network, `hyper.safetensors` the HyperSolver; both are stored
  in half precision and computed in single. `sha256sum -c {checksums}` checks them.
- `polypseg-predict IMAGE{facts.use}` in a clone of the repository uses them.

## Training

{_items(training)}

## Metrics

Of these half-precision weights; Dice and IoU are means over images in per cent, Dice with a 95 %
bootstrap interval; seconds per image at batch 1 on the machine of `evaluation/summary.json`.

{_table(facts.summary, config.model.classes)}
{notes}
## Limits

- Measured on the images of the table alone: of other images, devices, bowel preparations or
  populations nothing is known.
- {_output(config.model.classes)}

## Licence

{_licence(facts.lineage)}
"""


def _items(texts: list[str]) -> str:
    return "\n".join(f"- {text}" for text in texts)


def _network(model: ModelConfig) -> str:
    if model.name == "mdeq":
        return "multi-scale deep equilibrium model (MDEQ)"
    return f"deep equilibrium model (MiT-{model.encoder.upper()} encoder, UNet decoder)"


def _counts(lineage: Lineage | None) -> list[str]:
    if lineage is None:
        return []
    return [
        f"Images: {len(lineage.training)} for training and {len(lineage.validation)} for "
        f"validation{trained_too(lineage)}; `data.json` has their digests."
    ]


def _starts(lineage: Lineage | None) -> list[str]:
    """What the network started from, and what the network of that run started from, and so on."""
    texts: list[str] = []
    lead = "Start"
    while lineage is not None:
        start = lineage.start
        if start is None:
            return [*texts, f"{lead}: random weights."]
        own = f"`{start.file}` (SHA-256 {start.sha256})"
        if start.run is None:
            return [*texts, f"{lead}: the encoder from {own}, the rest from random weights."]
        trained = f", trained on {len(start.record.training)} images" if start.record else ""
        texts.append(f"{lead}: the network from {own} of `{start.run}`{trained}.")
        lineage, lead = start.record, f"Before that, `{start.run}`: Start"
    return texts


def _table(summary: list[SummaryRow], classes: int) -> str:
    names = ["data", "solver", "protocol", "images", "Dice", "IoU", "evaluations of f", "seconds"]
    rows = [
        [
            row.data,
            row.solver,
            row.protocol,
            str(row.images),
            per_cent(row.mDice, row.mDice_low, row.mDice_high),
            f"{100 * row.mIoU:.2f}",
            f"{row.evaluations_mean:.1f}",
            f"{row.seconds_median:.3f}",
        ]
        for row in summary
    ]
    if classes > 1:
        names.insert(3, "target")
        for cells, row in zip(rows, summary, strict=True):
            cells.insert(3, row.target)
    head, *body = (f"| {' | '.join(cells)} |" for cells in [names, *rows])
    return "\n".join([head, "|" + "---|" * len(names), *body])


def _output(classes: int) -> str:
    if classes == 1:
        return (
            "It marks pixels; it does not tell kinds of polyps apart and gives no calibrated "
            "confidence."
        )
    names = ", ".join(name.replace("_", "-") for name in CLASS_NAMES[1:classes])
    return f"It marks pixels as one of {names}; it gives no calibrated confidence."


def _licence(lineage: Lineage | None) -> str:
    """The conditions of the weights and, where the record shows whose they are, of the images."""
    parts = [] if _from_nothing(lineage) else [_NVIDIA]
    parts.append("The images that trained these weights have conditions of their own.")
    if _standard(lineage):
        parts.append(_SOURCES)
    return "\n".join(parts)


def _standard(lineage: Lineage | None) -> bool:
    """Whether this run, or one before it, used the field's standard training set."""
    if lineage is None:
        return False
    stems = list(lineage.training | lineage.validation)
    before = lineage.start.record if lineage.start is not None else None
    return stems_digest(stems) == TRAIN_DIGEST or _standard(before)


def _from_nothing(lineage: Lineage | None) -> bool:
    """Whether a record tells that no weights of others went in."""
    if lineage is None:
        return False
    start = lineage.start
    return start is None or (start.run is not None and _from_nothing(start.record))
