"""The loop that every solve runs through: forward, backward, unrolled and learned alike."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from deqsolvers.dropout import hold_masks
from deqsolvers.modes import may_overwrite, physical, transforming, undifferentiated
from deqsolvers.normalization import cached_weights
from deqsolvers.options import Options
from deqsolvers.precision import Autocast, warn_below_floor, widen
from deqsolvers.progress import HostMask, Progress
from deqsolvers.solution import ConvergenceError, Solution
from deqsolvers.solvers import Anderson, Solver
from deqsolvers.solvers.base import check_solver
from deqsolvers.state import Layout, check_inputs, map_rows, take_rows
from deqsolvers.workspace import Workspace

# Dropping decided samples copies the solver's memory; it pays once this share of the batch is gone.
_DROP_SHARE = 0.2

_WHOLE_BATCH = (
    "It may use a tensor of the whole batch: pass that through inputs, so that its samples leave "
    "with the others, or set drop_converged=False"
)


@dataclass(frozen=True)
class StepInfo:
    """What a callback sees after every evaluation of f.

    Attributes:
        step: how many solver updates led here, 0 for the initial state.
        z: the state that was evaluated, in the structure of ``z0``, samples ``rows`` only.
        residual: (len(rows),) its residual.
        rows: which samples of the batch these are.
        memory: the solver's memory before it uses this evaluation.
    """

    step: int
    z: Any
    residual: Tensor
    rows: Tensor
    memory: Any


def fixed_point(
    f: Callable[..., Any],
    z0: Any = None,
    inputs: tuple[Any, ...] = (),
    *,
    solver: Solver | None = None,
    tol: float | None = 1e-4,
    max_steps: int = 50,
    relative: bool = True,
    final: Literal["best", "last"] = "best",
    stall_after: int = 30,
    drop_converged: bool = True,
    raise_on_failure: bool = False,
    trace: bool = False,
    callback: Callable[[StepInfo], None] | None = None,
) -> Solution:
    """Find ``z = f(z, *inputs)`` for every sample of a batch, without gradients.

    Each step evaluates f once, on the samples that are still undecided, and measures the residual
    of exactly the iterate that was evaluated. A sample's result does not depend on its batch mates
    as long as f itself treats samples independently. As in a `DEQ`, a `VariationalDropout` in f
    draws one mask, and parametrized weights are computed once.

    Args:
        f: called as ``f(z, *inputs)``; returns a state of the structure and shapes of ``z``.
        z0: initial state, a tensor or a tuple, list or dict of tensors, batch first, floating point
            or complex. None lets the solver's own initializer make it (`HyperSolver`).
        inputs: passed to f after z. Every tensor in it is batch first, so that samples can leave
            the batch together with their inputs; let f close over whatever all samples share.
        solver: the method; `Anderson` with its defaults if None.
        tol: a sample has converged at ``||f(z) - z|| <= tol ||f(z)||``. None runs exactly
            ``max_steps`` steps and decides nothing early; such a solve reads nothing back from the
            device, so that a CUDA graph can capture it.
        max_steps: most solver updates. Measuring the last iterate takes one evaluation more.
        relative: False compares ``||f(z) - z||`` itself with ``tol``; use it where the fixed point
            may be zero.
        final: "best" returns each sample's best measured iterate, the one with the smallest
            ``||f(z) - z||``. "last" returns the iterate after the last update instead, which the
            last evaluation gives for free: where a sample meets ``tol``, one update further. It is
            not measured, and its residual is NaN. `NewtonKrylov`, whose iterates may be probes,
            returns the best one all the same.
        stall_after: a sample whose best residual has not fallen by one per cent for this many
            steps ends as stalled; raise it where a solve crosses long plateaus.
        drop_converged: let decided samples leave the batch when that saves work. Set False if f
            needs the whole batch (CUDA graphs, shapes compiled in) or couples samples (graphs,
            batch statistics). With ``final="best"`` a converged sample is then looked at again in
            every evaluation, and goes on where others have moved it from its fixed point; with
            "last" its status tells of its first look alone.
        raise_on_failure: raise `ConvergenceError`, which holds the solution, if any sample failed.
        trace: keep every residual in ``Solution.trace``.
        callback: called with a `StepInfo` after every evaluation.

    Returns:
        The `Solution`.

    Raises:
        ValueError, TypeError: an argument is out of range, or f returns another shape than ``z0``.
        ConvergenceError: with ``raise_on_failure=True``.
    """
    options = Options(tol, max_steps, relative, final, stall_after, drop_converged)
    solver = solver or Anderson()
    check_solver(solver)
    check_inputs(inputs)
    with undifferentiated(), cached_weights(f):
        if z0 is None:
            z0 = widen(solver.start(*inputs))
        held, given = hold_masks(f, inputs, z0)
        solution = iterate(held, z0, given, solver, options, trace, callback)
    if raise_on_failure and bool(physical(solution.failed).any()):
        raise ConvergenceError(solution)
    return solution


def iterate(
    f: Callable[..., Any],
    z0: Any,
    inputs: tuple[Any, ...],
    solver: Solver,
    options: Options,
    trace: bool = False,
    callback: Callable[[StepInfo], None] | None = None,
    keep_memory: bool = False,
) -> Solution:
    """`fixed_point` in the caller's grad mode: with gradients on, its z is differentiable.

    ``z0`` is a state; solver and inputs have been checked.
    """
    solution = _iterate(f, z0, inputs, solver, options, trace, callback, keep_memory)
    if may_overwrite():
        solver.workspace.end()  # now that only the solution looks at anything there
    return solution


def _iterate(
    f: Callable[..., Any],
    z0: Any,
    inputs: tuple[Any, ...],
    solver: Solver,
    options: Options,
    trace: bool,
    callback: Callable[[StepInfo], None] | None,
    keep_memory: bool,
) -> Solution:
    if z0 is None:
        raise ValueError(f"z0 is needed: {type(solver).__name__} has no initializer")
    autocast = Autocast(z0)
    layout = Layout.of(z0, computed_in=autocast.dtype)
    # A copy, so that nothing that f does to z can reach the caller's z0.
    z = _copy(layout.flatten(z0), solver.workspace)
    batch = z.shape[0]
    inputs = map_rows(lambda leaf: leaf, inputs, batch)
    warn_below_floor(options.tol if options.relative else None, layout.dtypes, autocast.dtype)

    progress = Progress(z, options, seen=trace or callback is not None)
    early = options.tol is not None
    mask = HostMask(z.device)
    may_drop = early and options.drop_converged and not torch.is_grad_enabled()
    may_drop = may_drop and not transforming()  # a vmapped dimension has masks of its own
    evaluate = _explaining(f, batch) if may_drop else f
    rounds = layout.rounds
    residuals: list[Tensor] = []
    calls = rows_evaluated = 0
    last = options.final == "last"
    returns_best = not last or solver.explores
    evaluations = options.max_steps + (not last)

    with autocast.forgetting(), autocast.suspended():
        memory: Any = solver.init(z, layout) if batch else None

        def update() -> Tensor:
            z_next = solver.step(memory, z, fz, g)
            # What f will see, so that the residual belongs to the state that is returned.
            return layout.flatten(layout.unflatten(z_next)) if rounds else z_next

        fz = z  # until f was called
        for step in range(evaluations if batch else 0):
            version = _version(z, first=calls == 0)
            before, returned = fz, _version(fz, first=False)  # solvers may remember it
            with autocast.restored():
                state = evaluate(layout.unflatten(z), *inputs)
            if calls == 0:
                layout.check(state, z.shape[0])
            if _changed(z, version) or _changed(before, returned):
                raise ValueError(
                    "f changed its argument z in place, or returned a buffer that its next call "
                    "writes over; let it work on a copy (avoid z += ..., z.relu_() and the like)"
                )
            del before  # a state that solvers may need the room of
            calls += 1
            rows_evaluated += z.shape[0]
            fz = layout.flatten(state)
            if fz.requires_grad and not torch.is_grad_enabled():
                fz = fz.detach()  # f enabled gradients to differentiate something inside
            if fz.shape != z.shape:
                raise ValueError(
                    f"f returned {fz.shape[0]} samples for the {z.shape[0]} that are left of "
                    f"{batch}. {_WHOLE_BATCH}"
                )
            g = torch.sub(fz, z, out=solver.workspace.like(z))
            residual = progress.measure(step, z, fz, g)
            if trace:
                residuals.append(progress.spread(residual))
            if callback is not None:
                callback(StepInfo(step, layout.unflatten(z), residual, progress.rows, memory))
            z_next = None
            if last:
                z_next = update()
                if not returns_best:
                    progress.replace_converged(step, z_next)
            running = None
            if early and not progress.all_running:
                running = mask.read(progress.running)
            if running is not None:
                # That view may be a step old, and a sample may have been reopened since.
                if not running.any() and not bool(physical(progress.running).any()):
                    break
                if may_drop and running.sum() <= (1 - _DROP_SHARE) * running.numel():
                    rows = running.nonzero().squeeze(1).to(z.device, non_blocking=True)
                    left = progress.rows.numel()
                    progress.take(rows)
                    memory.take(rows)
                    z, fz, g = z[rows], fz[rows], g[rows]
                    z_next = None if z_next is None else z_next[rows]
                    inputs = map_rows(partial(take_rows, rows=rows), inputs, left)
                    mask.reset()
                    running = None
            if step == options.max_steps:
                break
            z = update() if z_next is None else z_next
            if running is not None and not running.all():
                z = progress.hold(z, reopen=returns_best and not may_drop)
        if keep_memory and batch and not last:
            solver.step(memory, z, fz, g)  # what the last evaluation taught belongs to it too
    solution = progress.solution(
        layout,
        None if returns_best else z,
        calls,
        rows_evaluated,
        residuals if trace else None,
    )
    if keep_memory:
        solution.memory = memory
    return solution


def _copy(x: Tensor, workspace: Workspace) -> Tensor:
    place = workspace.like(x)
    return x.clone() if place is None else place.copy_(x)


def _explaining(f: Callable[..., Any], batch: int) -> Callable[..., Any]:
    """f, whose failure on a part of the batch says that it is one."""

    def evaluate(z: Any, *inputs: Any) -> Any:
        try:
            return f(z, *inputs)
        except RuntimeError as error:
            left = pytree.tree_leaves(z)[0].shape[0]
            told = isinstance(error, (torch.OutOfMemoryError, ConvergenceError))  # their own cause
            if left == batch or told:
                raise
            raise ValueError(
                f"f failed on the {left} samples that are left of {batch}: {error}. {_WHOLE_BATCH}"
            ) from error

    return evaluate


def _version(z: Tensor, first: bool) -> int | Tensor | None:
    """What `_changed` needs to tell whether f wrote into ``z``."""
    if torch.compiler.is_compiling():
        return None
    if z.is_inference():  # torch does not count writes here; once is enough to catch such an f
        return z.clone() if first else None
    return z._version


def _changed(z: Tensor, version: int | Tensor | None) -> bool:
    if version is None:
        return False
    if isinstance(version, Tensor):
        return not torch.equal(z, version)
    return z._version != version
