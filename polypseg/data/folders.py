"""Finding images and masks on disk: pairs are made by stem, never by sorted position."""

from __future__ import annotations

import glob
import re
from collections import defaultdict
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

from polypseg.data.faults import DataError, Fault
from polypseg.data.stems import file_stem, find_slips

IMAGE_SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".tif", ".tiff", ".webp"})
IMAGE_FOLDERS = ("images", "image")
MASK_FOLDERS = ("masks", "mask")
NAMED_FOLDERS = 5
NAMED_FILES = 5


@dataclass(frozen=True)
class Pair:
    """One image and its mask; `stem` is that of both, as `file_stem` gives it."""

    stem: str
    image: Path
    mask: Path


def natural_key(text: str) -> list[tuple[int, int, str]]:
    """Sort key that puts `clinic_9` before `clinic_10`."""
    parts = re.split(r"([0-9]+)", text)
    return [(0, int(p), p) if p.isdecimal() else (1, 0, p) for p in parts if p]


def find_pairs(root: Path) -> list[Pair]:
    """Pair the images of a folder with its masks, by stem.

    Args:
        root: folder with an `images` (or `image`) and a `masks` (or `mask`) folder, in any letter
            case.

    Returns:
        The pairs in natural order of their stems; never empty.

    Raises:
        DataError: a folder is missing, doubled or empty or holds images in subfolders, an image has
            no mask, a mask has no image, or two files share one stem. All faults are reported
            together.
    """
    pairs, faults = scan_pairs(root)
    if faults:
        raise DataError(faults)
    return pairs


def scan_pairs(root: Path) -> tuple[list[Pair], list[Fault]]:
    """The pairs of a folder, as `find_pairs`, and all that keeps other files from being paired."""
    root = Path(root)
    faults: list[Fault] = []
    try:
        images_dir, masks_dir = pair_folders(root)
    except DataError as error:
        return [], error.faults
    images = _by_stem(images_dir, faults)
    masks = _by_stem(masks_dir, faults)
    lone_images, lone_masks = images.keys() - masks.keys(), masks.keys() - images.keys()
    for slip, renamed in find_slips(lone_images, lone_masks).items():
        first = min(renamed, key=natural_key)
        example = f"{masks[first][0].name} of {images[renamed[first]][0].name}"
        problem = f"{len(renamed)} masks {slip}, as {example}"
        faults.append(Fault(masks_dir, problem, "rename them to the images' names"))
        lone_images -= set(renamed.values())
        lone_masks -= renamed.keys()
    for stem in sorted(lone_images, key=natural_key):
        faults.append(
            Fault(
                images[stem][0],
                "image without mask",
                f"add {masks_dir.name}/{stem}.png or remove the image",
            )
        )
    for stem in sorted(lone_masks, key=natural_key):
        faults.append(
            Fault(
                masks[stem][0],
                "mask without image",
                f"add {images_dir.name}/{stem}.jpg or remove the mask",
            )
        )
    paired = sorted(images.keys() & masks.keys(), key=natural_key)
    return [Pair(stem, images[stem][0], masks[stem][0]) for stem in paired], faults


def left_out_faults(root: Path) -> list[Fault]:
    """Warnings of what lies among the images and masks of a folder and is not taken for either.

    An image of an unknown type whose mask is of one too would be missing without a word.
    """
    try:
        folders = pair_folders(root)
    except DataError:
        return []  # `scan_pairs` tells what is wrong
    faults = []
    for folder in folders:
        found = [entry.name for entry in folder.iterdir() if not entry.name.startswith(".")]
        taken = {file.name for file in _image_files(folder)}
        left = sorted(
            (name for name in found if name not in taken and not (folder / name).is_dir()),
            key=natural_key,
        )
        if left:
            names = ", ".join(left[:NAMED_FILES]) + (", ..." if len(left) > NAMED_FILES else "")
            problem = f"{len(left)} files are left out, as no image by name or links to nothing"
            known = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
            remedy = f"make sure that none is an image or a mask; known types: {known}"
            faults.append(Fault(folder, f"{problem} ({names})", remedy, "warning"))
    return faults


def pair_folders(root: Path) -> tuple[Path, Path]:
    """Return the image folder and the mask folder of `root`.

    Raises:
        DataError: either is missing or there are several of it.
    """
    if not root.is_dir():
        problem = "is a file, not a folder" if root.exists() else "there is no such folder"
        raise DataError([Fault(root, problem, "give the folder that holds `images` and `masks`")])
    faults: list[Fault] = []
    found: list[Path] = []
    for names in (IMAGE_FOLDERS, MASK_FOLDERS):
        matches = sorted(d for d in root.iterdir() if d.name.lower() in names and d.is_dir())
        wanted = " or ".join(f"`{name}`" for name in names)
        if not matches:
            faults.append(
                Fault(root, f"holds no {wanted} folder", f"put the files in {root / names[0]}")
            )
        elif len(matches) > 1:
            listed = ", ".join(f"`{d.name}`" for d in matches)
            faults.append(
                Fault(root, f"holds several folders for one thing: {listed}", "keep one of them")
            )
        else:
            found.append(matches[0])
    if faults:
        raise DataError(faults)
    return found[0], found[1]


def list_images(source: Path | str) -> list[Path]:
    """List the images that a person names for prediction.

    Args:
        source: an image file, a folder (not searched recursively), or a glob pattern such as
            `"clips/*/*.png"`.

    Returns:
        The image files in natural order; never empty.

    Raises:
        DataError: nothing is there, nothing there is an image, or a named file is not of a known
            image type.
    """
    path = Path(source)
    known = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
    if path.is_file():
        if path.suffix.lower() not in IMAGE_SUFFIXES:
            raise DataError(
                [
                    Fault(
                        path,
                        f"is not an image file by its name (suffix {path.suffix!r})",
                        f"known: {known}",
                    )
                ]
            )
        return [path]
    if path.is_dir():
        files = _image_files(path)
        nested = [] if files else nested_files(path, IMAGE_SUFFIXES)
        if nested:
            problem = tell_nested(path, nested)
            raise DataError([Fault(path, problem, "name each of these folders")])
        if not files:
            raise DataError([Fault(path, "holds no images", f"known types: {known}")])
        return files
    matches = [Path(match) for match in glob.glob(str(source), recursive=True)]
    files = [
        match for match in matches if match.is_file() and match.suffix.lower() in IMAGE_SUFFIXES
    ]
    if not files:
        problem = "there is no such file or folder, and as a pattern it matches no image"
        raise DataError(
            [
                Fault(
                    path,
                    problem,
                    f"give an image, a folder of images or a pattern; known types: {known}",
                )
            ]
        )
    return sorted(files, key=lambda file: natural_key(str(file)))


def nested_files(folder: Path, suffixes: Collection[str]) -> list[Path]:
    """The files of these types in the subfolders of a folder, which are not searched for data."""
    below = (file for file in folder.rglob("*") if file.parent != folder)
    return sorted(
        (
            file
            for file in below
            if file.suffix.lower() in suffixes
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)
            and file.is_file()
        ),
        key=lambda file: natural_key(str(file)),
    )


def tell_nested(folder: Path, files: Sequence[Path], kind: str = "images") -> str:
    """The problem of `files` in subfolders of a folder; names the first of these."""
    names = list(dict.fromkeys(str(file.parent.relative_to(folder)) for file in files))
    listed = ", ".join(names[:NAMED_FOLDERS]) + (", ..." if len(names) > NAMED_FOLDERS else "")
    return f"holds {len(files)} {kind} in subfolders ({listed}), which are not searched"


def _image_files(folder: Path) -> list[Path]:
    # Names with a leading dot are what operating systems leave behind (`._a.jpg` is no JPEG).
    files = (
        f
        for f in folder.iterdir()
        if f.suffix.lower() in IMAGE_SUFFIXES and not f.name.startswith(".")
    )
    return sorted((f for f in files if f.is_file()), key=lambda f: natural_key(f.name))


def _by_stem(folder: Path, faults: list[Fault]) -> dict[str, list[Path]]:
    groups: dict[str, list[Path]] = defaultdict(list)
    for file in _image_files(folder):
        groups[file_stem(file)].append(file)
    nested = nested_files(folder, IMAGE_SUFFIXES)
    if nested:
        remedy = f"move them up into {folder.name}, or out of it"
        faults.append(Fault(folder, tell_nested(folder, nested), remedy))
    elif not groups:
        known = ", ".join(sorted(suffix[1:] for suffix in IMAGE_SUFFIXES))
        faults.append(Fault(folder, "holds no image files", f"known types: {known}"))
    for files in groups.values():
        if len(files) > 1:
            others = ", ".join(f"`{file.name}`" for file in files[1:])
            faults.append(
                Fault(files[0], f"shares its stem with {others}", "keep one file per stem")
            )
    return dict(groups)
