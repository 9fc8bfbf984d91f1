"""Trained models, ready to predict with a chosen solver."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from polypseg.checkpoint import CheckpointError, load_into
from polypseg.config import Config, SolveConfig
from polypseg.models import (
    ImplicitModel,
    Prediction,
    SegmentationModel,
    build_hand_over,
    build_hypersolver,
    build_model,
    build_solver,
)
from polypseg.run_config import load_run_config
from polypseg.runs import is_release

SOLVERS = ("explicit", "picard", "anderson", "broyden", "hyper")


class ExplicitPass(nn.Module):
    """A network that predicts in one pass, an implicit one after one evaluation of f from zero."""

    def __init__(self, model: SegmentationModel):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> Prediction:
        return self.model.explicit(images)


def load_model(
    run: Path, solver: str, *, tol: float | None = None, max_steps: int | None = None
) -> tuple[nn.Module, Config]:
    """The model of a run directory, in evaluation mode, predicting with ``solver``.

    "explicit" takes the weights of the explicit phase and evaluates f once; every other solver
    takes those of the implicit phase.

    Args:
        run: a directory that `polypseg-train` wrote.
        solver: one of `SOLVERS`.
        tol, max_steps: instead of the run's ``solve`` settings; without a ``tol``, "hyper" makes
            ``max_steps`` evaluations, and with one it goes on with Anderson where it stalls.

    Raises:
        ValueError: an unknown solver, or a ``tol`` that the start of a solve already meets.
        CheckpointError: the directory is no run, or has not reached the phase that the solver
            needs.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver must be one of {', '.join(SOLVERS)}, got {solver!r}")
    if tol is not None and not 0 <= tol < 1:
        raise ValueError(
            f"tol must be at least 0 and below 1, the relative residual of the start, got {tol!r}"
        )
    if not (run / "config.yaml").is_file():
        raise CheckpointError(f"{run}: not a run of polypseg-train (it has no config.yaml)")
    config = load_run_config(run / "config.yaml")
    model = build_model(config.model)
    if solver != "explicit" and not isinstance(model, ImplicitModel):
        raise ValueError(
            f"{run}: {config.model.name} is an explicit network; solver must be 'explicit', got "
            f"{solver!r}"
        )
    phase = "explicit" if solver == "explicit" else "implicit"
    load_into(model, _weights(run, phase, solver), what=f"model {config.model.name}")
    model.eval()
    if solver == "explicit" or not isinstance(model, ImplicitModel):
        return ExplicitPass(model).eval(), config
    settings = config.solve
    if solver == "hyper":
        hyper = build_hypersolver(model, config.hyper)
        load_into(hyper, _weights(run, "hyper", solver), what="HyperSolver")
        if tol is None:
            model.deq = model.deq.with_solver(hyper, **hyper_options(settings, max_steps))
        else:
            sure = build_hand_over(hyper, settings.anderson_memory, config.hyper.steps)
            steps = settings.max_steps if max_steps is None else max_steps
            model.deq = model.deq.with_solver(sure, tol=tol, max_steps=steps)
    else:
        memory = settings.memory if solver == "broyden" else settings.anderson_memory
        model.deq = model.deq.with_solver(
            build_solver(solver, memory),
            tol=settings.tol if tol is None else tol,
            max_steps=settings.max_steps if max_steps is None else max_steps,
        )
    return model.eval(), config


def hyper_options(settings: SolveConfig, max_steps: int | None = None) -> dict[str, Any]:
    """Of a solve by a HyperSolver alone.

    The residual that decides is that of the iterate before the last update, so that nothing is
    evaluated for the decision.
    """
    return {
        "tol": settings.hyper_tol or None,
        "max_steps": settings.hyper_steps if max_steps is None else max_steps,
        "final": "last",
    }


def _weights(run: Path, phase: str, solver: str) -> Path:
    path = run / f"{phase}.safetensors"
    if not path.is_file():
        remedy = f"train it: polypseg-train {run}"
        if phase == "explicit" and is_release(run):
            remedy = "a released model holds none; choose another solver"
        raise CheckpointError(
            f"{path}: missing, but solver '{solver}' needs the weights of the {phase} phase; "
            f"{remedy}"
        )
    return path
