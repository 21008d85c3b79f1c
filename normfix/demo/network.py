"""A small U-Net as microscopists train them: nuclei in one channel, InstanceNorm after every convolution.

Four levels of (conv 3x3 -> InstanceNorm -> ReLU) twice, as in nnU-Net: the norms have affine weights and no
running statistics, so each of the 14 computes mean and variance from the whole extent it is given. That is
the only thing that makes this network depend on the tile: everything else in it is local, with stride 8.
"""

from __future__ import annotations

from importlib import resources

import torch
from safetensors.torch import load
from torch import Tensor, nn

from normfix.networks.provenance import declare_window_

__all__ = ["WEIGHTS", "WINDOW", "NucleiUNet", "nuclei_unet"]

WEIGHTS = "nuclei_unet.safetensors"
WINDOW = 160
"""Pixels of the windows that it was trained on."""

_WIDTHS = (16, 32, 64, 128)


class NucleiUNet(nn.Module):
    """Map an image to the probability that each pixel lies inside a nucleus.

    Shapes: (N, 1, H, W) -> (N, 1, H, W), H and W multiples of 8; other sizes fail where a skip is
    concatenated. The input is scaled over the whole image so that its percentiles 1 and 99.8 become 0 and 1,
    not clipped.

    Example:
        >>> probability = NucleiUNet().eval()(torch.zeros(1, 1, 64, 96))
        >>> probability.shape
        torch.Size([1, 1, 64, 96])
    """

    def __init__(self) -> None:
        super().__init__()
        inputs = (1, *_WIDTHS[:-1])
        deeper_to_shallower = tuple(zip(_WIDTHS[:0:-1], _WIDTHS[-2::-1], strict=True))
        self.encoder = nn.ModuleList(_double_conv(i, o) for i, o in zip(inputs, _WIDTHS, strict=True))
        self.decoder = nn.ModuleList(_double_conv(below + skip, skip) for below, skip in deeper_to_shallower)
        self.pool = nn.MaxPool2d(2)
        self.upsample = nn.Upsample(scale_factor=2, mode="nearest")
        self.head = nn.Conv2d(_WIDTHS[0], 1, kernel_size=1)

    def forward(self, x: Tensor) -> Tensor:
        """Return the probability of nucleus, between 0 and 1, for each pixel of `x`."""
        x = self.encoder[0](x)
        skips = []
        for level in self.encoder[1:]:
            skips.append(x)
            x = level(self.pool(x))
        for level, skip in zip(self.decoder, reversed(skips), strict=True):
            x = level(torch.cat((skip, self.upsample(x)), dim=1))
        return torch.sigmoid(self.head(x))


def nuclei_unet(pretrained: bool = True) -> NucleiUNet:
    """Build the demo network in eval mode, by default with the weights that scripts/train_demo.py made.

    Example:
        >>> model = nuclei_unet()
        >>> sum(isinstance(module, nn.InstanceNorm2d) for module in model.modules())
        14
    """
    model = NucleiUNet().eval()
    if pretrained:
        model.load_state_dict(load(resources.files("normfix.demo").joinpath(WEIGHTS).read_bytes()))
        declare_window_(model, [WINDOW])
    return model


def _double_conv(inputs: int, outputs: int) -> nn.Sequential:
    # No bias: the norm after each convolution subtracts it.
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.InstanceNorm2d(outputs, affine=True),
        nn.ReLU(),
        nn.Conv2d(outputs, outputs, kernel_size=3, padding=1, bias=False),
        nn.InstanceNorm2d(outputs, affine=True),
        nn.ReLU(),
    )
