"""A trained run as one file that runs without this package: torch.export or ONNX."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import secrets
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from deqsolvers.state import Layout
from polypseg import cli
from polypseg.checkpoint import write_atomic
from polypseg.config import Config
from polypseg.data import normalize
from polypseg.data.synthetic import draw_pair
from polypseg.inference import load_model
from polypseg.predictor import available_solvers
from polypseg.result import DISCLAIMER
from polypseg.runs import versions
from polypseg.unrolled import DECOMPOSITIONS

PROGRAM = "polypseg-export"
FORMATS = {".onnx": "ONNX", ".pt2": "torch.export"}
# Largest difference of a probability that an export may show.
TOLERANCE = 1e-3


class FixedSteps(nn.Module):
    """A network that takes a fixed number of solver steps, without anything that depends on values.

    Maps images (B, 3, size, size), RGB from 0 to 1, to probabilities (B, classes, size, size): a
    sigmoid of one class, a softmax of several.

    Args:
        model: as `polypseg.inference.load_model` makes it; an explicit pass has no steps.
        steps: solver steps, each one evaluation of f.
    """

    def __init__(self, model: Any, steps: int) -> None:
        super().__init__()
        self.model = model
        self.steps = steps

    def forward(self, images: Tensor) -> Tensor:
        images = normalize(images)
        logits = self._solve(images) if self.steps else self.model(images).logits
        return logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)

    def _solve(self, images: Tensor) -> Tensor:
        # The loop of `deqsolvers.fixed_point` without its measurements.
        features, deq = self.model.features(images), self.model.deq
        start = deq.initial_state(features)
        layout = Layout.of(start)
        z = layout.flatten(start)
        memory = deq.solver.init(z, layout)
        for _ in range(self.steps):
            fz = layout.flatten(deq.f(layout.unflatten(z), features))
            z = deq.solver.step(memory, z, fz, fz - z)
        return self.model.read_out(layout.unflatten(z))


def export_run(
    run: Path, out: Path, solver: str | None = None, steps: int | None = None
) -> dict[str, Any]:
    """Write a run's network with fixed solver steps, and check it against the original.

    The file is loaded again and run on drawn images before it gets its name; beside it,
    `<out>.json` says what goes in, what comes out and how far the two differ.

    Args:
        run: a directory that `polypseg-train` wrote.
        out: `*.onnx` or `*.pt2` (torch.export); an existing file is replaced.
        solver: if None, the run's best. For ONNX, which has no linear solves, those of Anderson and
            Broyden are written out.
        steps: of the solver; if None, those of the HyperSolver in the run's settings.

    Returns:
        What `<out>.json` holds.

    Raises:
        ValueError: the suffix or solver is not possible, `steps` is missing, or the exported
            network does not compute what the original does. Then no file is written.
        CheckpointError: the run is missing, damaged or lacks weights.
    """
    if out.suffix not in FORMATS:
        raise ValueError(f"out must end in {' or '.join(FORMATS)}, got {str(out)!r}")
    solver = available_solvers(run)[-1] if solver is None else solver
    model: Any
    model, config = load_model(run, solver)
    steps = _steps(solver, steps, config)
    if steps:
        # The original takes the same steps, through the loop that everything else goes through.
        model.deq = model.deq.with_solver(model.deq.solver, tol=None, max_steps=steps, final="last")
    model.requires_grad_(False)
    size = config.data.size
    images = _drawn_images(size)

    out.parent.mkdir(parents=True, exist_ok=True)
    partial = out.with_name(f".{out.stem}.{secrets.token_hex(4)}{out.suffix}")
    try:
        with torch.no_grad(), _quiet():
            program = torch.export.export(FixedSteps(model, steps).eval(), (images[0],))
            if out.suffix == ".onnx":
                program = program.run_decompositions(DECOMPOSITIONS)
                exported = torch.onnx.export(
                    program, dynamo=True, input_names=["images"], output_names=["probabilities"]
                )
                assert exported is not None  # it is with dynamo=True
                exported.save(partial)
            else:
                torch.export.save(program, partial)
        difference = max(
            float(np.abs(_run(partial, one) - _original(model, one)).max()) for one in images
        )
        if not difference <= TOLERANCE:
            raise ValueError(
                f"the exported network differs from the original by {difference:.1e} in a "
                f"probability, more than {TOLERANCE:.0e}; nothing was written"
            )
        partial.replace(out)
    finally:
        partial.unlink(missing_ok=True)
    record = {
        "program": PROGRAM,
        "format": FORMATS[out.suffix],
        "run": str(run),
        "model": config.model.name,
        "solver": solver,
        "steps": steps,
        "input": f"images: (1, 3, {size}, {size}) float32, RGB from 0 to 1, resized bilinearly "
        "with antialiasing; normalised inside",
        "output": f"probabilities: (1, {config.model.classes}, {size}, {size}) float32",
        "largest_difference": difference,
        "versions": versions(),
        "notice": DISCLAIMER,
    }
    write_atomic(out.with_name(f"{out.name}.json"), json.dumps(record, indent=2).encode())
    return record


def _steps(solver: str, steps: int | None, config: Config) -> int:
    if solver == "explicit":
        if steps not in (None, 1):
            raise ValueError(f"an explicit pass evaluates f once; steps must be 1, got {steps}")
        return 0
    if steps is None:
        if solver != "hyper":
            raise ValueError(
                f"steps is needed for {solver}: an exported network cannot stop at a tolerance; "
                "polypseg-evaluate shows how many steps images take"
            )
        return config.solve.hyper_steps
    if steps < 1:
        raise ValueError(f"steps must be at least 1, got {steps}")
    return steps


def _drawn_images(size: int) -> list[Tensor]:
    """Two inputs (1, 3, size, size) with polyps: in noise a step more or less hardly shows."""
    drawn = (draw_pair(np.random.default_rng(seed), size)[0] for seed in range(2))
    return [torch.from_numpy(image).permute(2, 0, 1)[None] / 255 for image in drawn]


def _original(model: nn.Module, images: Tensor) -> np.ndarray:
    with torch.inference_mode():
        logits = model(normalize(images)).logits
    return (logits.sigmoid() if logits.shape[1] == 1 else logits.softmax(dim=1)).numpy()


def _run(path: Path, images: Tensor) -> np.ndarray:
    """The output of an exported file, read back from disk."""
    if path.suffix == ".pt2":
        with torch.inference_mode():
            return torch.export.load(path).module()(images).numpy()
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return session.run(None, {"images": images.numpy()})[0]


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the exporters' own progress and advice to their developers."""
    with warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")
        yield


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Write a run's network as one ONNX or torch.export file with a fixed number of "
        "solver steps, checked against the original. Research use only, not a medical device.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="directory polypseg-train wrote")
    parser.add_argument(
        "--out", type=Path, required=True, metavar="FILE", help="FILE.onnx or FILE.pt2"
    )
    parser.add_argument(
        "--solver",
        metavar="NAME",
        help="explicit, picard, anderson, broyden or hyper; default: the run's best",
    )
    parser.add_argument(
        "--steps", type=int, metavar="N", help="solver steps; default: the run's own, for hyper"
    )
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `polypseg-export`; errors are raised (see `polypseg.cli`)."""
    options = _parser().parse_args(argv)
    record = export_run(options.run, options.out, options.solver, options.steps)
    steps = f"{record['steps']} steps of {record['solver']}" if record["steps"] else "explicit"
    print(
        f"{options.out}: {record['format']}, {steps}; differs from the original by at most "
        f"{record['largest_difference']:.1e} in a probability"
    )
    print(f"Input and output: {options.out}.json")
    return 0


if __name__ == "__main__":
    sys.exit(cli.export())
