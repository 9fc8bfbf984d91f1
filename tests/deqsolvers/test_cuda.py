"""No wait for the device: what makes solves fast on CUDA, and fixed ones capturable in a graph."""

import sys

import pytest
import torch
from torch import Tensor

from deqsolvers import (
    DEQ,
    Anderson,
    Backward,
    Broyden,
    HandOver,
    HyperSolver,
    Implicit,
    NewtonKrylov,
    Phantom,
    Picard,
    Solution,
    Solver,
    fixed_point,
    norms,
    progress,
)
from deqsolvers.progress import HostMask
from deqsolvers.solvers import anderson, hand_over, newton_krylov
from tests.deqsolvers.maps import TanhMap, normal

loop = sys.modules[fixed_point.__module__]

SOLVERS: dict[str, Solver] = {
    "picard": Picard(damping=0.5),
    "anderson": Anderson(3),
    "anderson damped": Anderson(3, damping=0.5),
    "anderson safeguarded": Anderson(3, safeguard=2.0),
    "broyden": Broyden(4),
    "newton-krylov": NewtonKrylov(3),
}
every_solver = pytest.mark.parametrize("name", [*SOLVERS, "hyper", "hand over"])


def solver(name: str, device: str) -> Solver:
    if name in SOLVERS:
        return SOLVERS[name]
    with torch.device(device):
        hyper = HyperSolver.for_vectors(6, memory=2)
        return hyper if name == "hyper" else HandOver(hyper)


def solve(method: Solver, x: Tensor, **options: object) -> Solution:
    return fixed_point(
        lambda z, x: torch.tanh(0.5 * z + x),
        torch.zeros_like(x),
        (x,),
        solver=method,
        max_steps=8,
        **options,  # type: ignore[arg-type]
    )


@every_solver
@pytest.mark.parametrize("final", ["last", "best"])
@pytest.mark.parametrize("tol", [None, 1e-4])
def test_no_value_is_read_by_the_host(
    name: str, final: str, tol: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tensors on the meta device are not on a CPU and have no values: every read is an error.

    The one read that a tolerance needs, by a copy that nobody waits for, is left out.
    """
    monkeypatch.setattr(HostMask, "read", lambda self, running: None)
    x = torch.ones(4, 6, device="meta")
    with pytest.raises(RuntimeError, match=r"item\(\)"):
        bool((x > 0).any())
    solution = solve(solver(name, "meta"), x, tol=tol, final=final, trace=True)
    assert solution.z.is_meta
    assert solution.trace is not None
    assert solution.calls == 8 + (final == "best")


@pytest.mark.parametrize(
    "backward", [Implicit(tol=None), Phantom(2), "jacobian-free", "shine", "unrolled"]
)
@pytest.mark.parametrize("tol", [None, 1e-4])
def test_no_value_is_read_on_the_way_back(
    backward: Backward | str, tol: float | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An implicit backward pass with a tolerance reads one flag: whether it has failed."""
    monkeypatch.setattr(HostMask, "read", lambda self, running: None)
    with torch.device("meta"):
        f = TanhMap(6, norm=0.7)
        x = torch.ones(4, 6, requires_grad=True)
    z, _ = DEQ(f, solver=Broyden(4), backward=backward, tol=tol, max_steps=6)(x)
    z.sum().backward()
    assert x.grad is not None
    assert all(p.grad is not None and p.grad.is_meta for p in f.parameters())


class LateMask(HostMask):
    """Tells the mask of the step before, as a device does whose flags travel without a wait."""

    def __init__(self, device: torch.device):
        super().__init__(device)
        self.on_its_way: Tensor | None = None

    def read(self, running: Tensor) -> Tensor | None:
        arrived, self.on_its_way = self.on_its_way, running.clone()
        return arrived

    def reset(self) -> None:
        self.on_its_way = None


@every_solver
@pytest.mark.parametrize("final", ["last", "best"])
@pytest.mark.parametrize("drop", [True, False])
def test_a_mask_that_comes_late_changes_no_result(
    name: str, final: str, drop: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The loop as on CUDA, without one: the host sees no value, but for the mask a step late."""
    torch.manual_seed(0)
    method = solver(name, "cpu")
    # Of different sizes: samples need between one evaluation and more steps than there are.
    x = normal(12, 6) * torch.logspace(-4, 0.5, 12)[:, None]
    options = {"tol": 1e-2, "final": final, "drop_converged": drop, "relative": False}
    expected = solve(method, x, **options)
    assert len(set(expected.steps.tolist())) > 2
    for module in (norms, progress, anderson, hand_over, newton_krylov):
        monkeypatch.setattr(module, "may_look", lambda _: False)
    monkeypatch.setattr(loop, "HostMask", LateMask)
    late = solve(method, x, **options)
    assert late.rows_evaluated >= expected.rows_evaluated
    torch.testing.assert_close(late.z, expected.z)
    torch.testing.assert_close(late.residual, expected.residual, equal_nan=True)
    for field in ("status", "steps", "evaluations"):
        assert torch.equal(getattr(late, field), getattr(expected, field)), field


def test_the_mask_is_waited_for_on_its_own_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """The copy runs there, and the current device may be another one (``x.to("cuda:1")``)."""
    running = torch.ones(3, dtype=torch.bool)
    recorded: list[object] = []

    class Event:
        def record(self, stream: object = "of the current device") -> None:
            recorded.append(stream)

        def synchronize(self) -> None:
            pass

    empty = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *size, dtype, pin_memory: empty(*size, dtype=dtype))
    monkeypatch.setattr(torch.cuda, "Event", Event)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: ("of", device))
    mask = HostMask(torch.device("cuda", 1))
    assert mask.read(running) is None
    arrived = mask.read(~running)
    assert arrived is not None
    assert bool(arrived.all())
    assert recorded == [("of", running.device)] * 2


needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


@needs_cuda
@every_solver
def test_a_fixed_solve_is_captured_and_replayed_on_other_inputs(name: str) -> None:
    method = solver(name, "cuda")
    x = normal(4, 6, dtype=torch.float32).cuda()
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):  # libraries set themselves up outside of the capture
        for _ in range(2):
            solve(method, x, tol=None)
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = solve(method, x, tol=None)
    other = normal(4, 6, seed=1, dtype=torch.float32).cuda()
    x.copy_(other)
    graph.replay()
    expected = solve(method, other, tol=None)
    torch.testing.assert_close(captured.z, expected.z)
    torch.testing.assert_close(captured.residual, expected.residual, rtol=1e-2, atol=1e-6)


@needs_cuda
@every_solver
def test_the_device_finds_what_the_cpu_finds(name: str) -> None:
    f = TanhMap(6, norm=0.7)
    x = normal(4, 6) * torch.tensor([[0.01], [1.0], [3.0], [0.1]], dtype=torch.float64)
    here = fixed_point(f, torch.zeros_like(x), (x,), solver=solver(name, "cpu"), tol=1e-8)
    x = x.cuda()
    there = fixed_point(f.cuda(), torch.zeros_like(x), (x,), solver=solver(name, "cuda"), tol=1e-8)
    assert there.statuses() == here.statuses()
    torch.testing.assert_close(there.z.cpu(), here.z, rtol=0, atol=1e-6)


@needs_cuda
def test_a_training_step_is_captured() -> None:
    """With tol=None on both ways not even a failure is looked for."""
    f = TanhMap(6, norm=0.7).cuda()
    x = normal(4, 6).cuda()
    deq = DEQ(f, backward=Implicit(tol=None, max_steps=12), tol=None, max_steps=12)

    def gradient() -> Tensor:
        (grad,) = torch.autograd.grad(deq(x)[0].square().sum(), f.weight)
        return grad

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        gradient()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = gradient()
    x.copy_(normal(4, 6, seed=1).cuda())
    graph.replay()
    torch.testing.assert_close(captured, gradient())
