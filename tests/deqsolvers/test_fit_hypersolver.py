"""Fitting a HyperSolver: what it learns, what it leaves alone, what it refuses."""

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

from deqsolvers import DEQ, FitEpoch, HyperSolver, Picard, fit_hypersolver
from deqsolvers.hypersolver.fit import measure_distances
from deqsolvers.hypersolver.losses import unroll
from deqsolvers.hypersolver.network import AlphaBetaNetwork
from deqsolvers.hypersolver.targets import Teacher
from tests.deqsolvers.maps import ConvolutionMap, TanhMap, normal

SIZE = 8


def small(seed: int = 0, memory: int = 3) -> HyperSolver:
    """A HyperSolver whose weights depend on the seed alone."""
    torch.manual_seed(seed)
    return HyperSolver.for_vectors(SIZE, memory=memory, width=16)


def layer(norm: float = 0.9) -> DEQ:
    return DEQ(TanhMap(SIZE, norm=norm, dtype=torch.float32))


def inputs_of(batches: int, size: int = 32, seed: int = 0) -> list[Tensor]:
    """Inputs near one direction, so that fixed points resemble each other as images' do."""
    common = normal(1, SIZE, seed=99, dtype=torch.float32)
    return [
        common + 0.3 * normal(size, SIZE, seed=seed + k, dtype=torch.float32)
        for k in range(batches)
    ]


def test_fitting_beats_plain_iteration_of_as_many_steps() -> None:
    deq, hyper = layer(), small()
    steps = 4
    validation = inputs_of(2, seed=50)
    history = fit_hypersolver(
        hyper, deq, inputs_of(10), epochs=5, steps=steps, lr=1e-2, validation=validation
    )
    plain = torch.cat(measure_distances(Picard(), deq, validation, steps), dim=1).mean(1)
    fitted = torch.tensor(history[-1].distances)
    assert fitted.shape == (steps + 1,)
    assert fitted[-1] < 0.5 * plain[-1]
    assert fitted[0] < 0.5 * plain[0]  # the initializer beats zeros
    assert history[-1].loss < 0.5 * history[0].loss
    assert [epoch.epoch for epoch in history] == list(range(1, 6))
    assert all(epoch.skipped == 0 for epoch in history)


def test_distances_are_those_of_the_iterates() -> None:
    deq, x = layer(), inputs_of(1)[0]
    (found,) = measure_distances(Picard(), deq, [x], 3)
    with torch.no_grad():
        target = deq.solve(x).z
        z, expected = torch.zeros_like(x), []
        for _ in range(4):
            expected.append(((z - target).norm(dim=1) / target.norm(dim=1)).mean())
            z = deq.f(z, x)
    torch.testing.assert_close(found.mean(1), torch.stack(expected), rtol=0, atol=2e-3)


def test_images_with_two_inputs_as_tuples() -> None:
    kernel = ConvolutionMap(3, dtype=torch.float32)
    deq = DEQ(lambda z, x, gain: gain * kernel(z, x))
    batches = [
        (normal(2, 3, 6, 5, seed=k, dtype=torch.float32), torch.full((2, 1, 1, 1), 0.9))
        for k in range(3)
    ]
    hyper = HyperSolver.for_images(3, width=16)
    history = fit_hypersolver(hyper, deq, batches, epochs=3, steps=3)
    assert history[-1].loss < history[0].loss


class Switching(nn.Module):
    """A map with a normalisation and a dropout, whose modes can be told apart."""

    def __init__(self) -> None:
        super().__init__()
        self.map = TanhMap(SIZE, norm=0.7, dtype=torch.float32)
        self.norm = nn.BatchNorm1d(SIZE, affine=False)
        self.drop = nn.Dropout(0.5)
        self.trained_seen = False

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.trained_seen |= self.norm.training or self.drop.training
        return self.drop(0.9 * self.map(z, self.norm(x)))


def test_the_map_is_left_exactly_as_it_was() -> None:
    f = Switching()
    f.map.bias.requires_grad_(False)
    f.norm.eval()  # a mixture of modes must come back too
    deq = DEQ(f)
    before = copy.deepcopy(f.state_dict())
    modes = {name: module.training for name, module in deq.named_modules()}
    fit_hypersolver(small(), deq, inputs_of(2), epochs=2, steps=2)
    for name, value in f.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert {name: module.training for name, module in deq.named_modules()} == modes
    assert not f.map.bias.requires_grad
    assert f.map.weight.requires_grad
    assert all(p.grad is None for p in f.parameters())
    assert not f.trained_seen  # z* and the unrolled steps see the map of inference


def test_the_modules_that_a_function_calls_are_left_as_they_were_too() -> None:
    f = Switching()
    f.norm.eval()
    normalized = parametrizations.spectral_norm(nn.Linear(SIZE, SIZE))
    before = copy.deepcopy((f.state_dict(), normalized.state_dict()))
    deq = DEQ(lambda z, x: f(z, x) + 0.1 * normalized(z))
    fit_hypersolver(small(), deq, inputs_of(2), epochs=1, steps=2)
    torch.testing.assert_close((f.state_dict(), normalized.state_dict()), before, rtol=0, atol=0)
    assert not f.trained_seen
    assert f.drop.training
    assert normalized.training
    assert not f.norm.training


def test_modes_come_back_after_an_error() -> None:
    f = Switching()
    f.norm.eval()
    deq = DEQ(f)

    def fail(update: int, loss: float) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit_hypersolver(small(), deq, inputs_of(1), epochs=1, steps=1, on_batch=fail)
    assert deq.training
    assert f.drop.training
    assert not f.norm.training


def test_the_fitted_solver_is_left_in_evaluation_mode() -> None:
    hyper = small()
    fit_hypersolver(hyper, layer(), inputs_of(1), epochs=1, steps=1)
    assert not hyper.training


def test_a_deq_that_carries_the_solver_can_be_fitted() -> None:
    """hyper is then a submodule of the DEQ, which is put into evaluation mode."""
    hyper = small()
    history = fit_hypersolver(hyper, layer().with_solver(hyper), inputs_of(2), epochs=2, steps=2)
    assert history[-1].loss < history[0].loss


def test_fitting_is_reproducible() -> None:
    results = []
    for _ in range(2):
        hyper = small(seed=3)
        history = fit_hypersolver(hyper, layer(), inputs_of(3), epochs=2, steps=3)
        results.append((history, hyper.state_dict()))
    assert results[0][0] == results[1][0]
    for name, value in results[0][1].items():
        assert torch.equal(value, results[1][1][name]), name


def test_progress_is_reported() -> None:
    updates: list[tuple[int, float]] = []
    epochs: list[FitEpoch] = []
    history = fit_hypersolver(
        small(),
        layer(),
        inputs_of(3),
        epochs=2,
        steps=2,
        on_batch=lambda update, loss: updates.append((update, loss)),
        on_epoch=epochs.append,
    )
    assert [update for update, _ in updates] == [1, 2, 3, 4, 5, 6]
    assert epochs == history
    assert history[0].loss == pytest.approx(sum(loss for _, loss in updates[:3]) / 3, rel=1e-5)


def test_iterators_are_iterated_once_for_all_epochs() -> None:
    """A generator would be empty in the second epoch, for training as for validation."""
    history = fit_hypersolver(
        small(),
        layer(),
        (x for x in inputs_of(2)),
        epochs=3,
        steps=2,
        validation=(x for x in inputs_of(2, seed=50)),
    )
    assert [len(epoch.distances) for epoch in history] == [3, 3, 3]


def test_z_star_is_that_of_the_whole_batch_where_the_layer_keeps_it_together() -> None:
    f, sizes = TanhMap(SIZE, norm=0.9, dtype=torch.float32), set()

    def whole(z: Tensor, x: Tensor) -> Tensor:
        sizes.add(len(z))
        return f(z, x - x.mean(0))

    fit_hypersolver(small(), DEQ(whole, drop_converged=False), inputs_of(2), epochs=1, steps=2)
    assert sizes == {32}


def test_z_star_may_cross_a_plateau_that_the_layer_may_cross() -> None:
    deq = DEQ(lambda z, x: 0.95 * z + x.clamp(0.1, 1), stall_after=77)
    teacher = Teacher(deq, Picard(), max_steps=50)
    assert teacher.deq.options.stall_after == 77
    assert teacher.deq.options.tol == 1e-4


def test_a_deq_that_does_not_converge_is_refused() -> None:
    with pytest.raises(ValueError, match=r"z\* is unreliable for 64 of 64 samples.*residual above"):
        fit_hypersolver(small(), diverging(), inputs_of(2), epochs=2, steps=2)


def diverging() -> DEQ:
    f = TanhMap(SIZE, norm=0.9, dtype=torch.float32)
    return DEQ(lambda z, x: f(z, x) - 3 * torch.sign(z) * z.abs().sqrt() - 5 * torch.sign(z))


def test_a_refused_fit_leaves_the_hypersolver_as_it_was() -> None:
    hyper = small()
    before = copy.deepcopy(hyper.state_dict())
    with pytest.raises(ValueError, match="unreliable"):
        fit_hypersolver(hyper, diverging(), inputs_of(2), epochs=2, steps=2)
    for name, value in hyper.state_dict().items():
        assert torch.equal(value, before[name]), name


@pytest.mark.parametrize("batches", [[], iter(())])
def test_no_batches(batches: Any) -> None:
    with pytest.raises(ValueError, match="batches is empty"):
        fit_hypersolver(small(), layer(), batches)


@pytest.mark.parametrize("name", ["epochs", "steps"])
def test_counts_out_of_range(name: str) -> None:
    options: dict[str, Any] = {"epochs": 1, "steps": 1, name: 0}
    with pytest.raises(ValueError, match=f"{name} must be an integer of at least 1"):
        fit_hypersolver(small(), layer(), inputs_of(1), **options)


def test_a_sample_whose_fixed_point_is_zero_does_not_spoil_the_fit() -> None:
    """No distance is relative to zero: an empty measurement, say."""
    batches = inputs_of(4)
    batches[1][5] = 0
    hyper = small()
    (epoch,) = fit_hypersolver(hyper, DEQ(lambda z, x: 0.5 * z + x), batches, epochs=1, steps=2)
    assert epoch.skipped == 1 / 128
    assert epoch.worst[0] < 10
    assert all(p.isfinite().all() for p in hyper.parameters())


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_sample_without_a_fixed_point_does_not_spoil_the_fit(bad: float) -> None:
    """Its share of the loss is zero, and zero times NaN would be NaN."""
    batches = inputs_of(4)
    batches[1][5] = bad
    hyper = small()
    history = fit_hypersolver(hyper, layer(), batches, epochs=2, steps=2)
    assert history[0].skipped == pytest.approx(1 / 128)
    assert all(torch.isfinite(value).all() for value in hyper.state_dict().values())
    assert torch.isfinite(torch.tensor([epoch.loss for epoch in history])).all()
    assert torch.isfinite(torch.tensor([epoch.distances for epoch in history])).all()
    clean = fit_hypersolver(small(), layer(), inputs_of(4), epochs=2, steps=2)
    assert history[-1].loss == pytest.approx(clean[-1].loss, rel=0.2)


def chain(z: Tensor, x: Tensor) -> Tensor:
    """Every sample is moved by the one before."""
    return torch.relu(0.5 * z.roll(1, 0) + x)


def test_coupled_samples_stay_together_where_z_star_of_one_is_zero() -> None:
    """Without it the next sample would have another neighbour, and another fixed point."""
    x = inputs_of(1)[0].abs()
    x[5] = -10
    deq = DEQ(chain, Picard(), drop_converged=False)
    target = Teacher(deq, Picard(), tol=1e-6).target(x)
    assert target.skipped == 1
    way = unroll(Picard(), deq, target, 60)
    assert way.distances.shape == (61, 31)
    assert way.distances[-1].max() < 1e-4
    hyper = small()
    (epoch,) = fit_hypersolver(hyper, deq, [x], epochs=1, steps=2)
    assert epoch.skipped == 1 / 32
    assert epoch.worst[0] < 10
    assert all(p.isfinite().all() for p in hyper.parameters())


def test_coupled_samples_leave_together_where_one_has_no_fixed_point() -> None:
    deq = DEQ(lambda z, x: 0.5 * z - 0.1 * z.roll(1, 0) + x, drop_converged=False)
    batches = inputs_of(4)
    batches[1][5] = torch.nan
    (epoch,) = fit_hypersolver(small(), deq, batches, epochs=1, steps=2)
    assert epoch.skipped == 32 / 128
    with pytest.raises(ValueError, match="one such sample takes its whole batch with it"):
        fit_hypersolver(small(), deq, [batches[1]], epochs=1, steps=2)


def test_a_batch_without_any_fixed_point_is_left_out() -> None:
    """The last batch of a data set may hold a single sample."""
    bad = torch.full((1, SIZE), torch.nan)
    history = fit_hypersolver(
        small(),
        layer(),
        [*inputs_of(3), bad],
        epochs=2,
        steps=2,
        validation=[*inputs_of(2, seed=50), bad],
    )
    clean = fit_hypersolver(
        small(), layer(), inputs_of(3), epochs=2, steps=2, validation=inputs_of(2, seed=50)
    )
    assert history[0].skipped == pytest.approx(1 / 97)
    assert history[-1].distances == pytest.approx(clean[-1].distances, rel=0.2)


class Halves(nn.Module):
    """A state of two parts, by name, each moved by the other."""

    def forward(self, z: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"h": torch.tanh(0.5 * z["p"] + x), "p": torch.tanh(0.8 * z["h"] - x)}


class GuessHalves(nn.Module):
    def __init__(self, names: tuple[str, str]):
        super().__init__()
        self.parts = nn.ModuleDict({name: nn.Linear(SIZE, SIZE) for name in sorted(names)})
        self.names = names

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {name: self.parts[name](x) for name in self.names}


def test_an_initializer_may_order_a_dict_in_its_own_way() -> None:
    zeros = torch.zeros(32, SIZE)
    deq = DEQ(Halves(), z0=lambda x: {"h": zeros[: len(x)], "p": zeros[: len(x)]})
    losses = []
    for names in (("h", "p"), ("p", "h")):
        torch.manual_seed(0)
        network = AlphaBetaNetwork(2 * SIZE, memory=3, width=16)
        hyper = HyperSolver(
            GuessHalves(names), network, lambda g: torch.cat([g["h"], g["p"]], dim=1)
        )
        history = fit_hypersolver(hyper, deq, inputs_of(6), epochs=3, steps=2, lr=1e-2)
        losses.append(history[-1].distances)
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    assert losses[0][0] < 0.8


def test_an_initializer_of_another_shape_is_named() -> None:
    hyper = HyperSolver(nn.Linear(SIZE, SIZE + 1), AlphaBetaNetwork(SIZE), lambda g: g)
    with pytest.raises(ValueError, match=r"initializer must return the shape of z\*, \(32, 8\)"):
        fit_hypersolver(hyper, layer(), inputs_of(1), epochs=1)
