"""Per-sample bookkeeping of a solve: residuals, best iterates and statuses."""

from __future__ import annotations

import torch
from torch import Tensor

from deqsolvers.modes import may_look, may_overwrite, physical
from deqsolvers.norms import SQUARES_FROM, safe_row_norms
from deqsolvers.options import Options
from deqsolvers.solution import Solution, Status
from deqsolvers.solvers.history import row_norms
from deqsolvers.state import Layout

_RUNNING = 100  # no status yet
_STALL_FACTOR = 0.99  # a smaller fall of the best residual does not count as progress
# Growth of ||f(z) - z|| over the scale of the start that ends a sample. It is generous because a
# start close to an unstable fixed point looks like divergence until another one attracts the path;
# what grows slowly ends as a stall.
_DIVERGED_FACTOR = 1e10
# A residual of a converged sample that rises above this many tolerances is no rounding: f couples
# samples, and others have moved.
_REOPEN_FACTOR = 1.1
_GROWN_FACTOR = 10.0  # the growth that makes a sample that did not converge a diverged one


class Progress:
    """What is known of every sample that is still in the batch, and the results of those that left.

    Attributes:
        rows: (b,) which samples of the batch are still here.
        running: (b,) which of them have no status yet.
        best_z: (b, features) the best measured iterate of each.
    """

    def __init__(self, z: Tensor, options: Options, seen: bool = True):
        """``seen``: somebody sees the residuals of samples that are still running."""
        batch = z.shape[0]
        self.options = options
        # Else ||f(z) - z|| will do, which spares a pass over f(z).
        self._relate = seen or options.tol is not None or options.final == "best"
        self._relate |= not options.relative
        self.batch = batch
        self.rows = torch.arange(batch, device=z.device)
        self.running = torch.ones(batch, dtype=torch.bool, device=z.device)
        self._measured = self.running  # who was running when the last iterate was measured
        self.status = torch.full((batch,), _RUNNING, dtype=torch.int8, device=z.device)
        self._may_look = may_look(z)
        self._recorded = not may_overwrite()  # by autograd, say
        self.all_running = self._may_look  # false also where the host has not looked
        self.best_z = z
        infinite = z.new_full((batch,), torch.inf)
        zero = torch.zeros(batch, dtype=torch.int64, device=z.device)
        # Numbers to compare with, as tensors: torch takes longer to compare with a number.
        self._squares_from = z.new_full((batch,), SQUARES_FROM[z.dtype])  # below, squares vanish
        self._tol = None if options.tol is None else z.new_full((batch,), options.tol)
        self.best_residual = infinite
        self._best_size = infinite  # its ||f(z) - z||
        self.best_step = zero
        self.evaluations = zero
        # The best residual when progress was last made, and when that was.
        self._mark = infinite
        self._mark_step = zero
        self._first = infinite  # ||f(z0) - z0||
        self._scale = infinite  # the larger of that and ||f(z0)||
        self._best_g: Tensor | None = None  # f(z) - z at best_z, where its residual is not known
        self._unwritten: int | None = None  # the step that all samples' counters stand at
        self._grown = torch.zeros_like(self.running)  # whether ||g|| is far above its first value
        self._held: Tensor | None = None  # who is about to be measured at its best_z again
        self._left: _Results | None = None

    def measure(self, step: int, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        """Judge the iterate ``z`` after ``step`` updates; returns its residual (b,).

        Where nobody sees that, it may be ``||g||`` instead.
        """
        if self._recorded:
            g, fz = g.detach(), fz.detach()
        if self.all_running:
            residual = self._measure_together(step, z, fz, g)
            if residual is not None:
                return residual
        self._write_steps()
        self._relate_best()
        return self._measure_each(step, z, fz, g)

    def _relate_best(self) -> None:
        """Make a residual of the best ``||f(z) - z||``, where that has done so far."""
        if self._best_g is not None:  # what f returned there may have been written over
            scale = safe_row_norms(self.best_z + self._best_g)
            self.best_residual = self._best_size / scale.clamp_min(torch.finfo(scale.dtype).tiny)
            self._best_g = None

    def _measure_together(self, step: int, z: Tensor, fz: Tensor, g: Tensor) -> Tensor | None:
        """Note that all samples improved and none is done: what most steps of most solves find.

        None if a sample needs a closer look. The host asks, where it can look for free.
        """
        size = residual = row_norms(g)
        if self.options.relative and self._relate:
            residual = size / row_norms(fz)
        if not self._all(size < self._best_size) or not self._all(size > self._squares_from):
            return None
        if self._tol is not None:
            fallen = residual < _STALL_FACTOR * self._mark
            if not self._all(fallen) or not self._all(residual > self._tol):
                return None
        elif step == 0 and not self._all(residual > 0):
            return None  # f(z) may have overflowed where its entries did not
        if step == 0 and self.options.tol is not None:
            self._first, self._scale = size, torch.maximum(size, row_norms(fz))
        self.best_z, self._best_size, self.best_residual = z, size, residual
        self._best_g = None if self._relate else g
        self._mark = residual
        self._unwritten = step
        self._measured = self.running
        return residual

    def _all(self, fine: Tensor) -> bool:
        """Whether ``fine`` (b,) holds for all samples, while all are running."""
        return torch.equal(fine, self.running)

    def _write_steps(self) -> None:
        """Write what `measure` only remembered while all samples improved."""
        if self._unwritten is not None:
            self.best_step = torch.full_like(self.best_step, self._unwritten)
            self._mark_step = torch.full_like(self._mark_step, self._unwritten)
            self.evaluations = torch.full_like(self.evaluations, self._unwritten + 1)
            self._unwritten = None

    def _measure_each(self, step: int, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        size = residual = safe_row_norms(g)
        if self.options.relative:
            residual = size / safe_row_norms(fz).clamp_min(torch.finfo(size.dtype).tiny)
        if step == 0:
            self._first = size
            self._scale = torch.maximum(size, safe_row_norms(fz))
        self._reopen(residual, size, fz)
        running = self._measured = self.running
        finite = size < torch.inf  # false for NaN too
        # The size decides, not the relative residual: where f blows up, the latter falls.
        better = size < self._best_size
        if self.options.tol is not None:
            better = better | (residual <= self.options.tol)
        better = better & running
        self.best_z = self._choose(better, z, self.best_z)
        self._best_size = torch.where(better, size, self._best_size)
        self.best_residual = torch.where(better, residual, self.best_residual)
        self.best_step = torch.where(better, step, self.best_step)
        self.evaluations = self.evaluations + running

        status = torch.where(finite, _RUNNING, int(Status.NON_FINITE))
        if self.options.tol is not None:
            status = self._judge(step, status, residual, size, self.options.tol)
        self.status = torch.where(running, status.to(torch.int8), self.status)
        self.running = self.status == _RUNNING
        self.all_running = self._may_look and bool(self.running.all())
        return residual

    def _choose(self, rows: Tensor, these: Tensor, others: Tensor) -> Tensor:
        """(b, features) ``these`` for ``rows`` (b,) bool, ``others`` for the rest."""
        if self._may_look:  # most often it is all or none, which spares passes over both
            if bool(rows.all()):
                return these
            if not bool(rows.any()):
                return others
        return torch.where(rows.unsqueeze(1), these, others)

    def hold(self, z: Tensor, reopen: bool) -> Tensor:
        """``z`` with decided samples at their best iterate, a finite state for f to work on.

        ``reopen`` lets one that has converged go on where its residual there has risen, which
        only other samples can do.
        """
        if reopen and self.options.tol is not None:
            self._held = (~self.running) & (self.status > 0)
        return self._choose(self.running, z, self.best_z)

    def _reopen(self, residual: Tensor, size: Tensor, fz: Tensor) -> None:
        if self._held is None or self.options.tol is None:
            return
        risen = self._held & ~(residual <= _REOPEN_FACTOR * self.options.tol)
        self._held = None
        self.running = self.running | risen
        self.status = torch.where(risen, _RUNNING, self.status).to(torch.int8)
        self._best_size = torch.where(risen, torch.inf, self._best_size)
        self._mark = torch.where(risen, torch.inf, self._mark)
        self._first = torch.where(risen, size, self._first)
        scale = torch.maximum(size, safe_row_norms(fz))
        self._scale = torch.where(risen, scale, self._scale)

    def _judge(
        self, step: int, status: Tensor, residual: Tensor, size: Tensor, tol: float
    ) -> Tensor:
        finite = size < torch.inf
        progressed = residual < _STALL_FACTOR * self._mark
        self._mark = torch.where(progressed, residual, self._mark)
        self._mark_step = torch.where(progressed, step, self._mark_step)
        stalled = finite & (step - self._mark_step >= self.options.stall_after)
        grown = self._grown = size > _GROWN_FACTOR * self._first
        status = torch.where(stalled & ~grown, int(Status.STALLED), status)
        diverged = finite & ((size > _DIVERGED_FACTOR * self._scale) | (stalled & grown))
        status = torch.where(diverged, int(Status.DIVERGED), status)
        success = Status.STARTED_CONVERGED if step == 0 else Status.CONVERGED
        return torch.where(residual <= tol, int(success), status)

    def replace_converged(self, step: int, z: Tensor) -> None:
        """Let samples that this measurement found converged return their update ``z`` instead.

        One that started converged needs none, and one whose update overflows keeps what it has.
        """
        if self.options.tol is None or step == 0 or self.all_running:
            return
        converged = self._measured & (self.status == int(Status.CONVERGED))
        converged = converged & z.isfinite().all(dim=1)
        self.best_z = self._choose(converged, z, self.best_z)
        self.best_residual = torch.where(converged, torch.nan, self.best_residual)
        self.best_step = torch.where(converged, step + 1, self.best_step)

    def spread(self, residual: Tensor) -> Tensor:
        """(B,) residuals of the whole batch, NaN for samples decided before this evaluation."""
        full = residual.new_full((self.batch,), torch.nan)
        full[self.rows] = torch.where(self._measured, residual, torch.nan)
        return full

    def take(self, rows: Tensor) -> None:
        """Keep these rows and store the results of the others, which are decided."""
        self._write_steps()
        self._store(None)
        for name, value in vars(self).items():
            if isinstance(value, Tensor):
                setattr(self, name, value[rows])
        self.all_running = self._may_look

    def _store(self, z: Tensor | None) -> _Results:
        if self._left is None:
            self._left = _Results(self)
        self._left.put(self, self.best_z if z is None else z)
        return self._left

    def solution(
        self,
        layout: Layout,
        last: Tensor | None,
        calls: int,
        rows_evaluated: int,
        residuals: list[Tensor] | None,
    ) -> Solution:
        """Close the books. ``last`` replaces the best iterate of samples without a decision."""
        self._write_steps()
        undecided = self.running
        limit = Status.FIXED_STEPS if self.options.tol is None else Status.STEP_LIMIT
        # One that has only ever grown; where a step lowered it, the last may be a trial too long.
        diverged = self._grown & (self.best_step == 0)
        ended = torch.where(diverged, int(Status.DIVERGED), int(limit))
        self.status = torch.where(undecided, ended, self.status).to(torch.int8)
        z = self.best_z
        if last is None:
            self._relate_best()
        else:
            # A sum is finite only if all terms are, and one look is all that most solves need.
            if not self._may_look or not bool(last.sum().isfinite()):
                self._relate_best()
                overflowed = undecided & ~last.isfinite().all(dim=1)  # these keep what they have
                ended = torch.where(overflowed, int(Status.NON_FINITE), self.status)
                self.status = ended.to(torch.int8)
                undecided = undecided & ~overflowed
            z = self._choose(undecided, last, z)
            self.best_residual = torch.where(undecided, torch.nan, self.best_residual)
            self.best_step = torch.where(undecided, self.options.max_steps, self.best_step)
        if self._left is None:  # nobody left the batch: this is already everything
            done = _Results(self, z)
        else:
            done = self._store(z)
        trace = None
        if residuals is not None:
            trace = torch.stack(residuals) if residuals else done.residual.new_empty(0, self.batch)
        return Solution(
            z=layout.unflatten(done.z),
            status=done.status,
            residual=done.residual,
            steps=done.steps,
            evaluations=done.evaluations,
            calls=calls,
            rows_evaluated=rows_evaluated,
            trace=trace,
        )


class _Results:
    """Results of the whole batch, filled as samples leave it."""

    def __init__(self, progress: Progress, z: Tensor | None = None):
        self.z = torch.empty_like(progress.best_z) if z is None else z
        self.status = progress.status
        self.residual = progress.best_residual
        self.steps = progress.best_step
        self.evaluations = progress.evaluations

    def put(self, progress: Progress, z: Tensor) -> None:
        rows = progress.rows
        self.z[rows] = z
        self.status = self.status.index_copy(0, rows, progress.status)
        self.residual = self.residual.index_copy(0, rows, progress.best_residual)
        self.steps = self.steps.index_copy(0, rows, progress.best_step)
        self.evaluations = self.evaluations.index_copy(0, rows, progress.evaluations)


class HostMask:
    """The host's view of which samples are still running.

    On CUDA it is read one step late, through a non-blocking copy: the host waits for the flag of
    the step before, while the device still works on this one, so the queue never runs dry. A
    decided sample may be evaluated once more; its result does not change.
    """

    def __init__(self, device: torch.device):
        self._late = device.type == "cuda"
        self._pending: tuple[Tensor, torch.cuda.Event] | None = None

    def read(self, running: Tensor) -> Tensor | None:
        """The latest mask (b,) that has reached the host, None if there is none yet."""
        running = physical(running)
        if not self._late:
            return running.cpu()
        host = torch.empty(running.shape, dtype=torch.bool, pin_memory=True)
        host.copy_(running, non_blocking=True)
        event = torch.cuda.Event()
        event.record(torch.cuda.current_stream(running.device))  # not the current device's stream
        previous, self._pending = self._pending, (host, event)
        if previous is None:
            return None
        previous[1].synchronize()
        return previous[0]

    def reset(self) -> None:
        """Forget what is on its way, because the batch has changed."""
        self._pending = None
