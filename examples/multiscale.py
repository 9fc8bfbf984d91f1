"""A state with two scales, as in MDEQ: where is the bright square in a noisy image?

Run: python examples/multiscale.py
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deqsolvers import DEQ, jacobian_regularizer


class TwoScales(nn.Module):
    """f on a tuple of two maps: a layer for each, then the scales exchange what they know."""

    def __init__(self, fine: int, coarse: int):
        super().__init__()
        self.fine = nn.Conv2d(fine, fine, 3, padding=1)
        self.coarse = nn.Conv2d(coarse, coarse, 3, padding=1)
        self.down = nn.Conv2d(fine, coarse, 3, stride=2, padding=1)
        self.up = nn.Conv2d(coarse, fine, 1)

    def forward(self, z: tuple[Tensor, Tensor], x: Tensor) -> tuple[Tensor, Tensor]:
        fine, coarse = z
        raised = F.interpolate(self.up(coarse), size=fine.shape[-2:])
        new_fine = torch.tanh(x + 0.3 * (self.fine(fine) + raised))
        return new_fine, torch.tanh(0.5 * self.down(fine) + 0.3 * self.coarse(coarse))


class Segmenter(nn.Module):
    def __init__(self, fine: int = 8, coarse: int = 16):
        super().__init__()
        self.stem = nn.Conv2d(1, fine, 5, padding=2)

        def start(x: Tensor) -> tuple[Tensor, Tensor]:
            half = (side // 2 for side in x.shape[-2:])
            return torch.zeros_like(x), x.new_zeros(len(x), coarse, *half)

        self.deq = DEQ(TwoScales(fine, coarse), backward="phantom", z0=start, tol=1e-3)
        self.head = nn.Conv2d(fine, 1, 1)

    def forward(self, images: Tensor):
        x = self.stem(images)
        z, solution = self.deq(x)
        return self.head(z[0]), x, solution


def draw(count: int) -> tuple[Tensor, Tensor]:
    masks = torch.zeros(count, 1, 24, 24)
    for mask, (top, left) in zip(masks, torch.randint(2, 14, (count, 2)), strict=True):
        mask[:, top : top + 8, left : left + 8] = 1
    return masks + 0.7 * torch.randn_like(masks), masks


def main() -> float:
    """Train for some seconds and return the Dice on new images."""
    torch.manual_seed(0)
    model = Segmenter()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    for step in range(40):
        images, masks = draw(16)
        logits, x, solution = model(images)
        loss = F.binary_cross_entropy_with_logits(logits, masks)
        regularizer = jacobian_regularizer(model.deq.f, solution.z, (x,))  # keeps solves short
        optimizer.zero_grad()
        (loss + 2 * regularizer).backward()
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step:2}: loss {loss:.3f}, evaluations {solution.calls}")
    images, masks = draw(64)
    found = model(images)[0] > 0
    dice = 2 * (found * masks).sum() / (found.sum() + masks.sum())
    print(f"Dice on new images: {dice:.3f}")
    return dice.item()


if __name__ == "__main__":
    main()
