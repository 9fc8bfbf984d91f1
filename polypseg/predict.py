"""Segmenting a person's own images: masks, overlays and a table."""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm import tqdm

from polypseg.checkpoint import write_atomic
from polypseg.data import DataError, Fault, list_images, read_image
from polypseg.drawing import encode, overlay
from polypseg.predictor import Predictor, available_solvers
from polypseg.scores import to_csv

PROGRAM = "polypseg-predict"
READING_THREADS = 4


@dataclass(frozen=True)
class PredictionRow:
    """A line of `predictions.csv`; see `polypseg.predictor.Result` for the last five."""

    file: str
    width: int
    height: int
    polyp_pixels: int
    polyp_share: float
    max_probability: float
    steps: int
    evaluations: int
    residual: float
    status: str
    seconds: float


def predict_files(
    predictor: Predictor, sources: Sequence[Path | str], out: Path
) -> list[PredictionRow]:
    """Segment images and write what was found.

    Written are, for every image, `masks/<stem>.png` (8 bits, 0 and 255, at the image's own size)
    and `overlays/<stem>.jpg` (the outline in yellow), and for all of them `predictions.csv`. The
    EXIF orientation of an image is applied first, so masks are upright.

    Args:
        predictor: the network.
        sources: image files, folders of images or glob patterns.
        out: a folder that does not exist yet or is empty.

    Raises:
        DataError: a source holds no image, an image cannot be read, two images have one stem, or
            `out` holds something. All that is wrong is told together, and nothing is written then.
    """
    files = _find_files(sources, out)
    rows = []
    for file in tqdm(files, desc="predicting", unit="image", disable=None):
        image = read_image(file)
        result = predictor.predict(image, measure=True)
        mask = result.mask
        white = mask.astype(np.uint8) * np.uint8(255)
        write_atomic(out / "masks" / f"{file.stem}.png", encode(white, "PNG"))
        write_atomic(out / "overlays" / f"{file.stem}.jpg", encode(overlay(image, mask), "JPEG"))
        rows.append(
            PredictionRow(
                file=str(file),
                width=mask.shape[1],
                height=mask.shape[0],
                polyp_pixels=int(mask.sum()),
                polyp_share=float(mask.mean()),
                max_probability=float(result.probability.max()),
                steps=result.steps,
                evaluations=result.evaluations,
                residual=result.residual,
                status=result.status,
                seconds=result.seconds,
            )
        )
    write_atomic(out / "predictions.csv", to_csv(rows, PredictionRow))
    return rows


def _find_files(sources: Sequence[Path | str], out: Path) -> list[Path]:
    """Every image once, all of them known to be readable and to have stems of their own."""
    faults: list[Fault] = []
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        # Masks that a person drew may lie there under the very names that would be written.
        remedy = "give a new folder, so that nothing in it is overwritten"
        faults.append(Fault(out, "exists and is not an empty folder", remedy))
    files: dict[Path, Path] = {}  # by resolved path: sources may overlap
    for source in sources:
        try:
            files.update((file.resolve(), file) for file in list_images(source))
        except DataError as error:
            faults.extend(error.faults)
    stems = defaultdict(list)
    for file in files.values():
        # Some file systems take two names that differ in case for one.
        stems[file.stem.casefold()].append(file)
    for same in stems.values():
        if len(same) > 1:
            others = ", ".join(str(file) for file in same[1:])
            remedy = "their masks would have one name; predict them into separate folders"
            faults.append(Fault(same[0], f"shares its stem with {others}", remedy))
    with ThreadPoolExecutor(READING_THREADS) as pool:
        reading = tqdm(
            pool.map(_reading_faults, files.values()),
            desc="checking",
            unit="image",
            total=len(files),
            leave=False,
            disable=None,
        )
        for found in reading:
            faults.extend(found)
    if faults:
        raise DataError(faults)
    return list(files.values())


def _reading_faults(file: Path) -> list[Fault]:
    try:
        read_image(file)
    except DataError as error:
        return error.faults
    return []


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Find polyps in images. Research use only, not a medical device.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="an image, a folder of images or a pattern such as 'clips/*.png'",
    )
    parser.add_argument(
        "--run", type=Path, required=True, metavar="DIR", help="directory polypseg-train wrote"
    )
    parser.add_argument(
        "--out",
        type=Path,
        required=True,
        metavar="DIR",
        help="a new or empty folder for masks/, overlays/ and predictions.csv",
    )
    parser.add_argument(
        "--solver",
        metavar="NAME",
        help="explicit, picard, anderson, broyden or hyper; default: hyper, else anderson, else "
        "explicit, by what the run has weights for",
    )
    parser.add_argument("--device", help="cpu, cuda, cuda:1 ...; default: cuda if there is one")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `polypseg-predict`; errors are raised (see `polypseg.cli`)."""
    options = _parser().parse_args(argv)
    solver = available_solvers(options.run)[-1] if options.solver is None else options.solver
    predictor = Predictor.from_run(options.run, solver, device=options.device)
    rows = predict_files(predictor, options.sources, options.out)
    found = sum(row.polyp_pixels > 0 for row in rows)
    print(f"Images: {len(rows)}, with a polyp marked: {found} (solver {solver})")
    for status, count in Counter(row.status for row in rows).items():
        print(f"  {count} {status}")
    print(f"Masks, overlays and predictions.csv: {options.out}")
    return 0
