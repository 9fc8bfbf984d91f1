"""The images and videos that a person names for prediction."""

from __future__ import annotations

import glob
import os
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tqdm import tqdm

from polypseg.data import DataError, Fault, list_images, read_image
from polypseg.data.folders import IMAGE_SUFFIXES, natural_key, nested_files, tell_nested
from polypseg.data.stems import file_stem
from polypseg.video import VIDEO_SUFFIXES, check_video

SUFFIXES = IMAGE_SUFFIXES | VIDEO_SUFFIXES
READING_THREADS = 4
PRINTED_NAMES = 10


def find_sources(sources: Sequence[Path | str], out: Path) -> tuple[list[Path], list[Path]]:
    """Every image and every video once, all of them readable and with stems of their own.

    Lines on stderr name what lies beside them and is neither, and subfolders that hold more.
    """
    faults: list[Fault] = []
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        # Masks that a person drew may lie there under the very names that would be written.
        remedy = "give a new folder, so that nothing in it is overwritten"
        faults.append(Fault(out, "exists and is not an empty folder", remedy))
    files: dict[Path, Path] = {}  # by absolute path: sources may overlap
    videos: dict[Path, Path] = {}
    left_out: dict[Path, Path] = {}
    for source in sources:
        found = _videos(source)
        videos.update((_absolute(video), video) for video in found)
        left_out.update((_absolute(other), other) for other in _others(source))
        try:
            if not Path(source).is_file() or not found:
                files.update((_absolute(file), file) for file in list_images(source))
        except DataError as error:
            if not found:
                faults.extend(error.faults)
    for kind in (files, videos):
        stems = defaultdict(list)
        for file in kind.values():
            # Some file systems take two names that differ in case or in Unicode form for one.
            stems[file_stem(file).casefold()].append(file)
        for same in stems.values():
            if len(same) > 1:
                others = ", ".join(str(file) for file in same[1:])
                remedy = "their masks would have one name; predict them into separate folders"
                faults.append(Fault(same[0], f"shares its stem with {others}", remedy))
    checks: list[tuple[Callable[[Path], object], Path]] = [
        *((read_image, file) for file in files.values()),
        *((check_video, video) for video in videos.values()),
    ]
    with ThreadPoolExecutor(READING_THREADS) as pool:
        reading = tqdm(
            pool.map(lambda check: _reading_faults(*check), checks),
            desc="checking",
            unit="file",
            total=len(checks),
            leave=False,
            disable=None,
        )
        for problems in reading:
            faults.extend(problems)
    if faults:
        raise DataError(faults)
    if left_out:
        _tell_left_out(list(left_out.values()))
    _tell_subfolders(sources, {**files, **videos})
    return list(files.values()), list(videos.values())


def _absolute(path: Path) -> Path:
    """The path without `..`; links are kept, two links to one file being two names for a result."""
    return Path(os.path.abspath(path))


def _named(source: Path | str) -> list[Path]:
    """What a person names: a file, all that is in a folder or all that a pattern matches."""
    path = Path(source)
    if path.is_dir():
        found = [entry for entry in path.iterdir() if not entry.name.startswith(".")]
    elif path.is_file():
        found = [path]
    else:
        found = [Path(match) for match in glob.glob(str(source), recursive=True)]
    return sorted(found, key=lambda file: natural_key(str(file)))


def _videos(source: Path | str) -> list[Path]:
    """The videos among what a person names."""
    return [
        file for file in _named(source) if file.suffix.lower() in VIDEO_SUFFIXES and file.is_file()
    ]


def _others(source: Path | str) -> list[Path]:
    """Files of other types among what a person names, and links that lead nowhere."""
    return [
        file
        for file in _named(source)
        if not file.is_dir() and not (file.is_file() and file.suffix.lower() in SUFFIXES)
    ]


def _tell_left_out(files: Sequence[Path]) -> None:
    names = ", ".join(str(file) for file in files[:PRINTED_NAMES])
    more = len(files) - PRINTED_NAMES
    names += f" and {more} more" if more > 0 else ""
    print(
        f"warning: left out, as neither image nor video by name, or links to nothing: {names}",
        file=sys.stderr,
    )


def _tell_subfolders(sources: Sequence[Path | str], taken: Collection[Path]) -> None:
    for folder in dict.fromkeys(Path(source) for source in sources):
        nested = nested_files(folder, SUFFIXES) if folder.is_dir() else []
        left = [file for file in nested if _absolute(file) not in taken]
        if left:
            told = tell_nested(folder, left, "images or videos")
            print(f"warning: {folder}: {told}; name each of these folders", file=sys.stderr)


def _reading_faults(read: Callable[[Path], object], file: Path) -> list[Fault]:
    try:
        read(file)
    except DataError as error:
        return error.faults
    return []
