"""Blocks of real libraries with statistics that are no plain norms, and the functions by which each computes them."""

from monai.networks.blocks import ChannelSELayer
from timm.layers import (
    BatchNormAct2d,
    EcaModule,
    FilterResponseNormTlu2d,
    GroupNormAct,
    SqueezeExcite,
    StdConv2d,
)
from timm.layers.cbam import CbamModule
from timm.layers.evo_norm import EvoNorm2dS0
from timm.layers.global_context import GlobalContext
from timm.layers.grn import GlobalResponseNorm
from torch import nn


class ChannelsLast(nn.Module):
    """Runs a block on (n, h, w, c)."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return self.block(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


def _response():
    block = GlobalResponseNorm(8)
    nn.init.normal_(block.weight)
    nn.init.normal_(block.bias)
    return ChannelsLast(block)


BLOCKS = {
    "EvoNorm-S0": (lambda: EvoNorm2dS0(8, groups=2), ["var"]),
    "FRN": (lambda: FilterResponseNormTlu2d(8), ["mean"]),
    "GRN": (_response, ["norm"]),
    "squeeze-excite": (lambda: SqueezeExcite(8, rd_channels=4), ["mean"]),
    "ECA": (lambda: EcaModule(8), ["mean"]),
    "CBAM": (lambda: CbamModule(8, rd_ratio=0.5), ["mean", "amax", "batch_norm"]),
    "global context": (lambda: GlobalContext(8, rd_channels=4), ["matmul"]),
    "standardised convolution": (
        lambda: nn.Sequential(StdConv2d(8, 8, 3, padding=1), GroupNormAct(8, 2)),
        ["group_norm"],
    ),
    "fused batch norm": (lambda: BatchNormAct2d(8), ["batch_norm"]),
    "MONAI squeeze-excite": (lambda: ChannelSELayer(2, 8), ["adaptive_avg_pool2d"]),
}
