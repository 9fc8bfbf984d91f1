"""Learning rates, parameter groups, precision and image scales of a training."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from polypseg.config import ImplicitConfig, PhaseConfig
from polypseg.models import STRIDE


def parameter_groups(model: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """Weights with decay; biases and normalisation, which it would only distort, without."""
    decayed = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() <= 1]
    return [
        {"params": decayed, "weight_decay": weight_decay},
        {"params": others, "weight_decay": 0.0},
    ]


def learning_rate(settings: PhaseConfig, done: float) -> float:
    """Linear warm-up, then cosine decay; ``done`` is the share of the updates that are over.

    The explicit first epochs of an implicit phase come before that, with a linear decay of their
    own.
    """
    if isinstance(settings, ImplicitConfig) and settings.warm_epochs:
        warm = min(1.0, settings.warm_epochs / settings.epochs)
        if done < warm:
            return settings.warm_lr + (settings.final_lr - settings.warm_lr) * done / warm
        done = (done - warm) / max(1e-9, 1 - warm)
    if done < settings.warmup:
        # The floor lets the first update move something; a warm-up may be shorter than it.
        return settings.lr * min(1.0, max(done, 1e-3) / settings.warmup)
    left = (done - settings.warmup) / max(1e-9, 1 - settings.warmup)
    swing = (1 + math.cos(math.pi * min(1.0, left))) / 2
    return settings.final_lr + (settings.lr - settings.final_lr) * swing


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Autocast to ``precision`` ("fp32" switches it off)."""
    dtype = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    return torch.autocast(device.type, dtype=dtype, enabled=dtype is not None)


def rescale(batch: dict[str, Any], scale: float, device: torch.device) -> tuple[Tensor, Tensor]:
    """Images and masks of a batch at a scale, sides rounded to what the model takes."""
    images = batch["image"].to(device, non_blocking=True)
    masks = batch["mask"].to(device, non_blocking=True)
    side = max(STRIDE, round(images.shape[-1] * scale / STRIDE) * STRIDE)
    if side == images.shape[-1]:
        return images, masks
    images = F.interpolate(images, size=(side, side), mode="bilinear", antialias=True)
    return images, F.interpolate(masks, size=(side, side), mode="nearest-exact")
