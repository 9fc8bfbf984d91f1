"""A PolypDEQ whose fixed point is hard to find, made from one whose fixed point is easy.

``python results/hypersolver/weaken.py RUN WEAK --gain 6`` writes ``WEAK/explicit.safetensors``: the
implicit weights of RUN with f's output times the gain and the head's input divided by it. The state
then outweighs the image features that are added to it, which brings the spectral radius at the
fixed point near 1. ``polypseg-train WEAK ... implicit.jacobian=0`` trains on from there.
"""

from __future__ import annotations

import argparse
from pathlib import Path

from polypseg.checkpoint import load_weights, save_weights

# The last normalisation of f; the ReLU after it lets a positive factor pass.
LAST_NORM = "deq.f.decoder.blocks.2.1"


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("run", type=Path)
    parser.add_argument("weak", type=Path)
    parser.add_argument("--gain", type=float, required=True)
    given = parser.parse_args()
    weights, metadata = load_weights(given.run / "implicit.safetensors")
    weights = {key: value.float() for key, value in weights.items()}
    for key, factor in (
        (f"{LAST_NORM}.weight", given.gain),
        (f"{LAST_NORM}.bias", given.gain),
        ("head.0.weight", 1 / given.gain),
    ):
        weights[key] *= factor
    given.weak.mkdir(parents=True, exist_ok=True)
    save_weights(given.weak / "explicit.safetensors", weights, metadata | {"phase": "explicit"})


if __name__ == "__main__":
    main()
