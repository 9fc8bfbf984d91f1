"""One file a method; each is hyper-parameters plus `init` and `step` over an explicit memory."""

from deqsolvers.solvers.anderson import Anderson
from deqsolvers.solvers.anderson_type_one import AndersonTypeI
from deqsolvers.solvers.base import Memory, Solver
from deqsolvers.solvers.broyden import Broyden
from deqsolvers.solvers.hand_over import HandOver
from deqsolvers.solvers.history import History
from deqsolvers.solvers.newton_krylov import NewtonKrylov
from deqsolvers.solvers.picard import Picard

__all__ = [
    "Anderson",
    "AndersonTypeI",
    "Broyden",
    "HandOver",
    "History",
    "Memory",
    "NewtonKrylov",
    "Picard",
    "Solver",
]
