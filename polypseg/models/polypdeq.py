"""PolypDEQ: a UNet around a Mix Transformer, iterated to its fixed point."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from deqsolvers import DEQ
from polypseg.models.base import ImplicitModel, check_sides
from polypseg.models.decoder import UNetDecoder, conv_block
from polypseg.models.mit import MixTransformer

INJECTIONS = ("add", "res")


class ResidualInjection(nn.Module):
    """Injects image features e into the state z by a residual block: z + e + block([z, e])."""

    def __init__(self, channels: int):
        super().__init__()
        self.block = nn.Sequential(
            conv_block(2 * channels, channels),
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.GroupNorm(min(8, channels // 4), channels),
        )

    def forward(self, z: Tensor, e: Tensor) -> Tensor:
        return z + e + self.block(torch.cat([z, e], dim=1))


class PolypF(nn.Module):
    """The iterated map f(z, e): inject e into z, encoder stages 2 to 4, UNet decoder.

    z, e and the result are (B, C1, H/4, W/4). Source: HyperPolypDEQ, section 4.1 and figure 1.
    """

    def __init__(self, encoder: MixTransformer, injection: str):
        super().__init__()
        if injection not in INJECTIONS:
            raise ValueError(f"injection must be one of {', '.join(INJECTIONS)}, got {injection!r}")
        self.injection = None if injection == "add" else ResidualInjection(encoder.channels[0])
        self.stages = nn.ModuleList(encoder.stages[1:])
        self.decoder = UNetDecoder(encoder.channels)

    def maps(self, z: Tensor, e: Tensor) -> list[Tensor]:
        """What the decoder sees, fine to coarse: the injected map and those of stages 2 to 4."""
        found = [z + e if self.injection is None else self.injection(z, e)]
        for stage in self.stages:
            found.append(stage(found[-1]))
        return found

    def forward(self, z: Tensor, e: Tensor) -> Tensor:
        return self.decoder(self.maps(z, e))


class PolypDEQ(ImplicitModel):
    """Stage 1 runs once an image and gives e; z* = f(z*, e) is solved from zero; a head reads z*.

    Args:
        encoder: size of the Mix Transformer, "b0" ... "b5".
        injection: "add" (z + e) or "res" (a residual block on both).
        classes: output channels; 1 is a binary logit.

    ``deq`` is the `DEQ` layer around f: replace it by ``deq.with_solver(...)`` to solve
    differently.
    """

    def __init__(self, encoder: str = "b0", injection: str = "add", classes: int = 1):
        super().__init__()
        mit = MixTransformer(encoder)
        channels = mit.channels[0]
        self.patch_embed = mit.patch_embed
        self.first_stage = mit.stages[0]
        self.deq = DEQ(PolypF(mit, injection))
        # Outside f batch statistics do no harm.
        self.head = nn.Sequential(
            nn.Conv2d(channels, channels, 3, padding=1, bias=False),
            nn.BatchNorm2d(channels),
            nn.ReLU(),
            nn.Conv2d(channels, classes, 1),
        )
        self._encoder = (mit,)  # a tuple, because a module would be registered twice

    @property
    def encoder(self) -> MixTransformer:
        """The Mix Transformer that the model's stages belong to."""
        return self._encoder[0]

    def features(self, images: Tensor) -> Tensor:
        """Stage-1 features e (B, C1, H/4, W/4) of normalised images (B, 3, H, W)."""
        check_sides(images)
        return self.first_stage(self.patch_embed(images))

    def zero_state(self, e: Tensor) -> Tensor:
        """Zeros of the shape of e."""
        return torch.zeros_like(e)

    def read_out(self, z: Tensor) -> Tensor:
        """Logits (B, classes, H, W) from a state (B, C1, H/4, W/4)."""
        return F.interpolate(self.head(z), scale_factor=4, mode="bilinear", align_corners=False)
