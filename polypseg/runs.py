"""The files of a run directory: what ran, its log, its results table and its curves."""

import csv
import io
import logging
import math
import os
import platform
import subprocess
import sys
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import IO, Any

import torch
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from tqdm import tqdm

from polypseg.checkpoint import write_atomic

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_PACKAGES = ("deqsolvers", "torch", "torchvision", "timm", "numpy", "albumentations")


def versions() -> dict[str, str | int | bool | None]:
    """Say what a result was made with: software, commit and machine; None where it is not known."""
    return {
        "python": platform.python_version(),
        **{package: _version(package) for package in _PACKAGES},
        **_git(),
        "platform": platform.platform(),
        "cpu": _cpu_name(),
        "cpu_count": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "cuda": torch.version.cuda if torch.cuda.is_available() else None,
    }


def _version(package: str) -> str | None:
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None


def _cpu_name() -> str | None:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or None
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _git() -> dict[str, str | bool | None]:
    """The commit of the checkout that this file belongs to, and whether tracked files differ."""
    root = Path(__file__).resolve().parent.parent

    def git(*arguments: str) -> str:
        command = ["git", "-C", str(root), *arguments]
        return subprocess.run(
            command, capture_output=True, check=True, text=True, timeout=10
        ).stdout.strip()

    try:
        # Installed below someone else's repository, the commit of that one would be a lie.
        if Path(git("rev-parse", "--show-toplevel")).resolve() != root:
            return {"git_commit": None, "git_dirty": None}
        commit = git("rev-parse", "HEAD")
        changes = git("status", "--porcelain", "--untracked-files=no")
    except (OSError, subprocess.SubprocessError):
        return {"git_commit": None, "git_dirty": None}
    return {"git_commit": commit, "git_dirty": bool(changes)}


class ResultsCsv:
    """A table with one row per epoch, written as the training goes.

    `fields` are the columns and must hold "phase" and "epoch". An existing table is gone on with: a
    last line cut short by a kill is dropped, other columns are an error.

    Raises:
        ValueError: the columns lack "phase" or "epoch", or an existing table has other columns.
    """

    def __init__(self, path: Path, fields: list[str]) -> None:
        lacking = {"phase", "epoch"} - set(fields)
        if lacking:
            raise ValueError(f"fields lacks {sorted(lacking)}: rows are found again by them")
        self.path = path
        self.fields = fields
        text = path.read_text() if path.exists() else ""
        whole = text[: text.rfind("\n") + 1]
        if not whole:
            self._rewrite([])
            return
        found = next(csv.reader(io.StringIO(whole)))
        if found != fields:
            raise ValueError(
                f"{path}: has the columns {', '.join(found)}; this run writes {', '.join(fields)}. "
                "Move the file away or choose another run directory"
            )
        if whole != text:
            write_atomic(path, whole.encode())

    def append(self, row: Mapping[str, Any]) -> None:
        """Add a row; columns it lacks stay empty, and a key that is no column raises ValueError."""
        text = io.StringIO()
        csv.DictWriter(text, self.fields, lineterminator="\n").writerow(row)
        with open(self.path, "a") as file:
            file.write(text.getvalue())

    def truncate_from(self, phase: str, epoch: int) -> None:
        """Drop the first row of `phase` at or after `epoch` and all rows written after it.

        A resumed training calls this with the epoch it is about to run, so that the epochs which
        the lost process had written after its last checkpoint do not appear twice.
        """
        kept = []
        for row in read_epochs(self.path):
            if row["phase"] == phase and int(row["epoch"]) >= epoch:
                break
            kept.append(row)
        self._rewrite(kept)

    def _rewrite(self, rows: list[dict[str, str]]) -> None:
        text = io.StringIO()
        writer = csv.DictWriter(text, self.fields, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)
        write_atomic(self.path, text.getvalue().encode())


def read_epochs(path: Path) -> list[dict[str, str]]:
    """The rows of a table that a `ResultsCsv` wrote, oldest first."""
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def is_release(folder: Path) -> bool:
    """Whether a folder holds trained weights and no trace of the training, which a run has."""
    return (folder / "implicit.safetensors").is_file() and not (folder / "results.csv").exists()


def lock_folder(folder: Path) -> IO[str]:
    """Keep other trainings out of a run directory until the returned file is closed.

    The system releases the lock when the process ends, however it ends.

    Raises:
        ValueError: another process holds it.
    """
    file = open(folder / ".lock", "w")  # noqa: SIM115 (it stays open)
    if fcntl is not None:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.close()
            raise ValueError(
                f"{folder}: another training is at work in this run directory; wait for it, or "
                "choose another directory"
            ) from None
    return file


class _TqdmHandler(logging.Handler):
    """Print above a progress bar instead of through it."""

    def emit(self, record: logging.LogRecord) -> None:
        try:
            tqdm.write(self.format(record), file=sys.stderr)
        except Exception:
            self.handleError(record)


def setup_log(path: Path) -> logging.Logger:
    """Send the "polypseg" logger to the end of the file `path` and to stderr, and return it.

    A second call moves the log to another file.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    logger = logging.getLogger("polypseg")
    for old in logger.handlers[:]:
        logger.removeHandler(old)
        old.close()
    file = logging.FileHandler(path, encoding="utf-8")
    file.setFormatter(logging.Formatter("%(asctime)s %(levelname)s %(message)s"))
    logger.addHandler(file)
    logger.addHandler(_TqdmHandler())
    logger.setLevel(logging.INFO)
    logger.propagate = False  # the root logger may have handlers of its own: no line twice
    return logger


def plot_curves(results_csv: Path, png: Path) -> None:
    """Draw a results table, with a column of panels per phase.

    Columns with "loss" in their name share the first panel, those with "dice" the second. Columns
    with "residual" in their name, if there are any, share a third with a logarithmic axis. Empty
    cells are gaps.

    Raises:
        ValueError: the table has no rows.
    """
    rows = read_epochs(results_csv)
    if not rows:
        raise ValueError(f"{results_csv}: no rows to draw yet")
    phases = list(dict.fromkeys(row["phase"] for row in rows))
    panels = {
        kind: columns
        for kind in ("loss", "dice", "residual")
        if (columns := [name for name in rows[0] if kind in name.lower()])
    }
    # Figure, not pyplot: no global state, no window, and no dependence on the user's backend.
    figure = Figure(figsize=(4.5 * len(phases), 2.8 * len(panels)), layout="constrained")
    axes = figure.subplots(len(panels), len(phases), squeeze=False)
    for column, phase in enumerate(phases):
        axes[0, column].set_title(phase)
        own = [row for row in rows if row["phase"] == phase]
        epochs = [int(row["epoch"]) for row in own]
        for axis, (kind, names) in zip(axes[:, column], panels.items(), strict=True):
            for name in names:
                values = [float(row[name] or "nan") for row in own]
                if not all(math.isnan(value) for value in values):
                    axis.plot(epochs, values, marker=".", label=name)
            if not axis.lines:
                axis.set_axis_off()
                continue
            axis.set(xlabel="epoch", ylabel=kind, yscale="log" if kind == "residual" else "linear")
            axis.xaxis.set_major_locator(MaxNLocator(integer=True))
            axis.legend(fontsize="small")
            axis.grid(alpha=0.3)
    dice = [axis for axis in figure.axes if axis.get_ylabel() == "dice"]
    for axis in dice[1:]:  # comparable between phases, unlike the losses
        axis.sharey(dice[0])
        axis.autoscale(axis="y")
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=100)
    write_atomic(png, picture.getvalue())
