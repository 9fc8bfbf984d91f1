"""Scores of a model on held-out images while it trains."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from deqsolvers import spectral_radius
from polypseg.data import CLASS_NAMES, Pair, PolypDataset, batches, read_mask
from polypseg.metrics import resize_logits, score_masks
from polypseg.models import ImplicitModel, Prediction

CONVERGED = 1e-3  # the residual that counts as converged in the tables
RADIUS_IMAGES = 8  # for the spectral radius, which costs 30 backward passes of f


class Validation:
    """Held-out pairs, read once.

    Args:
        pairs: the files.
        size: side of the images that the network sees.
        batch: images predicted together.
        classes: of the masks, 1 or 3.
    """

    def __init__(self, pairs: Sequence[Pair], size: int, batch: int, classes: int = 1):
        self.dataset = PolypDataset(pairs, size, train=False, seed=0, classes=classes)
        self.masks = [torch.from_numpy(read_mask(pair.mask, classes)) for pair in pairs]
        self.batch = batch

    @torch.no_grad()
    def measure(
        self, predict: Callable[[Tensor], Prediction], device: torch.device
    ) -> dict[str, float]:
        """Mean per-image Dice and IoU at the masks' own resolution, and how the solves went.

        Returns:
            "dice" and "iou"; of an implicit model also "residual" (median), "evaluations" (mean)
            and "converged" (share of images with a residual of at most 1e-3). With three classes
            "dice" and "iou" are the means of the two polyp classes, "dice_neoplastic" and
            "dice_non_neoplastic" those of each, and "dice_polyp" counts both as one.
        """
        rows: list[dict[str, float]] = []
        residuals: list[Tensor] = []
        evaluations: list[Tensor] = []
        for batch in batches(self.dataset, self.batch, shuffle=False, seed=0, epoch=0):
            prediction = predict(batch["image"].to(device))
            for logits, index in zip(prediction.logits.cpu(), batch["index"].tolist(), strict=True):
                rows.append(score(logits, self.masks[index]))
            if prediction.solution is not None:
                residuals.append(prediction.solution.residual.cpu())
                evaluations.append(prediction.solution.evaluations.cpu())
        scores = {key: sum(row[key] for row in rows) / len(rows) for key in rows[0]}
        if residuals:
            residual = torch.cat(residuals)
            scores["residual"] = residual.median().item()
            scores["converged"] = (residual <= CONVERGED).float().mean().item()
            scores["evaluations"] = torch.cat(evaluations).float().mean().item()
        return scores

    def spectral_radius(self, model: ImplicitModel, device: torch.device) -> float:
        """Mean spectral radius of df/dz at z* over a few of the pairs, from all over the list.

        Near 1, classic solvers need many evaluations; above, they may find no fixed point.
        """
        chosen = range(0, len(self.dataset), max(1, len(self.dataset) // RADIUS_IMAGES))
        images = torch.stack([self.dataset[index]["image"] for index in chosen[:RADIUS_IMAGES]])
        with torch.no_grad():
            e = model.features(images.to(device))
            z = model.deq.solve(e, z0=model.zero_state(e)).z
        generator = torch.Generator(device).manual_seed(0)
        return float(spectral_radius(model.deq.f, z, (e,), generator=generator).mean())


def score(logits: Tensor, truth: Tensor) -> dict[str, float]:
    """Dice and IoU of one image, keys as in `Validation.measure`.

    Args:
        logits: (K, h, w) at any size; one binary logit or one of each class.
        truth: (H, W) class numbers.
    """
    height, width = truth.shape
    resized = resize_logits(logits, (height, width))
    if len(resized) == 1:
        whole = score_masks(resized[0] > 0, truth > 0)
        return {"dice": whole.dice, "iou": whole.iou}
    predicted = resized.argmax(0)
    names = CLASS_NAMES[1:]
    each = [score_masks(predicted == number, truth == number) for number in (1, 2)]
    return {
        "dice": sum(one.dice for one in each) / len(each),
        "iou": sum(one.iou for one in each) / len(each),
        **{f"dice_{name}": one.dice for name, one in zip(names, each, strict=True)},
        "dice_polyp": score_masks(predicted > 0, truth > 0).dice,
    }
