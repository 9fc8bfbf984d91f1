"""Faults that gave a plausible answer: each against a closed form or another way to compute it."""

from __future__ import annotations

import pickle
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

from deqsolvers import (
    DEQ,
    Anderson,
    AndersonTypeI,
    Broyden,
    ConvergenceError,
    HandOver,
    HyperSolver,
    Implicit,
    NewtonKrylov,
    Phantom,
    Picard,
    Shine,
    Solver,
    Status,
    fit_hypersolver,
    fixed_point,
    jacobian_regularizer,
    load_hypersolver,
    save_hypersolver,
    spectral_radius,
)
from deqsolvers.backward import Backward

DOUBLE = torch.float64


def rotation(seed: int = 0, dtype: torch.dtype = DOUBLE) -> Callable[[Tensor], Tensor]:
    """A linear map whose eigenvalues lie on the circle of radius 0.9."""
    generator = torch.Generator().manual_seed(seed)
    matrix = torch.randn(20, 20, generator=generator, dtype=DOUBLE)
    orthogonal = (0.9 * torch.linalg.qr(matrix)[0]).to(dtype)
    shift = torch.randn(1, 20, generator=generator, dtype=DOUBLE).to(dtype)
    return lambda z: z @ orthogonal.T + shift


@pytest.mark.parametrize("tol", [1e-6, None])
def test_a_probe_of_newton_krylov_is_no_answer(tol: float | None) -> None:
    f = rotation(dtype=torch.float32)
    found = [
        fixed_point(
            f,
            torch.zeros(1, 20),
            solver=NewtonKrylov(),
            tol=tol,
            max_steps=300 if tol else 43,
            final=final,
        )
        for final in ("best", "last")
    ]
    residuals = [float((f(s.z) - s.z).norm() / f(s.z).norm()) for s in found]
    assert residuals[1] <= residuals[0] * (1 + 1e-3)
    assert float(found[1].residual) == pytest.approx(residuals[1], rel=0.1)


@pytest.mark.parametrize("final", ["best", "last"])
def test_newton_krylov_reports_a_relative_residual_where_every_step_was_a_gain(final: str) -> None:
    """Its best iterate stands for the last, which nobody measures relative to f(z) on the way."""

    def f(z: Tensor) -> Tensor:
        return 0.5 * z.roll(1, dims=1) + 10

    solution = fixed_point(
        f, torch.zeros(2, 4), solver=NewtonKrylov(), tol=None, max_steps=2, final=final
    )
    fz = f(solution.z)
    torch.testing.assert_close(solution.residual, (fz - solution.z).norm(dim=1) / fz.norm(dim=1))


def test_the_jacobian_can_be_asked_for_in_inference_mode() -> None:
    with torch.inference_mode():
        z, x = torch.ones(2, 3), torch.ones(2, 3)
        radius = spectral_radius(lambda z, x: 0.5 * z + z * 0 * x, z, (x,))
        size = jacobian_regularizer(
            lambda z: 0.5 * z, z, generator=torch.Generator().manual_seed(0)
        )
    torch.testing.assert_close(radius, torch.full((2,), 0.5))
    noise = torch.randn(2, 3, generator=torch.Generator().manual_seed(0))
    torch.testing.assert_close(size, (0.5 * noise).square().mean())
    torch.testing.assert_close(spectral_radius(lambda z: 0.5 * z, z), torch.full((2,), 0.5))


def test_the_regulariser_of_an_empty_batch_is_zero() -> None:
    assert float(jacobian_regularizer(lambda z: 0.5 * z, torch.zeros(0, 3))) == 0


@pytest.mark.parametrize("function", [jacobian_regularizer, spectral_radius])
def test_what_f_takes_beside_z_comes_in_a_tuple(function: Callable[..., Tensor]) -> None:
    with pytest.raises(TypeError, match=r"inputs must be a tuple .* such as \(x,\); got Tensor"):
        function(lambda z, x: z + x, torch.zeros(1, 3), torch.zeros(1, 3))
    with pytest.raises(ValueError, match="shape of z,"):
        function(lambda z: z[:, :2], torch.zeros(2, 3))


def test_a_reentrant_checkpoint_is_refused_and_the_other_kind_is_not() -> None:
    cell, x = nn.Linear(4, 4), torch.randn(2, 4)

    def f(reentrant: bool) -> Callable[[Tensor, Tensor], Tensor]:
        return lambda z, x: torch.tanh(0.3 * checkpoint(cell, z, use_reentrant=reentrant) + x)

    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        DEQ(f(True))(x)
    z, _ = DEQ(f(False))(x)
    plain, _ = DEQ(lambda z, x: torch.tanh(0.3 * cell(z) + x))(x)
    (found,) = torch.autograd.grad(z.sum(), cell.weight)
    (expected,) = torch.autograd.grad(plain.sum(), cell.weight)
    torch.testing.assert_close(found, expected)


def test_threads_do_not_take_each_others_gradients() -> None:
    class Cell(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = weight_norm(nn.Linear(6, 6))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            if threading.current_thread() is other and not inside.is_set():
                inside.set()
                go_on.wait(20)
            return torch.tanh(0.3 * self.layer(z) + x)

    def evaluate() -> None:
        with torch.no_grad():
            deq(x)

    inside, go_on = threading.Event(), threading.Event()
    deq, x = DEQ(Cell()), torch.randn(4, 6)
    other = threading.Thread(target=evaluate)
    other.start()
    inside.wait(20)
    try:
        with pytest.raises(RuntimeError, match=r"'weight' of .*Linear.* another thread"):
            deq(x)
    finally:
        go_on.set()
        other.join()
    deq(x)[0].sum().backward()
    assert all(weight.grad is not None for weight in deq.parameters())


@pytest.mark.parametrize("backward", [Phantom(4, 0.5), Implicit(), "unrolled", "jacobian-free"])
def test_a_sample_that_blows_up_spares_the_gradients_of_the_others(
    backward: Backward | str,
) -> None:
    w = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return w * z + x + torch.where(x > 5, torch.exp(z * z), 0.0 * z)

    x = torch.tensor([[1.0], [10.0]], dtype=DOUBLE)
    z, solution = DEQ(f, Picard(), backward=backward, tol=1e-6)(x)
    assert bool(solution.z.isfinite().all())
    z[0].sum().backward()
    alone, _ = DEQ(f, Picard(), backward=backward, tol=1e-6)(x[:1])
    (expected,) = torch.autograd.grad(alone.sum(), w)
    assert w.grad is not None
    torch.testing.assert_close(w.grad, expected)


def test_unrolled_newton_krylov_with_an_exact_sample() -> None:
    w = torch.tensor(0.5, dtype=DOUBLE, requires_grad=True)

    def f(z: Tensor, x: Tensor) -> Tensor:
        return w * z + x + torch.where(x[:, 1:] > 1, 0.3 * torch.sin(z), 0.0)

    x = torch.tensor([[1.0, 0.0], [1.0, 2.0]], dtype=DOUBLE)
    gradients = []
    for solver, backward in ((NewtonKrylov(), "unrolled"), (Anderson(), "implicit")):
        z, _ = DEQ(f, solver, backward=backward, tol=1e-12, max_steps=60)(x)
        gradients.append(torch.autograd.grad(z.sum(), w)[0])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=0)


@pytest.mark.parametrize("rate", [0.3, 0.5, -0.7])
@pytest.mark.parametrize(
    "solver",
    [Anderson(), Anderson(safeguard=1.0), AndersonTypeI(), Broyden(), HandOver(Picard(0.5))],
    ids=repr,
)
def test_unrolled_past_the_exact_solution(solver: Solver, rate: float) -> None:
    """z = w z + x is exact after a few steps in fp32, and then differences of residuals are 0."""
    w = torch.tensor(rate, requires_grad=True)
    torch.manual_seed(0)
    x = torch.randn(64, 1)
    z, _ = DEQ(lambda z, x: w * z + x, solver, backward="unrolled", tol=None, max_steps=40)(x)
    (found,) = torch.autograd.grad(z.sum(), w)
    torch.testing.assert_close(found, (x / (1 - rate) ** 2).sum(), rtol=1e-3, atol=0)


@pytest.mark.parametrize(
    "solver",
    [Picard(0.5), Anderson(5, damping=0.5), AndersonTypeI(damping=0.5), HandOver(Picard(0.5))],
    ids=repr,
)
def test_a_buffer_that_f_returns_again_is_refused(solver: object) -> None:
    f, buffer = rotation(), torch.empty(1, 20, dtype=DOUBLE)
    z0 = torch.zeros(1, 20, dtype=DOUBLE)
    with pytest.raises(ValueError, match="returned a buffer that its next call writes over"):
        fixed_point(lambda z: buffer.copy_(f(z)), z0, solver=solver)  # type: ignore[arg-type]


def test_the_shine_gradient_of_a_stalled_sample_does_not_depend_on_its_mates() -> None:
    def f(z: Tensor, x: Tensor, rate: Tensor, noise: Tensor) -> Tensor:
        return rate * torch.sin(z) + x + noise * torch.sign(torch.sin(300 * z))

    generator = torch.Generator().manual_seed(1)
    x = torch.randn(2, 6, dtype=DOUBLE, generator=generator)
    rate = torch.tensor([[0.5], [0.99]], dtype=DOUBLE)
    noise = torch.tensor([[2e-2], [0.0]], dtype=DOUBLE)
    deq = DEQ(f, Broyden(100), backward=Shine(1e9), tol=1e-10, max_steps=90, stall_after=6)

    def gradient(rows: list[int]) -> Tensor:
        given = x[rows].clone().requires_grad_()
        z, solution = deq(given, rate[rows], noise[rows])
        assert solution.statuses()[0] is Status.STALLED
        z[0].sum().backward()
        assert given.grad is not None
        return given.grad[0]

    torch.testing.assert_close(gradient([0, 1]), gradient([0]))


@pytest.mark.parametrize("dtype", [torch.float32, DOUBLE])
@pytest.mark.parametrize("tol", [None, 1e-9])
@pytest.mark.parametrize("power", [-30, -22, -12, 0, 12, 25])
def test_residuals_at_any_scale(power: int, tol: float | None, dtype: torch.dtype) -> None:
    """z <- z / 2 + s leads from 0 to s (2 - 2^(1 - k)), with a residual of 1 / (2^(k + 1) - 1)."""
    scale = 10.0 ** (power * (6 if dtype is DOUBLE else 1))
    shift = torch.full((1, 4), scale, dtype=dtype)
    solution = fixed_point(
        lambda z: 0.5 * z + shift, torch.zeros_like(shift), solver=Picard(), tol=tol, max_steps=3
    )
    assert float(solution.residual) == pytest.approx(1 / 15, rel=1e-5)
    assert solution.statuses() == [Status.FIXED_STEPS if tol is None else Status.STEP_LIMIT]


def test_growth_without_end_is_divergence_at_the_step_limit_too() -> None:
    solution = fixed_point(lambda z: 1 - 2 * z, torch.zeros(1, 3), solver=Picard(), max_steps=20)
    assert solution.statuses() == [Status.DIVERGED]


def test_a_convergence_error_crosses_processes() -> None:
    with pytest.raises(ConvergenceError) as caught:
        fixed_point(lambda z: 2 * z + 1, torch.zeros(1, 3), raise_on_failure=True, max_steps=1)
    again = pickle.loads(pickle.dumps(caught.value))
    assert str(again) == str(caught.value)
    assert again.solution.statuses() == caught.value.solution.statuses()


def test_what_comes_after_may_work_in_place() -> None:
    x = torch.randn(3, 4, requires_grad=True)
    z, _ = DEQ(lambda z, x: 0.5 * torch.tanh(z) + x)(x)
    z.relu_().sum().backward()
    out_of_place, _ = DEQ(lambda z, x: 0.5 * torch.tanh(z) + x)(x)
    (expected,) = torch.autograd.grad(out_of_place.relu().sum(), x)
    assert x.grad is not None
    torch.testing.assert_close(x.grad, expected)


@pytest.mark.parametrize("backward", ["implicit", "phantom", "jacobian-free", "shine", "unrolled"])
def test_an_empty_batch_has_gradients(backward: str) -> None:
    cell = nn.Linear(3, 3)
    solver = Broyden() if backward == "shine" else Anderson()
    deq = DEQ(lambda z, x: torch.tanh(0.3 * cell(z) + x), solver, backward=backward)
    z, _ = deq(torch.zeros(0, 3))
    z.sum().backward()
    assert cell.weight.grad is not None
    assert not cell.weight.grad.any()


def test_numbers_of_numpy_are_numbers() -> None:
    solution = fixed_point(
        lambda z: 0.5 * z + 1,
        torch.zeros(1, 3),
        solver=Anderson(memory=np.int64(3)),
        tol=np.float32(1e-3),
        max_steps=np.int64(20),
    )
    assert bool(solution.converged.all())


def test_a_layer_is_refused_at_once_what_it_cannot_use() -> None:
    with pytest.raises(TypeError, match=r"f must be callable.* got None"):
        DEQ(None)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"function of the inputs.* got a Tensor.*deq\(x, z0="):
        DEQ(torch.cos, z0=torch.zeros(2, 3))  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"an object such as Implicit\(\)"):
        DEQ(torch.cos, backward=Implicit)  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=r"solver must be a Solver such as Anderson\(\)"):
        Implicit(solver=Broyden)  # type: ignore[arg-type]


def test_with_solver_leaves_the_modes_of_f_alone() -> None:
    f = nn.Sequential(nn.BatchNorm1d(3), nn.Tanh()).eval()
    deq = DEQ(f)
    f.eval()
    other = deq.with_solver(Picard())
    assert other.training
    assert not f.training
    assert not f[0].training


class Cell(nn.Module):
    """A contraction with a plain attribute, which no state dict holds."""

    def __init__(self) -> None:
        super().__init__()
        self.layer, self.sign = nn.Linear(8, 8), 1.0

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.3 * self.sign * self.layer(z) + x)


@pytest.mark.parametrize("as_module", [True, False])
def test_a_folder_of_fixed_points_is_not_used_for_another_map(
    as_module: bool, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    cell = Cell()
    deq = DEQ(cell if as_module else lambda z, x: cell(z, x))
    batches = [torch.randn(16, 8) for _ in range(4)]

    def distance(cache: Path | bool) -> float:
        torch.manual_seed(1)
        hyper = HyperSolver.for_vectors(8)
        return fit_hypersolver(hyper, deq, batches, epochs=3, cache=cache)[-1].distances[-1]

    distance(tmp_path)
    if as_module:
        cell.sign = -3.0
    else:
        with torch.no_grad():
            cell.layer.weight.mul_(-3)
    assert distance(tmp_path) == pytest.approx(distance(False), rel=1e-3)


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"weights": "wikitext-103"}, "weights"),
        ({"mode": "truncate"}, "mode"),
        ({"final_lr": 1e-5}, "final_lr"),
        ({"teacher_tol": 1e-3}, "teacher"),
        ({"f": 2.0}, "f was"),
    ],
)
def test_a_fit_goes_on_with_its_own_settings_alone(
    changes: dict[str, object], named: str, tmp_path: Path
) -> None:
    torch.manual_seed(0)
    cell, batches = Cell(), [torch.randn(4, 8)]
    options = {"epochs": 1, "steps": 2, "resume": tmp_path / "fit.pt"}
    fit_hypersolver(HyperSolver.for_vectors(8), DEQ(cell), batches, **options)  # type: ignore[arg-type]
    if "f" in changes:
        changes = {}
        with torch.no_grad():
            cell.layer.weight.mul_(2)
    with pytest.raises(ValueError, match=f"holds another fit: {named}"):
        fit_hypersolver(
            HyperSolver.for_vectors(8),
            DEQ(cell),
            batches,
            **{**options, **changes},  # type: ignore[arg-type]
        )


def test_a_fit_of_another_hypersolver_is_refused(tmp_path: Path) -> None:
    batches, options = [torch.randn(4, 8)], {"epochs": 1, "resume": tmp_path / "fit.pt"}
    torch.manual_seed(0)
    deq = DEQ(Cell())
    fit_hypersolver(HyperSolver.for_vectors(8), deq, batches, **options)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="is of another HyperSolver"):
        fit_hypersolver(HyperSolver.for_vectors(8, width=32), deq, batches, **options)  # type: ignore[arg-type]


def test_batches_of_a_data_loader_and_of_a_generator() -> None:
    torch.manual_seed(0)
    data = torch.randn(32, 8)
    loader = DataLoader(TensorDataset(data), 16)
    histories = [
        fit_hypersolver(
            HyperSolver.for_vectors(8), deq, batches, epochs=1, validation=lambda epoch: [data]
        )
        for deq in [DEQ(Cell())]
        for batches in (loader, lambda epoch: (part for part in data.split(16)))
    ]
    assert all(len(history) == 1 for history in histories)


def test_batches_of_a_data_loader_without_a_length() -> None:
    """It is read anew every epoch, as its data set may draw other samples each time."""

    class Stream(IterableDataset[Tensor]):
        passes = 0

        def __iter__(self) -> Iterator[Tensor]:
            self.passes += 1
            return iter(torch.randn(32, 8))

    torch.manual_seed(0)
    stream, hyper = Stream(), HyperSolver.for_vectors(8)
    updates: list[int] = []
    history = fit_hypersolver(
        hyper,
        DEQ(Cell()),
        DataLoader(stream, 16),
        epochs=3,
        validation=DataLoader(stream, 16),
        on_batch=lambda update, loss: updates.append(update),
    )
    assert len(history) == 3
    assert updates == [1, 2, 3, 4, 5, 6]
    assert stream.passes == 7  # one of them to count


def test_fixed_points_of_token_inputs_are_kept_in_a_folder(tmp_path: Path) -> None:
    torch.manual_seed(0)
    table = nn.Embedding(10, 8)

    class Tokens(nn.Module):
        def forward(self, tokens: Tensor, *rest: Tensor) -> Tensor:
            return torch.zeros(len(tokens), 8)

    hyper = HyperSolver.for_vectors(8)
    hyper.initializer = Tokens()
    deq = DEQ(lambda z, tokens: torch.tanh(0.3 * z + table(tokens)), z0=Tokens())
    tokens = torch.arange(10)
    history = fit_hypersolver(hyper, deq, [tokens], epochs=2, cache=tmp_path)
    assert len(history) == 2


def pool_vectors(residual: Tensor) -> Tensor:
    """A pool of another's with the name of one of ours."""
    return residual.abs()


def test_a_pool_of_ones_own_is_not_taken_for_ours(tmp_path: Path) -> None:
    hyper = HyperSolver.for_vectors(8)
    hyper.pool = pool_vectors
    save_hypersolver(hyper, tmp_path / "hyper.safetensors")
    with pytest.raises(ValueError, match=r"test_hard_to_see\.pool_vectors are not of this package"):
        load_hypersolver(tmp_path / "hyper.safetensors")
    assert load_hypersolver(tmp_path / "hyper.safetensors", into=hyper).pool is pool_vectors


def test_a_loaded_hypersolver_has_the_precision_that_was_saved(tmp_path: Path) -> None:
    hyper = HyperSolver.for_vectors(8).double()
    save_hypersolver(hyper, tmp_path / "hyper.safetensors")
    x = torch.randn(2, 8, dtype=DOUBLE)
    loaded = load_hypersolver(tmp_path / "hyper.safetensors")
    torch.testing.assert_close(loaded.start(x), hyper.start(x), rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, DOUBLE])
def test_a_preconditioner_takes_states_of_any_precision(dtype: torch.dtype) -> None:
    hyper = HyperSolver.for_vectors(8, rank=4)
    z0 = torch.zeros(2, 8, dtype=dtype)
    solution = fixed_point(
        lambda z: 0.5 * z + 1, z0, solver=hyper, tol=None, max_steps=3, final="last"
    )
    assert solution.z.dtype is dtype
    torch.testing.assert_close(solution.z, torch.full_like(z0, 1.75))  # it is plain iteration
