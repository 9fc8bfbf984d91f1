"""A full disk costs nothing that was good, and says how much room is missing."""

import errno
import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

from polypseg import checkpoint
from polypseg.checkpoint import OutOfSpaceError, load_state, save_state, write_atomic


def files(folder):
    return sorted(path.name for path in folder.iterdir())


@pytest.fixture
def small_disk(tmp_path):
    """A file system of one megabyte."""
    folder = tmp_path / "disk"
    folder.mkdir()
    command = ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)]
    try:
        subprocess.run(command, check=True, capture_output=True)
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("needs the right to mount a file system")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_really_full_keeps_the_last_checkpoint(small_disk):
    path = small_disk / "last.pt"
    save_state(path, {"weights": torch.zeros(100_000)}, keep_previous=True)
    with pytest.raises(OutOfSpaceError) as caught:
        save_state(path, {"weights": torch.ones(180_000)}, keep_previous=True)
    told = re.search(
        r"write ([\d,]+) bytes \(([\d,]+) are free.*, ([\d,]+) are miss", str(caught.value)
    )
    needed, free, missing = (int(number.replace(",", "")) for number in told.groups())
    assert needed > 720_000
    assert 600_000 < free < 1_048_576 - 400_000
    assert missing == needed - free
    assert files(small_disk) == ["last.pt"]
    assert load_state(path)["weights"].sum() == 0
    # With that much room it works.
    save_state(path, {"weights": torch.ones(150_000)})
    assert load_state(path)["weights"].sum() == 150_000


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EDQUOT])
def test_full_disk_keeps_the_old_files_and_says_what_was_needed(tmp_path, monkeypatch, code):
    path, previous = tmp_path / "file", tmp_path / "before"
    write_atomic(path, b"old")

    def full(descriptor):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OutOfSpaceError, match=r"12,345 bytes \([\d,]+ are free") as caught:
        write_atomic(path, bytes(12345), keep_as=previous)
    assert caught.value.errno == code
    assert str(path) in str(caught.value)
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["file"]


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_full_disk_seen_by_the_write_itself(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_atomic(path, b"old")

    def open_full_disk(name, mode):
        Path(name).touch()
        return open("/dev/full", "wb")

    monkeypatch.setattr(checkpoint, "open", open_full_disk, raising=False)
    with pytest.raises(OutOfSpaceError):
        write_atomic(path, bytes(10))
    assert path.read_bytes() == b"old"
    assert files(tmp_path) == ["file"]


def test_full_disk_while_rotating_keeps_both_files(tmp_path, monkeypatch):
    for epoch in (1, 2):
        save_state(tmp_path / "last.pt", {"epoch": epoch}, keep_previous=True)

    def full(descriptor):
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(checkpoint.os, "fsync", full)
    with pytest.raises(OutOfSpaceError):
        save_state(tmp_path / "last.pt", {"epoch": 3}, keep_previous=True)
    assert load_state(tmp_path / "last.pt") == {"epoch": 2}
    assert load_state(tmp_path / "previous.pt") == {"epoch": 1}
