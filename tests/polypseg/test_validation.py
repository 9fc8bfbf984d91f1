"""What training measures on held-out images, on a network with a known answer."""

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from torch import Tensor

from deqsolvers import DEQ
from polypseg.data import find_pairs
from polypseg.models import ImplicitModel
from polypseg.validation import Validation


class Linear(ImplicitModel):
    """f(z, e) = factor z + e."""

    def __init__(self, factor: float) -> None:
        super().__init__()
        self.deq = DEQ(lambda z, e: factor * z + e, tol=1e-4)

    def features(self, images: Tensor) -> Tensor:
        return images.mean(1, keepdim=True)

    def zero_state(self, e: Tensor) -> Tensor:
        return torch.zeros_like(e)

    def read_out(self, z: Tensor) -> Tensor:
        return z


@pytest.mark.parametrize("factor", [-0.7, 0.9])
def test_the_spectral_radius_of_a_linear_map(
    write_pairs: Callable[..., Path], factor: float
) -> None:
    pairs = find_pairs(write_pairs([f"s{i}" for i in range(11)]))
    validation = Validation(pairs, size=32, batch=4)
    measured = validation.spectral_radius(Linear(factor), torch.device("cpu"))
    assert measured == pytest.approx(abs(factor), rel=1e-4)
