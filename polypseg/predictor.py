"""From one image to one polyp mask: everything around the network at inference."""

from __future__ import annotations

import hashlib
import math
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.utils._pytree import tree_leaves

from deqsolvers import DEQ
from deqsolvers.state import Layout
from polypseg.checkpoint import CheckpointError
from polypseg.data import resize_image, to_tensor
from polypseg.inference import load_model
from polypseg.metrics import resize_logits
from polypseg.models import STRIDE, ImplicitModel, Prediction
from polypseg.result import EXPLICIT, NON_FINITE, Frame, Result

# The phases of training whose weights each solver needs, in the order of an evaluation's tables.
_NEEDS = {
    "explicit": ("explicit",),
    "broyden": ("implicit",),
    "anderson": ("implicit",),
    "hyper": ("implicit", "hyper"),
}


@dataclass(frozen=True)
class Source:
    """What a predictor was loaded from.

    Attributes:
        run: the run directory, as it was named.
        solver: one of `polypseg.inference.SOLVERS`.
        weights: SHA-256 of each file of weights, by its name.
    """

    run: str
    solver: str
    weights: dict[str, str]


class Predictor:
    """Segments polyps in images of any size, one at a time.

    Args:
        model: maps normalised images (B, 3, size, size) to a `Prediction`; it is put into eval mode
            and left on its device.
        size: side of the square that images are resized to, as the network was trained; a multiple
            of 32.
        source: where the network comes from, for the record; `from_run` tells it.

    Raises:
        ValueError: `size` is no positive multiple of 32.
    """

    def __init__(self, model: nn.Module, size: int, source: Source | None = None) -> None:
        if size < STRIDE or size % STRIDE:
            raise ValueError(f"size must be a positive multiple of {STRIDE}, got {size}")
        self.model = model.eval()
        self.size = size
        self.source = source

    @property
    def device(self) -> torch.device:
        """Where the network computes."""
        return next(self.model.parameters()).device

    @property
    def deq(self) -> DEQ | None:
        """The fixed-point layer, with its solver and options; None where there is only one pass."""
        return self.model.deq if isinstance(self.model, ImplicitModel) else None

    @classmethod
    def from_run(
        cls,
        run: Path,
        solver: str | None = None,
        *,
        tol: float | None = None,
        max_steps: int | None = None,
        device: str | None = None,
    ) -> Predictor:
        """Load a trained network from a run directory.

        Args:
            run: what `polypseg-train` wrote.
            solver: one of `polypseg.inference.SOLVERS`; if None, the last that `available_solvers`
                lists.
            tol: relative residual at which the solver stops, if not the run's own.
            max_steps: most solver updates, if not the run's own.
            device: where to compute; if None, a GPU where there is one.

        Raises:
            CheckpointError: the run is missing, damaged or lacks the weights for this solver.
            ValueError: the solver is unknown, an option is out of range, or there is no such
                device.
        """
        solver = available_solvers(run)[-1] if solver is None else solver
        model, config = load_model(Path(run), solver, tol=tol, max_steps=max_steps)
        if device is None:
            device = "cuda" if torch.cuda.is_available() else "cpu"
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:  # torch raises either
            raise ValueError(f"device {device!r} cannot be used here: {error}") from error
        return cls(model, config.data.size, Source(str(run), solver, _digests(Path(run), solver)))

    def predict(self, image: np.ndarray, *, measure: bool = False) -> Result:
        """Segment one image.

        Args:
            image: (H, W, 3) uint8 RGB.
            measure: spend one more evaluation of f, outside of the seconds and of the evaluations
                that are reported, where the solver has left the residual of its answer unmeasured.

        Raises:
            ValueError: the array is of another kind; says what it is and how to convert it.
        """
        return self._predict(image, None, measure).result

    def predict_frame(
        self, image: np.ndarray, state: Any = None, *, measure: bool = False
    ) -> Frame:
        """Segment a frame of a video, starting the solver where the last frame's solve ended.

        Args:
            image, measure: as `predict`.
            state: `Frame.state` of the frame before; None starts as `predict` does. A state that is
                not finite is not used. An explicit pass has none and ignores it.
        """
        if state is not None:
            finite = all(bool(leaf.isfinite().all()) for leaf in tree_leaves(state))
            state = state if finite else None
        return self._predict(image, state, measure)

    def _predict(self, image: np.ndarray, state: Any, measure: bool) -> Frame:
        batch = self._batch(image)
        options = {} if state is None or self.deq is None else {"z0": state}
        with torch.inference_mode():
            _wait(batch.device)
            start = time.perf_counter()
            prediction = self.model(batch, **options)
            _wait(batch.device)
            seconds = time.perf_counter() - start
            logits = resize_logits(prediction.logits[0], image.shape[:2])
            result = _result(
                prediction, _probabilities(logits), _probabilities(prediction.logits[0]), seconds
            )
            if prediction.solution is None:
                return Frame(result, None)
            if measure and math.isnan(result.residual):
                result = replace(result, residual=self._residual(batch, prediction.solution.z))
        return Frame(result, prediction.solution.z)

    def residuals(self, image: np.ndarray, evaluations: int) -> np.ndarray:
        """Relative residuals (evaluations,) that the solver meets on an image, without stopping.

        Raises:
            ValueError: the model has no solver, or `evaluations` is below 2.
        """
        model = self._iterative()
        # Measuring the start takes the first evaluation.
        deq = model.deq.with_solver(
            model.deq.solver, tol=None, max_steps=evaluations - 1, final="best"
        )
        with torch.inference_mode():
            trace = deq.solve(model.features(self._batch(image)), trace=True).trace
        assert trace is not None  # it was asked for
        return trace[:, 0].cpu().numpy()

    def _residual(self, batch: torch.Tensor, z: Any) -> float:
        model = self._iterative()
        layout = Layout.of(z)
        fz = layout.flatten(model.deq.f(z, model.features(batch)))
        return float((fz - layout.flatten(z)).norm() / fz.norm())

    def _iterative(self) -> ImplicitModel:
        if not isinstance(self.model, ImplicitModel):
            raise ValueError("an explicit pass has no solver and no residual")
        return self.model

    def _batch(self, image: np.ndarray) -> torch.Tensor:
        _check_image(image)
        return to_tensor(resize_image(image, self.size))[None].to(self.device)


def available_solvers(run: Path) -> list[str]:
    """Name the solvers that a run directory has weights for; the last is the one to predict with.

    "picard" is not among them: on many networks it diverges, so it has to be asked for by name.

    Raises:
        CheckpointError: there is no such folder, or it holds no weights.
    """
    run = Path(run)
    if not run.is_dir():
        problem = "is a file, not a run directory" if run.exists() else "there is no such folder"
        raise CheckpointError(f"{run}: {problem}; give a folder that polypseg-train wrote")
    found = [
        solver
        for solver, phases in _NEEDS.items()
        if all((run / f"{phase}.safetensors").is_file() for phase in phases)
    ]
    if not found:
        raise CheckpointError(
            f"{run}: holds no trained weights (neither explicit.safetensors nor "
            "implicit.safetensors); give a folder in which polypseg-train has finished a phase"
        )
    return found


def _digests(run: Path, solver: str) -> dict[str, str]:
    files = [run / f"{phase}.safetensors" for phase in _NEEDS.get(solver, ("implicit",))]
    return {file.name: hashlib.sha256(file.read_bytes()).hexdigest() for file in files}


def _probabilities(logits: torch.Tensor) -> np.ndarray:
    logits = logits.float()
    return (logits.sigmoid() if len(logits) == 1 else logits.softmax(dim=0)).cpu().numpy()


def _result(
    prediction: Prediction, probabilities: np.ndarray, native: np.ndarray, seconds: float
) -> Result:
    solution = prediction.solution
    if solution is None:
        steps, evaluations, residual, status = 1, 1, float("nan"), EXPLICIT
    else:
        steps, evaluations = int(solution.steps[0]), int(solution.evaluations[0])
        residual, status = float(solution.residual[0]), solution.statuses()[0].name
    if not (np.isfinite(probabilities).all() and np.isfinite(native).all()):
        status = NON_FINITE
        probabilities, native = _nothing(probabilities), _nothing(native)
    return Result(probabilities, native, steps, evaluations, residual, status, seconds)


def _nothing(probabilities: np.ndarray) -> np.ndarray:
    """Probabilities of the same shape that mark no polyp."""
    empty = np.zeros_like(probabilities)
    if len(empty) > 1:
        empty[0] = 1
    return empty


def _wait(device: torch.device) -> None:
    """A GPU works on after the call returns; the clock must not."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _check_image(image: np.ndarray) -> None:
    if not isinstance(image, np.ndarray):
        raise ValueError(
            f"image must be a NumPy array (H, W, 3) of uint8, got {type(image).__name__}; "
            "polypseg.data.read_image reads a file into one"
        )
    if image.ndim != 3:
        hint = "repeat a grey image three times: np.stack([image] * 3, axis=2)"
        hint = hint if image.ndim == 2 else "give one image at a time"
        raise ValueError(f"image must be (H, W, 3), got the shape {image.shape}; {hint}")
    if image.shape[2] != 3:
        hint = "channels come last, in the order red, green, blue"
        if image.shape[2] == 4:
            hint = "drop the alpha channel: image[..., :3]"
        raise ValueError(f"image must be (H, W, 3), got the shape {image.shape}; {hint}")
    if image.dtype != np.uint8:
        raise ValueError(
            f"image must hold uint8 values from 0 to 255, got {image.dtype}; scale it to that "
            "range and convert it with .astype(np.uint8)"
        )
    if 0 in image.shape:
        raise ValueError(f"image is empty, its shape is {image.shape}")
