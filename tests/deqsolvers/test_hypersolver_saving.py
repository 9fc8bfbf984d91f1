"""Saving and loading a HyperSolver with its configuration."""

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from deqsolvers import (
    DEQ,
    HyperSolver,
    fit_hypersolver,
    fixed_point,
    load_hypersolver,
    save_hypersolver,
)
from deqsolvers.hypersolver.network import AlphaBetaNetwork, pool_vectors
from tests.deqsolvers.maps import TanhMap, normal

pytest.importorskip("safetensors")
SIZE = 8

MAKERS = {
    "vectors": lambda: HyperSolver.for_vectors(SIZE, memory=3, width=16, rank=2),
    "sequences": lambda: HyperSolver.for_sequences(SIZE, inputs=4, width=8, causal=True),
    "images": lambda: HyperSolver.for_images(SIZE, inputs=3, memory=2, rank=4),
    "deep": lambda: HyperSolver.for_images(SIZE, inputs=3, deep=True),
    "scales": lambda: HyperSolver.for_scales([4, 6, 8], inputs=3, strides=(1, 2, 8)),
    "no initializer": lambda: HyperSolver.for_vectors(SIZE, initializer=False, rank=2),
}
INPUTS = {
    "vectors": (2, SIZE),
    "sequences": (2, 5, 4),
    "images": (2, 3, 8, 8),
    "deep": (2, 3, 9, 14),
    "scales": (2, 3, 16, 16),
    "no initializer": (2, SIZE),
}


@pytest.mark.parametrize("kind", MAKERS)
def test_what_is_loaded_is_what_was_saved(kind: str, tmp_path: Path) -> None:
    torch.manual_seed(1)
    hyper = MAKERS[kind]()
    for parameter in hyper.parameters():
        nn.init.normal_(parameter)
    save_hypersolver(hyper, tmp_path / "sub" / "hyper.safetensors")
    loaded = load_hypersolver(tmp_path / "sub" / "hyper.safetensors")
    assert not loaded.training
    assert loaded.memory == hyper.memory
    assert loaded.fitted_on is None
    x = torch.randn(*INPUTS[kind])
    if hyper.initializer is None:
        assert loaded.initializer is None
    else:
        torch.testing.assert_close(loaded.start(x), hyper.start(x))
    series = torch.randn(3, 2, hyper.network.features)  # type: ignore[arg-type]
    torch.testing.assert_close(loaded.network(series), hyper.network(series))
    assert [p.name for p in (tmp_path / "sub").iterdir()] == ["hyper.safetensors"]


def test_it_says_what_it_was_fitted_on_and_solves_another_map(tmp_path: Path) -> None:
    f = TanhMap(SIZE, dtype=torch.float32)
    hyper = HyperSolver.for_vectors(SIZE, width=16)
    batches = [normal(32, SIZE, seed=k, dtype=torch.float32) for k in range(3)]
    history = fit_hypersolver(hyper, DEQ(f), batches, epochs=2, steps=3)
    save_hypersolver(hyper, tmp_path / "h.safetensors")
    loaded = load_hypersolver(tmp_path / "h.safetensors")
    fitted = loaded.fitted_on
    assert fitted is not None
    assert fitted == hyper.fitted_on
    assert (fitted.f, fitted.state, fitted.samples) == ("TanhMap", ((SIZE,),), 96)
    assert (fitted.epochs, fitted.steps) == (2, 3)
    assert fitted.parameters == 2 * SIZE * SIZE + SIZE
    assert fitted.distances == history[-1].distances
    assert "TanhMap" in repr(loaded)
    other = TanhMap(SIZE, seed=5, dtype=torch.float32)
    assert fixed_point(other, None, (batches[0],), solver=loaded).converged.all()


class OwnInitializer(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(()))

    def forward(self, x: Tensor) -> Tensor:
        return self.scale * x


def own() -> HyperSolver:
    return HyperSolver(OwnInitializer(), AlphaBetaNetwork(SIZE), pool_vectors)


def test_modules_of_the_user_are_loaded_into_what_they_build(tmp_path: Path) -> None:
    hyper = own()
    nn.init.constant_(hyper.initializer.scale, 3.0)  # type: ignore[arg-type]
    save_hypersolver(hyper, tmp_path / "h.safetensors")
    with pytest.raises(ValueError, match=r"OwnInitializer.*into="):
        load_hypersolver(tmp_path / "h.safetensors")
    target = own()
    assert load_hypersolver(tmp_path / "h.safetensors", into=target) is target
    assert target.initializer.scale == 3.0


def test_weights_that_do_not_fit_leave_everything_as_it_was(tmp_path: Path) -> None:
    save_hypersolver(HyperSolver.for_vectors(SIZE, width=16), tmp_path / "h.safetensors")
    other = HyperSolver.for_vectors(SIZE, width=24)
    before = {key: value.clone() for key, value in other.state_dict().items()}
    with pytest.raises(ValueError, match=r"h\.safetensors.*do not fit.*network"):
        load_hypersolver(tmp_path / "h.safetensors", into=other)
    assert all(torch.equal(before[key], value) for key, value in other.state_dict().items())


def test_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    save_file({"a": torch.zeros(2)}, tmp_path / "a.safetensors")
    with pytest.raises(ValueError, match=r"a\.safetensors: holds no HyperSolver"):
        load_hypersolver(tmp_path / "a.safetensors")
    (tmp_path / "b.safetensors").write_bytes(b"nonsense")
    with pytest.raises(ValueError, match=r"b\.safetensors: not a complete"):
        load_hypersolver(tmp_path / "b.safetensors")
    with pytest.raises(OSError, match=r"c\.safetensors"):
        load_hypersolver(tmp_path / "c.safetensors")
