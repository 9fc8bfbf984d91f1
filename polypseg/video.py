"""Segmenting a video: each frame's solve starts where the last one ended."""

from __future__ import annotations

import itertools
import math
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from tqdm import tqdm

from polypseg.checkpoint import write_atomic
from polypseg.data import DataError, Fault
from polypseg.drawing import encode_labels, overlay_labels
from polypseg.metrics import Confusion
from polypseg.predictor import Predictor
from polypseg.result import Result
from polypseg.scores import to_csv

VIDEO_SUFFIXES = frozenset({".mp4", ".m4v", ".mov", ".avi", ".mkv", ".webm", ".mpg", ".mpeg"})
# Every so many frames the solve is repeated without the warm start, to know what it saves.
COLD_EVERY = 10
# Ends of a solve that a start from scratch may spare.
FAILED = ("STALLED", "DIVERGED", "NON_FINITE")
NOT_MEASURED = float("nan")
LARGEST_RATE = 65535.0  # of MPEG-4, in which it is a fraction of numbers up to this


@dataclass(frozen=True)
class FrameRow:
    """A line of a video's table; see `polypseg.result.Result` for the solve.

    Attributes:
        frame: from 0.
        time: of the frame in the video, in seconds.
        cold_evaluations, cold_seconds, cold_residual: of the same frame without the warm start;
            NaN but for every tenth frame.
        cold_dice: overlap of the masks with and without the warm start.
    """

    frame: int
    time: float
    polyp_pixels: int
    polyp_share: float
    max_probability: float
    steps: int
    evaluations: int
    residual: float
    status: str
    seconds: float
    cold_evaluations: float = NOT_MEASURED
    cold_seconds: float = NOT_MEASURED
    cold_residual: float = NOT_MEASURED
    cold_dice: float = NOT_MEASURED


@dataclass(frozen=True)
class Saving:
    """What the warm start saved, on the frames that were also solved without it.

    Attributes:
        frames: how many these are; without any, the rest is NaN.
        evaluations, cold_evaluations: of f, means with and without the warm start.
        seconds, cold_seconds: medians of the time in the network.
        residual, cold_residual: medians of the relative residuals reached.
        dice: mean overlap of the masks with and without.
    """

    frames: int
    evaluations: float
    cold_evaluations: float
    seconds: float
    cold_seconds: float
    residual: float
    cold_residual: float
    dice: float

    def __str__(self) -> str:
        if not self.frames:
            return "warm start: not measured (one frame, or a pass without a solver)"
        return (
            f"warm start, measured on {self.frames} frames: {self.evaluations:.1f} evaluations of "
            f"f a frame instead of {self.cold_evaluations:.1f}, {self.seconds:.3f} s instead of "
            f"{self.cold_seconds:.3f} s, residual {self.residual:.1e} instead of "
            f"{self.cold_residual:.1e} (medians); masks agree with Dice {self.dice:.4f}"
        )


def check_video(path: Path) -> None:
    """Raise `DataError` if a file is missing or its first frame cannot be decoded."""
    with _opened(path):
        pass


def predict_video(predictor: Predictor, path: Path, out: Path) -> tuple[list[FrameRow], Saving]:
    """Segment every frame of a video and write what was found.

    Written are `masks/<stem>/<frame>.png` (as for images, at the video's own size),
    `overlays/<stem>.mp4` (the outline in yellow; sides of odd length are a pixel longer, for MP4
    has even ones) and `videos/<stem>.csv` with a row per frame.

    A frame whose warm-started solve fails is solved again from scratch. A file that announces more
    frames than it gives is named on stderr.

    Raises:
        DataError: the file is no video that can be decoded.
        OSError: a file cannot be written.
    """
    rows: list[FrameRow] = []
    state = None
    with _opened(path) as (capture, rate, size, count):
        total = count or None
        with _writer(out / "overlays" / f"{path.stem}.mp4", rate, size) as write:
            for number, (image, time) in enumerate(
                tqdm(_frames(capture, rate), path.name, total, unit="frame", disable=None)
            ):
                warm = state is not None
                frame = predictor.predict_frame(image, state, measure=True)
                if warm and frame.result.status in FAILED:
                    frame, warm = predictor.predict_frame(image, measure=True), False
                cold = None
                if warm and number % COLD_EVERY == 0:
                    cold = predictor.predict(image, measure=True)
                state = frame.state
                labels, classes = frame.result.labels, len(frame.result.probabilities)
                write_atomic(
                    out / "masks" / path.stem / f"{number:06d}.png", encode_labels(labels, classes)
                )
                write(overlay_labels(image, labels, classes))
                rows.append(_row(number, time, frame.result, cold))
    write_atomic(out / "videos" / f"{path.stem}.csv", to_csv(rows, FrameRow))
    if len(rows) < count:
        print(
            f"warning: {path}: announces {count} frames, but only {len(rows)} could be decoded; "
            "compare it with its original, it may have been cut short",
            file=sys.stderr,
        )
    return rows, saving(rows)


def saving(rows: list[FrameRow]) -> Saving:
    """Sum up what the warm start saved."""
    both = [row for row in rows if row.cold_evaluations == row.cold_evaluations]
    if not both:
        return Saving(0, *[NOT_MEASURED] * 7)
    return Saving(
        len(both),
        float(np.mean([row.evaluations for row in both])),
        float(np.mean([row.cold_evaluations for row in both])),
        float(np.median([row.seconds for row in both])),
        float(np.median([row.cold_seconds for row in both])),
        float(np.median([row.residual for row in both])),
        float(np.median([row.cold_residual for row in both])),
        float(np.mean([row.cold_dice for row in both])),
    )


def _row(number: int, time: float, result: Result, cold: Result | None) -> FrameRow:
    measured: dict[str, Any] = {}
    if cold is not None:
        measured = {
            "cold_evaluations": float(cold.evaluations),
            "cold_seconds": cold.seconds,
            "cold_residual": cold.residual,
            "cold_dice": Confusion.from_masks(result.mask, cold.mask).dice,
        }
    return FrameRow(frame=number, time=time, **result.as_row(), **measured)


@contextmanager
def _opened(path: Path) -> Iterator[tuple[cv2.VideoCapture, float, tuple[int, int], int]]:
    """A video, its frames a second, (width, height), and how many frames it says it has."""
    if not path.is_file():
        raise DataError([Fault(path, "there is no such file", "check the path")])
    capture = cv2.VideoCapture(str(path))
    try:
        # Decoding says more than opening does; the size is that of a decoded, upright frame.
        decoded, first = capture.read() if capture.isOpened() else (False, None)
        if not decoded or first is None:
            problem = "cannot be decoded as a video"
            raise DataError([Fault(path, problem, "replace it by an intact file, such as MP4")])
        rate = capture.get(cv2.CAP_PROP_FPS)
        rate = rate if np.isfinite(rate) and rate > 0 else 25.0
        count = max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
        height, width = first.shape[:2]
        capture.release()
        capture = cv2.VideoCapture(str(path))  # not every container can go back to its start
        yield capture, rate, (width, height), count
    finally:
        capture.release()


def _frames(capture: cv2.VideoCapture, rate: float) -> Iterator[tuple[np.ndarray, float]]:
    """Every frame and its time in seconds; the rate tells it where the file does not."""
    for number in itertools.count():
        decoded, frame = capture.read()
        if not decoded:
            return
        # Screens and telephones are recorded at a rate that varies: the number does not tell.
        time = capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
        yield cv2.cvtColor(frame, cv2.COLOR_BGR2RGB), time if time > 0 else number / rate


def _frame_count(path: Path) -> int:
    """How many frames a video says it has; 0 where it cannot be opened."""
    capture = cv2.VideoCapture(str(path))
    try:
        return max(0, int(capture.get(cv2.CAP_PROP_FRAME_COUNT)))
    finally:
        capture.release()


def writable_rate(rate: float) -> float:
    """The nearest frames a second that MPEG-4, which counts to 65535 in a second, can hold."""
    rate = min(rate, LARGEST_RATE)
    return round(rate, int(math.log10(LARGEST_RATE / rate)))


@contextmanager
def _writer(
    path: Path, rate: float, size: tuple[int, int]
) -> Iterator[Callable[[np.ndarray], object]]:
    """Write RGB frames to an MP4 file that gets its name once it is whole.

    The encoder would cut the last column or row off an odd side; it is written twice instead.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    right, below = size[0] % 2, size[1] % 2
    even = (size[0] + right, size[1] + below)
    rate = writable_rate(rate)
    writer = cv2.VideoWriter(str(partial), cv2.VideoWriter.fourcc(*"mp4v"), rate, even)
    if not writer.isOpened():
        raise OSError(f"{path}: this installation of OpenCV cannot write MP4 videos")

    frames = 0

    def write(image: np.ndarray) -> None:
        nonlocal frames
        frames += 1
        frame = cv2.cvtColor(image, cv2.COLOR_RGB2BGR)
        writer.write(cv2.copyMakeBorder(frame, 0, below, 0, right, cv2.BORDER_REPLICATE))

    try:
        yield write
        writer.release()
        # OpenCV does not tell that a disk was full or a file too large for it.
        written = _frame_count(partial)
        if written < frames:
            raise OSError(
                f"{path}: {written} of {frames} frames could be written; is the disk full?"
            )
        partial.rename(path)
    finally:
        writer.release()
        partial.unlink(missing_ok=True)
