"""Train the same DEQ with exact, phantom, SHINE and Jacobian-free gradients and compare.

Run: python examples/backward.py
"""

import time

import torch
from torch import nn

from deqsolvers import DEQ, Anderson, Broyden, Phantom

FEATURES = 24


def train(backward, solver) -> tuple[float, float]:
    """The last loss and the seconds of a short training."""
    torch.manual_seed(0)
    state, head = nn.Linear(FEATURES, FEATURES), nn.Linear(FEATURES, 1)
    deq = DEQ(lambda z, x: torch.tanh(0.6 * state(z) + x), solver, backward=backward, tol=1e-4)
    optimizer = torch.optim.Adam([*state.parameters(), *head.parameters()], lr=1e-2)
    x = torch.randn(128, FEATURES)
    target = (x[:, :1] * x[:, 1:2]).tanh()
    started = time.perf_counter()
    for _ in range(60):
        loss = (head(deq(x)[0]) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return loss.item(), time.perf_counter() - started


def main() -> dict[str, float]:
    """The last loss by method."""
    methods = {
        "implicit": ("implicit", Anderson()),
        "phantom": (Phantom(steps=3, damping=0.8), Anderson()),
        "shine": ("shine", Broyden(memory=50)),
        "jacobian-free": ("jacobian-free", Anderson()),
    }
    losses = {}
    for name, (backward, solver) in methods.items():
        losses[name], seconds = train(backward, solver)
        print(f"{name:14} loss {losses[name]:.4f} after {seconds:.1f} s")
    return losses


if __name__ == "__main__":
    main()
