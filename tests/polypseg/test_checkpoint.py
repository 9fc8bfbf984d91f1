"""Checkpoints: what is written comes back, and no fault costs a file that was good."""

import os
import pickle
import signal
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from polypseg import checkpoint
from polypseg.checkpoint import (
    CheckpointError,
    load_into,
    load_latest,
    load_state,
    load_weights,
    save_state,
    save_weights,
    write_atomic,
)


def files(folder):
    return sorted(path.name for path in folder.iterdir())


def small_net():
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))


def test_atomic_write_creates_the_folder_and_replaces_the_file(tmp_path):
    path = tmp_path / "new" / "file.bin"
    write_atomic(path, b"old")
    write_atomic(path, b"new!")
    assert path.read_bytes() == b"new!"
    assert files(path.parent) == ["file.bin"]


@pytest.mark.parametrize("name", ["x" * 251 + ".png", "息" * 83 + ".png"])
def test_a_name_may_be_as_long_as_the_system_takes(tmp_path, name):
    write_atomic(tmp_path / name, b"mask")
    assert files(tmp_path) == [name]


def test_atomic_write_respects_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        write_atomic(tmp_path / "file", b"x")
    finally:
        os.umask(before)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640


def test_other_failures_leave_no_temporary_file(tmp_path, monkeypatch):
    def interrupted(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(checkpoint.os, "fsync", interrupted)
    with pytest.raises(KeyboardInterrupt):
        write_atomic(tmp_path / "file", b"x")
    assert files(tmp_path) == []


def test_weights_come_back_bit_for_bit_with_their_metadata(tmp_path):
    tensors = {
        "half": torch.randn(3, 2).half(),
        "count": torch.tensor(7),
        "empty": torch.zeros(0, 4),
        "nan": torch.tensor([float("nan"), float("-inf")]),
    }
    save_weights(tmp_path / "w.safetensors", tensors, {"recipe": "polypdeq-add"})
    loaded, metadata = load_weights(tmp_path / "w.safetensors")
    assert metadata == {"recipe": "polypdeq-add"}
    assert loaded.keys() == tensors.keys()
    for key, value in tensors.items():
        assert loaded[key].dtype == value.dtype
        np.testing.assert_array_equal(loaded[key].numpy(), value.numpy())


def test_weights_that_share_memory_or_are_strided_are_stored_whole(tmp_path):
    base = torch.arange(12.0).reshape(3, 4)
    parameter = nn.Parameter(base)
    tensors = {"base": parameter, "tied": parameter, "transposed": base.T, "slice": base[1:2]}
    save_weights(tmp_path / "w.safetensors", tensors, {})
    loaded, _ = load_weights(tmp_path / "w.safetensors")
    expected = np.arange(12.0).reshape(3, 4)
    np.testing.assert_array_equal(loaded["base"], expected)
    np.testing.assert_array_equal(loaded["tied"], expected)
    np.testing.assert_array_equal(loaded["transposed"], expected.T)
    np.testing.assert_array_equal(loaded["slice"], expected[1:2])


def test_weights_that_are_no_tensors_are_named(tmp_path):
    with pytest.raises(CheckpointError, match="name_of_it"):
        save_weights(tmp_path / "w.safetensors", {"name_of_it": "text"}, {})
    assert files(tmp_path) == []


@pytest.mark.parametrize("keep", [0, 5, 100, -1])
def test_truncated_weights_are_refused(tmp_path, keep):
    path = tmp_path / "w.safetensors"
    save_weights(path, small_net().state_dict(), {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(CheckpointError, match="not a complete safetensors file"):
        load_weights(path)


def test_load_into_restores_a_module_and_returns_the_metadata(tmp_path):
    source, target = small_net(), small_net()
    source(torch.randn(2, 3, 8, 8))  # moves the batch statistics, which are buffers
    save_weights(tmp_path / "w.safetensors", source.state_dict(), {"epoch": "3"})
    assert load_into(target, tmp_path / "w.safetensors", what="network") == {"epoch": "3"}
    for key, value in source.state_dict().items():
        assert torch.equal(target.state_dict()[key], value), key


def test_load_into_names_every_fault_at_once_and_changes_nothing(tmp_path):
    module = small_net()
    tensors = dict(module.state_dict())
    del tensors["0.bias"]
    tensors["0.weight"] = torch.zeros(4, 1, 3, 3)
    tensors["1.weight"] = torch.full((4,), 9.0)  # fits, and must not be copied all the same
    tensors |= {f"extra.{i}": torch.zeros(1) for i in range(13)}
    save_weights(tmp_path / "w.safetensors", tensors, {})
    before = {key: value.clone() for key, value in module.state_dict().items()}

    with pytest.raises(CheckpointError) as caught:
        load_into(module, tmp_path / "w.safetensors", what="encoder")

    message = str(caught.value)
    assert "do not fit the encoder" in message
    assert "1 missing in the file: 0.bias" in message
    assert "13 unknown to the model: extra." in message
    assert "and 3 more" in message
    assert "1 of another shape: 0.weight (file (4, 1, 3, 3), model (4, 3, 3, 3))" in message
    for key, value in module.state_dict().items():
        assert torch.equal(value, before[key]), key


def test_missing_files_are_named(tmp_path):
    with pytest.raises(CheckpointError, match=r"absent\.safetensors: there is no such"):
        load_into(small_net(), tmp_path / "absent.safetensors", what="network")
    with pytest.raises(CheckpointError, match=r"absent\.pt: there is no such"):
        load_state(tmp_path / "absent.pt")
    with pytest.raises(CheckpointError, match="cannot be read"):
        load_state(tmp_path)


def test_a_resumed_optimiser_and_generator_continue_exactly(tmp_path):
    def train(parameter, optimizer, steps):
        for _ in range(steps):
            optimizer.zero_grad()
            ((parameter - torch.randn(5)) ** 2).sum().backward()
            optimizer.step()

    torch.manual_seed(3)
    parameter = nn.Parameter(torch.zeros(5))
    optimizer = torch.optim.AdamW([parameter], lr=0.1)
    train(parameter, optimizer, 3)
    state = {
        "parameter": parameter.detach().clone(),
        "optimizer": optimizer.state_dict(),
        "rng": torch.get_rng_state(),
        "progress": {"phase": "explicit", "epoch": 3, "best": (0.5, None)},
    }
    save_state(tmp_path / "last.pt", state)
    train(parameter, optimizer, 4)

    loaded = load_state(tmp_path / "last.pt")
    assert loaded["progress"] == state["progress"]
    torch.manual_seed(99)
    resumed = nn.Parameter(loaded["parameter"])
    optimizer = torch.optim.AdamW([resumed], lr=0.7)
    optimizer.load_state_dict(loaded["optimizer"])
    torch.set_rng_state(loaded["rng"])
    train(resumed, optimizer, 4)
    assert torch.equal(resumed, parameter)


class Bomb:
    """Unpickling this the unsafe way makes a folder."""

    def __init__(self, target):
        self.target = target

    def __reduce__(self):
        return os.mkdir, (str(self.target),)


@pytest.mark.parametrize(
    "writer", [torch.save, lambda bomb, path: path.write_bytes(pickle.dumps(bomb, protocol=2))]
)
def test_a_pickle_with_code_is_refused_and_not_run(tmp_path, writer):
    target = tmp_path / "exploded"
    writer({"epoch": 1, "optimizer": Bomb(target)}, tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match=r"refused.*could run code") as caught:
        load_state(tmp_path / "last.pt")
    assert "weights_only" not in str(caught.value)  # torch's message would tell how to run it
    assert not target.exists()


def test_a_state_that_could_not_be_read_back_is_not_written(tmp_path):
    save_state(tmp_path / "last.pt", {"epoch": 1})
    with pytest.raises(CheckpointError, match="not written"):
        save_state(tmp_path / "last.pt", {"rng": np.random.default_rng(0)}, keep_previous=True)
    assert load_state(tmp_path / "last.pt") == {"epoch": 1}
    assert files(tmp_path) == ["last.pt"]


def test_a_state_is_a_dict(tmp_path):
    torch.save([1, 2], tmp_path / "last.pt")
    with pytest.raises(CheckpointError, match="expected a dict, found list"):
        load_state(tmp_path / "last.pt")


@pytest.mark.parametrize("share", [0, 0.001, 0.3, 0.99])
def test_truncated_last_falls_back_to_previous_and_says_so(tmp_path, share):
    for epoch in (1, 2, 3):
        save_state(tmp_path / "last.pt", {"epoch": epoch, "w": torch.ones(999)}, keep_previous=True)
    assert files(tmp_path) == ["last.pt", "previous.pt"]
    assert load_latest(tmp_path)["epoch"] == 3

    data = (tmp_path / "last.pt").read_bytes()
    (tmp_path / "last.pt").write_bytes(data[: int(share * len(data))])
    with pytest.warns(UserWarning, match=r"last\.pt: .*; going on from .*previous\.pt"):
        assert load_latest(tmp_path)["epoch"] == 2

    (tmp_path / "last.pt").unlink()
    with pytest.warns(UserWarning, match="there is no such checkpoint"):
        assert load_latest(tmp_path)["epoch"] == 2

    (tmp_path / "previous.pt").unlink()
    with pytest.raises(CheckpointError, match=r"(?s)last\.pt: .*previous\.pt: "):
        load_latest(tmp_path)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
@pytest.mark.parametrize(
    ("function", "call"), [("fsync", 1), ("replace", 1), ("replace", 2), ("fsync", 2)]
)
def test_sigkill_at_every_step_of_a_write_leaves_a_complete_file(tmp_path, function, call):
    for epoch in (1, 2):
        save_state(tmp_path / "last.pt", {"epoch": epoch}, keep_previous=True)

    child = os.fork()
    if child == 0:
        try:
            real, calls = getattr(os, function), iter(range(1, 9))

            def killed(*arguments):
                if next(calls) == call:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*arguments)

            setattr(os, function, killed)
            save_state(tmp_path / "last.pt", {"epoch": 3}, keep_previous=True)
        finally:
            os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status)

    in_place = {path.name: load_state(path)["epoch"] for path in tmp_path.glob("[!.]*")}
    expected = {
        ("fsync", 1): {"last.pt": 2, "previous.pt": 1},
        ("replace", 1): {"last.pt": 2, "previous.pt": 1},
        ("replace", 2): {"previous.pt": 2},
        ("fsync", 2): {"last.pt": 3, "previous.pt": 2},
    }
    assert in_place == expected[function, call]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert load_latest(tmp_path)["epoch"] == max(in_place.values())
