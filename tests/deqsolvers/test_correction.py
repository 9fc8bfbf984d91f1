"""Fixed-point correction against iterates and gradients that are written out."""

import pytest
import torch
from torch import Tensor, nn

from deqsolvers import (
    DEQ,
    ConvergenceError,
    Implicit,
    Phantom,
    Picard,
    Unrolled,
    VariationalDropout,
    fixed_point_correction,
)
from tests.problems import TanhMap, normal


def test_states_and_gradients_are_those_of_one_step_from_each_iterate() -> None:
    f, x = TanhMap(5), normal(3, 5).requires_grad_()
    exact = Implicit(tol=1e-10, max_steps=400)
    deq = DEQ(f, Picard(), backward=exact, tol=1e-12, max_steps=400)
    states, solution = fixed_point_correction(deq, x, steps=(4, 0, 2))
    assert len(states) == 4
    z = torch.zeros_like(x)
    for step in range(5):
        expected = f(z.detach(), x)
        if step in (0, 2, 4):
            state = states[step // 2]
            torch.testing.assert_close(state, expected)
            mine = torch.autograd.grad(state.square().sum(), (x, f.weight))
            torch.testing.assert_close(
                mine, torch.autograd.grad(expected.square().sum(), (x, f.weight))
            )
        z = expected
    last, alone = deq(x)
    torch.testing.assert_close(states[-1], last)
    torch.testing.assert_close(solution.z, alone.z)
    torch.testing.assert_close(
        torch.autograd.grad(states[-1].square().sum(), (x, f.weight)),
        torch.autograd.grad(last.square().sum(), (x, f.weight)),
    )


def test_a_sample_of_nan_spares_the_gradients_of_the_iterates() -> None:
    f, x = TanhMap(5), normal(3, 5)
    x[1] = torch.nan
    deq = DEQ(f, Picard(), tol=1e-6, max_steps=400)
    slopes = []
    for given in (x, x[[0, 2]]):
        states, solution = fixed_point_correction(deq, given, steps=(1, 2))
        kept = [state[solution.converged] for state in states]
        loss = torch.stack(kept).square().sum()
        slopes.append(torch.autograd.grad(loss, list(f.parameters())))
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-8, atol=1e-10)


def test_phantom_gradients_for_the_iterates() -> None:
    f, x = TanhMap(5), normal(3, 5)
    deq = DEQ(f, Picard(), tol=1e-6, max_steps=400)
    states, _ = fixed_point_correction(deq, x, steps=(1,), backward=Phantom(steps=2, damping=0.5))
    z = f(torch.zeros_like(x), x).detach()
    for _ in range(2):
        z = 0.5 * z + 0.5 * f(z, x)
    torch.testing.assert_close(states[0], z)
    torch.testing.assert_close(
        torch.autograd.grad(states[0].sum(), f.weight), torch.autograd.grad(z.sum(), f.weight)
    )


@pytest.mark.parametrize("drop", [True, False])
def test_samples_that_are_done_appear_with_their_result(drop: bool) -> None:
    rates = torch.tensor([[0.0], [0.9], [0.1], [0.5]], dtype=torch.float64)
    x = normal(4, 3)

    def f(z: Tensor, rate: Tensor, x: Tensor) -> Tensor:
        return rate * z + x

    deq = DEQ(f, Picard(), tol=1e-6, max_steps=300, drop_converged=drop)
    start = torch.zeros_like(x)
    states, solution = fixed_point_correction(deq, rates, x, steps=(2, 10), z0=start)
    for step, state in zip((2, 10), states, strict=False):
        # z_k = x (1 - rate^k) / (1 - rate), and the state is one step further.
        done = torch.minimum(solution.steps, torch.tensor(step)).unsqueeze(1) + 1
        torch.testing.assert_close(state, x * (1 - rates**done) / (1 - rates))
    assert solution.steps[0] < 10 < solution.steps[1]


def test_steps_beyond_the_end_of_the_solve_add_nothing() -> None:
    f, x = TanhMap(5, norm=0.3), normal(3, 5)
    states, solution = fixed_point_correction(DEQ(f), x, steps=(1, 45))
    assert solution.calls < 45
    assert len(states) == 2


def test_the_recorded_call_is_not_taken_for_an_iterate() -> None:
    f, x = TanhMap(5, norm=0.3), normal(3, 5)
    _, solution = DEQ(f)(x)
    states, _ = fixed_point_correction(DEQ(f), x, steps=(solution.calls, solution.calls + 1))
    assert len(states) == 1


def test_an_iterate_that_is_not_finite_appears_with_its_result() -> None:
    rates = torch.tensor([[3.0], [0.9]], dtype=torch.float64, requires_grad=True)

    def f(z: Tensor, rate: Tensor) -> Tensor:
        return torch.where(z.abs() > 4, torch.nan, rate * z + 0.5)

    deq = DEQ(f, Picard(), max_steps=20, backward="jacobian-free")
    # The first sample goes 0, 0.5, 2, 6.5, and f is NaN there.
    with torch.no_grad():
        failed = deq.solve(rates, z0=torch.zeros(2, 1, dtype=torch.float64)).z[0]
    states, _ = fixed_point_correction(
        deq, rates, steps=(3,), z0=torch.zeros(2, 1, dtype=torch.float64)
    )
    torch.testing.assert_close(states[0][0], 3 * failed + 0.5)
    torch.testing.assert_close(states[0][1], (0.9 * torch.tensor(1.355) + 0.5).double()[None])
    (gradient,) = torch.autograd.grad(states[0].sum(), rates)
    assert bool(gradient.isfinite().all())


def test_the_iterates_share_the_dropout_mask_of_the_solve() -> None:
    drop, x = VariationalDropout(0.5), normal(2, 50)
    deq = DEQ(lambda z, x: 0.5 * z + drop(x), Picard(), max_steps=60)
    (first, second, last), _ = fixed_point_correction(deq, x, steps=(0, 1))
    assert set((first / x).flatten().tolist()) == {0.0, 2.0}
    torch.testing.assert_close(second, 1.5 * first)
    torch.testing.assert_close(last, 2 * first, rtol=1e-3, atol=0)


def test_nested_states_and_no_grad() -> None:
    def f(state: dict[str, Tensor], x: Tensor) -> dict[str, Tensor]:
        return {"a": 0.5 * state["b"] + x, "b": 0.5 * state["a"]}

    x = normal(2, 3)
    deq = DEQ(f, Picard(), z0=lambda x: {"a": torch.zeros_like(x), "b": torch.zeros_like(x)})
    with torch.no_grad():
        states, _ = fixed_point_correction(deq, x, steps=(1,))
    torch.testing.assert_close(states[0], {"a": x, "b": 0.5 * x})
    torch.testing.assert_close(states[1]["a"], x / 0.75, rtol=1e-3, atol=1e-3)


def test_it_goes_with_an_unrolled_solve() -> None:
    f, x = TanhMap(4), normal(2, 4)
    deq = DEQ(f, Picard(), backward=Unrolled(), tol=1e-3, max_steps=200)
    states, _ = fixed_point_correction(deq, x, steps=(0,))
    torch.testing.assert_close(states[0], f(torch.zeros_like(x), x))
    (found,) = torch.autograd.grad(states[0].sum(), f.weight)
    assert torch.equal(found, torch.zeros_like(found))  # z0 is zero, so W has no influence yet
    (found,) = torch.autograd.grad(states[1].sum(), f.weight)
    (expected,) = torch.autograd.grad(deq(x)[0].sum(), f.weight)
    torch.testing.assert_close(found, expected)


def test_the_layer_keeps_its_options() -> None:
    deq = DEQ(nn.Linear(3, 3), Picard(), tol=0.0, max_steps=2, raise_on_failure=True)
    with pytest.raises(ConvergenceError):
        fixed_point_correction(deq, z0=torch.ones(1, 3), steps=(1,))


@pytest.mark.parametrize(("steps", "message"), [((), "empty"), ((-1,), "steps"), ((1.5,), "steps")])
def test_bad_steps(steps: tuple[int, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixed_point_correction(DEQ(torch.cos), torch.zeros(1, 1), steps=steps)
