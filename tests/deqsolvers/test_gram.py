"""The small systems of a solver: a Gram matrix that is written entry by entry, and solved."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from deqsolvers.solvers.history import Gram

SIZE, BATCH = 4, 3


def columns(seed: int = 0) -> Tensor:
    """(SIZE + 2, BATCH, 9) vectors whose lengths differ by a factor of a thousand."""
    generator = torch.Generator().manual_seed(seed)
    vectors = torch.randn(SIZE + 2, BATCH, 9, generator=generator, dtype=torch.float64)
    return vectors * 10.0 ** torch.randint(-2, 2, (SIZE + 2, 1, 1), generator=generator)


def write(gram: Gram, held: list[Tensor], slot: int) -> None:
    """The products of the vector in ``slot`` with all that are held."""
    row = torch.stack([(one * held[slot]).sum(1) for one in held], dim=1)
    gram.write(slot, row, row, row[:, slot])


def numpy_solve(held: list[Tensor], right: Tensor) -> np.ndarray:
    stacked = torch.stack(held, dim=1).numpy()
    return np.linalg.solve(stacked @ stacked.transpose(0, 2, 1), right.numpy()[..., None])[..., 0]


@pytest.mark.parametrize("recorded", [False, True])
def test_solutions_are_numpy_s_while_it_grows_and_when_entries_are_replaced(
    recorded: bool,
) -> None:
    with torch.set_grad_enabled(recorded):
        vectors, other = columns(), columns(seed=1)[0]
        gram = Gram(SIZE, vectors[0])
        held: list[Tensor] = []
        for pushed, vector in enumerate(vectors):
            slot = pushed % SIZE
            held[slot : slot + 1] = [vector]
            write(gram, held, slot)
            right = torch.stack([(one * other).sum(1) for one in held], dim=1)
            found, info = gram.solve(right)
            np.testing.assert_allclose(found.numpy(), numpy_solve(held, right), rtol=1e-9)
            assert info.tolist() == [0] * BATCH


@torch.no_grad()
def test_samples_that_stay_keep_their_systems() -> None:
    held = list(columns()[:SIZE])
    gram = Gram(SIZE, held[0])
    for slot in range(SIZE):
        write(gram, held[: slot + 1], slot)
        gram.solve(torch.ones(BATCH, slot + 1, dtype=torch.float64))
    rows = torch.tensor([2, 0])
    gram.take(rows)
    right = columns(seed=1)[0, rows, :SIZE]
    found, info = gram.solve(right)
    np.testing.assert_allclose(found, numpy_solve([one[rows] for one in held], right), rtol=1e-9)
    assert info.tolist() == [0, 0]


@pytest.mark.parametrize("recorded", [False, True])
@pytest.mark.parametrize("fault", ["singular", "infinite", "not a number"])
def test_a_system_without_a_finite_solution_is_told_and_spoils_no_other(
    fault: str, recorded: bool
) -> None:
    with torch.set_grad_enabled(recorded):
        held = list(columns()[:SIZE])
        right = torch.ones(BATCH, SIZE, dtype=torch.float64)
        if fault == "singular":
            held[2][1] = 0
        else:
            right[1, 2] = torch.inf if fault == "infinite" else torch.nan
        gram = Gram(SIZE, held[0])
        for slot in range(SIZE):
            write(gram, held[: slot + 1], slot)
        found, info = gram.solve(right)
        assert (info != 0).tolist() == [False, True, False]
        others = torch.tensor([0, 2])
        expected = numpy_solve([one[others] for one in held], right[others])
        np.testing.assert_allclose(found[others].numpy(), expected, rtol=1e-9)
