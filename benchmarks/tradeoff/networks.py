"""Small U-Nets with a norm of choice, MONAI's UNETR and SwinUNETR, and a SegFormer, whose keys can be held."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfix.layers import BatchRenorm2d, BatchRenorm3d

__all__ = ["PREPARED", "SETTINGS", "TRAINED", "Setting", "build"]

PREPARED = "batchrenorm, prepared"
"""BatchRenorm from scratch by the choices of prepare_finetune: momentum for the run's length, held at the end."""
TRAINED = ("instance", "instance tracked", "group", "batch", "batchrenorm", PREPARED)
"""What networks are trained with; everything else is made of these."""


@dataclass(frozen=True)
class Setting:
    """A network, the window it is trained and tiled with, and the length of its training.

    Attributes:
        ndim: axes in space.
        window: pixels per axis of a training patch, and of a window at prediction.
        halo: context that is cropped from a window; 0 on an axis where a window is as large as the image.
        sizes: batch sizes.
        steps: optimizer steps of a training run.
        dense: whether it takes images of any size.
        norms: of TRAINED, those that it is trained with.
        attends: whether it attends between all positions, so that its keys are what is held.
    """

    ndim: int
    window: tuple[int, ...]
    halo: tuple[int, ...]
    sizes: tuple[int, ...]
    steps: int
    dense: bool = True
    norms: tuple[str, ...] = TRAINED
    attends: bool = False


SETTINGS = {
    "unet 2D": Setting(2, (96, 96), (24, 24), (1, 2, 8), 200),
    "unet 3D": Setting(3, (30, 48, 48), (0, 12, 12), (2,), 80),
    "unetr 2D": Setting(2, (96, 96), (16, 16), (2,), 200, dense=False),
    # trained and cut as UNETR is
    "swinunetr 2D": Setting(
        2, (96, 96), (16, 16), (2,), 200, dense=False, norms=("instance", "group", "batch")
    ),
    "segformer 2D": Setting(2, (96, 96), (32, 32), (2,), 200, norms=("batch",), attends=True),
}


class UNet(nn.Module):
    """Two convolutions, each with norm and ReLU, per level; stride 2 ** (levels - 1)."""

    def __init__(self, ndim: int, widths: tuple[int, ...], norm: str) -> None:
        super().__init__()
        convolution = nn.Conv2d if ndim == 2 else nn.Conv3d
        transposed = nn.ConvTranspose2d if ndim == 2 else nn.ConvTranspose3d

        def block(entering: int, leaving: int) -> nn.Sequential:
            layers = list[nn.Module]()
            for channels in (entering, leaving):
                layers += [convolution(channels, leaving, 3, padding=1), made(norm, ndim, leaving), nn.ReLU()]
            return nn.Sequential(*layers)

        self.down = nn.ModuleList(block(a, b) for a, b in zip((1, *widths), widths, strict=False))
        self.pool = nn.MaxPool2d(2) if ndim == 2 else nn.MaxPool3d(2)
        pairs = list(pairwise(widths))[::-1]
        self.raised = nn.ModuleList(transposed(b, a, 2, stride=2) for a, b in pairs)
        self.up = nn.ModuleList(block(2 * a, a) for a, _ in pairs)
        self.head = convolution(widths[0], 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, 1, *space)."""
        skips = list[Tensor]()
        for level, block in enumerate(self.down):
            x = block(x if level == 0 else self.pool(x))
            skips.append(x)
        x = skips.pop()
        for raised, block in zip(self.raised, self.up, strict=True):
            x = block(torch.cat((skips.pop(), raised(x)), 1))
        return cast(Tensor, self.head(x))


def made(norm: str, ndim: int, channels: int) -> nn.Module:
    """Return an affine norm over c channels."""
    instance = nn.InstanceNorm2d if ndim == 2 else nn.InstanceNorm3d
    if norm.startswith("instance"):
        return instance(channels, affine=True, track_running_stats=norm.endswith("tracked"))
    if norm == "group":
        return nn.GroupNorm(4, channels)
    if norm == "batch":
        return nn.BatchNorm2d(channels) if ndim == 2 else nn.BatchNorm3d(channels)
    return (BatchRenorm2d if ndim == 2 else BatchRenorm3d)(channels)


def build(setting: str, norm: str) -> nn.Module:
    """Return a new network with one of TRAINED."""
    if setting == "unet 2D":
        return UNet(2, (8, 16, 32), norm)
    if setting == "unet 3D":
        return UNet(3, (8, 16), norm)
    return SegFormer() if setting == "segformer 2D" else _of_monai(setting, norm)


class SegFormer(nn.Module):
    """Two stages of a SegFormer (transformers), their logits stretched to the image; stride 8."""

    def __init__(self) -> None:
        super().__init__()
        from transformers import SegformerConfig, SegformerForSemanticSegmentation

        config = SegformerConfig(
            num_channels=1,
            num_labels=1,
            num_encoder_blocks=2,
            depths=[1, 1],
            sr_ratios=[4, 2],
            hidden_sizes=[32, 64],
            patch_sizes=[7, 3],
            strides=[4, 2],
            num_attention_heads=[1, 2],
            mlp_ratios=[2, 2],
            decoder_hidden_size=64,
        )
        self.inner = SegformerForSemanticSegmentation(config)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits, (N, 1, *space)."""
        return F.interpolate(self.inner(x).logits, scale_factor=4, mode="bilinear")


def _of_monai(setting: str, norm: str) -> nn.Module:
    from monai.networks.nets import UNETR, SwinUNETR

    names: dict[str, Any] = {
        "instance": ("instance", {"affine": True}),
        "instance tracked": ("instance", {"affine": True, "track_running_stats": True}),
        "group": ("group", {"num_groups": 4, "affine": True}),
    }
    shared: dict[str, Any] = {"in_channels": 1, "out_channels": 1, "spatial_dims": 2}
    shared["norm_name"] = names.get(norm, "batch")
    if setting == "swinunetr 2D":
        return SwinUNETR(feature_size=12, **shared)
    net = UNETR(
        img_size=SETTINGS[setting].window,
        feature_size=8,
        hidden_size=48,
        mlp_dim=96,
        num_heads=4,
        **shared,
    )
    if norm.startswith("batchrenorm"):
        for parent in list(net.modules()):
            for name, child in parent.named_children():
                if isinstance(child, nn.BatchNorm2d):
                    setattr(parent, name, BatchRenorm2d(child.num_features))
    return net
