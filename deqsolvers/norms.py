"""Norms of states of every size that their precision can hold."""

from __future__ import annotations

import torch
from torch import Tensor

from deqsolvers.modes import may_look

# Norms from which on the squares of all that counts in them are normal numbers.
SQUARES_FROM = {torch.float32: 1e-15, torch.float64: 1e-145}


def safe_row_norms(x: Tensor) -> Tensor:
    """(b,) Euclidean norms that neither overflow nor vanish where the entries do not."""
    norms = torch.linalg.vector_norm(x, dim=1)
    plain = (norms > SQUARES_FROM[x.dtype]) & (norms < torch.inf)
    # The long way costs several times as much on a CPU, but there a look at the norms is free.
    if may_look(x) and bool(plain.all()):
        return norms
    if x.dtype == torch.float32:
        safe = torch.linalg.vector_norm(x, dim=1, dtype=torch.float64).to(x.dtype)
    else:
        largest = torch.linalg.vector_norm(x.detach(), ord=torch.inf, dim=1, keepdim=True)
        scale = torch.where((largest > 0) & (largest < torch.inf), largest, 1.0)
        safe = torch.linalg.vector_norm(x / scale, dim=1) * scale.squeeze(1)
    # Row by row: the two round differently, which no sample may owe to its batch mates.
    return torch.where(plain, norms, safe)
