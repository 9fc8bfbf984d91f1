"""The HyperSolver's network, its update and its place in the loop."""

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from deqsolvers import DEQ, HyperSolver, Picard, Solution, Status, StepInfo, fixed_point
from deqsolvers.hypersolver.initializers import ImageInitializer, VectorInitializer
from deqsolvers.hypersolver.network import AlphaBetaNetwork, pool_images
from tests.deqsolvers.maps import TanhMap, normal
from tests.problems import breaking, convolution_deq, tanh_deq


@pytest.fixture(autouse=True)
def _seed() -> None:
    """Initial weights are drawn from torch's global generator."""
    torch.manual_seed(0)


class FixedWeights(AlphaBetaNetwork):
    """A network that ignores the residuals: alpha by the length of the history, and one beta."""

    def __init__(self, alphas: dict[int, list[float]], beta: float):
        super().__init__(1, max(alphas) - 1)
        self.alphas, self.beta = alphas, beta

    def forward(self, series: Tensor) -> tuple[Tensor, Tensor]:
        alpha = torch.tensor(self.alphas[series.shape[1]], dtype=series.dtype)
        return alpha.expand(len(series), -1), series.new_full((len(series), 1), self.beta)


class Recording(AlphaBetaNetwork):
    """Keeps the series that it was given."""

    def __init__(self, features: int, memory: int):
        super().__init__(features, memory)
        self.seen: list[Tensor] = []

    def forward(self, series: Tensor) -> tuple[Tensor, Tensor]:
        self.seen.append(series.clone())
        return super().forward(series)


class Start(nn.Module):
    """Starts where it was told to."""

    def __init__(self, z0: Tensor):
        super().__init__()
        self.z0 = z0

    def forward(self, *inputs: Tensor) -> Tensor:
        return self.z0


def randomised(network: AlphaBetaNetwork, scale: float = 0.1, seed: int = 0) -> AlphaBetaNetwork:
    """The network as if it were trained: a reader that is not zero."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        network.read.weight.normal_(0, scale, generator=generator)
        network.read.bias.normal_(0, scale, generator=generator)
    return network


def iterates(
    f: object, z0: Tensor, inputs: tuple[Tensor, ...], solver: object, steps: int
) -> list[Tensor]:
    seen: list[Tensor] = []
    fixed_point(
        f,  # type: ignore[arg-type]
        z0,
        inputs,
        solver=solver,  # type: ignore[arg-type]
        tol=None,
        max_steps=steps,
        callback=lambda info: seen.append(info.z.clone()),
    )
    return seen


@pytest.mark.parametrize("length", [1, 2, 4, 6])
def test_alpha_sums_to_one_and_may_be_negative(length: int) -> None:
    network = randomised(AlphaBetaNetwork(3, memory=5)).double()
    alpha, beta = network(normal(50, length, 3))
    assert alpha.shape == (50, length)
    assert beta.shape == (50, 1)
    torch.testing.assert_close(alpha.sum(1), torch.ones(50, dtype=torch.float64))
    if length > 1:
        assert (alpha < 0).any()
        assert (alpha > 1).any()
        assert alpha.std(dim=0).min() > 0  # it depends on the residuals


def test_alpha_is_the_raw_output_with_its_excess_spread_evenly() -> None:
    """alpha = raw + (1 - sum raw) / k, raw being the reader's output beside a plain step."""
    network = AlphaBetaNetwork(2, memory=3)
    with torch.no_grad():
        network.read.bias.copy_(torch.tensor([0.4, -0.2, 0.1, 0.7, 0.3]))
    alpha, beta = network(torch.randn(1, 3, 2))
    raw = np.array([0.4, -0.2, 0.1 + 1])  # the newest of three starts from one
    np.testing.assert_allclose(alpha[0].detach(), raw + (1 - raw.sum()) / 3, atol=1e-6)
    assert float(beta.detach()) == pytest.approx(1.3)


def test_the_network_by_hand() -> None:
    """A short series of which the earlier residuals are the larger ones, as they are in a solve."""
    network = randomised(AlphaBetaNetwork(2, memory=3, width=8, groups=4)).double()
    conv, norm, _ = network.mix
    assert isinstance(norm, nn.GroupNorm)
    nn.init.normal_(norm.weight)
    nn.init.normal_(norm.bias)
    kernel, shift, scale, offset, reader, bias = (
        p.detach().numpy()
        for p in (*conv.parameters(), *norm.parameters(), *network.read.parameters())
    )
    series = normal(1, 2, 2) * torch.tensor([10.0, 1.0]).double()[:, None]
    alpha, beta = network(series)

    # Two residuals that exist, two of zero for those to come, and the edges of the convolution.
    padded = np.zeros((6, 2))
    padded[1:3] = series[0] / np.sqrt(np.mean(series[0].numpy() ** 2))
    mixed = np.stack(
        [np.einsum("oik,ki->o", kernel, padded[t : t + 3]) + shift for t in range(4)], axis=1
    )
    groups = mixed.reshape(4, -1)
    groups = groups - groups.mean(1, keepdims=True)
    groups = groups / np.sqrt((groups**2).mean(1, keepdims=True) + 1e-5)
    inner = np.maximum(groups.reshape(8, 4) * scale[:, None] + offset[:, None], 0)
    out = reader @ inner.ravel() + bias
    raw = out[:2] + np.array([0, 1])
    np.testing.assert_allclose(alpha[0].detach(), raw + (1 - raw.sum()) / 2)
    np.testing.assert_allclose(float(beta.detach()), 1 + out[-1])


def test_the_network_sees_residuals_in_their_own_scale() -> None:
    network = randomised(AlphaBetaNetwork(3, memory=4)).double()
    series = normal(4, 5, 3)
    expected = network(series)
    for scale in (1e-9, 1e9):
        torch.testing.assert_close(network(scale * series), expected)


def test_samples_do_not_see_each_other() -> None:
    network = randomised(AlphaBetaNetwork(3, memory=4)).double()
    series = normal(4, 5, 3)
    together = network(series)
    alone = [network(series[row : row + 1]) for row in range(4)]
    torch.testing.assert_close(torch.cat([alpha for alpha, _ in alone]), together[0])
    torch.testing.assert_close(torch.cat([beta for _, beta in alone]), together[1])


def test_a_residual_of_zero_has_a_finite_gradient() -> None:
    """A sample that is solved exactly must not turn the training into NaN."""
    network = randomised(AlphaBetaNetwork(3, memory=4)).double()
    series = torch.zeros(2, 3, 3, dtype=torch.float64, requires_grad=True)
    alpha, beta = network(series)
    (alpha.square().sum() + beta.sum()).backward()
    assert series.grad is not None
    assert torch.isfinite(series.grad).all()
    assert all(torch.isfinite(p.grad).all() for p in network.parameters() if p.grad is not None)


def test_an_untrained_hypersolver_is_plain_iteration_from_its_guess() -> None:
    problem = tanh_deq()
    hyper = HyperSolver.for_vectors(16, memory=3).double()
    guess = hyper.start(*problem.inputs)
    assert guess.detach().abs().sum() > 0
    learned = iterates(problem.f, None, problem.inputs, hyper, 9)  # type: ignore[arg-type]
    plain = iterates(problem.f, guess.detach(), problem.inputs, Picard(), 9)
    torch.testing.assert_close(learned, plain)


def test_the_update_is_the_formula_of_the_paper_in_time_order() -> None:
    """z <- sum alpha_i z_i + beta sum alpha_i g_i, long after the ring buffer has turned round."""
    alphas = {1: [1.0], 2: [-0.3, 1.3], 3: [0.2, -0.5, 1.3], 4: [-0.1, 0.25, -0.35, 1.2]}
    beta = 0.8
    problem = tanh_deq(size=6, batch=2)
    network = FixedWeights(alphas, beta).double()
    hyper = HyperSolver(Start(problem.z0), network, lambda g: g[:, :1])
    found = iterates(problem.f, problem.z0, problem.inputs, hyper, 11)

    z = problem.z0.numpy()
    zs: list[np.ndarray] = []
    gs: list[np.ndarray] = []
    for step in range(12):
        np.testing.assert_allclose(found[step], z, atol=1e-12)
        with torch.no_grad():
            fz = problem.f(torch.from_numpy(z), *problem.inputs).numpy()
        zs, gs = [*zs, z][-4:], [*gs, fz - z][-4:]
        alpha = np.array(alphas[len(zs)])
        z = np.tensordot(alpha, zs, axes=1) + beta * np.tensordot(alpha, gs, axes=1)


def test_the_network_is_given_the_newest_pooled_residuals_oldest_first() -> None:
    problem = convolution_deq()
    network = Recording(3, memory=2).double()
    hyper = HyperSolver(Start(problem.z0), network, pool_images)
    found = iterates(problem.f, problem.z0, problem.inputs, hyper, 6)
    with torch.no_grad():
        pooled = [(problem.f(z, *problem.inputs) - z).mean(dim=(2, 3)) for z in found]
    assert [series.shape[1] for series in network.seen] == [1, 2, 3, 3, 3, 3]
    for step, series in enumerate(network.seen):
        newest = pooled[max(0, step - 2) : step + 1]
        torch.testing.assert_close(series, torch.stack(newest, dim=1))


@pytest.mark.parametrize("size", [(6, 5), (12, 9)])
def test_one_hypersolver_serves_images_of_every_size(size: tuple[int, int]) -> None:
    """Its parameters depend on the channels of the state alone."""
    hyper = HyperSolver.for_images(3, memory=4).double()
    count = sum(p.numel() for p in hyper.parameters())
    problem = convolution_deq()
    x = normal(2, 3, *size)
    solution = fixed_point(problem.f, None, (x,), solver=hyper, tol=1e-8)
    assert solution.z.shape == x.shape
    assert solution.statuses() == [Status.CONVERGED] * 2
    assert sum(p.numel() for p in hyper.parameters()) == count


def test_the_initializers_compute_what_they_say() -> None:
    x = normal(2, 3, 5, 4)
    image = ImageInitializer(3, 7).double()
    expected = torch.nn.functional.conv2d(
        x, image.convolution.weight, image.convolution.bias, padding=1
    ).clamp_min(0)
    torch.testing.assert_close(image(x, x), expected)
    assert image(x).shape == (2, 7, 5, 4)

    vector = VectorInitializer(3, 8, width=5).double()
    inner, _, outer = vector.layers
    assert isinstance(inner, nn.Linear)
    assert isinstance(outer, nn.Linear)
    y = normal(4, 3)
    hidden = (y @ inner.weight.T + inner.bias).clamp_min(0)
    torch.testing.assert_close(vector(y), hidden @ outer.weight.T)


def solve_randomised(tol: float | None = 1e-8, **options: object) -> tuple[Solution, HyperSolver]:
    problem = tanh_deq()
    hyper = HyperSolver.for_vectors(16, memory=3).double()
    randomised(hyper.network, scale=0.01)
    solution = fixed_point(
        problem.f,
        None,
        problem.inputs,
        solver=hyper,
        tol=tol,
        max_steps=100,
        **options,  # type: ignore[arg-type]
    )
    return solution, hyper


def test_it_runs_in_the_loop_like_any_solver() -> None:
    sizes: list[int] = []

    def count(info: StepInfo) -> None:
        sizes.append(len(info.rows))

    solution, _ = solve_randomised(callback=count)
    problem = tanh_deq()
    assert solution.statuses() == [Status.CONVERGED] * 5
    assert problem.solution is not None
    torch.testing.assert_close(solution.z, problem.solution, rtol=0, atol=1e-6)
    assert solution.calls == int(solution.steps.max()) + 1
    assert solution.rows_evaluated == sum(sizes)


def test_leaving_the_batch_changes_nothing() -> None:
    leaving, _ = solve_randomised()
    torch.manual_seed(0)
    staying, _ = solve_randomised(drop_converged=False)
    assert leaving.rows_evaluated < staying.rows_evaluated
    assert torch.equal(leaving.steps, staying.steps)
    torch.testing.assert_close(leaving.z, staying.z)


def test_a_broken_sample_ends_alone() -> None:
    problem = breaking(after=3, sample=2)
    hyper = HyperSolver.for_vectors(16).double()
    solution = fixed_point(problem.f, None, problem.inputs, solver=hyper, tol=1e-8)
    assert solution.statuses()[2] == Status.NON_FINITE
    assert solution.converged.sum() == 4
    assert torch.isfinite(solution.z).all()


def test_a_given_start_overrides_the_initializer() -> None:
    problem = tanh_deq()
    hyper = HyperSolver.for_vectors(16).double()
    assert problem.solution is not None
    solution = fixed_point(problem.f, problem.solution, problem.inputs, solver=hyper)
    assert solution.statuses() == [Status.STARTED_CONVERGED] * 5


def test_it_solves_for_a_deq_and_its_gradients_stay_implicit() -> None:
    f, x = TanhMap(16), normal(3, 16).requires_grad_()
    classic = DEQ(f, tol=1e-10, max_steps=200)
    learned = classic.with_solver(HyperSolver.for_vectors(16).double())
    z, solution = learned(x)
    assert solution.converged.all()
    (found,) = torch.autograd.grad(z.square().sum(), x)
    (expected,) = torch.autograd.grad(classic(x)[0].square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-4)
    # The solve itself is not recorded, so the learned solver gets no gradient from it.
    assert all(p.grad is None for p in learned.solver.parameters())  # type: ignore[attr-defined]


def test_autocast_touches_neither_the_guess_nor_the_state() -> None:
    """A guess in half precision would make the whole state one, whose residual ends at 5e-3."""
    problem = convolution_deq(dtype=torch.float32)
    hyper = HyperSolver.for_images(3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        solution = fixed_point(problem.f, None, problem.inputs, solver=hyper, tol=2e-2)
    assert solution.converged.all()
    assert solution.z.dtype == torch.float32


def test_a_factory_takes_an_initializer_of_ones_own() -> None:
    own = nn.Linear(6, 6)
    for hyper in (
        HyperSolver.for_vectors(6, initializer=own),
        HyperSolver.for_sequences(6, initializer=own),
        HyperSolver.for_images(6, initializer=own),
        HyperSolver.for_scales([6], initializer=own),
    ):
        assert hyper.initializer is own
    with pytest.raises(TypeError, match=r"True, False or an nn\.Module, got 'deep'"):
        HyperSolver.for_images(6, initializer="deep")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"must be an nn\.Module or None, got a bool"):
        HyperSolver(False, AlphaBetaNetwork(6), pool_images)  # type: ignore[arg-type]
