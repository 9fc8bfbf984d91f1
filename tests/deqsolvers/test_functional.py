"""torch.func and forward-mode differentiation over the layer."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.func import functional_call, grad, hessian, jacfwd, jacrev, jvp, vjp, vmap
from torch.nn.utils import parametrizations

from deqsolvers import (
    DEQ,
    Anderson,
    AndersonTypeI,
    Broyden,
    ConvergenceWarning,
    Implicit,
    NewtonKrylov,
    Picard,
    Solver,
    Status,
    fixed_point,
)
from tests.deqsolvers.maps import TanhMap, normal
from tests.deqsolvers.references import exact, unrolled

SOLVERS: list[Solver] = [Picard(), Anderson(), AndersonTypeI(), Broyden(), NewtonKrylov()]
X = normal(3, 5, seed=7)


def layer(backward: Any = "implicit", **options: Any) -> DEQ:
    if backward == "implicit":
        return exact(TanhMap(5, norm=0.8), **options)
    return DEQ(TanhMap(5, norm=0.8), backward=backward, tol=1e-12, max_steps=200, **options)


def jacobian(deq: DEQ) -> Tensor:
    """(3, 5, 3, 5), by recording plain iteration."""
    return torch.autograd.functional.jacobian(
        lambda x: unrolled(deq.f, torch.zeros_like(x), x, steps=200), X
    )


@pytest.mark.parametrize("transform", [jacrev, jacfwd])
@pytest.mark.parametrize("backward", ["implicit", "unrolled"])
def test_jacobians(transform: Callable[..., Any], backward: str) -> None:
    deq = layer(backward)
    found = transform(lambda x: deq(x)[0])(X)
    torch.testing.assert_close(found, jacobian(deq), rtol=1e-7, atol=1e-9)


def test_vector_jacobian_products_of_inputs_and_parameters() -> None:
    deq, v = layer(), normal(3, 5, seed=1)
    parameters = dict(deq.named_parameters())

    def call(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(deq, parameters, (x,))[0]

    z, pull = vjp(call, parameters, X)
    found, at_x = pull(v)
    x = X.clone().requires_grad_()
    expected = torch.autograd.grad(deq(x)[0], (x, *parameters.values()), v)
    torch.testing.assert_close(z, deq(X)[0])
    torch.testing.assert_close([at_x, *found.values()], list(expected), rtol=1e-8, atol=1e-10)


@pytest.mark.parametrize("recording", [True, False])
def test_jacobian_vector_products_in_both_forms(recording: bool) -> None:
    deq, tangent = layer(), normal(3, 5, seed=2)
    expected = torch.einsum("bixy,xy->bi", jacobian(deq), tangent)
    with torch.set_grad_enabled(recording):
        _, found = jvp(lambda x: deq(x)[0], (X,), (tangent,))
        with forward_ad.dual_level():
            z, _ = deq(forward_ad.make_dual(X, tangent))
            also = forward_ad.unpack_dual(z).tangent
    torch.testing.assert_close(found, expected, rtol=1e-7, atol=1e-9)
    torch.testing.assert_close(also, expected, rtol=1e-7, atol=1e-9)


@pytest.mark.parametrize("solver", [Anderson(memory=8), AndersonTypeI(memory=8), Broyden(30)])
def test_gradcheck_of_forward_and_reverse_mode(solver: Solver) -> None:
    """Finite differences against jvp, and against the vjp of torch.func in place of autograd's."""
    deq = exact(TanhMap(3, norm=0.8), solver)
    names = [name for name, _ in deq.named_parameters()]

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(deq, dict(zip(names, weights, strict=True)), (x,))[0]

    class ByFunc(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *args: Tensor) -> Tensor:
            ctx.save_for_backward(*args)
            return call(*args)

        @staticmethod
        def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
            pulled: tuple[Tensor, ...] = vjp(call, *(t.detach() for t in ctx.saved_tensors))[1](
                grads[0]
            )
            return pulled

    args = (
        X[:2, :3].clone().requires_grad_(),
        *(p.detach().requires_grad_() for p in deq.parameters()),
    )
    assert torch.autograd.gradcheck(call, args, check_forward_ad=True)
    assert torch.autograd.gradcheck(ByFunc.apply, args)


@pytest.mark.parametrize("backward", ["implicit", "phantom", "unrolled"])
def test_a_lost_sample_is_no_other_sample_in_forward_mode(backward: str) -> None:
    deq, x = layer(backward), X.clone()
    x[1] = torch.nan
    with forward_ad.dual_level():
        z, solution = deq(forward_ad.make_dual(x, torch.ones_like(x)))
        primal, tangent = forward_ad.unpack_dual(z)
        alone = deq(forward_ad.make_dual(X[[0, 2]], torch.ones_like(X[[0, 2]])))[0]
        expected = forward_ad.unpack_dual(alone)
    assert solution.status[1] == Status.NON_FINITE
    torch.testing.assert_close(primal[[0, 2]], expected.primal)
    torch.testing.assert_close(tangent[[0, 2]], expected.tangent)
    if backward != "unrolled":
        assert bool((primal[1] == 0).all())  # where the solve began
        assert bool((tangent[1] == 0).all())


def test_a_complex_state_has_tangents() -> None:
    matrix = 0.5 * torch.complex(normal(4, 4), normal(4, 4, seed=1)) / 4
    b = torch.complex(normal(2, 4, seed=2), normal(2, 4, seed=3))
    deq = exact(lambda z, b: z @ matrix.T + b)
    _, found = jvp(lambda b: deq(b)[0], (b,), (b.conj(),))
    system = torch.eye(4) - matrix
    torch.testing.assert_close(found, torch.linalg.solve(system, b.conj().T).T)


def test_gradients_of_each_sample() -> None:
    deq = layer()
    parameters = dict(deq.named_parameters())

    def loss(parameters: dict[str, Tensor], x: Tensor) -> Tensor:
        return functional_call(deq, parameters, (x.unsqueeze(0),))[0].square().sum()

    found = vmap(grad(loss), (None, 0))(parameters, X)
    for row in range(len(X)):
        expected = torch.autograd.grad(
            deq(X[row : row + 1])[0].square().sum(), list(parameters.values())
        )
        mine = [found[name][row] for name in parameters]
        torch.testing.assert_close(mine, list(expected), rtol=1e-7, atol=1e-9)


class Model(nn.Module):
    """A layer whose f is a module, or a function that calls one of this model's; with a buffer."""

    def __init__(self, kind: str = "module", backward: Any = "implicit"):
        super().__init__()
        cell = TanhMap(5, norm=0.8)
        bias = cell.bias.detach()
        del cell.bias
        cell.register_buffer("bias", bias)
        if kind == "weight_norm":
            parametrizations.weight_norm(cell)
        functions = {
            "bound method": cell.forward,
            "method of the model": self.step,
            "closure": lambda z, x: self.cell(z, x),
        }
        f = functions.get(kind, cell)
        if backward == "implicit":
            self.layer = exact(f)
        else:
            self.layer = DEQ(f, Broyden(30), backward=backward, tol=1e-12, max_steps=50)
        if kind in functions:  # else the layer has it
            self.cell = cell

    def step(self, z: Tensor, x: Tensor) -> Tensor:
        return self.cell(z, x)

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)[0]


KINDS = ["module", "bound method", "method of the model", "closure", "weight_norm"]
FAMILY = ["implicit", "phantom", "jacobian-free", "unrolled"]
cases = [("implicit", kind) for kind in KINDS] + [(name, "closure") for name in FAMILY[1:]]


def tensors(model: Model) -> dict[str, Tensor]:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


@pytest.mark.parametrize(("backward", "kind"), cases)
def test_a_functional_call_has_the_derivatives_of_what_it_was_lent(
    backward: str, kind: str
) -> None:
    """A recorded pass evaluates f when the module has its own parameters back."""
    model, owner = Model(kind, backward), Model(kind, backward)
    mine, x = tensors(model), X.clone().requires_grad_()
    lent = {name: (0.6 * value.detach()).requires_grad_() for name, value in mine.items()}
    owner.load_state_dict(lent)
    owned = {name: value.requires_grad_() for name, value in tensors(owner).items()}
    results = []
    for z, given in ((functional_call(model, lent, (x,)), lent), (owner(x), owned)):
        targets = [x, *given.values()]
        first = torch.autograd.grad(z.square().sum(), targets, retain_graph=True)
        recorded = torch.autograd.grad(z.square().sum(), targets, create_graph=True)
        torch.testing.assert_close(first, recorded, rtol=1e-7, atol=1e-9)
        second = torch.autograd.grad(sum(part.square().sum() for part in recorded), targets)
        results.append((first, second))
    torch.testing.assert_close(results[0], results[1], rtol=1e-7, atol=1e-9)
    assert all(value is mine[name] for name, value in tensors(model).items())


def test_shine_has_the_gradient_of_what_the_module_was_lent() -> None:
    model, x = Model("closure", "shine"), X.clone().requires_grad_()
    lent = {name: 0.6 * value.detach() for name, value in tensors(model).items()}
    owner = Model("closure", "shine")
    owner.load_state_dict(lent)
    found = [functional_call(model, lent, (x,)), owner(x)]
    slopes = [torch.autograd.grad(z.square().sum(), x)[0] for z in found]
    torch.testing.assert_close(slopes[0], slopes[1], rtol=1e-9, atol=1e-12)


def test_second_derivatives_of_a_functional_call_by_finite_differences() -> None:
    deq = exact(TanhMap(3, norm=0.8))
    names = [name for name, _ in deq.named_parameters()]

    def call(x: Tensor, *weights: Tensor) -> Tensor:
        return functional_call(deq, dict(zip(names, weights, strict=True)), (x,))[0]

    weights = [0.5 * parameter.detach() for parameter in deq.parameters()]
    args = [X[:2, :3].clone(), *weights]
    assert torch.autograd.gradgradcheck(call, [arg.requires_grad_() for arg in args])


def test_an_inner_step_of_training_is_differentiated() -> None:
    """The step's result is lent to the layer, and its own gradient leads to the parameters."""
    results = []
    for backward in ("implicit", "unrolled"):
        deq = layer(backward)
        mine = dict(deq.named_parameters())
        loss = deq(X)[0].square().sum()
        slopes = torch.autograd.grad(loss, list(mine.values()), create_graph=True)
        stepped = {
            name: value - 0.1 * slope
            for (name, value), slope in zip(mine.items(), slopes, strict=True)
        }
        again = functional_call(deq, stepped, (X,))[0].square().sum()
        results.append(torch.autograd.grad(again, list(mine.values()), create_graph=True))
    torch.testing.assert_close(results[0], results[1], rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
@pytest.mark.parametrize("in_dim", [0, 1, 2])
def test_a_mapped_solve_is_the_solve_of_each_part(solver: Solver, in_dim: int) -> None:
    f = TanhMap(5, norm=0.8)
    parts = torch.stack([X, 3 * X, 0.01 * X])

    def solve(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        found = fixed_point(f, torch.zeros_like(x), (x,), solver=solver, tol=1e-9, max_steps=80)
        return found.z, found.status, found.steps

    found = vmap(solve, in_dims=in_dim)(parts.movedim(0, in_dim))
    z, status, steps = zip(*(solve(part) for part in parts), strict=True)
    assert (found[1] == Status.CONVERGED).all()
    assert torch.equal(found[1], torch.stack(status))
    assert torch.equal(found[2], torch.stack(steps))
    torch.testing.assert_close(found[0], torch.stack(z), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "transform",
    [
        hessian,
        lambda loss: jacrev(jacrev(loss)),
        lambda loss: jacrev(jacfwd(loss)),
        lambda loss: jacfwd(jacfwd(loss)),
    ],
)
def test_second_derivatives_are_refused_with_a_remedy(transform: Callable[..., Any]) -> None:
    deq = layer()
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        transform(lambda x: deq(x)[0].square().sum())(X)


def test_the_remedies_work() -> None:
    loss = lambda deq: lambda x: deq(x)[0].square().sum()  # noqa: E731
    found = hessian(loss(layer("unrolled")))(X)
    expected = torch.autograd.functional.hessian(loss(layer()), X)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_a_second_derivative_by_ordinary_autograd_is_refused_too(weight: float) -> None:
    """With a weight of 0 the loss is linear and no gradient reaches the product by itself."""
    deq, x = layer(), X.clone().requires_grad_()
    first = grad(lambda x: (deq(x)[0] + weight * deq(x)[0].square()).sum())(x)
    with pytest.raises(NotImplementedError, match="create_graph=True"):
        first.sum().backward()


def test_differentiating_a_mapped_layer_from_outside_is_refused() -> None:
    deq = layer()
    mapped = vmap(lambda x: deq(x.unsqueeze(0))[0])
    torch.testing.assert_close(mapped(X).squeeze(1), deq(X)[0])
    with pytest.raises(NotImplementedError, match="Fold the mapped dimension"):
        grad(lambda x: mapped(x).sum())(X)
    with pytest.raises(NotImplementedError, match="Fold the mapped dimension"):
        mapped(X).sum().backward()


@pytest.mark.parametrize("backward", ["phantom", "jacobian-free", "unrolled"])
def test_several_gradients_at_once(backward: str) -> None:
    deq = layer(backward)
    found = torch.autograd.functional.jacobian(lambda x: deq(x)[0], X, vectorize=True)
    torch.testing.assert_close(
        found, torch.autograd.functional.jacobian(lambda x: deq(x)[0], X), rtol=1e-10, atol=1e-12
    )


@pytest.mark.parametrize("backward", ["implicit", "shine"])
def test_several_gradients_at_once_are_refused_where_each_is_solved_for(backward: str) -> None:
    deq = layer(backward).with_solver(Broyden())
    with pytest.raises(NotImplementedError, match=r"one by one \(vectorize=False\).*jacrev"):
        torch.autograd.functional.jacobian(lambda x: deq(x)[0], X, vectorize=True)
    x = X.clone().requires_grad_()
    with pytest.raises(NotImplementedError, match="is_grads_batched"):
        torch.autograd.grad(deq(x)[0], x, torch.ones(2, 3, 5).double(), is_grads_batched=True)


def test_shine_says_that_it_cannot() -> None:
    deq = layer("shine").with_solver(Broyden())
    with pytest.raises(NotImplementedError, match="Shine knows neither"):
        jacrev(lambda x: deq(x)[0])(X)


@pytest.mark.parametrize("transform", [grad, lambda loss: lambda x: jvp(loss, (x,), (x,))])
def test_a_failed_solve_is_visible(transform: Callable[..., Any]) -> None:
    deq = layer().with_solver(Anderson(), backward=Implicit(tol=1e-12, max_steps=2))
    with pytest.warns(ConvergenceWarning, match="STEP_LIMIT: "):
        transform(lambda x: deq(x)[0].sum())(X)


def test_a_failed_mapped_solve_raises_where_asked() -> None:
    deq = layer(max_steps=2, raise_on_failure=True)
    with pytest.raises(RuntimeError, match="6 of 6 STEP_LIMIT"):
        vmap(lambda x: deq(x)[0])(torch.stack([X, 2 * X]))
