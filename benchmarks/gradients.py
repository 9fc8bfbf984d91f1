"""Ways to differentiate a fixed point, ours and torchdeq's, and the exact gradient."""

from __future__ import annotations

import copy
import importlib.util
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks.methods import OURS, TORCHDEQ
from benchmarks.problems import Problem
from deqsolvers import (
    DEQ,
    Anderson,
    Backward,
    Broyden,
    Implicit,
    JacobianFree,
    Phantom,
    Picard,
    Shine,
    Solver,
    Unrolled,
)

FORWARD_TOL, STEPS = 1e-5, 200


@dataclass(frozen=True)
class Mode:
    """A backward pass; ``forward`` gives z* from f and x, differentiable where gradients are on."""

    name: str
    library: str
    forward: Callable[[nn.Module, Tensor], Tensor]


def modes() -> list[Mode]:
    """Every backward pass, each after a forward solve to the same tolerance."""
    chosen = [
        _ours("implicit, tol 1e-2", Implicit(tol=1e-2)),
        _ours("implicit, tol 1e-4", Implicit()),
        _ours("implicit, tol 1e-6", Implicit(tol=1e-6, max_steps=STEPS)),
        _ours("implicit by Broyden, tol 1e-4", Implicit(Broyden())),
        _ours("phantom, 5 steps", Phantom()),
        _ours("Jacobian-free", JacobianFree()),
        _ours("SHINE", Shine(), Broyden(STEPS)),
        _ours("unrolled", Unrolled(), Picard()),
    ]
    if importlib.util.find_spec("torchdeq"):
        chosen += [
            _torchdeq(
                "implicit, tol 1e-4",
                ift=True,
                b_solver="anderson",
                b_tol=1e-4,
                b_max_iter=50,
                b_stop_mode="rel",
            ),
            _torchdeq("phantom, 5 steps", grad=5, tau=0.5),
            _torchdeq("Jacobian-free", grad=1),
        ]
    return chosen


def _ours(name: str, backward: Backward, solver: Solver | None = None) -> Mode:
    def forward(f: nn.Module, x: Tensor) -> Tensor:
        deq = DEQ(
            f,
            solver or Anderson(),
            backward=backward,
            tol=FORWARD_TOL,
            max_steps=STEPS,
            # SHINE keeps the whole batch; then the forward solve alone must do so too.
            drop_converged=not isinstance(backward, Shine),
        )
        return deq.eval()(x)[0]

    return Mode(name, OURS, forward)


def _torchdeq(name: str, **options: object) -> Mode:
    from torchdeq import get_deq

    deq = get_deq(
        f_solver="anderson",
        f_max_iter=STEPS,
        f_tol=FORWARD_TOL,
        f_stop_mode="rel",
        **options,
    )
    deq.train()  # in eval mode it records nothing

    def forward(f: nn.Module, x: Tensor) -> Tensor:
        return deq(lambda z: f(z, x), torch.zeros_like(x))[0][-1]

    return Mode(name, TORCHDEQ, forward)


def trainable(problem: Problem) -> tuple[nn.Module, Tensor, Tensor]:
    """f and x that ask for gradients, and a fixed gradient v of the loss at z*."""
    f = copy.deepcopy(problem.f).requires_grad_(True)
    x = problem.x.clone().requires_grad_(True)
    generator = torch.Generator().manual_seed(2)
    v = torch.randn(problem.z0.shape, generator=generator, dtype=torch.float64)
    return f, x, v.to(problem.z0)


def gradient(mode: Mode, f: nn.Module, x: Tensor, v: Tensor) -> Tensor:
    """Gradients of ``<v, z*>`` w.r.t. x and f's parameters, end to end."""
    leaves = [x, *f.parameters()]
    for leaf in leaves:
        leaf.grad = None
    mode.forward(f, x).backward(v)
    grads = [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]
    return torch.cat([grad.flatten() for grad in grads])


def exact_gradient(problem: Problem) -> Tensor:
    """The same in double precision: v (I - J)^-1 as a Neumann series at z*, by torch alone."""
    f, x, v = trainable(problem)
    f, x, v = f.double(), x.detach().double().requires_grad_(True), v.double()
    z = problem.exact.double().requires_grad_(True)
    fz = f(z, x)
    u, change = v, torch.inf
    while change > 1e-13:
        (product,) = torch.autograd.grad(fz, z, u, retain_graph=True)
        change = float((v + product - u).norm() / u.norm())
        u = v + product
    leaves = [x, *f.parameters()]
    found = torch.autograd.grad(fz, leaves, u, allow_unused=True, materialize_grads=True)
    return torch.cat([grad.flatten() for grad in found])
