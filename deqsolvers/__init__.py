"""Fixed points inside networks: solvers, learned solvers and implicit gradients for PyTorch."""

from deqsolvers.backward import Backward, Implicit, JacobianFree, Phantom, Shine, Unrolled
from deqsolvers.deq import DEQ
from deqsolvers.fixed_point import StepInfo, fixed_point
from deqsolvers.hypersolver.fit import FitEpoch, LossWeights, fit_hypersolver
from deqsolvers.regularization import jacobian_regularizer
from deqsolvers.solution import ConvergenceError, ConvergenceWarning, Solution, Status
from deqsolvers.solvers import Anderson, Broyden, Memory, Picard, Solver
from deqsolvers.solvers.hyper import HyperSolver

__version__ = "0.1.0"

__all__ = [
    "DEQ",
    "Anderson",
    "Backward",
    "Broyden",
    "ConvergenceError",
    "ConvergenceWarning",
    "FitEpoch",
    "HyperSolver",
    "Implicit",
    "JacobianFree",
    "LossWeights",
    "Memory",
    "Phantom",
    "Picard",
    "Shine",
    "Solution",
    "Solver",
    "Status",
    "StepInfo",
    "Unrolled",
    "fit_hypersolver",
    "fixed_point",
    "jacobian_regularizer",
]
