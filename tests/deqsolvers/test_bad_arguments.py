"""What is said to arguments that cannot work, and that nothing is silently wrong."""

import re
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from deqsolvers import (
    DEQ,
    Anderson,
    AndersonTypeI,
    Broyden,
    ConvergenceError,
    NewtonKrylov,
    Picard,
    Solver,
    fixed_point,
)


def half(z: Tensor, *inputs: Any) -> Tensor:
    return 0.5 * z + 1


@pytest.mark.parametrize(
    ("z0", "error", "message"),
    [
        (torch.tensor(1.0), ValueError, "without dimensions.*use .reshape"),
        (torch.zeros(2, 3, dtype=torch.int64), TypeError, "dtype torch.int64.*float32.*.float()"),
        (torch.zeros(2, 3, dtype=torch.bool), TypeError, "dtype torch.bool"),
        (np.zeros((2, 3)), TypeError, "it holds a ndarray"),
        ((torch.zeros(2, 3), None), TypeError, "it holds a NoneType"),
        ({}, ValueError, "z0 holds no tensor"),
        ((torch.zeros(2, 3), torch.zeros(4, 3)), ValueError, r"different batch sizes: \[2, 4\]"),
        (
            (torch.zeros(2, 3), torch.zeros(2, 3, device="meta")),
            ValueError,
            "different devices",
        ),
    ],
    ids=["0-d", "integer", "bool", "numpy", "None", "empty", "batch sizes", "devices"],
)
def test_bad_initial_states(z0: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message) as caught:
        fixed_point(half, z0)
    assert "z0" in str(caught.value)


@pytest.mark.parametrize(
    ("returned", "message"),
    [
        (torch.zeros(2, 4), r"f must return the shape of z0, \(2, 3\); got \(2, 4\)"),
        (torch.zeros(3), r"\(2, 3\); got \(3,\)"),
        (torch.zeros(1, 3), r"\(2, 3\); got \(1, 3\)"),
        (torch.tensor(0.0), r"\(2, 3\); got \(\)"),
        (None, r"\(2, 3\); got NoneType"),
        (3.0, r"\(2, 3\); got float"),
        ((torch.zeros(2, 3), {}), "f must return .* of z0.*; got .*tuple"),
        ([torch.zeros(2, 3)], "f must return .* of z0.*; got .*list"),
        (torch.zeros(2, 3, dtype=torch.complex64), "f returned torch.complex64 for a state of"),
        (torch.zeros(2, 3, device="meta"), "f returned a tensor on meta for a state on cpu"),
    ],
    ids=["wider", "1-d", "one row", "0-d", "None", "number", "pair", "list", "complex", "device"],
)
def test_bad_values_of_f(returned: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixed_point(lambda z: returned, torch.zeros(2, 3))


@pytest.mark.parametrize("inference", [False, True])
@pytest.mark.parametrize("shape", [(2, 3), (2, 3, 4)])
def test_a_map_that_works_in_place_is_refused(shape: tuple[int, ...], inference: bool) -> None:
    """Taken at its word, every residual would be zero."""
    with (
        torch.inference_mode(inference),
        pytest.raises(ValueError, match="f changed its argument z in place"),
    ):
        fixed_point(lambda z: z.mul_(0.5).add_(1), torch.zeros(shape))


def test_a_map_that_works_in_place_on_one_of_two_tensors_is_refused() -> None:
    with pytest.raises(ValueError, match="in place"):
        fixed_point(lambda z: (z[0] * 0.5, z[1].relu_()), (torch.ones(2, 3), torch.ones(2, 4)))


def test_a_refused_in_place_map_leaves_the_callers_state_alone() -> None:
    z0 = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="in place"):
        fixed_point(lambda z: z.add_(1), z0)
    assert torch.equal(z0, torch.zeros(2, 3))


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (torch.tensor(2.0), r"shape \(\); its first dimension must be the batch, 2"),
        (torch.zeros(3, 2), r"shape \(3, 2\); its first dimension must be the batch, 2"),
        ({"deep": [torch.zeros(1, 5)]}, r"shape \(1, 5\).*let f close over"),
    ],
)
def test_inputs_must_be_batch_first(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fixed_point(half, torch.zeros(2, 3), (value,))


@pytest.mark.parametrize(
    "solver", [Picard(), Anderson(), AndersonTypeI(), Broyden(), NewtonKrylov()], ids=repr
)
def test_a_map_that_closes_over_a_tensor_of_the_batch_is_told_so(solver: Solver) -> None:
    """When one sample is left, its state broadcasts against the tensor of the whole batch."""
    rates, shift = torch.tensor([[0.9], [0.1]]), torch.arange(1.0, 7.0).reshape(2, 3)

    def f(z: Tensor) -> Tensor:
        return rates * torch.tanh(z) + shift

    with pytest.raises(ValueError, match=r"drop_converged=False"):
        fixed_point(f, torch.zeros(2, 3), solver=solver)
    solution = fixed_point(f, torch.zeros(2, 3), solver=solver, drop_converged=False)
    assert solution.converged.all()


def test_inputs_must_be_a_tuple() -> None:
    with pytest.raises(TypeError, match=r"inputs must be a tuple.*got Tensor"):
        fixed_point(half, torch.zeros(2, 3), torch.zeros(2, 3))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"tol": -1e-3}, ValueError, "tol must be None or a number of at least 0, got -0.001"),
        ({"tol": float("nan")}, ValueError, "tol must be"),
        ({"tol": "tight"}, (TypeError, ValueError), "tol must be"),
        ({"max_steps": 0}, ValueError, "max_steps must be an integer of at least 1, got 0"),
        ({"max_steps": 2.5}, ValueError, "max_steps must be an integer"),
        ({"stall_after": 0}, ValueError, "stall_after must be an integer of at least 1"),
        ({"final": "first"}, ValueError, "final must be 'best' or 'last', got 'first'"),
        ({"solver": "anderson"}, TypeError, r"solver must be a Solver such as Anderson\(\)"),
        ({"solver": Anderson}, TypeError, r"solver must be a Solver such as Anderson\(\)"),
    ],
)
def test_options_out_of_range(options: dict[str, Any], error: Any, message: str) -> None:
    with pytest.raises(error, match=message):
        fixed_point(half, torch.zeros(2, 3), **options)


@pytest.mark.parametrize("name", ["stop_mode", "threshold", "maxsteps", "memory"])
def test_unknown_options_are_refused(name: str) -> None:
    with pytest.raises(TypeError, match=name):
        fixed_point(half, torch.zeros(2, 3), **{name: 1})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=name):
        DEQ(half, **{name: 1})  # type: ignore[arg-type]
    with pytest.raises(TypeError, match=name):
        DEQ(half).with_solver(Picard(), **{name: 1})


def test_deq_options_out_of_range() -> None:
    with pytest.raises(ValueError, match="max_steps must be an integer"):
        DEQ(half, max_steps=0)
    with pytest.raises(TypeError, match="solver must be a Solver"):
        DEQ(half, solver="anderson")(torch.zeros(2, 3))  # type: ignore[arg-type]
    known = re.escape("backward must be one of implicit, phantom, jacobian-free")
    with pytest.raises(ValueError, match=known + ".*got 'exact'"):
        DEQ(half, backward="exact")


def test_a_state_is_needed_where_nothing_gives_one() -> None:
    with pytest.raises(ValueError, match="z0 is needed"):
        fixed_point(half)
    with pytest.raises(ValueError, match="give z0"):
        DEQ(half)(3.0)


def test_an_error_inside_f_reaches_the_caller_unchanged() -> None:
    def failing(z: Tensor) -> Tensor:
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        fixed_point(failing, torch.zeros(2, 3))


def test_an_f_that_uses_a_tensor_of_the_whole_batch_is_explained() -> None:
    """It fails once samples leave, however it fails: by an error, or by returning all of them."""
    x = torch.cat([torch.zeros(4, 3), torch.ones(2, 3)])

    def adds(z: Tensor) -> Tensor:
        return torch.tanh(0.5 * z + x)

    def ignores(z: Tensor) -> Tensor:
        return torch.tanh(0.5 * z.mean() + x)

    for f in (adds, ignores):
        with pytest.raises(ValueError, match=r"are left of 6.*pass that through inputs"):
            fixed_point(f, torch.zeros(6, 3), solver=Picard())
    assert fixed_point(adds, torch.zeros(6, 3), drop_converged=False).converged.all()


def test_a_layer_inside_f_that_does_not_converge_says_so_on_a_part_of_the_batch_too() -> None:
    inner = DEQ(lambda y, z: -2 * y + z, Picard(), raise_on_failure=True, max_steps=5)
    x = torch.cat([torch.zeros(4, 3), torch.ones(2, 3)])

    def f(z: Tensor, x: Tensor) -> Tensor:
        if len(z) < 6:
            inner(z)
        return torch.tanh(0.5 * z + x)

    with pytest.raises(ConvergenceError):
        fixed_point(f, torch.zeros(6, 3), (x,), solver=Picard())


def test_a_guessed_state_of_another_shape_is_explained() -> None:
    wide = torch.nn.Linear(3, 5)
    with pytest.raises(ValueError, match=r"got \(2, 5\) \(a DEQ that is given no z0 starts from"):
        DEQ(lambda z, x: wide(x))(torch.zeros(2, 3))


def test_options_of_a_layer_are_not_assigned() -> None:
    deq = DEQ(half, Picard())
    for name in ("tol", "max_steps", "final"):
        with pytest.raises(AttributeError, match=rf"deq\.with_solver\({name}=\.\.\.\)"):
            setattr(deq, name, 1)
    tighter = deq.with_solver(tol=1e-9, max_steps=7)
    assert tighter.solver is deq.solver
    assert (tighter.options.tol, tighter.options.max_steps) == (1e-9, 7)


def test_a_tolerance_is_a_number() -> None:
    for wrong in (True, "1e-4", -1.0, float("nan")):
        with pytest.raises(ValueError, match="tol must be None or a number of at least 0"):
            DEQ(half, tol=wrong)  # type: ignore[arg-type]
