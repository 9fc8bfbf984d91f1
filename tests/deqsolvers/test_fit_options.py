"""Options of a HyperSolver fit: presets, unrolling, cache, resuming, early stop."""

import math
from pathlib import Path
from typing import Any

import pytest
import torch
import tqdm
from torch import Tensor, nn

from deqsolvers import (
    DEQ,
    PUBLISHED_WEIGHTS,
    FitEpoch,
    HandOver,
    HyperSolver,
    LossWeights,
    Picard,
    fit_hypersolver,
    save_hypersolver,
)
from deqsolvers.hypersolver.fit import measure_distances
from deqsolvers.hypersolver.losses import unroll
from deqsolvers.hypersolver.targets import Teacher
from tests.deqsolvers.maps import TanhMap, normal

SIZE = 8


class Counting(TanhMap):
    """Counts its evaluations with and without gradients."""

    def __init__(self) -> None:
        super().__init__(SIZE, dtype=torch.float32)
        self.calls = {True: 0, False: 0}

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        self.calls[torch.is_grad_enabled()] += 1
        return super().forward(z, x)


def small() -> HyperSolver:
    torch.manual_seed(0)
    return HyperSolver.for_vectors(SIZE, memory=3, width=16)


def inputs_of(batches: int, seed: int = 0) -> list[Tensor]:
    common = normal(1, SIZE, seed=99, dtype=torch.float32)
    return [
        common + 0.3 * normal(32, SIZE, seed=seed + k, dtype=torch.float32) for k in range(batches)
    ]


def test_presets_are_those_of_the_iclr_papers_table_2() -> None:
    table = {
        "wikitext-103": (0.1, 0.05, 1e-4),
        "imagenet": (0.1, 0.02, 1e-5),
        "cityscapes": (0.1, 0.02, 1e-5),
    }
    assert table == {
        name: (w.convergence, w.initializer, w.alpha) for name, w in PUBLISHED_WEIGHTS.items()
    }
    with pytest.raises(ValueError, match="wikitext-103, imagenet, cityscapes"):
        fit_hypersolver(small(), DEQ(Counting()), inputs_of(1), weights="coco")


def test_the_weight_of_the_alpha_loss_falls_linearly() -> None:
    weights = LossWeights(alpha=1e-4, final_alpha=2e-6, alpha_decay=0.4)
    assert weights.alpha_at(0) == pytest.approx(1e-4)
    assert weights.alpha_at(0.1) == pytest.approx(2e-6 + 0.75 * 9.8e-5)
    assert weights.alpha_at(0.4) == weights.alpha_at(1) == pytest.approx(2e-6)
    assert LossWeights(alpha_decay=0).alpha_at(0) == 5e-8
    assert LossWeights() == LossWeights(0.1, 0.02, 1e-5, final_alpha=5e-8, alpha_decay=0.5)


def test_the_weight_of_the_alpha_loss_falls_while_fitting() -> None:
    """With nothing learned the loss is in proportion to it."""
    weights = LossWeights(convergence=0, initializer=0, alpha=1, final_alpha=0.2, alpha_decay=0.5)
    history = fit_hypersolver(
        small(), DEQ(Counting()), inputs_of(1), epochs=4, steps=2, lr=0, final_lr=0, weights=weights
    )
    shares = [epoch.loss / history[0].loss for epoch in history]
    assert shares == pytest.approx([1, 0.6, 0.2, 0.2], rel=1e-5)


def test_the_learning_rate_decays_by_a_cosine(monkeypatch: pytest.MonkeyPatch) -> None:
    rates: list[float] = []
    original = torch.optim.Adam.step

    def step(self: torch.optim.Adam, *args: Any) -> Any:
        rates.extend(group["lr"] for group in self.param_groups)
        return original(self, *args)

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    fit_hypersolver(
        small(), DEQ(Counting()), inputs_of(2), epochs=2, steps=1, lr=1e-2, final_lr=1e-4
    )
    # After 0, 1/4, 1/2 and 3/4 of the updates, where the cosine is 1, sqrt(1/2), 0 and -sqrt(1/2).
    swings = [1, (1 + 0.5**0.5) / 2, 0.5, (1 - 0.5**0.5) / 2]
    assert rates == pytest.approx([1e-4 + 9.9e-3 * swing for swing in swings])


def test_epochs_of_other_lengths_than_the_first_keep_to_the_schedule(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    rates: list[float] = []
    original = torch.optim.Adam.step

    def step(self: torch.optim.Adam, *args: Any) -> Any:
        rates.extend(group["lr"] for group in self.param_groups)
        return original(self, *args)

    def fit(stop: bool) -> None:
        def interrupt(epoch: FitEpoch) -> None:
            if stop and epoch.epoch == 3:
                raise KeyboardInterrupt

        fit_hypersolver(
            small(),
            DEQ(Counting()),
            lambda epoch: inputs_of((1, 4, 2)[epoch]),
            epochs=3,
            steps=1,
            lr=1,
            final_lr=0,
            resume=tmp_path / "fit.pt",
            on_batch=lambda update, loss: updates.append(update),
            on_epoch=interrupt,
        )

    monkeypatch.setattr(torch.optim.Adam, "step", step)
    updates: list[int] = []
    with pytest.raises(KeyboardInterrupt):
        fit(stop=True)
    fit(stop=False)  # the third epoch again
    assert updates == [1, 2, 3, 4, 5, 6, 7, 6, 7]
    done = [0, 4 / 12, 5 / 12, 6 / 12, 7 / 12, 4 / 6, 5 / 6, 4 / 6, 5 / 6]
    assert rates == pytest.approx([(1 + math.cos(math.pi * share)) / 2 for share in done])


def test_a_bar_knows_how_many_updates_are_left(monkeypatch: pytest.MonkeyPatch) -> None:
    bars: list[Any] = []

    class Recorded(tqdm.tqdm):  # type: ignore[type-arg]
        def __init__(self, **options: Any):
            super().__init__(**options)
            bars.append(self)

    monkeypatch.setattr(tqdm, "tqdm", Recorded)
    fit_hypersolver(
        small(),
        DEQ(Counting()),
        lambda epoch: inputs_of(1 + epoch),
        epochs=2,
        steps=1,
        progress=True,
    )
    assert [(bar.n, bar.total) for bar in bars] == [(3, 3)]


def test_a_large_gradient_is_cut_to_length_one() -> None:
    hyper = small()
    fit_hypersolver(
        hyper,
        DEQ(Counting()),
        inputs_of(1),
        epochs=1,
        steps=2,
        weights=LossWeights(convergence=1e3),
    )
    gradients = [p.grad.flatten() for p in hyper.parameters() if p.grad is not None]
    assert float(torch.cat(gradients).norm()) == pytest.approx(1, rel=1e-3)


def test_a_sample_teaches_from_a_residual_of_one_per_cent_on() -> None:
    """Plain steps from zero on r z + x leave the residual (1 - r) r^k / (1 - r^(k + 1))."""
    rates = torch.linspace(0.5, 0.99, 40, dtype=torch.float64).unsqueeze(1)
    x, steps = normal(40, 3), 20
    teacher = Teacher(DEQ(lambda z, x, r: r * z + x), Picard(), tol=1e-9, max_steps=steps)
    target = teacher.target((x, rates))
    residual = ((1 - rates) * rates**steps / (1 - rates ** (steps + 1))).squeeze(1)
    reliable = residual <= 1e-2
    assert 0 < target.skipped == int((~reliable).sum()) < 40
    torch.testing.assert_close(target.inputs, (x[reliable], rates[reliable]))
    found = (x * (1 - rates**steps) / (1 - rates))[reliable]
    torch.testing.assert_close(target.goal, found)


@pytest.mark.parametrize(
    ("lost", "message"),
    [
        ([16, 0], None),
        ([16, 1], "17 of 32 samples"),  # once the epoch is over
        ([16, 16, 0, 0, 0, 0], None),
        ([16, 16, 1, 0, 0, 0], "33 of 64 samples"),  # as soon as so many were seen
    ],
)
def test_a_fit_is_refused_where_most_samples_have_no_fixed_point(
    lost: list[int], message: str | None
) -> None:
    batches = [batch[:16] for batch in inputs_of(len(lost))]
    for batch, count in zip(batches, lost, strict=True):
        batch[:count] = torch.nan

    def fit() -> None:
        fit_hypersolver(small(), DEQ(Counting()), lambda epoch: batches, epochs=1, steps=1)

    if message is None:
        fit()
    else:
        with pytest.raises(ValueError, match=f"unreliable for {message}"):
            fit()


def gradients(mode: Any) -> tuple[dict[str, Tensor], Tensor, dict[bool, int]]:
    f = Counting()
    deq, hyper = DEQ(f), small()
    torch.nn.init.normal_(hyper.network.read.weight, std=0.05)  # type: ignore[union-attr, arg-type]
    target = Teacher(deq).target(inputs_of(1)[0])
    f.calls = {True: 0, False: 0}
    path = unroll(hyper, deq, target, 4, mode).distances
    path[-1].mean().backward()
    found = {
        name: parameter.grad
        for name, parameter in hyper.named_parameters()
        if parameter.grad is not None
    }
    return found, path, f.calls


def test_checkpointing_gives_the_same_gradients_and_evaluates_again() -> None:
    full, path, calls = gradients("full")
    again, same, more = gradients("checkpoint")
    assert calls == {True: 4, False: 0}
    assert more[True] + more[False] == 8
    torch.testing.assert_close(path, same)
    assert full.keys() == again.keys()
    for name, value in full.items():
        torch.testing.assert_close(again[name], value, msg=name)


def test_truncation_needs_no_gradient_of_f() -> None:
    """Every step sees its own distance: the last one's gradient is that of one unrolled step."""
    found, path, calls = gradients("truncate")
    assert calls == {True: 0, False: 4}
    torch.testing.assert_close(path, gradients("full")[1])
    assert not any(found[name].any() for name in found if name.startswith("initializer"))

    f, hyper = TanhMap(SIZE, dtype=torch.float32), small()
    torch.nn.init.normal_(hyper.network.read.weight, std=0.05)  # type: ignore[union-attr, arg-type]
    x = inputs_of(1)[0]
    target = Teacher(DEQ(f)).target(x)
    with torch.no_grad():
        z = torch.stack(unroll(hyper, DEQ(f), target, 4).states[:4], dim=1)  # memory 3: all of them
        g = torch.stack([f(z[:, k], x) for k in range(4)], dim=1) - z
    alpha, beta = hyper.network(g)
    last = (alpha.unsqueeze(2) * z).sum(1) + beta * (alpha.unsqueeze(2) * g).sum(1)
    distance = (last - target.goal).norm(dim=1) / target.goal.norm(dim=1)
    distance.mean().backward()
    for name, parameter in hyper.network.named_parameters():
        torch.testing.assert_close(found[f"network.{name}"], parameter.grad, rtol=1e-3, atol=1e-6)


def test_truncated_fits_learn_too() -> None:
    history = fit_hypersolver(
        small(), DEQ(Counting()), inputs_of(8), epochs=5, steps=4, lr=1e-2, mode="truncate"
    )
    assert history[-1].distances[0] < 0.6 * history[0].distances[0]
    assert history[-1].distances[-1] < 0.5 * history[0].distances[-1]


@pytest.mark.parametrize("on_disk", [False, True])
def test_a_cached_z_star_is_solved_for_once(on_disk: bool, tmp_path: Path) -> None:
    def fit(cache: bool | Path, epochs: int = 3) -> tuple[int, list[FitEpoch]]:
        f = Counting()
        history = fit_hypersolver(
            small(), DEQ(f), inputs_of(2), epochs=epochs, steps=2, cache=cache
        )
        return f.calls[False], history

    plain, without = fit(False)
    solved, with_cache = fit(tmp_path / "z" if on_disk else True)
    assert with_cache == without
    assert solved == plain // 3
    if on_disk:
        # A later fit finds them there, and looks once whether its f leaves each in place.
        assert fit(tmp_path / "z") == (2, without)
        assert len(list((tmp_path / "z").iterdir())) == 2


def test_a_cache_knows_other_weights_and_other_inputs(tmp_path: Path) -> None:
    deq, other = DEQ(TanhMap(SIZE, dtype=torch.float32)), DEQ(TanhMap(SIZE, seed=3).float())
    x = inputs_of(1)[0]
    first = Teacher(deq, cache=tmp_path).target(x).goal
    torch.testing.assert_close(Teacher(deq, cache=tmp_path).target(x).goal, first)
    assert not torch.allclose(Teacher(other, cache=tmp_path).target(x).goal, first)
    shifted = x.clone()
    shifted[3, 2] += 0.1
    assert not torch.allclose(Teacher(deq, cache=tmp_path).target(shifted).goal, first)


@pytest.mark.parametrize("stop_at", [1, 3])
def test_a_resumed_fit_repeats_the_uninterrupted_one(stop_at: int, tmp_path: Path) -> None:
    options: dict[str, Any] = {"epochs": 4, "steps": 3, "seed": 5, "lr": 1e-2}
    whole = small()
    expected = fit_hypersolver(whole, DEQ(Counting()), inputs_of(4), **options)

    seen: list[int] = []

    def interrupt(epoch: FitEpoch) -> None:
        seen.append(epoch.epoch)
        if epoch.epoch == stop_at + 1:
            raise KeyboardInterrupt

    state = tmp_path / "fit.pt"
    with pytest.raises(KeyboardInterrupt):
        fit_hypersolver(
            small(), DEQ(Counting()), inputs_of(4), **options, resume=state, on_epoch=interrupt
        )
    resumed = small()
    torch.nn.init.normal_(resumed.network.read.weight)  # type: ignore[union-attr, arg-type]
    found = fit_hypersolver(
        resumed,
        DEQ(Counting()),
        inputs_of(4),
        **options,
        resume=state,
        on_epoch=lambda epoch: seen.append(epoch.epoch),
    )
    assert found == expected
    # The epoch that was lost is told again, and none is left out.
    assert sorted(set(seen)) == [1, 2, 3, 4]
    assert seen.count(stop_at + 1) == 2
    finished = small()  # killed after the last epoch, nothing is left to do
    fit_hypersolver(finished, DEQ(Counting()), inputs_of(4), **options, resume=state)
    assert finished.fitted_on == whole.fitted_on
    for name, value in whole.state_dict().items():
        assert torch.equal(value, resumed.state_dict()[name]), name
    with pytest.raises(ValueError, match=r"fit\.pt holds another fit: steps was 3, now 2"):
        fit_hypersolver(
            small(), DEQ(Counting()), inputs_of(4), **{**options, "steps": 2}, resume=state
        )
    state.write_bytes(state.read_bytes()[:1000])
    with pytest.raises(ValueError, match=r"fit\.pt is damaged .* delete it"):
        fit_hypersolver(small(), DEQ(Counting()), inputs_of(4), **options, resume=state)


def test_batches_by_epoch() -> None:
    seen: list[int] = []

    def batches(epoch: int) -> list[Tensor]:
        seen.append(epoch)
        return inputs_of(2, seed=10 * epoch)

    fit_hypersolver(small(), DEQ(Counting()), batches, epochs=3, steps=1)
    assert seen[-3:] == [0, 1, 2]


def test_the_order_of_a_list_follows_from_the_seed() -> None:
    def order(seed: int) -> float:
        (epoch,) = fit_hypersolver(
            small(), DEQ(Counting()), inputs_of(6), epochs=1, steps=2, lr=1e-2, seed=seed
        )
        return epoch.loss

    assert order(1) == order(1)
    assert order(1) != order(2)


def test_an_early_stop_keeps_the_best_weights() -> None:
    """Validation inputs of another kind: learning to solve the training inputs makes them worse."""
    hyper = small()
    states: list[dict[str, Tensor]] = []

    def keep(epoch: FitEpoch) -> None:
        states.append({key: value.clone() for key, value in hyper.state_dict().items()})

    validation = [-20 * inputs_of(1)[0]]
    history = fit_hypersolver(
        hyper,
        DEQ(Counting()),
        inputs_of(6),
        epochs=30,
        steps=2,
        lr=3e-2,
        validation=validation,
        patience=2,
        on_epoch=keep,
    )
    ramp = torch.tensor([1 / 3, 2 / 3])
    scores = [float((ramp * torch.tensor(epoch.distances[1:])).sum()) for epoch in history]
    assert len(history) < 30
    best = scores.index(min(scores))
    assert best == len(history) - 3
    for name, value in hyper.state_dict().items():
        assert torch.equal(value, states[best][name]), name
    assert hyper.fitted_on is not None
    assert hyper.fitted_on.epochs == best + 1
    assert hyper.fitted_on.distances == history[best].distances


def test_validation_measures_the_hypersolver_as_it_will_be_used() -> None:
    """Its statistics are of the training inputs alone, and they normalise the others."""
    torch.manual_seed(0)
    norm = nn.BatchNorm1d(SIZE)
    hyper = HyperSolver.for_vectors(
        SIZE, memory=3, width=16, initializer=nn.Sequential(nn.Linear(SIZE, SIZE), norm)
    )
    deq, validation = DEQ(Counting()), inputs_of(2, seed=9)
    (epoch,) = fit_hypersolver(hyper, deq, inputs_of(3), epochs=1, steps=2, validation=validation)
    assert norm.num_batches_tracked == 3
    measured = torch.cat(measure_distances(hyper, deq, validation, 2), dim=1).mean(1)
    torch.testing.assert_close(torch.tensor(epoch.distances), measured)


def test_the_worst_sample_is_reported() -> None:
    (epoch,) = fit_hypersolver(
        small(), DEQ(Counting()), inputs_of(1), epochs=1, steps=2, validation=inputs_of(2, seed=9)
    )
    assert all(w > m for w, m in zip(epoch.worst, epoch.distances, strict=True))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"mode": "half"}, "mode must be one of full, checkpoint, truncate"),
        ({"patience": 1}, "patience needs validation"),
        ({"patience": 0, "validation": []}, "patience must be an integer"),
        ({"teacher_tol": None}, "teacher_tol must be a number of at least 0, got None"),
        ({"batches": [torch.zeros(0, SIZE)]}, "batches is empty"),
        ({"hyper": small().requires_grad_(False)}, "hyper is frozen.*requires_grad_"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    given: dict[str, Any] = {
        "hyper": small(),
        "deq": DEQ(Counting()),
        "batches": inputs_of(1),
        **options,
    }
    with pytest.raises(ValueError, match=message):
        fit_hypersolver(**given)


def test_only_a_hypersolver_can_be_fitted() -> None:
    with pytest.raises(TypeError, match="hyper must be a HyperSolver, got HandOver"):
        fit_hypersolver(HandOver(small()), DEQ(Counting()), inputs_of(1))  # type: ignore[arg-type]
    with pytest.raises(
        TypeError, match="hyper must be a HyperSolver, got a HandOver; save its first"
    ):
        save_hypersolver(HandOver(small()), "hyper.safetensors")  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"deq must be a DEQ, such as DEQ\(f\), got a Counting"):
        fit_hypersolver(small(), Counting(), inputs_of(1))  # type: ignore[arg-type]
