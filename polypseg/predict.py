"""Segmenting a person's own images and videos: masks, overlays and tables."""

from __future__ import annotations

import argparse
import contextlib
import json
import shlex
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from polypseg import cli
from polypseg.checkpoint import write_atomic
from polypseg.data import DataError, Fault, read_image
from polypseg.drawing import encode, encode_labels, overlay_labels
from polypseg.metrics import THRESHOLD
from polypseg.predictor import Predictor, available_solvers
from polypseg.released import released_run
from polypseg.result import DISCLAIMER
from polypseg.runs import versions
from polypseg.scores import json_values, to_csv
from polypseg.solver_arguments import add_solver_arguments, check_solver_arguments
from polypseg.sources import find_sources
from polypseg.video import FrameRow, Saving, predict_video

PROGRAM = "polypseg-predict"


@dataclass(frozen=True)
class PredictionRow:
    """A line of `predictions.csv`; see `polypseg.result.Result` for the last five."""

    file: str
    width: int
    height: int
    polyps: int
    polyp_pixels: int
    polyp_share: float
    max_probability: float
    steps: int
    evaluations: int
    residual: float
    status: str
    seconds: float


@dataclass(frozen=True)
class Predictions:
    """What `predict_files` found.

    Attributes:
        images: a row per image.
        boxes: for each image, its polyps (see `find_polyps`), largest first.
        videos: for each video its rows and what the warm start saved.
    """

    images: list[PredictionRow]
    boxes: list[list[dict[str, int]]]
    videos: dict[Path, tuple[list[FrameRow], Saving]]


def predict_files(
    predictor: Predictor, sources: Sequence[Path | str], out: Path, *, command: str = ""
) -> Predictions:
    """Segment images and videos and write what was found.

    Written are, for every image, `masks/<stem>.png` (8 bits, 0 and 255, or NeoPolyp's colours if
    the network tells its classes apart; at the image's own size) and `overlays/<stem>.jpg`
    (outlines), for every video what `predict_video` writes, and for all images `predictions.csv`.
    `predictions.json` holds all of this and what made it. The EXIF orientation of an image is
    applied first, so masks are upright.

    Args:
        predictor: the network.
        sources: image or video files, folders of them or glob patterns.
        out: a folder that does not exist yet or is empty.
        command: the command line, for the record.

    Whatever ends the work before its end, the tables are written of what is done, `missing` in
    `predictions.json` names the rest, and a line on stderr says so. A file that can no longer be
    read does not keep the others from being segmented.

    Raises:
        DataError: a source holds nothing, a file cannot be read, two images or two videos have one
            stem, or `out` holds something. All that is wrong is told together, and nothing is
            written then. Also if files can no longer be read once it is their turn.
    """
    files, videos = find_sources(sources, out)
    done = Predictions([], [], {})
    faults: list[Fault] = []
    try:
        for file in tqdm(files, desc="predicting", unit="image", disable=None):
            with _kept(faults):
                _predict_image(predictor, file, out, done)
        for video in videos:
            with _kept(faults):
                done.videos[video] = predict_video(predictor, video, out)
    finally:  # also after a full disk or an interrupt, which would cost hours of work
        _write_tables(predictor, done, [*files, *videos], out, command)
    if faults:
        raise DataError(faults)
    return done


@contextlib.contextmanager
def _kept(faults: list[Fault]) -> Iterator[None]:
    try:
        yield
    except DataError as error:
        faults.extend(error.faults)


def _predict_image(predictor: Predictor, file: Path, out: Path, done: Predictions) -> None:
    image = read_image(file)
    result = predictor.predict(image, measure=True)
    mask = result.mask
    classes = len(result.probabilities)
    write_atomic(out / "masks" / f"{file.stem}.png", encode_labels(result.labels, classes))
    write_atomic(
        out / "overlays" / f"{file.stem}.jpg",
        encode(overlay_labels(image, result.labels, classes), "JPEG"),
    )
    polyps = find_polyps(mask)
    height, width = mask.shape
    done.images.append(PredictionRow(str(file), width, height, len(polyps), **result.as_row()))
    done.boxes.append(polyps)


def find_polyps(mask: np.ndarray) -> list[dict[str, int]]:
    """The connected regions of a mask (H, W) bool: box (x, y, width, height) and pixels of each.

    Pixels are connected by sides and corners; the largest region comes first.
    """
    _, _, statistics, _ = cv2.connectedComponentsWithStats(mask.astype(np.uint8), connectivity=8)
    names = ("x", "y", "width", "height", "pixels")
    regions = [dict(zip(names, row, strict=True)) for row in statistics[1:].tolist()]
    return sorted(regions, key=lambda region: -region["pixels"])


def _write_tables(
    predictor: Predictor, done: Predictions, asked: Sequence[Path], out: Path, command: str
) -> None:
    finished = {*(row.file for row in done.images), *map(str, done.videos)}
    if not finished:
        return
    missing = [str(file) for file in asked if str(file) not in finished]
    if done.images:
        write_atomic(out / "predictions.csv", to_csv(done.images, PredictionRow))
    write_atomic(out / "predictions.json", _record(predictor, done, missing, command))
    if missing:
        print(
            f"{len(missing)} of {len(asked)} files are missing in {out}, which predictions.json "
            "names; masks, overlays and tables of the others are there",
            file=sys.stderr,
        )


def _record(
    predictor: Predictor, predictions: Predictions, missing: list[str], command: str
) -> bytes:
    source = predictor.source
    record = {
        "program": PROGRAM,
        "notice": DISCLAIMER,
        "command": command,
        "run": source and source.run,
        "weights_sha256": source and source.weights,
        "threshold": THRESHOLD,
        "size": predictor.size,
        "solver": source and source.solver,
        "solve": None if predictor.deq is None else asdict(predictor.deq.options),
        "versions": versions(),
        "images": [
            {**asdict(row), "polyp_boxes": found}
            for row, found in zip(predictions.images, predictions.boxes, strict=True)
        ],
        "videos": [
            {"file": str(video), "frames": len(rows), "warm_start": asdict(saved)}
            for video, (rows, saved) in predictions.videos.items()
        ],
        "missing": missing,
    }
    return json.dumps(json_values(record), indent=2).encode()


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description="Find polyps in images and videos. Research use only, not a medical device.",
    )
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="an image, a video, a folder of them or a pattern such as 'clips/*.png'",
    )
    parser.add_argument(
        "--run",
        type=Path,
        metavar="DIR",
        help="directory polypseg-train wrote; default: the released model",
    )
    parser.add_argument(
        "--out",
        type=Path,
        default=Path("predictions"),
        metavar="DIR",
        help="a new or empty folder for masks/, overlays/, predictions.csv and predictions.json; "
        "default: predictions",
    )
    parser.add_argument(
        "--solver",
        metavar="NAME",
        help="explicit, picard, anderson, broyden or hyper; default: hyper, else anderson, else "
        "explicit, by what the run has weights for",
    )
    add_solver_arguments(parser)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run `polypseg-predict`; errors are raised (see `polypseg.cli`)."""
    arguments = sys.argv[1:] if argv is None else list(argv)
    options = _parser().parse_args(arguments)
    run = released_run() if options.run is None else options.run
    solver = available_solvers(run)[-1] if options.solver is None else options.solver
    check_solver_arguments([solver], options.tol, options.max_steps)
    predictor = Predictor.from_run(
        run, solver, tol=options.tol, max_steps=options.max_steps, device=options.device
    )
    command = shlex.join([PROGRAM, *arguments])
    predictions = predict_files(predictor, options.sources, options.out, command=command)
    if predictions.images:
        found = sum(row.polyp_pixels > 0 for row in predictions.images)
        print(f"Images: {len(predictions.images)}, with a polyp marked: {found} (solver {solver})")
        for status, count in Counter(row.status for row in predictions.images).items():
            print(f"  {count} {status}")
    for video, (rows, saved) in predictions.videos.items():
        found = sum(row.polyp_pixels > 0 for row in rows)
        print(f"{video}: {len(rows)} frames, with a polyp marked: {found} (solver {solver})")
        for status, count in Counter(row.status for row in rows).items():
            print(f"  {count} {status}")
        print(f"  {saved}")
    print(f"Masks, overlays and tables: {options.out}")
    return 0


if __name__ == "__main__":
    sys.exit(cli.predict())
