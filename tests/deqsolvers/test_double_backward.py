"""First, second and third derivatives of implicit layers by finite differences and unrolling."""

import contextlib
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.deqsolvers.maps import TanhMap, normal
from tests.deqsolvers.references import exact, unrolled


def layer_on_inputs(x: Tensor, weight: Tensor) -> Tensor:
    """The weight is shared by the batch, so f closes over it; x passes as an input."""
    return exact(lambda z, x: torch.tanh(z @ weight.T + x))(x)[0]


def layer_on_closure(x: Tensor, weight: Tensor) -> Tensor:
    """Nothing passes as an input; both tensors in the closure are computed from others."""
    derived, shift = 0.5 * torch.sin(weight), x.square()
    start = torch.zeros_like(x)
    deq = exact(lambda z: torch.tanh(z @ derived.T + shift), z0=lambda: start, drop_converged=False)
    return deq()[0]


def layer_on_both(x: Tensor, weight: Tensor) -> Tensor:
    """x is an input and in the closure, and an upstream of z's product too."""
    y = x.sin()
    z, _ = exact(lambda z, y: torch.tanh(z @ weight.T + y * x), drop_converged=False)(y)
    return z * y


def layer_twice(x: Tensor, weight: Tensor) -> Tensor:
    """One layer's output is another's input, with the same weight."""
    deq = exact(lambda z, x: torch.tanh(z @ weight.T + x))
    return deq(deq(x)[0])[0]


def layer_on_pairs(x: Tensor, weight: Tensor) -> Tensor:
    """A nested state and nested inputs."""

    def f(z: dict[str, Tensor], inputs: list[Tensor]) -> dict[str, Tensor]:
        return {
            "a": torch.tanh(z["b"] @ weight.T + inputs[0]),
            "b": torch.tanh(0.5 * z["a"] + inputs[1]),
        }

    zeros = torch.zeros_like(x)
    z, _ = exact(f, z0=lambda inputs: {"a": zeros, "b": zeros})([x, x.cos()])
    return z["a"] + z["b"].square()


LAYERS = [layer_on_inputs, layer_on_closure, layer_on_both, layer_twice, layer_on_pairs]
every_layer = pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.__name__)


def small_variables() -> tuple[Tensor, Tensor]:
    weight = normal(3, 3, seed=1)
    weight = 0.7 * weight / torch.linalg.matrix_norm(weight, 2)
    return normal(2, 3).requires_grad_(), weight.requires_grad_()


@every_layer
def test_gradcheck(layer: Callable[..., Tensor]) -> None:
    assert torch.autograd.gradcheck(layer, small_variables())


@every_layer
def test_a_pass_that_is_recorded_gives_the_same_gradients(layer: Callable[..., Tensor]) -> None:
    variables = small_variables()
    value = layer(*variables).square().sum()
    plain = torch.autograd.grad(value, variables, retain_graph=True)
    recorded = torch.autograd.grad(value, variables, create_graph=True)
    torch.testing.assert_close(recorded, plain, rtol=1e-8, atol=1e-10)


@every_layer
def test_gradgradcheck(layer: Callable[..., Tensor]) -> None:
    assert torch.autograd.gradgradcheck(layer, small_variables())


def test_third_derivative() -> None:
    """z = tanh(w z + x): compare with the derivatives of a long unrolled iteration."""
    found: list[Any] = []
    expected: list[Any] = []
    for kind, results in (("implicit", found), ("unrolled", expected)):
        x = torch.tensor([[0.3], [-0.8]], dtype=torch.float64, requires_grad=True)
        w = torch.tensor(0.6, dtype=torch.float64, requires_grad=True)

        def f(z: Tensor, x: Tensor, w: Tensor = w) -> Tensor:
            return torch.tanh(w * z + x)

        z = exact(f)(x)[0] if kind == "implicit" else unrolled(f, torch.zeros_like(x), x)
        value = z.sum()
        for _ in range(3):
            by_x, by_w = torch.autograd.grad(value, (x, w), create_graph=True)
            results.append((by_x.detach(), by_w.detach()))
            value = by_x.sum() + by_w
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


def test_third_derivative_by_a_computed_tensor_is_an_error_whose_remedies_work() -> None:
    layer = exact(lambda z, x: torch.tanh(0.5 * z + x))

    def derivative(x: Tensor, target: Tensor) -> Tensor:
        value = layer(x)[0].sum()
        for _ in range(3):
            (value,) = torch.autograd.grad(value.sum(), target, create_graph=True)
        return value.detach()

    source = normal(2, 3).requires_grad_()
    x = 1 * source
    with pytest.raises(RuntimeError, match="third and higher derivatives with respect to leaf"):
        derivative(x, x)
    leaf = x.detach().requires_grad_()
    torch.testing.assert_close(derivative(leaf, leaf), derivative(x, source))
    value = unrolled(lambda z, x: torch.tanh(0.5 * z + x), torch.zeros_like(leaf), leaf)
    for _ in range(3):
        (value,) = torch.autograd.grad(value.sum(), leaf, create_graph=True)
    torch.testing.assert_close(derivative(leaf, leaf), value.detach(), rtol=1e-6, atol=1e-8)


def test_gradient_penalty_trains_the_parameters_of_a_module() -> None:
    f, x = TanhMap(5, norm=0.7), normal(3, 5, seed=7).requires_grad_()
    found: list[Any] = []
    expected: list[Any] = []
    for kind, results in (("implicit", found), ("unrolled", expected)):
        z = exact(f)(x)[0] if kind == "implicit" else unrolled(f, torch.zeros_like(x), x)
        (slope,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        results.extend(torch.autograd.grad(slope.square().sum(), [x, *f.parameters()]))
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-10)


COMPUTED = [lambda source: 2 * source, lambda source: (2 * source).sin()]


@pytest.mark.parametrize("compute", COMPUTED, ids=["beside a leaf", "further away"])
@pytest.mark.parametrize("create_graph", [False, True])
def test_gradient_of_a_computed_tensor_in_the_closure(
    create_graph: bool, compute: Callable[[Tensor], Tensor]
) -> None:
    """Features from an encoder that f closes over are no leaves, and still have a gradient."""
    weight = small_variables()[1].detach()
    source = normal(2, 3).requires_grad_()
    features = compute(source)

    def f(z: Tensor) -> Tensor:
        return torch.tanh(z @ weight.T + features)

    z, _ = exact(f, z0=lambda: torch.zeros_like(source), drop_converged=False)()
    reference = unrolled(f, torch.zeros_like(source))
    if create_graph:
        with pytest.raises(RuntimeError, match="pass that tensor to the DEQ as an input"):
            torch.autograd.grad(z.sum() + features.sum(), features, create_graph=True)
    for target in (source,) if create_graph else (features, source):
        (found,) = torch.autograd.grad(
            z.sum(), target, create_graph=create_graph, retain_graph=True
        )
        (expected,) = torch.autograd.grad(reference.sum(), target, retain_graph=True)
        torch.testing.assert_close(found, expected, rtol=1e-8, atol=1e-10)


def test_a_computed_tensor_that_all_samples_share_passes_expanded() -> None:
    """As an input of every sample; both errors on the way there name it."""
    start, source = small_variables()

    def penalty(solve: Callable[[Tensor, Tensor], Tensor], by: str = "weight") -> Any:
        weight = source.sin() / 2
        z = solve(start, weight)
        target = {"weight": weight, "source": source}[by]
        (slope,) = torch.autograd.grad(z.square().sum(), target, create_graph=True)
        return slope, *torch.autograd.grad(slope.square().sum(), (start, source))

    def closed_over(x: Tensor, weight: Tensor) -> Tensor:
        return exact(lambda z, x: torch.tanh(z @ weight.T + x))(x)[0]

    def shared(x: Tensor, weight: Tensor) -> Tensor:
        return exact(lambda z, x, weight: torch.tanh(z @ weight.T + x))(x, weight)[0]

    def f(z: Tensor, x: Tensor, weight: Tensor) -> Tensor:
        return torch.tanh(torch.bmm(weight, z.unsqueeze(2)).squeeze(2) + x)

    def expanded(x: Tensor, weight: Tensor) -> Tensor:
        return exact(f)(x, weight.expand(len(x), *weight.shape))[0]

    def reference(x: Tensor, weight: Tensor) -> Tensor:
        return unrolled(f, torch.zeros_like(x), x, weight.expand(len(x), *weight.shape))

    with pytest.raises(RuntimeError, match=r"as an input of f.*w\.expand\(B, \*w\.shape\)"):
        penalty(closed_over)
    with pytest.raises(ValueError, match=r"let f close over it or.*w\.expand\(B, \*w\.shape\)"):
        penalty(shared)
    for by in ("weight", "source"):
        found, expected = penalty(expanded, by), penalty(reference, by)
        torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("compute", COMPUTED, ids=["beside a leaf", "further away"])
def test_gradient_penalty_on_a_computed_input(compute: Callable[[Tensor], Tensor]) -> None:
    f, source = TanhMap(5, norm=0.7), normal(3, 5, seed=7).requires_grad_()
    results = []
    for kind in ("implicit", "unrolled"):
        x = compute(source)
        z = exact(f)(x)[0] if kind == "implicit" else unrolled(f, torch.zeros_like(x), x)
        for targets in ([x], [x, source]):
            slopes = torch.autograd.grad(z.square().sum(), targets, create_graph=True)
            penalty = sum(slope.square().sum() for slope in slopes)
            second = torch.autograd.grad(penalty, [x, source, *f.parameters()], retain_graph=True)
            results.append([*slopes, *second])
    torch.testing.assert_close(results[:2], results[2:], rtol=1e-7, atol=1e-9)


def test_parameters_that_were_replaced_since_the_forward_pass_do_not_count() -> None:
    f, x = TanhMap(5, norm=0.7), normal(3, 5, seed=7).requires_grad_()
    z, _ = exact(f)(x)
    mine = [x, *f.parameters()]
    plain = torch.autograd.grad(z.square().sum(), mine, retain_graph=True)
    replacement = torch.nn.Parameter(torch.zeros_like(f.weight))
    f.weight = replacement
    recorded = torch.autograd.grad(z.square().sum(), mine, create_graph=True)
    torch.testing.assert_close(recorded, plain, rtol=1e-8, atol=1e-10)
    assert f.weight is replacement


def test_parameters_that_changed_in_place_are_an_error_of_torch() -> None:
    f, x = TanhMap(5, norm=0.7), normal(3, 5, seed=7).requires_grad_()
    z, _ = exact(f)(x)
    torch.nn.init.zeros_(f.weight)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


def test_a_buffer_that_f_replaces_does_not_count_twice() -> None:
    class Counting(TanhMap):
        def __init__(self) -> None:
            super().__init__(5, norm=0.7)
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, z: Tensor, x: Tensor) -> Tensor:
            self.calls = self.calls + 1
            return super().forward(z, x)

    f, x = Counting(), normal(3, 5, seed=7).requires_grad_()
    z, solution = exact(f)(x)
    assert f.calls == solution.calls + 1
    results = [
        torch.autograd.grad(z.square().sum(), x, create_graph=create_graph, retain_graph=True)
        for create_graph in (False, True, True)
    ]
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)
    torch.testing.assert_close(results[2], results[0], rtol=1e-8, atol=1e-10)
    assert f.calls == solution.calls + 1


@pytest.mark.parametrize("change", ["another", "frozen", "fewer"])
def test_an_f_that_depends_on_other_leaves_by_then_is_refused(change: str) -> None:
    used = [small_variables()[1], small_variables()[1]]
    x = normal(2, 3).requires_grad_()
    z, _ = exact(lambda z, x: torch.tanh(sum(z @ weight.T for weight in used) / 2 + x))(x)
    if change == "another":
        used[1] = small_variables()[1]
    elif change == "frozen":
        used[1].requires_grad_(False)
    else:
        used.pop()
    with pytest.raises(RuntimeError, match="no longer depends on the same parameters"):
        torch.autograd.grad(z.sum(), x, create_graph=True)


def test_saved_tensors_may_be_packed_away() -> None:
    f, x = TanhMap(5, norm=0.7), normal(3, 5, seed=7).requires_grad_()
    results = []
    for pack in (False, True):
        hooks = torch.autograd.graph.saved_tensors_hooks(
            lambda t: t.numpy(force=True), torch.tensor
        )
        with hooks if pack else contextlib.nullcontext():
            z, _ = exact(f)(x)
            (slope,) = torch.autograd.grad(z.square().sum(), x, create_graph=True)
        results.append(torch.autograd.grad(slope.square().sum(), [x, *f.parameters()]))
    torch.testing.assert_close(results[1], results[0], rtol=1e-8, atol=1e-10)
