"""The alternating strategy: train the DEQ with a HyperSolver inside, and fit it again in between.

Bai, Koltun & Kolter (ICLR 2022); HyperPolypDEQ, section 4.2, which prefers to fit once, after the
DEQ has converged. Here each solve of the training hands over to the classic solver where the
HyperSolver stalls, so that a snapshot's HyperSolver that has grown stale costs time, not accuracy.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from deqsolvers import HandOver, Solver, fit_hypersolver
from deqsolvers.hypersolver.saving import hypersolver_metadata
from deqsolvers.state import Layout
from polypseg.checkpoint import load_into, save_weights
from polypseg.hyper_training import TrainingFeatures, alternating_weights, fit_options
from polypseg.models import ImplicitModel, build_hypersolver, build_solver
from polypseg.training_run import Run


def due(run: Run, epoch: int) -> bool:
    """Whether the implicit phase fits a HyperSolver before this epoch (0 first)."""
    every = run.config.hyper.alternate
    start = run.config.implicit.warm_epochs
    return every > 0 and epoch > start and (epoch - start) % every == 0


def alternating_solver(run: Run, model: ImplicitModel, epoch: int) -> Solver | None:
    """The solver to train with in ``epoch``; None for the classic one.

    Where a fit is due, a HyperSolver is fitted to the model as it is, from the weights of the fit
    before if there was one.
    """
    if run.config.hyper.alternate == 0:
        return None
    file = alternating_weights(run)
    last = max((e for e in range(epoch + 1) if due(run, e)), default=None)
    if last is None:
        file.unlink(missing_ok=True)  # of a training that was started again
        return None
    torch.manual_seed(run.config.seed)
    hyper = build_hypersolver(model, run.config.hyper).to(run.device)
    fitted = int(load_into(hyper, file, what="HyperSolver")["epoch"]) if file.exists() else -1
    if fitted < last:
        run.log.info("alternating: fitting a HyperSolver before epoch %d", epoch + 1)
        training = model.training
        features = TrainingFeatures(run, model.eval(), run.config.hyper.alternate_updates)
        history = fit_hypersolver(
            hyper,
            model.deq,
            lambda _: features(epoch),
            epochs=1,
            progress=True,
            **fit_options(run),
        )
        model.train(training)
        run.log.info("alternating: distances to z* %s", history[-1].distances)
        metadata = {**hypersolver_metadata(hyper), "epoch": str(epoch)}
        save_weights(file, hyper.state_dict(), metadata)
    classic = build_solver(run.config.implicit.solver, run.config.implicit.memory)
    steps = run.config.hyper.steps
    return _Aside(HandOver(hyper.eval().requires_grad_(False), classic, after=steps))


class _Aside(Solver):
    """A solver with weights that are no part of the model that it solves for."""

    def __init__(self, solver: Solver):
        self.solver = solver

    def __repr__(self) -> str:
        return repr(self.solver)

    def start(self, *inputs: Any) -> Any | None:
        return self.solver.start(*inputs)

    def init(self, z: Tensor, layout: Layout) -> Any:
        return self.solver.init(z, layout)

    def step(self, memory: Any, z: Tensor, fz: Tensor, g: Tensor) -> Tensor:
        return self.solver.step(memory, z, fz, g)
