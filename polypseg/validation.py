"""Scores of a model on held-out images while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from polypseg.data import Pair, PolypDataset, batches, read_mask
from polypseg.metrics import resize_logits, score_masks
from polypseg.models import Prediction

CONVERGED = 1e-3  # the residual that counts as converged in the tables


class Validation:
    """Held-out pairs, read once.

    Args:
        pairs: the files.
        size: side of the images that the network sees.
        batch: images predicted together.
    """

    def __init__(self, pairs: Sequence[Pair], size: int, batch: int):
        self.dataset = PolypDataset(pairs, size, train=False, seed=0)
        self.masks = [torch.from_numpy(read_mask(pair.mask)).bool() for pair in pairs]
        self.batch = batch

    @torch.no_grad()
    def measure(
        self, predict: Callable[[Tensor], Prediction], device: torch.device
    ) -> dict[str, float]:
        """Mean per-image Dice and IoU at the masks' own resolution, and how the solves went.

        Returns:
            "dice" and "iou"; of an implicit model also "residual" (median), "evaluations" (mean)
            and "converged" (share of images with a residual of at most 1e-3).
        """
        dice, iou = [], []
        residuals: list[Tensor] = []
        evaluations: list[Tensor] = []
        for batch in batches(self.dataset, self.batch, shuffle=False, seed=0, epoch=0):
            prediction = predict(batch["image"].to(device))
            for logits, index in zip(prediction.logits.cpu(), batch["index"].tolist(), strict=True):
                truth = self.masks[index]
                height, width = truth.shape
                score = score_masks(resize_logits(logits, (height, width))[0] > 0, truth)
                dice.append(score.dice)
                iou.append(score.iou)
            if prediction.solution is not None:
                residuals.append(prediction.solution.residual.cpu())
                evaluations.append(prediction.solution.evaluations.cpu())
        scores = {"dice": sum(dice) / len(dice), "iou": sum(iou) / len(iou)}
        if residuals:
            residual = torch.cat(residuals)
            scores["residual"] = residual.median().item()
            scores["converged"] = (residual <= CONVERGED).float().mean().item()
            scores["evaluations"] = torch.cat(evaluations).float().mean().item()
        return scores
