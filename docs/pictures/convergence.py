"""Draws the residuals of the solvers on three maps: python docs/pictures/convergence.py"""

import torch
from matplotlib.figure import Figure
from style import COLOURS, save

from deqsolvers import Anderson, Broyden, NewtonKrylov, Picard, fixed_point

SOLVERS = {
    "Picard": Picard(),
    "Anderson": Anderson(memory=5),
    "Broyden": Broyden(memory=20),
    "Newton-Krylov": NewtonKrylov(),
}
EVALUATIONS = 60


def maps() -> dict[str, torch.Tensor]:
    """Jacobians at zero of tanh maps, symmetric, by what they are called in the picture."""
    basis = torch.linalg.qr(torch.randn(100, 100, dtype=torch.float64))[0]

    def with_spectrum(low: float, high: float) -> torch.Tensor:
        return basis @ torch.diag(torch.linspace(low, high, 100, dtype=torch.float64)) @ basis.T

    return {
        "contracts: radius 0.7": with_spectrum(-0.4, 0.7),
        "near 1: radius 0.98": with_spectrum(-0.6, 0.98),
        "expands many directions: radius 2": with_spectrum(-2.0, 0.6),
    }


def main() -> None:
    torch.manual_seed(0)
    figure = Figure(figsize=(10, 3.3), layout="constrained")
    axes = figure.subplots(1, 3, sharey=True)
    for axis, (title, matrix) in zip(axes, maps().items(), strict=True):
        b = 0.1 * torch.randn(1, 100, dtype=torch.float64)
        for name, solver in SOLVERS.items():
            solution = fixed_point(
                lambda z, b, matrix=matrix: torch.tanh(z @ matrix + b),
                torch.zeros_like(b),
                (b,),
                solver=solver,
                tol=1e-10,
                max_steps=EVALUATIONS,
                trace=True,
            )
            residual = solution.trace[:, 0]
            count = range(1, len(residual) + 1)
            axis.semilogy(count, residual, color=COLOURS[name], label=name, linewidth=1.8)
        axis.set(title=title, xlabel="evaluations of f", xlim=(0, EVALUATIONS), ylim=(1e-10, 10))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("relative residual")
    axes[0].legend(frameon=False)
    save(figure, "convergence.svg")


if __name__ == "__main__":
    main()
