"""Networks that a graph cut into stages could get wrong, each named for how."""

import torch
import torch.nn.functional as F
from torch import nn


def _twice(inputs, width):
    parts = (
        (nn.Conv2d(n, width, 3, padding=1), nn.InstanceNorm2d(width), nn.LeakyReLU(0.1))
        for n in (inputs, width)
    )
    return nn.Sequential(*(layer for part in parts for layer in part))


class TwoLevels(nn.Module):
    """Is an ordinary U-Net: two pools, two transposed convolutions, ten instance norms."""

    def __init__(self, width=3):
        super().__init__()
        self.stem, self.mid, self.low = _twice(1, width), _twice(width, width), _twice(width, 2 * width)
        self.up_mid, self.up_top = (
            nn.ConvTranspose2d(2 * width, width, 2, 2),
            nn.ConvTranspose2d(width, width, 2, 2),
        )
        self.join_mid, self.join_top = _twice(2 * width, width), _twice(2 * width, width)
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x):
        top = self.stem(x)
        mid = self.mid(F.max_pool2d(top, 2))
        low = self.low(F.max_pool2d(mid, 2))
        mid = self.join_mid(torch.cat([mid, self.up_mid(low)], 1))
        return self.head(self.join_top(torch.cat([top, self.up_top(mid)], 1)))


class Shallow(nn.Module):
    """Is as little as a network with a stride, a skip and two instance norms can be."""

    def __init__(self, width=3):
        super().__init__()
        self.stem, self.first = nn.Conv2d(1, width, 3, padding=1), nn.InstanceNorm2d(width)
        self.down, self.second = nn.Conv2d(width, width, 3, 2, padding=1), nn.InstanceNorm2d(width)
        self.head = nn.Conv2d(2 * width, 2, 1)

    def forward(self, x):
        skip = F.leaky_relu(self.first(self.stem(x)))
        deep = F.leaky_relu(self.second(self.down(skip)))
        return self.head(torch.cat([skip, F.interpolate(deep, scale_factor=2.0)], 1))


class Tangled(nn.Module):
    """Works in place on skips and through views, has dropout, a residual, asserts, and resizes to its skip."""

    def __init__(self, width=4):
        super().__init__()
        self.stem, self.first = nn.Conv2d(1, width, 3, padding=1), nn.InstanceNorm2d(width, affine=True)
        self.down, self.second = nn.Conv2d(width, width, 3, 2, padding=1), nn.GroupNorm(2, width)
        self.deep, self.third = nn.Conv2d(width, width, 3, padding=1), nn.InstanceNorm2d(width)
        self.join, self.fourth = nn.Conv2d(2 * width, width, 3, padding=1), nn.InstanceNorm2d(width)
        self.head = nn.Conv2d(width, 2, 1)
        self.relu, self.drop = nn.ReLU(inplace=True), nn.Dropout2d(0.3)
        for norm in (self.first, self.second):
            nn.init.normal_(norm.weight, 1, 0.3)
            nn.init.normal_(norm.bias)

    def forward(self, x):
        assert x.shape[2] % 2 == 0, "an even height"
        skip = self.relu(self.first(self.stem(x)))
        y = self.drop(self.relu(self.second(self.down(skip))))
        y = y + self.relu(self.third(self.deep(y)))
        y = F.interpolate(y, size=skip.shape[2:], mode="bilinear")
        y = self.fourth(self.join(torch.cat([skip, y], 1)))
        y.view(y.shape[0], -1).mul_(1.5)
        y += skip
        return self.head(y)


class Anisotropic3d(nn.Module):
    """Strides by 2 and 3 on two axes only and goes back up, in 3D."""

    def __init__(self, width=3):
        super().__init__()
        self.stem, self.first = nn.Conv3d(1, width, (1, 3, 3), padding=(0, 1, 1)), nn.InstanceNorm3d(width)
        self.down = nn.Conv3d(width, width, (3, 3, 3), (1, 2, 3), padding=1)
        self.second = nn.InstanceNorm3d(width)
        self.up = nn.Upsample(scale_factor=(1, 2, 3))
        self.last = nn.Conv3d(2 * width, 2, 3, padding=1)

    def forward(self, x):
        skip = F.leaky_relu(self.first(self.stem(x)))
        deep = F.leaky_relu(self.second(self.down(skip)))
        return self.last(torch.cat([skip, self.up(deep)], 1))


class ChannelsLast(nn.Module):
    """Keeps its maps as (N, H, W, C) between layers, as ConvNeXt does."""

    def __init__(self, width=4):
        super().__init__()
        self.stem, self.first = nn.Conv2d(1, width, 5, padding=2), nn.InstanceNorm2d(width)
        self.mix = nn.Linear(width, width)
        self.depth, self.second = (
            nn.Conv2d(width, width, 3, padding=1, groups=width),
            nn.InstanceNorm2d(width),
        )
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        y = self.first(self.stem(x)).permute(0, 2, 3, 1)
        y = y + F.gelu(self.mix(y))
        z = self.second(self.depth(y.permute(0, 3, 1, 2))).permute(0, 2, 3, 1)
        return self.head(y + z).permute(0, 3, 1, 2)


class Deep(nn.Module):
    """Returns outputs of several depths and resolutions in a dict."""

    def __init__(self):
        super().__init__()
        self.first, self.one = nn.Conv2d(1, 3, 3, padding=1), nn.InstanceNorm2d(3)
        self.second, self.two = nn.Conv2d(3, 3, 2, 2), nn.InstanceNorm2d(3)
        self.head = nn.Conv2d(3, 1, 1)

    def forward(self, x):
        fine = self.one(self.first(x)).relu()
        coarse = self.two(self.second(fine)).relu()
        return {"coarse": self.head(coarse), "fine": self.head(fine)}


def _norm(width=3):
    return nn.Sequential(nn.Conv2d(1, width, 3, padding=1), nn.InstanceNorm2d(width))


class DividesBySize(nn.Module):
    """Divides by its extent: right on the whole, wrong on every block."""

    def __init__(self):
        super().__init__()
        self.body, self.last = _norm(), nn.Conv2d(3, 1, 3, padding=1)

    def forward(self, x):
        y = self.body(x)
        return self.last(y / y.shape[2])


class Positions(DividesBySize):
    """Adds the row number."""

    def forward(self, x):
        y = self.body(x)
        return self.last(y + torch.arange(y.shape[2], dtype=y.dtype)[:, None])


class Corners(DividesBySize):
    """Resizes with aligned corners."""

    def forward(self, x):
        return F.interpolate(self.body(x), scale_factor=2, mode="bilinear", align_corners=True)


class Wraps(DividesBySize):
    """Pads circularly: the left border sees the right one."""

    def forward(self, x):
        y = F.pad(self.body(x), (1, 1, 1, 1), mode="circular")
        return F.conv2d(y, self.last.weight, self.last.bias)


class StillLive(DividesBySize):
    """Subtracts the mean of the image by hand."""

    def forward(self, x):
        y = self.body(x)
        return self.last(y - y.mean((2, 3), keepdim=True))


class OneSize(DividesBySize):
    """Holds a map of one size."""

    def __init__(self):
        super().__init__()
        self.map = nn.Parameter(torch.randn(64, 64))

    def forward(self, x):
        return self.last(self.body(x) * self.map)


class Squeezed(nn.Module):
    """Gates channels by their mean, and scales by the largest value of the image: statistics that are no norms."""

    def __init__(self, width=4):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, width, 3, padding=1), nn.InstanceNorm2d(width)
        self.gate = nn.Linear(width, width)
        self.last = nn.Conv2d(width, 2, 3, padding=1)

    def forward(self, x):
        y = self.norm(self.stem(x)).relu()
        y = y * torch.sigmoid(self.gate(y.mean((2, 3))))[:, :, None, None]
        return self.last(y / y.amax((2, 3), keepdim=True))
