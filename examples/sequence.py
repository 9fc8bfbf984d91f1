"""A DEQ on sequences: one attention layer, repeated until it settles, adds up what it reads.

Run: python examples/sequence.py
"""

import torch
from torch import Tensor, nn

from deqsolvers import DEQ, Anderson, jacobian_regularizer

LENGTH, WIDTH = 12, 24


class Block(nn.Module):
    """f(z, x) on (B, T, C): causal attention and a layer norm; x is injected at every step."""

    def __init__(self) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(WIDTH, 2, batch_first=True)
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("mask", torch.ones(LENGTH, LENGTH).triu(1).bool())

    def forward(self, z: Tensor, x: Tensor) -> Tensor:
        mixed, _ = self.attention(z, z, x, attn_mask=self.mask, need_weights=False)
        return self.norm(x + 0.5 * mixed)


def main() -> float:
    """Train to predict the running mean of a sequence; return the last loss."""
    torch.manual_seed(0)
    embed, head = nn.Linear(1, WIDTH), nn.Linear(WIDTH, 1)
    deq = DEQ(Block(), Anderson(memory=5), tol=1e-3, max_steps=30)
    modules = nn.ModuleList([embed, deq, head])
    optimizer = torch.optim.Adam(modules.parameters(), lr=5e-3)
    count = torch.arange(1, LENGTH + 1).view(1, LENGTH, 1)
    for step in range(80):
        sequence = torch.randn(64, LENGTH, 1)
        x = embed(sequence)
        z, solution = deq(x)
        loss = (head(z) - sequence.cumsum(1) / count).square().mean()
        objective = loss
        if step % 4 == 0:  # keeps the solves short
            # Fused attention has no second derivative on a CPU.
            with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
                objective = loss + 0.1 * jacobian_regularizer(deq.f, solution.z, (x,))
        optimizer.zero_grad()
        objective.backward()
        optimizer.step()
        if step % 20 == 0 or step == 79:
            print(f"step {step:2}: loss {loss:.4f}, evaluations {solution.calls}")
    print(solution.describe())
    return loss.item()


if __name__ == "__main__":
    main()
