"""Our solvers for users of torchdeq: `register` them, and change one string.

::

    from deqsolvers.interop.torchdeq import register

    register()
    deq = torchdeq.get_deq(f_solver="deqsolvers_anderson", b_solver="deqsolvers_broyden", ift=True)

torchdeq's wishes are kept: ``max_iter`` counts evaluations of f, the tolerance is absolute unless
``stop_mode`` is "rel", and samples stay in the batch, because its f closes over their inputs.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from deqsolvers.fixed_point import StepInfo, fixed_point
from deqsolvers.solution import Solution
from deqsolvers.solvers import Anderson, AndersonTypeI, Broyden, NewtonKrylov, Picard, Solver
from deqsolvers.state import Layout

try:
    from torchdeq.solver import register_solver
    from torchdeq.solver.stat import SolverStat
except ImportError as error:
    raise ImportError(
        "deqsolvers.interop.torchdeq needs torchdeq; install it with: pip install torchdeq"
    ) from error


def register() -> None:
    """Make our solvers known to torchdeq, for both its forward and its backward pass.

    - "deqsolvers_anderson", with torchdeq's options ``m`` (pairs kept) and ``tau`` (damping);
    - "deqsolvers_anderson_type_one", which torchdeq has not, with the same;
    - "deqsolvers_broyden", with ``LBFGS_thres`` (rank-one terms kept);
    - "deqsolvers_newton_krylov", with ``m`` (dimension of the Krylov space);
    - "deqsolvers_picard", with ``tau``.

    All know ``max_iter``, ``tol``, ``stop_mode``, ``indexing`` and ``return_final`` too. Any other
    option, which torchdeq's own solvers would ignore, is a TypeError that lists these and says what
    to do instead of one of torchdeq's.
    """
    for solver in (_anderson, _anderson_type_one, _broyden, _newton_krylov, _picard):
        name = f"deqsolvers{solver.__name__}"
        register_solver(name, _checked(name, solver))


def info_from_solution(solution: Solution, relative: bool = True) -> dict[str, Tensor]:
    """torchdeq's ``info`` for a `Solution` of ours.

    The keys of the other kind of residual, which a solution does not know, and "sradius" hold -1,
    as torchdeq itself marks what is unknown. After a sample was decided its trace repeats its
    result, as in torchdeq. The trace has a column for each evaluation; torchdeq's first column,
    which holds no residual, and its padding up to ``max_iter`` are left out.

    Args:
        solution: if solved with ``trace=True``, "abs_trace" or "rel_trace" (B, calls) is complete;
            otherwise it holds the final residuals only.
        relative: as given to the solve; says which kind of residual the solution holds.
    """
    trace = solution.residual.unsqueeze(0) if solution.trace is None else solution.trace
    trace = torch.where(trace.isnan(), solution.residual, trace)
    kind = "rel" if relative else "abs"
    return SolverStat(
        {
            f"{kind}_lowest": solution.residual,
            f"{kind}_trace": trace.t(),
            # torchdeq counts evaluations, from 1.
            "nstep": (solution.steps + 1).clamp_max(solution.calls).to(solution.residual),
        }
    )


_Result = tuple[Any, list[Any], dict[str, Tensor]]

# What to do instead of torchdeq's options, where a solver of ours does not have them.
_INSTEAD = {
    "lam": "leave lam out: regularisation is relative to the scale of f here and needs no tuning",
    "ls": "leave ls out: of ours only deqsolvers_newton_krylov has a line search, and always",
    "m": "deqsolvers_broyden calls its memory LBFGS_thres, and deqsolvers_picard has none",
    "LBFGS_thres": "the others call their memory m, and deqsolvers_picard has none",
    "tau": "to damp, take deqsolvers_anderson, deqsolvers_anderson_type_one or deqsolvers_picard",
}


def _checked(name: str, solver: Callable[..., _Result]) -> Callable[..., _Result]:
    """``solver``, which torchdeq knows by ``name``, with a TypeError for options it has not."""
    signatures = inspect.signature(solver), inspect.signature(_solve)
    accepted = [
        parameter.name
        for signature in signatures
        for parameter in signature.parameters.values()
        if parameter.kind is parameter.KEYWORD_ONLY
    ]

    def run(func: Callable[[Any], Any], x0: Any, **options: Any) -> _Result:
        unknown = [option for option in options if option not in accepted]
        if unknown:
            advice = [_INSTEAD[option] for option in unknown if option in _INSTEAD]
            raise TypeError(
                f"{name} has no option {' or '.join(map(repr, unknown))}; it takes "
                + "; ".join([", ".join(accepted), *advice])
            )
        return solver(func, x0, **options)

    return run


def _anderson(
    func: Callable[[Any], Any], x0: Any, *, m: int = 6, tau: float = 1.0, **options: Any
) -> _Result:
    # m pairs have m - 1 differences.
    return _solve(Anderson(memory=max(m - 1, 1), damping=tau), func, x0, **options)


def _anderson_type_one(
    func: Callable[[Any], Any], x0: Any, *, m: int = 6, tau: float = 1.0, **options: Any
) -> _Result:
    return _solve(AndersonTypeI(memory=max(m - 1, 1), damping=tau), func, x0, **options)


def _broyden(
    func: Callable[[Any], Any], x0: Any, *, LBFGS_thres: int | None = None, **options: Any
) -> _Result:
    solver = Broyden() if LBFGS_thres is None else Broyden(memory=LBFGS_thres)
    return _solve(solver, func, x0, **options)


def _newton_krylov(func: Callable[[Any], Any], x0: Any, *, m: int = 20, **options: Any) -> _Result:
    return _solve(NewtonKrylov(memory=m), func, x0, **options)


def _picard(func: Callable[[Any], Any], x0: Any, *, tau: float = 1.0, **options: Any) -> _Result:
    return _solve(Picard(damping=tau), func, x0, **options)


def _solve(
    solver: Solver,
    func: Callable[[Any], Any],
    x0: Any,
    *,
    max_iter: int = 50,
    tol: float = 1e-3,
    stop_mode: str = "abs",
    indexing: Sequence[int] | None = None,
    return_final: bool = False,
) -> _Result:
    """Solve by torchdeq's conventions; returns the state, the states at ``indexing``, the info."""
    if stop_mode not in ("abs", "rel"):
        raise ValueError(f"stop_mode must be 'abs' or 'rel', got {stop_mode!r}")
    relative = stop_mode == "rel"
    # A single evaluation cannot both make a step and measure it.
    final = return_final or int(max_iter) == 1
    layout = Layout.of(x0, "x0")
    sizes: list[Tensor] = []  # ||f(z)|| of every evaluation, to turn one residual into the other
    path = _Path(layout, indexing or (), final)

    def f(z: Any) -> Any:
        fz = func(z)
        sizes.append(torch.linalg.vector_norm(layout.flatten(fz), dim=1))
        return fz

    solution = fixed_point(
        f,
        x0,
        solver=solver,
        tol=None if final else tol,
        max_steps=int(max_iter) if final else int(max_iter) - 1,
        relative=relative,
        final="last" if final else "best",
        drop_converged=False,
        trace=True,
        callback=path.watch,
    )
    assert solution.trace is not None
    size = torch.stack(sizes).clamp_min(torch.finfo(layout.dtype).tiny)
    other = solution.trace * size if relative else solution.trace / size
    info = info_from_solution(_with_trace(solution, solution.trace), relative)
    others = info_from_solution(_with_trace(solution, other), not relative)
    kind = "abs" if relative else "rel"
    info.update({key: value for key, value in others.items() if key.startswith(kind)})
    return solution.z, path.states(solution), info


def _with_trace(solution: Solution, trace: Tensor) -> Solution:
    """The solution in terms of the residuals in ``trace``; the lowest count, as in torchdeq."""
    lowest = torch.where(trace.isnan(), torch.inf, trace).amin(0)
    return replace(solution, trace=trace, residual=lowest)


class _Path:
    """Notes the best (or, if ``final``, the current) states at the evaluations in ``indexing``."""

    def __init__(self, layout: Layout, indexing: Sequence[int], final: bool):
        self.layout = layout
        self.indexing = indexing
        self.final = final
        self.found: dict[int, Any] = {}
        self.best: tuple[Tensor, Tensor] | None = None  # states, and their residuals

    def watch(self, info: StepInfo) -> None:
        if not self.indexing:
            return
        z, residual = self.layout.flatten(info.z), info.residual
        if self.best is not None and not self.final:
            best_z, best_residual = self.best
            # A first residual of NaN is beaten by any number.
            better = (residual < best_residual) | best_residual.isnan()
            z = torch.where(better.unsqueeze(1), z, best_z)
            residual = torch.where(better, residual, best_residual)
        self.best = z, residual
        if info.step + 1 in self.indexing:
            self.found[info.step + 1] = self.layout.unflatten(z)

    def states(self, solution: Solution) -> list[Any]:
        """One state for each index; from the last evaluation on, that is the result."""
        return [
            self.found[index] if index < solution.calls else solution.z for index in self.indexing
        ]
