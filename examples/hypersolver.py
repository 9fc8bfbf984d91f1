"""Fit a HyperSolver to a DEQ and compare it with Anderson at equal numbers of evaluations.

Run: python examples/hypersolver.py
"""

import torch
from torch import Tensor, nn

from deqsolvers import DEQ, Anderson, HyperSolver, Solver, fit_hypersolver

FEATURES = 32


class Cell(nn.Module):
    """tanh(A z + x) with the eigenvalues of A between -0.9 and 0.9."""

    def __init__(self) -> None:
        super().__init__()
        basis = torch.linalg.qr(torch.randn(FEATURES, FEATURES))[0]
        self.register_buffer("matrix", basis @ torch.linspace(-0.9, 0.9, FEATURES).diag() @ basis.T)

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        return torch.tanh(z @ self.matrix + x)


def main() -> list[tuple[float, float]]:
    """Distances to z* after 1, 2 and 3 evaluations: (HyperSolver, Anderson)."""
    torch.manual_seed(0)
    deq = DEQ(Cell(), tol=1e-5, max_steps=100)  # stands for a trained one
    train = [0.5 * torch.randn(64, FEATURES) for _ in range(40)]
    x = 0.5 * torch.randn(256, FEATURES)
    goal = deq.solve(x).z

    hyper = HyperSolver.for_vectors(FEATURES, rank=16)
    fit_hypersolver(hyper, deq, train, epochs=6, steps=3, lr=5e-3, cache=True, progress=True)

    def distance(solver: Solver, steps: int) -> float:
        fast = deq.with_solver(solver, tol=None, max_steps=steps, final="last")
        return ((fast.solve(x).z - goal).norm(dim=1) / goal.norm(dim=1)).mean().item()

    distances = []
    for steps in (1, 2, 3):
        distances.append((distance(hyper, steps), distance(Anderson(), steps)))
        learned, classic = distances[-1]
        print(f"{steps} evaluations of f: HyperSolver {learned:.4f}, Anderson {classic:.4f}")
    return distances


if __name__ == "__main__":
    main()
