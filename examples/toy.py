"""A DEQ on a toy problem: learn the fixed point of a known map from its answers.

Run: python examples/toy.py
"""

import torch
from torch import nn

from deqsolvers import DEQ, Anderson, spectral_radius

FEATURES = 10


def main() -> float:
    """Train for some seconds and return the last loss."""
    torch.manual_seed(0)
    truth = 0.7 * torch.linalg.qr(torch.randn(FEATURES, FEATURES))[0]
    x = torch.randn(256, FEATURES)
    answers = torch.linalg.solve(torch.eye(FEATURES) - truth, x.T).T  # of z = truth z + x

    layer = nn.Linear(FEATURES, FEATURES, bias=False)
    nn.init.normal_(layer.weight, std=0.05)
    deq = DEQ(lambda z, x: layer(z) + x, Anderson(memory=5), tol=1e-4, max_steps=60)
    optimizer = torch.optim.Adam(layer.parameters(), lr=1e-2)
    for step in range(200):
        z, solution = deq(x)
        loss = (z - answers).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        if step % 40 == 0 or step == 199:
            radius = spectral_radius(deq.f, z, (x,)).max()
            print(
                f"step {step:3}: loss {loss:.5f}, evaluations {solution.calls}, "
                f"spectral radius {radius:.2f} (the truth: 0.70)"
            )
    error = (layer.weight - truth).norm() / truth.norm()
    print(f"relative error of the matrix: {error:.1e}")
    return loss.item()


if __name__ == "__main__":
    main()
