"""Variational dropout: masks belong to solves, and every sample keeps its own."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deqsolvers import (
    DEQ,
    Implicit,
    Picard,
    Status,
    VariationalDropout,
    fixed_masks,
    fixed_point,
    jacobian_regularizer,
)
from tests.problems import normal

EXACT: dict[str, Any] = {
    "tol": 1e-12,
    "max_steps": 300,
    "backward": Implicit(tol=1e-10, max_steps=300),
}
# 0.3 drop(z) + x with p = 0.5 has the fixed point x where the mask is 0, and 2.5 x where it is 2.
KEPT = 2.5


class Damped(nn.Module):
    """``0.3 drop(z) + x``."""

    def __init__(self) -> None:
        super().__init__()
        self.drop = VariationalDropout(0.5)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return 0.3 * self.drop(z) + x


def kept(z: Tensor, x: Tensor) -> Tensor:
    """Which entries the mask of this solution kept."""
    ratio = (z / x).detach()
    mask = ratio > 2
    torch.testing.assert_close(ratio, torch.where(mask, KEPT, 1.0).to(ratio))
    return mask


@pytest.fixture(autouse=True)
def _seeded() -> None:
    torch.manual_seed(0)


@pytest.mark.parametrize("options", [{}, {"solver": Picard(), "backward": "unrolled"}])
def test_solution_and_gradient_belong_to_one_mask(options: dict[str, Any]) -> None:
    x = normal(6, 40).requires_grad_()
    z, solution = DEQ(Damped(), **{**EXACT, **options})(x)
    assert solution.statuses() == [Status.CONVERGED] * 6
    mask = kept(z, x)
    assert 0.35 < mask.double().mean() < 0.65
    assert len({tuple(row) for row in mask.tolist()}) == 6  # every sample has its own
    (gradient,) = torch.autograd.grad(z.sum(), x)
    torch.testing.assert_close(gradient, torch.where(mask, KEPT, 1.0).double(), rtol=1e-7, atol=0)


def test_samples_keep_their_masks_when_others_leave() -> None:
    drop = VariationalDropout(0.5)
    seen: dict[int, list[Tensor]] = {row: [] for row in range(8)}
    rates = torch.linspace(0, 0.95, 8, dtype=torch.float64).flip(0).unsqueeze(1)

    def f(z: Tensor, row: Tensor, rate: Tensor, x: Tensor) -> Tensor:
        masks = drop(torch.ones_like(z))
        for number, mask in zip(row.flatten().tolist(), masks, strict=True):
            seen[number].append(mask)
        return rate * torch.tanh(z) * masks / 2 + x

    rows = torch.arange(8).unsqueeze(1)
    x = normal(8, 12).requires_grad_()
    deq = DEQ(f, Picard(), tol=1e-9, max_steps=400)
    _, solution = deq(rows, rates, x, z0=torch.zeros_like(x))
    assert solution.rows_evaluated < 8 * solution.calls  # some did leave
    for masks in seen.values():
        assert all(torch.equal(mask, masks[0]) for mask in masks)
    assert len({tuple(masks[0].tolist()) for masks in seen.values()}) == 8


def test_every_solve_draws_anew_and_several_may_wait_for_one_backward_pass() -> None:
    deq, x = DEQ(Damped(), **EXACT), normal(3, 30).requires_grad_()
    one, other = deq(x)[0], deq(x)[0]
    masks = kept(one, x), kept(other, x)
    assert not torch.equal(*masks)
    (gradient,) = torch.autograd.grad(one.sum() + 10 * other.sum(), x)
    expected = torch.where(masks[0], KEPT, 1.0) + 10 * torch.where(masks[1], KEPT, 1.0)
    torch.testing.assert_close(gradient, expected.double(), rtol=1e-7, atol=0)


def test_double_backward_uses_the_mask_of_its_own_solve() -> None:
    drop = VariationalDropout(0.5)
    deq = DEQ(lambda z, x: 0.3 * drop(z) * x + x, **EXACT)
    x = (0.1 + 0.8 * torch.rand(2, 20, dtype=torch.float64)).requires_grad_()
    z, _ = deq(x)
    deq(x)  # another solve, with another mask, in between
    # z = x / (1 - 0.3 m x) for the mask m
    mask = ((1 - x / z) / (0.3 * x)).detach().round()
    assert set(mask.unique().tolist()) == {0.0, 2.0}
    (first,) = torch.autograd.grad(z.sum(), x, create_graph=True)
    torch.testing.assert_close(first, 1 / (1 - 0.3 * mask * x) ** 2, rtol=1e-6, atol=1e-8)
    (second,) = torch.autograd.grad(first.sum(), x)
    torch.testing.assert_close(second, 0.6 * mask / (1 - 0.3 * mask * x) ** 3, rtol=1e-6, atol=1e-8)


def test_evaluation_mode_and_p_of_zero_do_nothing() -> None:
    x = normal(2, 5)
    torch.testing.assert_close(DEQ(Damped(), **EXACT).eval()(x)[0], x / 0.7)
    assert VariationalDropout(0.5).eval()(x) is x
    assert VariationalDropout(0.0)(x) is x


def test_masks_are_unbiased() -> None:
    p, count = 0.2, 100_000
    with fixed_masks():
        out = VariationalDropout(p)(torch.ones(4, count // 4))
    assert set(out.unique().tolist()) == {0.0, 1.25}
    assert abs((out == 0).double().mean() - p) < 4 * (p * (1 - p) / count) ** 0.5


@pytest.mark.parametrize(
    ("shared", "varies"),
    [((), (0, 1, 2, 3)), ((2, 3), (0, 1)), ((1, 2, 3), (0,)), ((0,), (1, 2, 3))],
)
def test_shared_dimensions(shared: tuple[int, ...], varies: tuple[int, ...]) -> None:
    with fixed_masks():
        out = VariationalDropout(0.5, shared_dims=shared)(torch.ones(16, 5, 6, 7))
    for dim in range(4):
        same = bool((out == out.narrow(dim, 0, 1)).all())
        assert same == (dim not in varies)


def test_masks_shared_by_the_batch_serve_a_shrinking_batch() -> None:
    drop = VariationalDropout(0.5, shared_dims=(0,))
    rates = torch.linspace(0, 0.45, 8, dtype=torch.float64).unsqueeze(1)
    x = normal(8, 12)
    deq = DEQ(lambda z, r, x: r * drop(z) + x, Picard(), tol=1e-10, max_steps=400)
    z, solution = deq(rates, x, z0=torch.zeros_like(x))
    assert bool(solution.converged.all())
    mask = (z != x)[1:]  # the first sample's rate is 0
    assert bool((mask == mask[0]).all())


def test_a_block_shares_the_mask_with_a_regulariser() -> None:
    f, x = Damped(), normal(3, 20)
    with fixed_masks():
        z, solution = DEQ(f, **EXACT)(x)
        found = jacobian_regularizer(
            f, solution.z, (x,), generator=torch.Generator().manual_seed(4)
        )
    noise = torch.randn(3, 20, generator=torch.Generator().manual_seed(4), dtype=torch.float64)
    expected = (0.6 * noise * kept(z, x)).square().mean()
    torch.testing.assert_close(found, expected)


def test_a_block_around_the_functional_interface() -> None:
    f, x = Damped(), normal(3, 20)
    with fixed_masks():
        solution = fixed_point(f, torch.zeros_like(x), (x,), drop_converged=False, tol=1e-12)
    assert bool(solution.converged.all())
    kept(solution.z, x)


def test_the_functional_interface_holds_a_mask_while_samples_leave() -> None:
    f, x = Damped(), normal(6, 20)
    start = x * torch.logspace(0, 6, 6, dtype=torch.float64).unsqueeze(1)
    options: dict[str, Any] = {"solver": Picard(), "tol": 1e-12, "max_steps": 300}
    first = kept(fixed_point(f, start, (x,), **options).z, x)
    with fixed_masks():
        solution = fixed_point(f, start, (x,), **options)
        mask = kept(solution.z, x)
        again = fixed_point(f, start, (x,), **options)
    assert solution.rows_evaluated < 6 * solution.calls  # samples have left the batch
    assert bool((kept(again.z, x) == mask).all())
    assert not bool((first == mask).all())


def test_a_solve_inside_f_keeps_its_masks_for_the_outer_solve() -> None:
    inner = DEQ(Damped(), **EXACT)
    x = normal(4, 30)
    rates = torch.tensor([[0.0], [0.1], [0.2], [0.35]], dtype=torch.float64)
    outer = DEQ(lambda z, x, rate: rate * inner(z)[0] + x, Picard(), tol=1e-9, max_steps=200)
    z, solution = outer(x, rates)
    assert bool(solution.converged.all())
    # inner(z) is z or 2.5 z, so the outer fixed point is x / (1 - rate) or x / (1 - 2.5 rate).
    ratio = z / x
    either = torch.stack([1 / (1 - rates), 1 / (1 - KEPT * rates)])
    assert bool(((ratio - either).abs() < 1e-6).any(0).all())
    assert not torch.equal(ratio[3], ratio[3, :1].expand(30))


def test_it_is_reproducible_under_a_seed() -> None:
    deq, x = DEQ(Damped(), **EXACT), normal(3, 20)
    torch.manual_seed(7)
    one = deq(x)[0]
    torch.manual_seed(7)
    assert torch.equal(deq(x)[0], one)


def test_copies_draw_masks_of_their_own() -> None:
    drop, ones = VariationalDropout(0.5), torch.ones(2, 20)
    with fixed_masks():
        first = drop(ones)
        twin = copy.deepcopy(drop)  # of a layer that holds a mask already
        other = twin(ones)
        assert not torch.equal(first, other)
        assert torch.equal(drop(ones), first)
        assert torch.equal(twin(ones), other)
    assert not list(drop.state_dict())


def test_outside_of_a_solve_it_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="with fixed_masks"):
        VariationalDropout(0.5)(torch.ones(2, 3))
    deq = DEQ(Damped(), **EXACT)
    deq(normal(2, 3))
    with pytest.raises(RuntimeError, match="with fixed_masks"):
        deq.f(normal(2, 3), normal(2, 3))


def test_one_layer_in_two_places_of_other_shapes() -> None:
    drop = VariationalDropout(0.5)
    deq = DEQ(lambda z, x: drop(z) + drop(x[:, :2]).sum(), **EXACT)
    with pytest.raises(ValueError, match="one layer for each place"):
        deq(normal(2, 3))


def test_a_first_dimension_that_is_not_the_batch() -> None:
    drop = VariationalDropout(0.5)
    deq = DEQ(lambda z, x: 0.1 * drop(z.reshape(-1, 2)).reshape(z.shape) + x, **EXACT)
    with pytest.raises(ValueError, match="first dimension is the batch"):
        deq(normal(3, 4))


def test_a_block_for_batches_of_two_sizes() -> None:
    deq = DEQ(Damped(), **EXACT)
    with fixed_masks():
        deq(normal(3, 4))
        with pytest.raises(ValueError, match="for each batch"):
            deq(normal(2, 4))


@pytest.mark.parametrize("p", [-0.1, 1.0, float("nan")])
def test_p_out_of_range(p: float) -> None:
    with pytest.raises(ValueError, match="p must be"):
        VariationalDropout(p)


@pytest.mark.parametrize("randomness", ["same", "different"])
def test_a_mapped_solve_draws_as_vmap_is_told(randomness: str) -> None:
    drop = VariationalDropout(0.5)
    deq = DEQ(lambda z, x: 0.5 * z + drop(x), Picard(), tol=1e-10, max_steps=60)

    def solve(x: Tensor) -> tuple[Tensor, Tensor]:
        z, pull = torch.func.vjp(lambda x: deq(x)[0], x)
        return z, pull(torch.ones_like(z))[0]

    x = torch.ones(3, 2, 50, dtype=torch.float64)
    z, slope = torch.func.vmap(solve, randomness=randomness)(x)
    # z = 2 mask x with one mask for all evaluations, the recorded one too.
    masks = (z / 2).round()
    assert set(masks.flatten().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(z, 2 * masks, rtol=1e-8, atol=1e-8)
    torch.testing.assert_close(slope, 2 * masks, rtol=1e-3, atol=1e-8)
    for slices in (masks[:2], masks[1:]):
        assert torch.equal(slices[0], slices[1]) == (randomness == "same")
    assert not torch.equal(masks[:, 0], masks[:, 1])
