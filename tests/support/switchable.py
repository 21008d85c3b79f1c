"""Networks whose factory has an argument for the norm, each in another form, as libraries have them."""

import torch
import torch.nn.functional as F
from torch import nn

NORMS = {
    "instance": nn.InstanceNorm2d,
    "batch": nn.BatchNorm2d,
    "none": nn.Identity,
}


def generator(channels=4, norm="instance"):
    """Build as CycleGAN does: only instance norms have a convolution with a bias before them."""
    bias = norm != "batch"
    layers = [nn.Conv2d(1, channels, 7, padding=3, bias=bias), NORMS[norm](channels), nn.ReLU()]
    layers += [nn.Conv2d(channels, channels, 3, 2, padding=1, bias=bias), NORMS[norm](channels), nn.ReLU()]
    layers += [
        nn.ConvTranspose2d(channels, channels, 3, 2, padding=1, output_padding=1, bias=bias),
        NORMS[norm](channels),
        nn.ReLU(),
        nn.Conv2d(channels, 1, 3, padding=1),
    ]
    return nn.Sequential(*layers)


class Functional(nn.Module):
    """Normalises by a function, with an affine map of its own; with batch norm it has a module instead."""

    def __init__(self, norm_type: str = "IN") -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.head = nn.Conv2d(4, 1, 3, padding=1)
        self.gain = nn.Parameter(torch.rand(4) + 0.5) if norm_type == "IN" else None
        self.offset = nn.Parameter(torch.randn(4)) if norm_type == "IN" else None
        self.bn = nn.BatchNorm2d(4) if norm_type == "BN" else None

    def forward(self, x):
        x = self.conv(x)
        x = F.instance_norm(x, weight=self.gain, bias=self.offset) if self.bn is None else self.bn(x)
        return self.head(F.relu(x))


class Renamed(nn.Module):
    """Names every layer after its norm and gives its BatchNorms another eps."""

    def __init__(self, settings=None) -> None:
        super().__init__()
        norm = (settings or {}).get("normalization", "GroupNorm")
        make = {"GroupNorm": lambda: nn.GroupNorm(2, 4), "BatchNorm": lambda: nn.BatchNorm2d(4, eps=1e-3)}
        for number in range(2):
            self.add_module(f"conv_{norm}_{number}", nn.Conv2d(4 if number else 1, 4, 3, padding=1))
            self.add_module(f"{norm}_{number}", make[norm]())
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        for layer in list(self.children())[:-1]:
            x = layer(x)
        return self.head(F.relu(x))


class Twice(nn.Module):
    """Normalises twice with one BatchNorm where it has two instance norms."""

    def __init__(self, norm: str = "instance") -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.first = NORMS[norm](4)
        self.second = self.first if norm == "batch" else NORMS[norm](4)
        self.head = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        return self.head(self.second(F.relu(self.first(self.conv(x)))))


class Another(nn.Module):
    """Is another network with batch norm: it has another activation too."""

    def __init__(self, norm: str = "instance") -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = NORMS[norm](4)
        self.act = nn.ReLU() if norm == "instance" else nn.LeakyReLU(0.2)
        self.head = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        return self.head(self.act(self.norm(self.conv(x))))


class Numbered(nn.Module):
    """Lets its norm be chosen by a number, which nobody can guess: `--switch kind=1`."""

    def __init__(self, kind: int = 0) -> None:
        super().__init__()
        norm = [nn.InstanceNorm2d, nn.BatchNorm2d][kind]
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), norm(4), nn.Conv2d(4, 1, 3, padding=1))

    def forward(self, x):
        return self.body(x)


class Pooled(nn.Module):
    """Divides by a mean of the whole map, which no BatchNorm does."""

    def __init__(self, norm: str = "instance") -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), NORMS[norm](4), nn.ReLU())
        self.head = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        x = self.body(x)
        return self.head(x * torch.sigmoid(x.mean((2, 3), keepdim=True)))


class Grouped(nn.Module):
    """Takes its norm as MONAI does, a name with settings; without an affine map unless asked for."""

    def __init__(self, norm=("group", {"num_groups": 2})) -> None:
        super().__init__()
        kind, settings = norm
        make = {
            "group": lambda num_groups, affine=True: nn.GroupNorm(num_groups, 4, affine=affine),
            "batch": lambda affine=False: nn.BatchNorm2d(4, affine=affine),
        }
        self.body = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), make[kind](**settings), nn.ReLU())
        self.head = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        return self.head(self.body(x))
