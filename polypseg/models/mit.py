"""The Mix Transformer (MiT) encoder of SegFormer, built from timm's PVTv2."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import timm
import torch
from torch import Tensor, nn

from polypseg.checkpoint import CheckpointError, load_weights
from polypseg.config_limits import ENCODERS

# timm's PVTv2 differs from MiT only in the width of the first two stages' MLPs.
_MLP_RATIOS = (4, 4, 4, 4)


class MixTransformer(nn.Module):
    """The four stages of MiT-B0..B5 (Xie et al., SegFormer, NeurIPS 2021), without a head.

    Stage outputs are (B, C_i, H / 2^(i+1), W / 2^(i+1)) for i = 1..4; for B0 C = 32, 64, 160, 256.
    Nothing in it is random at training time, because it serves inside a fixed point.

    Args:
        size: one of "b0" ... "b5".
    """

    def __init__(self, size: str = "b0"):
        super().__init__()
        if size not in ENCODERS:
            raise ValueError(f"encoder must be one of {', '.join(ENCODERS)}, got {size!r}")
        net: Any = timm.create_model(f"pvt_v2_{size}", mlp_ratios=_MLP_RATIOS, num_classes=0)
        self.patch_embed: nn.Module = net.patch_embed
        self.stages = nn.ModuleList(net.stages)
        self.channels: tuple[int, ...] = tuple(info["num_chs"] for info in net.feature_info)

    def forward(self, images: Tensor) -> list[Tensor]:
        """The stage outputs of (B, 3, H, W), fine to coarse."""
        x = self.patch_embed(images)
        outputs = []
        for stage in self.stages:
            x = stage(x)
            outputs.append(x)
        return outputs


def load_encoder_weights(encoder: MixTransformer, path: Path) -> None:
    """Load a SegFormer encoder (its own key names; safetensors, or a weights-only .pth) completely.

    Keys of a segmentation or classification head are ignored; everything else must fit.

    Raises:
        CheckpointError: the file cannot be read safely, or keys or shapes do not fit; nothing is
            loaded.
    """
    tensors = {}
    for key, value in _read(path).items():
        name = key.removeprefix("module.").removeprefix("backbone.")
        if not name.startswith(("head.", "decode_head.", "auxiliary_head.")):
            tensors[_timm_name(name)] = value
    own = encoder.state_dict()
    missing = [_segformer_name(key) for key in own if key not in tensors]
    unknown = [_segformer_name(key) for key in tensors if key not in own]
    shapes = [
        f"{_segformer_name(key)} (file {tuple(tensors[key].shape)}, model {tuple(own[key].shape)})"
        for key in own
        if key in tensors and own[key].shape != tensors[key].shape
    ]
    faults = {"missing": missing, "unknown": unknown, "of another shape": shapes}
    if any(faults.values()):
        lines = [
            f"  {len(keys)} keys {fault}: {', '.join(keys[:8])}{', ...' if len(keys) > 8 else ''}"
            for fault, keys in faults.items()
            if keys
        ]
        raise CheckpointError(
            f"{path}: not the weights of this SegFormer encoder; nothing was loaded\n"
            + "\n".join(lines)
        )
    encoder.load_state_dict(tensors)


def _read(path: Path) -> dict[str, Tensor]:
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file of encoder weights")
    if path.suffix == ".safetensors":
        return load_weights(path)[0]
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many types here; each means the same to the user
        raise CheckpointError(
            f"{path}: not a file of plain weights ({type(error).__name__}); "
            "give a .safetensors file or a .pth that holds a state dict"
        ) from error
    if isinstance(content, dict) and isinstance(content.get("state_dict"), dict):
        content = content["state_dict"]
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise CheckpointError(f"{path}: it holds no state dict (a dict of names and tensors)")
    return content


def _timm_name(name: str) -> str:
    """A SegFormer key as timm's PVTv2 calls it; an unknown key stays as it is."""
    name = name.replace("mlp.dwconv.dwconv.", "mlp.dwconv.")
    if name.startswith("patch_embed1."):
        return name.replace("patch_embed1.", "patch_embed.", 1)
    for pattern, part in (
        (r"patch_embed([2-4])\.", "downsample."),
        (r"block([1-4])\.", "blocks."),
        (r"norm([1-4])\.", "norm."),
    ):
        match = re.match(pattern, name)
        if match:
            return f"stages.{int(match[1]) - 1}.{part}{name[match.end() :]}"
    return name


def _segformer_name(name: str) -> str:
    """The inverse of `_timm_name`, so that messages name the keys that the file uses."""
    name = name.replace("mlp.dwconv.", "mlp.dwconv.dwconv.")
    if name.startswith("patch_embed."):
        return name.replace("patch_embed.", "patch_embed1.", 1)
    match = re.match(r"stages\.(\d)\.(downsample|blocks|norm)\.", name)
    if not match:
        return name
    part = {"downsample": "patch_embed", "blocks": "block", "norm": "norm"}[match[2]]
    return f"{part}{int(match[1]) + 1}.{name[match.end() :]}"
