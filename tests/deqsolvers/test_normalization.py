"""Parametrized weights are computed once per solve, and their gradients are right."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from deqsolvers import DEQ, Broyden, Implicit, Picard, cached_weights, fixed_point
from deqsolvers.modules import modules_of
from tests.problems import normal

EXACT: dict[str, Any] = {
    "tol": 1e-12,
    "max_steps": 400,
    "backward": Implicit(tol=1e-10, max_steps=400),
}


class Layer(nn.Module):
    """``tanh(0.5 A z + x)`` with the norm of A at most about 1."""

    def __init__(self, seed: int = 0):
        super().__init__()
        self.linear = nn.Linear(5, 5, dtype=torch.float64)
        weight = normal(5, 5, seed=seed)
        self.linear.weight.data = weight / torch.linalg.matrix_norm(weight, 2)
        self.linear.bias.data = normal(5, seed=seed + 1)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(0.5 * self.linear(z) + x)


class Counting(nn.Module):
    """The identity, with a count of how often it was computed."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def forward(self, weight: Tensor) -> Tensor:
        self.calls += 1
        return weight


def by_hand(f: Layer, weight: Tensor, x: Tensor) -> Tensor:
    """The fixed point with this weight by plain, recorded iteration."""
    z = torch.zeros_like(x)
    for _ in range(60):
        z = torch.tanh(0.5 * (z @ weight.T + f.linear.bias) + x)
    return z


def behind_weight(f: Layer) -> Any:
    """The parametrization of the weight, which also holds the parameters that it is made of."""
    return f.linear.parametrizations["weight"]  # type: ignore[index]


def normalised(name: str) -> Layer:
    f = Layer()
    getattr(parametrizations, name)(f.linear)
    return f.eval()


@pytest.mark.parametrize("options", [{}, {"solver": Picard(), "backward": "unrolled"}])
@pytest.mark.parametrize("name", ["weight_norm", "spectral_norm"])
def test_gradients_of_the_parameters_behind_the_weight(name: str, options: dict[str, Any]) -> None:
    f, x = normalised(name), normal(3, 5, seed=1)
    parameters = list(f.parameters())
    assert len(parameters) == (3 if name == "weight_norm" else 2)
    expected = torch.autograd.grad(by_hand(f, f.linear.weight, x).square().sum(), parameters)
    z, _ = DEQ(f, **{**EXACT, **options})(x)
    found = torch.autograd.grad(z.square().sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_an_outer_cache_of_torch_does_not_lose_gradients() -> None:
    """`parametrize.cached` alone would keep the unrecorded weight of the solve."""
    f, x = normalised("weight_norm"), normal(3, 5, seed=1)
    parameters = list(f.parameters())
    expected = torch.autograd.grad(by_hand(f, f.linear.weight, x).square().sum(), parameters)
    with parametrize.cached():
        z, _ = DEQ(f, **EXACT)(x)
    found = torch.autograd.grad(z.square().sum(), parameters)
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)


def test_a_solve_computes_each_weight_once() -> None:
    f, counting, x = Layer(), Counting(), normal(3, 5)
    parametrize.register_parametrization(f.linear, "weight", counting)
    deq = DEQ(f, Picard(), **EXACT)
    for call in (deq, deq.solve, lambda x: fixed_point(f, torch.zeros_like(x), (x,))):
        counting.calls = 0
        call(x)
        assert counting.calls == 1
    counting.calls = 0
    with cached_weights(f):
        z, _ = deq(x)
        f(z, x)
        deq(x)
    assert counting.calls == 1


def test_spectral_norm_improves_its_estimate_once_per_solve() -> None:
    f, x = Layer(), normal(3, 5)
    f.linear.weight.data = 3 * normal(5, 5, seed=4)
    parametrizations.spectral_norm(f.linear)
    norm = behind_weight(f)[0]
    norm._u, norm._v = (nn.functional.normalize(normal(5, seed=s), dim=0) for s in (8, 9))
    weight = behind_weight(f).original.detach()
    u = nn.functional.normalize(weight @ norm._v, dim=0)
    v = nn.functional.normalize(weight.T @ u, dim=0)
    z, solution = DEQ(f, **EXACT)(x)
    torch.testing.assert_close((norm._u, norm._v), (u, v))
    assert bool(solution.converged.all())
    torch.testing.assert_close(z, by_hand(f, weight / (u @ weight @ v), x))


def test_a_solve_sees_parameters_that_changed_since_the_last_one() -> None:
    f, x = normalised("weight_norm"), normal(3, 5)
    deq = DEQ(f, **EXACT)
    deq(x)
    with torch.no_grad():
        behind_weight(f).original0.mul_(0.5)
    torch.testing.assert_close(deq(x)[0], by_hand(f, f.linear.weight, x))


def test_nothing_stays_cached_after_an_error() -> None:
    f, counting = Layer(), Counting()
    parametrize.register_parametrization(f.linear, "weight", counting)
    with pytest.raises(RuntimeError):
        DEQ(f)(normal(3, 4))  # of a wrong width
    counting.calls = 0
    f.linear.weight, f.linear.weight  # noqa: B018
    assert counting.calls == 2


class Plain:
    """Not a module, but it holds one."""

    def __init__(self, f: Layer):
        self.f = f

    def __call__(self, z: Tensor, x: Tensor) -> Tensor:
        return self.f(z, x)


def of_its_file(z: Tensor, x: Tensor) -> Tensor:
    return LAYER_OF_THIS_FILE(z, x)


LAYER_OF_THIS_FILE = Layer()
WRAPPERS: dict[str, Callable[[Layer], Callable[..., Tensor]]] = {
    "a closure": lambda f: lambda z, x: f(z, x),
    "a closure over a closure": lambda f: (lambda g: lambda z, x: g(z, x))(lambda z, x: f(z, x)),
    "a default": lambda f: lambda z, x, f=f: f(z, x),
    "a keyword's default": lambda f: lambda z, x, *, f=f: f(z, x),
    "a bound method": lambda f: f.forward,
    "a bound method of a plain object": lambda f: Plain(f).__call__,
    "a plain object": lambda f: Plain(f),
    "a partial": lambda f: partial(lambda f, z, x: f(z, x), f),
    "a partial's keyword": lambda f: partial(lambda z, x, f: f(z, x), f=f),
    "a compiled function": lambda f: torch.compile(lambda z, x: f(z, x), backend="eager"),
    "a decorated function": lambda f: torch.autocast("cpu", enabled=False)(lambda z, x: f(z, x)),
}
wrapped = pytest.mark.parametrize("wrap", WRAPPERS.values(), ids=WRAPPERS)


@wrapped
def test_the_modules_behind_a_function(wrap: Callable[[Layer], Callable[..., Tensor]]) -> None:
    f = Layer()
    assert modules_of(wrap(f)) == [f]


def test_the_modules_of_a_file() -> None:
    assert modules_of(of_its_file) == [LAYER_OF_THIS_FILE]
    assert modules_of(lambda z, x: of_its_file(z, x)) == [LAYER_OF_THIS_FILE]
    in_one = lambda z, x: sum(LAYER_OF_THIS_FILE(z, x) for _ in range(1))  # noqa: E731
    assert modules_of(in_one) == [LAYER_OF_THIS_FILE]


def test_functions_without_modules() -> None:
    functional = nn.functional
    assert modules_of(torch.tanh) == []
    assert modules_of(lambda z, x: functional.relu(z) + set_later(z, x)) == []
    set_later = Layer()


@pytest.mark.parametrize("options", [{}, {"solver": Picard(), "backward": "unrolled"}])
@wrapped
def test_a_function_sees_one_weight_in_a_solve(
    wrap: Callable[[Layer], Callable[..., Tensor]], options: dict[str, Any]
) -> None:
    """In training mode spectral_norm changes the weight at every access."""
    x, found = normal(3, 5), []
    for of in (lambda f: f, wrap):
        f = Layer()
        f.linear.weight.data = 3 * normal(5, 5, seed=4)
        torch.manual_seed(0)
        parametrizations.spectral_norm(f.linear, n_power_iterations=1)
        norm = behind_weight(f)[0]
        norm._u, norm._v = (nn.functional.normalize(normal(5, seed=s), dim=0) for s in (8, 9))
        z, solution = DEQ(of(f), **{**EXACT, **options})(x)
        assert bool(solution.converged.all())
        found.append([z, *torch.autograd.grad(z.square().sum(), list(f.parameters())), norm._u])
    torch.testing.assert_close(found[1], found[0], rtol=0, atol=0)


@pytest.mark.parametrize("backward", ["implicit", "phantom", "jacobian-free", "shine"])
def test_weights_that_are_not_found_keep_their_gradients(backward: str) -> None:
    """torch caches every module's weights in the block, and the solve comes first."""
    one, other, x = normalised("weight_norm"), normalised("weight_norm"), normal(3, 5)
    hidden = [other]
    deq = DEQ(lambda z, x: one(z, x) + 0.1 * hidden[0](z, x), Broyden(), backward=backward)
    z, _ = deq(x)
    for f in (one, other):
        for gradient in torch.autograd.grad(z.sum(), list(f.parameters()), retain_graph=True):
            assert bool((gradient != 0).any())


def test_the_second_derivative_of_a_normalised_layer() -> None:
    f, x = normalised("spectral_norm"), normal(1, 5)
    weight = behind_weight(f).original

    def curvature(z: Tensor) -> Tensor:
        (first,) = torch.autograd.grad(z.square().sum(), weight, create_graph=True)
        (second,) = torch.autograd.grad(first.square().sum(), weight)
        return second

    expected = curvature(by_hand(f, f.linear.weight, x))
    found = curvature(DEQ(f, **EXACT)(x)[0])
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)
