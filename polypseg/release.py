"""Making a released model of a trained run: half-precision weights, checksums, a model card."""

from __future__ import annotations

import argparse
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path

import torch

from polypseg.checkpoint import CheckpointError, load_weights, save_weights, write_atomic
from polypseg.evaluate import evaluate_run
from polypseg.evaluation import Evaluation
from polypseg.released import RELEASED
from polypseg.run_config import load_run_config
from polypseg.testsets import NOTES, find_test_sets

PHASES = ("implicit", "hyper")
CHECKSUMS = "SHA256SUMS"
CARD = "README.md"


def write_release(run: Path, out: Path) -> None:
    """Copy what prediction needs of a run: its configuration and its weights in half precision.

    Raises:
        CheckpointError: the run lacks a phase, a weight does not fit into half precision, or
            ``out`` is the run.
    """
    if out.resolve() == run.resolve():
        raise CheckpointError(f"{out}: a release must not replace the run that it is made of")
    tensors = {phase: load_weights(run / f"{phase}.safetensors") for phase in PHASES}
    for phase, (weights, metadata) in tensors.items():
        halved = {
            key: value.half() if value.dtype == torch.float32 else value
            for key, value in weights.items()
        }
        overflown = [key for key, value in halved.items() if not torch.isfinite(value).all()]
        if overflown:
            raise CheckpointError(
                f"{run}: {', '.join(overflown)} of {phase} do not fit into half precision"
            )
        save_weights(out / f"{phase}.safetensors", halved, metadata)
    for name in ("config.yaml", "versions.json"):
        write_atomic(out / name, (run / name).read_bytes())
    sums = [
        f"{hashlib.sha256((out / f'{phase}.safetensors').read_bytes()).hexdigest()}  "
        f"{phase}.safetensors\n"
        for phase in PHASES
    ]
    write_atomic(out / CHECKSUMS, "".join(sums).encode())


def write_card(out: Path, evaluation: Evaluation, data: str) -> None:
    """Write the model card beside the weights.

    Args:
        out: what `write_release` wrote.
        evaluation: of these very weights.
        data: what the model was trained on, in words.
    """
    config = load_run_config(out / "config.yaml")
    versions = json.loads((out / "versions.json").read_text())
    rows = [
        f"| {row.data} | {row.solver} | {row.protocol} | {row.images} | {100 * row.mDice:.2f} "
        f"[{100 * row.mDice_low:.1f}, {100 * row.mDice_high:.1f}] | {100 * row.mIoU:.2f} | "
        f"{row.evaluations_mean:.1f} | {row.seconds_median:.3f} |"
        for row in evaluation.summary
    ]
    chosen = "" if out.resolve() == RELEASED else f" --run models/{out.name}"
    notes = [f"- {NOTES[name]}" for name in evaluation.rows if name in NOTES]
    text = f"""# {config.model.name}, released weights

Colon-polyp segmentation by a deep equilibrium model (MiT-B0 encoder, UNet decoder) with a
HyperSolver. **Research use only. It is not a medical device and must not guide diagnosis or
treatment.**

- `implicit.safetensors` is the network, `hyper.safetensors` the HyperSolver; both are stored
  in half precision and computed in single. `sha256sum -c {CHECKSUMS}` checks them.
- `polypseg-predict IMAGE{chosen}` in a clone of the repository uses them.

## Training

- Data: {data}
- Pretraining of the encoder: MiT-B0 trained on ImageNet-1k, then ADE20K, stored once as uint8 and
  dequantised (the paper's encoder was trained on ImageNet only).
- Settings: `config.yaml`; versions and machine: `versions.json` (commit
  {versions["git_commit"]}).
- No checkpoint, threshold or setting was chosen on a test image.

## Metrics

Of these half-precision weights; Dice and IoU are means over images in per cent, Dice with a 95 %
bootstrap interval; seconds per image at batch 1 on the machine of `evaluation/summary.json`.

| data | solver | protocol | images | Dice | IoU | evaluations of f | seconds |
|---|---|---|---|---|---|---|---|
{chr(10).join(rows)}

{chr(10).join(notes)}

## Limits

- Trained on still frames of two sources that each show a polyp; on normal mucosa, other devices,
  bowel preparation or populations it was not measured.
- It marks pixels; it does not tell kinds of polyps apart and gives no calibrated confidence.

## Licence

The encoder comes from SegFormer's weights, which carry NVIDIA's non-commercial licence; treat these
weights alike. CVC-ClinicDB is for research and educational purposes only; Kvasir-SEG is also part
of HyperKvasir (CC BY 4.0).
"""
    write_atomic(out / CARD, text.encode())


def main(argv: Sequence[str] | None = None) -> int:
    """`python -m polypseg.release RUN OUT --data DIR`: release a run with its measured card."""
    parser = argparse.ArgumentParser(prog="python -m polypseg.release", description=main.__doc__)
    parser.add_argument("run", type=Path, metavar="RUN")
    parser.add_argument("out", type=Path, metavar="OUT")
    parser.add_argument("--data", type=Path, required=True, metavar="DIR")
    parser.add_argument("--trained-on", required=True, metavar="TEXT", help="for the card")
    options = parser.parse_args(argv)
    write_release(options.run, options.out)
    evaluation = evaluate_run(
        options.out,
        find_test_sets([options.data]),
        protocols=("default", "pranet", "paper"),
        command=f"python -m polypseg.release {options.run} {options.out}",
    )
    write_card(options.out, evaluation, options.trained_on)
    # The rows per image are the run's to keep; the card has what users of the weights need.
    for table in evaluation.out.glob("*-*.csv"):
        table.unlink()
    print(f"Released: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
