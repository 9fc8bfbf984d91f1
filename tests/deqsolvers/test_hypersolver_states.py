"""HyperSolvers for sequences, multi-scale states and preconditioned steps."""

from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

from deqsolvers import DEQ, HyperSolver, Picard, Status, fit_hypersolver, fixed_point
from deqsolvers.hypersolver.fit import measure_distances
from deqsolvers.hypersolver.initializers import (
    DeepImageInitializer,
    MultiScaleInitializer,
    SequenceInitializer,
)
from deqsolvers.hypersolver.network import AlphaBetaNetwork, pool_scales, pool_sequences
from deqsolvers.hypersolver.preconditioners import ImagePreconditioner, VectorPreconditioner
from tests.deqsolvers.maps import normal


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


class SequenceMap(nn.Module):
    """``tanh(conv over time (z) W + x)``."""

    def __init__(self, features: int):
        super().__init__()
        kernel = normal(features, features, 3, seed=1, dtype=torch.float32)
        self.kernel = nn.Parameter(0.8 * kernel / kernel.abs().sum(dim=(1, 2)).max())

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(F.conv1d(z.transpose(1, 2), self.kernel, padding=1).transpose(1, 2) + x)


class ScalesMap(nn.Module):
    """Two coupled resolutions, like an MDEQ in small; its size is odd, so scales round up."""

    def __init__(self) -> None:
        super().__init__()
        self.fine = nn.Parameter(0.02 * normal(3, 8, 3, 3, seed=1, dtype=torch.float32))
        self.coarse = nn.Parameter(0.02 * normal(5, 8, 3, 3, seed=2, dtype=torch.float32))

    def forward(self, z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        fine, coarse = z
        up = F.interpolate(coarse, size=fine.shape[-2:])
        down = F.avg_pool2d(fine, 2, ceil_mode=True)
        first = F.conv2d(torch.cat([fine, up], 1), self.fine, padding=1)
        second = F.conv2d(torch.cat([down, coarse], 1), self.coarse, padding=1)
        return torch.tanh(first + x), torch.tanh(second + down.mean(1, keepdim=True))


def sequences(count: int, seed: int = 0) -> list[Tensor]:
    return [normal(8, 7, 4, seed=seed + k, dtype=torch.float32) for k in range(count)]


def images(count: int, seed: int = 0) -> list[Tensor]:
    return [normal(4, 3, 9, 7, seed=seed + k, dtype=torch.float32) for k in range(count)]


def scales_start(x: Tensor) -> tuple[Tensor, Tensor]:
    return x.new_zeros(len(x), 3, 9, 7), x.new_zeros(len(x), 5, 5, 4)


def test_sequences_of_any_length() -> None:
    f = SequenceMap(4)
    hyper = HyperSolver.for_sequences(4, width=16, initializer_width=6)
    history = fit_hypersolver(hyper, DEQ(f), sequences(4), epochs=4, steps=3, lr=1e-2)
    assert history[-1].distances[-1] < 0.5 * history[0].distances[-1]
    x = normal(2, 19, 4, seed=90, dtype=torch.float32)
    solution = fixed_point(f, None, (x,), solver=hyper, tol=1e-3)
    assert solution.statuses() == [Status.CONVERGED] * 2


def test_multi_scale_states() -> None:
    f = ScalesMap()
    deq = DEQ(f, z0=scales_start)
    hyper = HyperSolver.for_scales([3, 5], width=16)
    history = fit_hypersolver(hyper, deq, images(4), epochs=4, steps=3, lr=1e-2)
    assert history[-1].distances[-1] < 0.5 * history[0].distances[-1]
    assert hyper.fitted_on is not None
    assert hyper.fitted_on.state == ((3, 9, 7), (5, 5, 4))
    x = images(1, seed=90)[0]
    found = fixed_point(f, None, (x,), solver=hyper, tol=1e-4)
    plain = fixed_point(f, scales_start(x), (x,), solver=Picard(), tol=1e-4)
    assert found.converged.all()
    for ours, theirs in zip(found.z, plain.z, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=2e-3)


def test_scales_share_alpha_and_beta() -> None:
    """One alpha and beta serve all scales: with the reader at zero the step is plain on each."""
    f = ScalesMap()
    hyper = HyperSolver.for_scales([3, 5], width=16)
    assert hyper.network.features == 8
    x = images(1)[0]
    guess = hyper.start(x)
    assert [each.shape for each in guess] == [(4, 3, 9, 7), (4, 5, 5, 4)]
    options: dict[str, Any] = {"tol": None, "max_steps": 3, "final": "last"}
    learned = fixed_point(f, None, (x,), solver=hyper, **options).z
    plain = fixed_point(f, guess, (x,), solver=Picard(), **options).z
    for ours, theirs in zip(learned, plain, strict=True):
        torch.testing.assert_close(ours, theirs)


def test_pools_by_hand() -> None:
    sequence = normal(2, 7, 3)
    torch.testing.assert_close(pool_sequences(sequence)[1, 2], sequence[1, :, 2].sum() / 7)
    fine, coarse = normal(2, 3, 4, 6), normal(2, 5, 2, 3)
    pooled = pool_scales((fine, coarse))
    assert pooled.shape == (2, 8)
    torch.testing.assert_close(pooled[1, 4], coarse[1, 1].sum() / 6)


def test_the_sequence_initializer_by_hand() -> None:
    """One output frame: ReLU of a window of three inputs times the kernel, then W."""
    initializer = SequenceInitializer(3, 5, width=4).double()
    x = normal(2, 6, 3)
    inner = torch.einsum("oik,ki->o", initializer.convolution.weight, x[1, 1:4])
    expected = (inner + initializer.convolution.bias).clamp_min(0) @ initializer.read.weight.T
    torch.testing.assert_close(initializer(x)[1, 2], expected)


@pytest.mark.parametrize("kernel_size", [2, 3])
def test_a_causal_initializer_sees_no_later_input(kernel_size: int) -> None:
    initializer = SequenceInitializer(3, 5, kernel_size=kernel_size, causal=True)
    x = torch.randn(1, 6, 3)
    changed = x.clone()
    changed[:, 4:] += 1
    before, after = initializer(x), initializer(changed)
    torch.testing.assert_close(before[:, :4], after[:, :4])
    assert not torch.allclose(before[:, 4], after[:, 4])


@pytest.mark.parametrize(("side", "strides"), [(9, None), (8, (1, 4)), (11, (2, 8))])
def test_scales_have_the_sizes_that_strides_say(side: int, strides: tuple[int, ...] | None) -> None:
    initializer = MultiScaleInitializer(3, [4, 6], strides=strides)
    found = initializer(torch.randn(2, 3, side, side))
    for scale, stride, channels in zip(found, strides or (1, 2), (4, 6), strict=True):
        assert scale.shape == (2, channels, -(-side // stride), -(-side // stride))


def test_the_deep_initializer_sees_the_whole_image() -> None:
    """A pixel in one corner moves the guess in the other; one convolution's stays the same."""
    x = torch.randn(1, 3, 33, 30)
    changed = x.clone()
    changed[:, :, 0, 0] += 5
    for deep in (False, True):
        initializer = HyperSolver.for_images(8, inputs=3, deep=deep).initializer
        before, after = initializer(x), initializer(changed)
        assert before.shape == (1, 8, 33, 30)
        assert torch.equal(before[..., -1, -1], after[..., -1, -1]) is not deep


def test_a_scale_is_computed_from_the_averages_of_its_cells() -> None:
    initializer = MultiScaleInitializer(3, [4, 6], kernel_size=1).double()
    x = normal(2, 3, 5, 4)
    _, coarse = initializer(x)
    convolution = initializer.scales[1].convolution
    for row, rows in ((0, slice(0, 2)), (2, slice(4, 5))):  # the last cell has half the pixels
        mean = x[:, :, rows, 2:4].mean(dim=(2, 3))
        expected = mean @ convolution.weight[:, :, 0, 0].T + convolution.bias
        torch.testing.assert_close(coarse[:, :, row, 1], expected.clamp_min(0))


def test_every_weight_of_the_deep_initializer_has_a_say() -> None:
    initializer = DeepImageInitializer(3, 4, width=8, blocks=3)
    initializer(torch.randn(2, 3, 13, 18)).square().sum().backward()
    for name, parameter in initializer.named_parameters():
        assert parameter.grad is not None, name
        assert float(parameter.grad.abs().max()) > 0, name


def test_blocks_of_the_deep_initializer_add_to_what_they_are_given() -> None:
    """Blocks that say nothing change nothing."""
    deep, plain = DeepImageInitializer(3, 4, width=8, blocks=2), DeepImageInitializer(3, 4, 8, 4, 0)
    for block in deep.blocks:
        nn.init.zeros_(block[2].weight)
    plain.load_state_dict(
        {key: value for key, value in deep.state_dict().items() if not key.startswith("blocks")}
    )
    x = torch.randn(2, 3, 9, 12)
    torch.testing.assert_close(deep(x), plain(x))


def test_strides_and_channels_must_match() -> None:
    with pytest.raises(ValueError, match="strides must have one entry a scale"):
        MultiScaleInitializer(3, [4, 6], strides=(1, 2, 4))


@pytest.mark.parametrize(
    ("preconditioner", "shape"),
    [
        (VectorPreconditioner(6, rank=2), (3, 6)),
        (VectorPreconditioner(6, rank=2), (3, 4, 6)),
        (ImagePreconditioner(6, rank=2), (3, 6, 5, 4)),
    ],
)
def test_a_preconditioner_is_linear_and_starts_as_the_identity(
    preconditioner: nn.Module, shape: tuple[int, ...]
) -> None:
    a, b = torch.randn(*shape), torch.randn(*shape)
    torch.testing.assert_close(preconditioner(a), a)
    nn.init.normal_(preconditioner.up.weight)  # type: ignore[union-attr, arg-type]
    assert not torch.allclose(preconditioner(a), a)
    torch.testing.assert_close(
        preconditioner(2 * a - b), 2 * preconditioner(a) - preconditioner(b), rtol=1e-4, atol=1e-4
    )


def test_a_preconditioner_takes_newtons_step_on_a_linear_map() -> None:
    """f(z) = A z + b with A of rank one: (I - A)^-1 = I + c u v^T, which solves it in one step."""
    u, v, b = normal(6, 1, seed=1), normal(6, 1, seed=2) / 6, normal(4, 6, seed=3)
    matrix = u @ v.T
    preconditioner = VectorPreconditioner(6, rank=1).double()
    with torch.no_grad():
        preconditioner.down.weight.copy_(v.T)
        preconditioner.up.weight.copy_(u / (1 - (v.T @ u)))
    hyper = HyperSolver.for_vectors(6).double()
    hyper.preconditioner = preconditioner
    solution = fixed_point(
        lambda z, b: z @ matrix.T + b, None, (b,), solver=hyper, tol=1e-10, max_steps=1
    )
    assert solution.converged.all()


def test_an_alpha_beta_network_refuses_groups_that_do_not_divide_its_width() -> None:
    with pytest.raises(ValueError, match="groups must divide width=20"):
        HyperSolver.for_vectors(4, width=20)


WITHOUT = {
    "vectors": (HyperSolver.for_vectors(6, initializer=False), torch.zeros(3, 6)),
    "sequences": (HyperSolver.for_sequences(6, initializer=False), torch.zeros(3, 5, 6)),
    "images": (HyperSolver.for_images(6, initializer=False, deep=True), torch.zeros(3, 6, 4, 4)),
    "scales": (
        HyperSolver.for_scales([6, 2], initializer=False),
        (torch.zeros(3, 6, 4, 4), torch.zeros(3, 2, 2, 2)),
    ),
}


@pytest.mark.parametrize("kind", WITHOUT)
def test_without_an_initializer_it_starts_where_the_layer_does(kind: str) -> None:
    """The first residual is f(z0) - z0, and nothing else of the solver has weights."""
    hyper, zeros = WITHOUT[kind]
    half = pytree.tree_map(lambda leaf: leaf + 0.5, zeros)
    seen = []

    def f(z: object, x: Tensor) -> object:
        seen.append(z)
        return pytree.tree_map(lambda leaf: 0.5 * leaf, z)

    x = torch.ones(3, 1)
    DEQ(f, hyper, z0=lambda x: half).solve(x)
    torch.testing.assert_close(seen[0], half)
    assert {name.partition(".")[0] for name, _ in hyper.named_parameters()} == {"network"}
    with pytest.raises(ValueError, match="z0 is needed: HyperSolver has no initializer"):
        fixed_point(f, None, (x,), solver=hyper)


def test_without_an_initializer_it_learns_to_step() -> None:
    """Half of plain iteration's distance, after the same three evaluations from zero."""
    torch.manual_seed(0)
    basis = torch.linalg.qr(torch.randn(8, 8))[0]
    matrix = basis @ torch.diag(torch.linspace(-0.3, 0.9, 8)) @ basis.T
    deq = DEQ(lambda z, x: z @ matrix + x, tol=1e-5, max_steps=300)
    train = [torch.randn(64, 8) for _ in range(30)]
    test = [torch.randn(64, 8)]
    hyper = HyperSolver.for_vectors(8, initializer=False, rank=8)
    fit_hypersolver(hyper, deq, train, epochs=6, steps=3, lr=1e-2, cache=True)
    learned = measure_distances(hyper, deq, test, 3)[0].mean(1)
    plain = measure_distances(Picard(), deq, test, 3)[0].mean(1)
    assert learned[0] == plain[0] == 1
    assert learned[3] < 0.5 * plain[3]


def test_without_an_initializer_it_is_fitted_from_where_it_will_start() -> None:
    """Which is not the guess of the HyperSolver that the layer has had so far."""
    deq = DEQ(lambda z, x: 0.5 * z + x, HyperSolver.for_vectors(8))
    hyper = HyperSolver.for_vectors(8, initializer=False)
    history = fit_hypersolver(hyper, deq, [torch.randn(16, 8)], epochs=1, steps=2)
    assert history[0].distances[0] == 1


@pytest.mark.parametrize(
    ("kind", "z0", "message"),
    [
        ("vectors", torch.zeros(3, 5), "pooled to 5 numbers.*made for 6.*as the state has"),
        ("images", torch.zeros(3, 5, 4, 4), "pooled to 5 numbers.*made for 6"),
        ("vectors", torch.zeros(3, 5, 6), r"vectors solves states \(B, features\).*is \(3, 5, 6\)"),
        ("sequences", torch.zeros(3, 6), r"sequences solves states \(B, T, features\)"),
        ("images", (torch.zeros(3, 6, 4, 4),), "this one is tuple: use for_vectors"),
        ("scales", torch.zeros(3, 8, 4, 4), "one tensor: use for_images"),
    ],
)
def test_a_state_that_it_was_not_made_for(kind: str, z0: object, message: str) -> None:
    hyper, _ = WITHOUT[kind]
    with pytest.raises(ValueError, match=message):
        fixed_point(lambda z: pytree.tree_map(lambda leaf: 0.5 * leaf + 1, z), z0, solver=hyper)


@pytest.mark.parametrize(
    ("hyper", "x", "message"),
    [
        (
            HyperSolver.for_images(6),
            torch.zeros(2, 3, 4, 4),
            r"\(B, 6, H, W\).*\(2, 3, 4, 4\): make",
        ),
        (HyperSolver.for_images(6, deep=True), torch.zeros(2, 3, 4, 4), r"\(B, 6, H, W\)"),
        (HyperSolver.for_scales([6, 2]), torch.zeros(2, 3, 4, 4), r"\(B, 6, H, W\).*inputs= as"),
        (HyperSolver.for_sequences(6), torch.zeros(2, 5).long(), r"\(B, T, 6\).*int64 \(2, 5\)"),
        (HyperSolver.for_vectors(6), torch.zeros(2, 5), r"real numbers \(B, 6\)"),
        (HyperSolver.for_vectors(6), {"x": torch.zeros(2, 6)}, "and it is dict"),
        (HyperSolver.for_vectors(6), torch.zeros(2, 6) + 0j, "real numbers.*complex64"),
    ],
)
def test_an_initializer_says_what_it_reads(hyper: HyperSolver, x: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        hyper.start(x)


def test_an_initializer_of_another_precision() -> None:
    x = torch.zeros(2, 6).double()
    hyper = HyperSolver.for_vectors(6)
    with pytest.raises(TypeError, match=r"float64; convert it with hyper.to\(torch.float64\)"):
        hyper.start(x)
    assert hyper.to(torch.float64).start(x).dtype == torch.float64
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert HyperSolver.for_vectors(6).start(x.bfloat16()).dtype == torch.bfloat16


def test_half_of_a_complex_state_is_not_left_out() -> None:
    zeros = torch.zeros(3, 6, dtype=torch.complex64)
    hyper, _ = WITHOUT["vectors"]
    with pytest.raises(TypeError, match="complex64: keep the state as real and imaginary channels"):
        fixed_point(lambda z: 0.5 * z + 1, zeros, solver=hyper)
    both = HyperSolver(
        None,
        AlphaBetaNetwork(12),
        lambda g: torch.view_as_real(g).flatten(1),
        nn.Linear(6, 6, bias=False, dtype=torch.complex64),
    )
    nn.init.eye_(both.preconditioner.weight)
    solution = fixed_point(lambda z: 0.5j * z + 1, zeros, solver=both)
    torch.testing.assert_close(solution.z, zeros + 1 / (1 - 0.5j), rtol=0, atol=1e-3)
