"""Implicit gradients against closed forms, unrolled iterations and finite differences."""

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from deqsolvers import (
    DEQ,
    Anderson,
    Backward,
    Broyden,
    ConvergenceWarning,
    Implicit,
    JacobianFree,
    Phantom,
    Picard,
    Shine,
    Solution,
    Solver,
    Status,
    Unrolled,
    VariationalDropout,
)
from tests.deqsolvers.maps import TanhMap, normal
from tests.deqsolvers.references import EXACT, exact, unrolled
from tests.problems import PROBLEMS, breaking, convolution_deq, non_normal, tanh_deq, with_spectrum

SOLVERS: list[Solver] = [Picard(), Anderson(), Broyden()]
every_solver = pytest.mark.parametrize("solver", SOLVERS, ids=repr)


@every_solver
@pytest.mark.parametrize(
    "matrix",
    [
        with_spectrum(torch.tensor([0.9, 0.4, -0.7, 0.1], dtype=torch.float64)),
        torch.full((4, 4), 0.8, dtype=torch.float64).triu(1) + 0.3 * torch.eye(4),
    ],
    ids=["symmetric", "non-normal"],
)
def test_linear_map_in_closed_form(solver: Solver, matrix: Tensor) -> None:
    """z = A z + b + x: with u = (I - A)^-T c, dL/db = sum u, dL/dx = u and dL/dA = sum u z^T."""
    a, b = matrix.clone().requires_grad_(), normal(4, seed=3).requires_grad_()
    x, c = normal(3, 4, seed=4).requires_grad_(), normal(3, 4, seed=5)
    z, solution = exact(lambda z, x: z @ a.T + b + x, solver)(x)
    assert solution.converged.all()
    (c * z).sum().backward()

    inverse = torch.linalg.inv(torch.eye(4, dtype=torch.float64) - matrix)
    expected_z = (b + x).detach() @ inverse.T
    u = c @ inverse
    torch.testing.assert_close(z.detach(), expected_z, rtol=0, atol=1e-9)
    torch.testing.assert_close(x.grad, u, rtol=0, atol=1e-9)
    torch.testing.assert_close(b.grad, u.sum(0), rtol=0, atol=1e-9)
    torch.testing.assert_close(a.grad, u.T @ expected_z, rtol=0, atol=1e-8)


@every_solver
@pytest.mark.parametrize("name", ["tanh", "perceptron", "convolution"])
def test_unrolled_differentiation_agrees(solver: Solver, name: str) -> None:
    problem = PROBLEMS[name]()
    assert isinstance(problem.f, nn.Module)
    variables = [problem.inputs[0].requires_grad_(), *problem.f.parameters()]
    c = normal(*problem.z0.shape, seed=11)
    z, _ = exact(problem.f, solver)(*problem.inputs)
    found = torch.autograd.grad((c * z).sum(), variables)
    reference = unrolled(problem.f, problem.z0, *problem.inputs)
    expected = torch.autograd.grad((c * reference).sum(), variables)
    torch.testing.assert_close(z, reference, rtol=0, atol=1e-10)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_several_calls_before_one_backward() -> None:
    f = TanhMap(5)
    deq = exact(f)
    xs = [normal(3, 5, seed=seed).requires_grad_() for seed in range(3)]
    variables = [*xs, *f.parameters()]
    powers = [deq(x)[0] ** k for k, x in enumerate(xs, 1)]
    found = torch.autograd.grad(torch.stack(powers).sum(), variables)
    reference = [unrolled(f, torch.zeros_like(x), x) for x in xs]
    total = torch.stack([z**k for k, z in enumerate(reference, 1)]).sum()
    torch.testing.assert_close(found, torch.autograd.grad(total, variables), rtol=1e-8, atol=1e-10)


def test_backward_twice_gives_the_same_twice() -> None:
    f, x = TanhMap(5), normal(3, 5).requires_grad_()
    z, _ = exact(f)(x)
    loss = z.square().sum()
    variables = [x, *f.parameters()]
    first = torch.autograd.grad(loss, variables, retain_graph=True)
    exact(f)(2 * x.detach())[0].sum().backward()  # another solve in between
    second = torch.autograd.grad(loss, variables)
    for one, other in zip(first, second, strict=True):
        assert torch.equal(one, other)


def test_a_layer_inside_the_map_of_another() -> None:
    """y = B y + z inside z = A z + y / 4 + x, so that z = (I - A - (I - B)^-1 / 4)^-1 x."""
    a = with_spectrum(torch.tensor([0.4, -0.3, 0.2], dtype=torch.float64)).requires_grad_()
    b = with_spectrum(torch.tensor([0.3, 0.2, -0.5], dtype=torch.float64), 1).requires_grad_()
    x, c = normal(2, 3).requires_grad_(), normal(2, 3, seed=1)
    inner = exact(lambda y, z: y @ b.T + z)
    outer = exact(lambda z, x: z @ a.T + inner(z)[0] / 4 + x)
    z, solution = outer(x)
    assert solution.converged.all()
    eye = torch.eye(3, dtype=torch.float64)
    closed = x @ torch.linalg.inv(eye - a - torch.linalg.inv(eye - b) / 4).T
    torch.testing.assert_close(z, closed, rtol=0, atol=1e-9)
    found = torch.autograd.grad((c * z).sum(), (a, b, x))
    expected = torch.autograd.grad((c * closed).sum(), (a, b, x))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_two_inputs_of_which_one_needs_no_gradient() -> None:
    f = TanhMap(4)
    x, gain = normal(3, 4).requires_grad_(), normal(3, 1, seed=2).sigmoid().requires_grad_()
    mask = torch.tensor([[1, 0, 1, 1]]).expand(3, 4)  # an integer tensor, batch first

    def gated(z: Tensor, x: Tensor, gain: Tensor, mask: Tensor) -> Tensor:
        return mask * gain * f(z, x)

    z, _ = exact(gated)(x, gain, mask)
    found = torch.autograd.grad(z.square().sum(), (x, gain))
    reference = unrolled(gated, torch.zeros_like(x), x, gain, mask)
    expected = torch.autograd.grad(reference.square().sum(), (x, gain))
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_a_complex_state_has_the_gradient_of_the_equivalent_real_one() -> None:
    matrix = torch.complex(normal(3, 3, seed=1), normal(3, 3, seed=2))
    matrix = 0.7 * matrix / torch.linalg.matrix_norm(matrix, 2)
    x = torch.complex(normal(2, 3, seed=3), normal(2, 3, seed=4)).requires_grad_()
    z, _ = exact(lambda z, x: z @ matrix.T + x)(x)
    closed = x @ torch.linalg.inv(torch.eye(3) - matrix).T
    (found,) = torch.autograd.grad(z.abs().square().sum(), x)
    (expected,) = torch.autograd.grad(closed.abs().square().sum(), x)
    torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-9)


@pytest.mark.parametrize("damping", [1.0, 0.4])
@pytest.mark.parametrize("steps", [1, 4])
def test_phantom_is_a_few_recorded_steps(steps: int, damping: float) -> None:
    f, x = TanhMap(5), normal(3, 5).requires_grad_()
    deq = DEQ(f, backward=Phantom(steps=steps, damping=damping), **EXACT)
    z, solution = deq(x)
    by_hand = solution.z
    for _ in range(steps):
        by_hand = (1 - damping) * by_hand + damping * f(by_hand, x)
    variables = [x, *f.parameters()]
    found = torch.autograd.grad(z.square().sum(), variables)
    expected = torch.autograd.grad(by_hand.square().sum(), variables)
    torch.testing.assert_close(z, by_hand)
    torch.testing.assert_close(found, expected)


def test_phantom_approaches_the_implicit_gradient() -> None:
    f, x = TanhMap(5, norm=0.6), normal(3, 5).requires_grad_()
    (truth,) = torch.autograd.grad(exact(f)(x)[0].sum(), x)
    errors = []
    for steps in (1, 4, 16, 64):
        z, _ = DEQ(f, backward=Phantom(steps=steps, damping=0.8), **EXACT)(x)
        errors.append(float((torch.autograd.grad(z.sum(), x)[0] - truth).norm()))
    assert errors == sorted(errors, reverse=True)
    assert errors[-1] < 1e-8


def test_jacobian_free_is_one_recorded_call() -> None:
    f, x = TanhMap(5), normal(3, 5).requires_grad_()
    z, solution = DEQ(f, backward="jacobian-free", **EXACT)(x)
    variables = [x, *f.parameters()]
    found = torch.autograd.grad(z.square().sum(), variables)
    expected = torch.autograd.grad(f(solution.z, x).square().sum(), variables)
    torch.testing.assert_close(found, expected)


def test_a_backward_pass_that_fails_warns_and_is_recorded() -> None:
    """Three plain steps cannot solve for u with a Jacobian whose powers grow first."""
    problem = non_normal()
    x = problem.inputs[0].requires_grad_()
    deq = DEQ(problem.f, Broyden(), backward=Implicit(Picard(), tol=1e-6, max_steps=3), **EXACT)
    z, solution = deq(x)
    assert solution.backward is None
    with pytest.warns(ConvergenceWarning, match=r"did not converge.* DIVERGED: The residual"):
        z.sum().backward()
    assert solution.backward is not None
    assert solution.backward.statuses() == [Status.DIVERGED] * 4
    assert solution.backward.calls == 4


def test_passes_that_fail_alike_warn_once() -> None:
    """A training whose backward passes miss their tolerance is told so, and not at every update."""
    problem = non_normal()
    backward = Implicit(Picard(), tol=1e-6, max_steps=3)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for scale in (1.0, 0.5, 2.0):
            x = (scale * problem.inputs[0]).detach().requires_grad_()
            z, _ = DEQ(problem.f, Broyden(), backward=backward, **EXACT)(x)
            z.sum().backward()
    assert [one.category for one in caught] == [ConvergenceWarning]


def test_a_backward_pass_that_succeeds_is_recorded_without_a_warning() -> None:
    problem = tanh_deq()
    x = problem.inputs[0].requires_grad_()
    z, solution = exact(problem.f)(x)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        z.sum().backward()
    assert solution.backward is not None
    assert solution.backward.converged.all()
    assert (solution.backward.residual <= 1e-12).all()


def test_a_loss_that_ignores_a_sample_leaves_it_without_gradient() -> None:
    problem = tanh_deq()
    x = problem.inputs[0].requires_grad_()
    z, solution = exact(problem.f)(x)
    z[1].sum().backward()
    assert x.grad is not None
    assert x.grad[1].abs().sum() > 0
    assert x.grad[[0, 2, 3, 4]].abs().sum() == 0
    assert solution.backward is not None
    assert solution.backward.converged.all()


@pytest.mark.filterwarnings("ignore::deqsolvers.ConvergenceWarning")
def test_a_broken_sample_does_not_spoil_the_gradients_of_its_mates() -> None:
    problem = breaking(after=3, sample=1)
    x = problem.inputs[0].requires_grad_()
    z, _ = exact(problem.f)(x, problem.inputs[1])
    z.square().sum().backward()
    healthy = tanh_deq()
    y = healthy.inputs[0].requires_grad_()
    exact(healthy.f)(y)[0].square().sum().backward()
    others = [0, 2, 3, 4]
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad[others], y.grad[others], rtol=1e-8, atol=1e-10)


def with_a_nan(rows: int = 4, lost: int = 1) -> tuple[Tensor, Tensor]:
    """Inputs of which one sample is NaN, and the numbers of the others."""
    x = normal(rows, 5, seed=7)
    x[lost] = torch.nan
    return x.requires_grad_(), torch.tensor([row for row in range(rows) if row != lost])


SPARING = ["implicit", "phantom", "jacobian-free", "shine"]


@pytest.mark.parametrize("backward", SPARING)
@pytest.mark.parametrize("lost", [0, 3])
def test_a_sample_of_nan_that_the_loss_masks_spares_all_gradients(backward: str, lost: int) -> None:
    f = TanhMap(5)
    x, others = with_a_nan(lost=lost)
    # Nearer to z*, SHINE's estimate depends on rounding.
    deq = DEQ(f, Broyden(30), backward=backward, tol=1e-8)
    z, solution = deq(x)
    assert solution.status[lost] == Status.NON_FINITE
    assert bool((z[lost] == 0).all())  # where the solve began
    mask = solution.converged.unsqueeze(1)
    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        torch.where(mask, z, 0).square().sum().backward()
    found = [x.grad, *(parameter.grad for parameter in f.parameters())]
    alone = x.detach()[others].requires_grad_()
    targets = [alone, *f.parameters()]
    expected = torch.autograd.grad(deq(alone)[0].square().sum(), targets)
    assert found[0] is not None
    assert bool((found[0][lost] == 0).all())
    found[0] = found[0][others]
    torch.testing.assert_close(found, list(expected), rtol=1e-6, atol=1e-8)


def test_second_derivatives_are_spared_too() -> None:
    f, results = TanhMap(5, norm=0.7), []
    x, others = with_a_nan()
    for given in (x, x.detach()[others].requires_grad_()):
        z, solution = exact(f)(given)
        loss = torch.where(solution.converged.unsqueeze(1), z, 0).square().sum()
        (slope,) = torch.autograd.grad(loss, given, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), list(f.parameters())))
    torch.testing.assert_close(results[0], results[1], rtol=1e-8, atol=1e-10)


def test_a_nested_state_with_masks_and_a_start_of_nan() -> None:
    """What is put back is the state that the solution holds, whatever that is."""
    f, drop = TanhMap(5, norm=0.7), VariationalDropout(0.3)
    z0 = {"a": torch.zeros(4, 5).double(), "b": torch.zeros(4, 5, 1).double()}
    z0["b"][2] = torch.nan

    def nested(z: dict[str, Tensor], x: list[Any]) -> dict[str, Tensor]:
        return {"b": 0.5 * z["a"].unsqueeze(2), "a": f(drop(z["b"].squeeze(2)), x[0])}

    x, others = with_a_nan(lost=2)
    z, solution = exact(nested)([x, "not a tensor"], z0=z0)
    assert solution.converged.tolist() == [True, True, False, True]
    assert torch.equal(z["b"].isnan().flatten(1).any(1), torch.tensor([False, False, True, False]))
    z["a"][others].sum().backward()
    assert all(bool(p.grad.isfinite().all()) for p in f.parameters() if p.grad is not None)
    assert x.grad is not None
    assert (x.grad != 0).any(1).tolist() == [True, True, False, True]


def test_where_all_samples_are_lost_nothing_is_spared() -> None:
    f, x = TanhMap(5), torch.full((2, 5), torch.nan, dtype=torch.float64)
    z, solution = DEQ(f, backward="jacobian-free")(x)
    assert not solution.converged.any()
    assert z.isnan().all()


@pytest.mark.parametrize(
    "backward", [Implicit(), Phantom(), JacobianFree()], ids=lambda b: type(b).__name__
)
def test_image_states_have_gradients_of_their_shape(backward: Any) -> None:
    problem = convolution_deq()
    x = problem.inputs[0].requires_grad_()
    z, _ = DEQ(problem.f, backward=backward)(x)
    z.sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert z.shape == problem.z0.shape


@pytest.mark.parametrize("kind", ["bf16", "fp16", "bf16 autocast", "fp32"])
def test_the_default_tolerance_is_one_that_the_precision_can_reach(kind: str) -> None:
    state = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(kind, torch.float32)
    floor = {"bf16": 5e-3, "fp16": 6e-4, "bf16 autocast": 5e-3, "fp32": 1e-4}[kind]
    matrix = torch.linalg.qr(normal(32, 32)).Q.to(state)
    x = normal(8, 32).to(state).requires_grad_()

    def gradient(backward: Implicit) -> Solution:
        def f(z: Tensor, x: Tensor) -> Tensor:
            return torch.tanh(0.9 * z @ matrix + x)

        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=kind == "bf16 autocast"):
            z, solution = DEQ(f, tol=5e-3, backward=backward)(x)
        z.float().square().sum().backward()
        assert solution.backward is not None
        return solution.backward

    with warnings.catch_warnings():
        warnings.simplefilter("error", ConvergenceWarning)
        found = gradient(Implicit())
    assert found.converged.all()
    assert (found.residual <= floor).all()
    assert found.residual.max() > floor / 100  # as loose as that, not by accident
    if floor == 5e-3:  # which is why
        with pytest.warns(ConvergenceWarning):
            gradient(Implicit(tol=1e-4))


@pytest.mark.parametrize(
    "backward",
    [
        Implicit(),
        Implicit(Broyden(memory=9, damping=0.5), tol=1e-7, max_steps=80),
        Implicit(tol=None),
        Phantom(3, 0.7),
        JacobianFree(),
        Shine(fallback=2.5),
        Unrolled(),
    ],
    ids=repr,
)
def test_a_repr_makes_the_same_object(backward: Backward) -> None:
    other = eval(repr(backward))
    assert type(other) is type(backward)
    assert repr(other) == repr(backward)
    assert getattr(other, "options", None) == getattr(backward, "options", None)


def test_the_defaults_of_inexact_gradients() -> None:
    """Of Geng et al. five steps of 0.5, of Ramzi et al. a fallback above 1.3 times the gradient."""
    assert repr(Phantom()) == "Phantom(steps=5, damping=0.5)"
    assert repr(Shine()) == "Shine(fallback=1.3)"
