"""Small networks for what runs on a GPU, as factories that a fresh process can call."""

import torch
import torch.nn.functional as F
from torch import nn


def _block(inputs, width, norm):
    return nn.Sequential(nn.Conv2d(inputs, width, 3, padding=1), norm(width), nn.ReLU())


class Small(nn.Module):
    """Has two levels, a skip, two instance norms and a group norm."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = _block(1, width, lambda c: nn.InstanceNorm2d(c, affine=True))
        self.low = _block(width, 2 * width, lambda c: nn.GroupNorm(4, c))
        self.join = _block(3 * width, width, lambda c: nn.InstanceNorm2d(c, affine=True))
        self.head = nn.Conv2d(width, 2, 1)

    def forward(self, x):
        top = self.stem(x)
        low = F.interpolate(self.low(F.max_pool2d(top, 2)), scale_factor=2.0)
        return self.head(self.join(torch.cat([top, low], 1)))


class Branching(nn.Module):
    """Looks at a value of the image to decide what to compute, and cannot run in stages."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)

    def forward(self, x):
        y = self.norm(self.stem(x))
        return y if float(x[0, 0, 0, 0]) < 1e9 else y * 2  # a graph has no such branch


def small(width=8):
    """Build a network with seeded weights, its affine away from the identity."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        network = Small(width)
        for name, parameter in network.named_parameters():
            if parameter.dim() == 1 and "weight" in name:
                nn.init.uniform_(parameter, 0.5, 1.5)
    return network.eval()


def uneven(*size):
    """Return an image whose contrast changes from left to right."""
    generator = torch.Generator().manual_seed(1)
    return torch.rand(1, 1, *size, generator=generator) * torch.linspace(0.2, 2, size[-1])
