"""Fixed points inside networks: solvers, learned solvers and implicit gradients for PyTorch."""

from deqsolvers.backward import Backward, Implicit, JacobianFree, Phantom, Shine, Unrolled
from deqsolvers.correction import fixed_point_correction
from deqsolvers.deq import DEQ
from deqsolvers.dropout import VariationalDropout, fixed_masks
from deqsolvers.fixed_point import StepInfo, fixed_point
from deqsolvers.hypersolver.fit import FitEpoch, fit_hypersolver
from deqsolvers.hypersolver.losses import PUBLISHED_WEIGHTS, LossWeights
from deqsolvers.hypersolver.saving import load_hypersolver, save_hypersolver
from deqsolvers.normalization import cached_weights
from deqsolvers.regularization import jacobian_regularizer, spectral_radius
from deqsolvers.solution import ConvergenceError, ConvergenceWarning, Solution, Status
from deqsolvers.solvers import (
    Anderson,
    AndersonTypeI,
    Broyden,
    HandOver,
    Memory,
    NewtonKrylov,
    Picard,
    Solver,
)
from deqsolvers.solvers.hyper import FittedOn, HyperSolver

__version__ = "0.1.0"

__all__ = [
    "DEQ",
    "PUBLISHED_WEIGHTS",
    "Anderson",
    "AndersonTypeI",
    "Backward",
    "Broyden",
    "ConvergenceError",
    "ConvergenceWarning",
    "FitEpoch",
    "FittedOn",
    "HandOver",
    "HyperSolver",
    "Implicit",
    "JacobianFree",
    "LossWeights",
    "Memory",
    "NewtonKrylov",
    "Phantom",
    "Picard",
    "Shine",
    "Solution",
    "Solver",
    "Status",
    "StepInfo",
    "Unrolled",
    "VariationalDropout",
    "cached_weights",
    "fit_hypersolver",
    "fixed_masks",
    "fixed_point",
    "fixed_point_correction",
    "jacobian_regularizer",
    "load_hypersolver",
    "save_hypersolver",
    "spectral_radius",
]
