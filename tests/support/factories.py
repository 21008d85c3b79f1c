"""Tiny networks that tests name as pkg.module:factory, each a few kilobytes."""

import torch
from torch import Tensor, nn


class TinyUNet(nn.Module):
    """One down and one up, an instance norm on each level: stride 2, a halo of a few pixels."""

    def __init__(self, channels: int = 1, width: int = 4, ndim: int = 2) -> None:
        super().__init__()
        conv, norm, pool = _LAYERS[ndim]
        self.first = nn.Sequential(conv(channels, width, 3, padding=1), norm(width), nn.ReLU())
        self.pool = pool(2)
        self.second = nn.Sequential(conv(width, width, 3, padding=1), norm(width), nn.ReLU())
        self.up = nn.Upsample(scale_factor=2, mode="nearest")
        self.head = conv(2 * width, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        fine = self.first(x)
        coarse = self.up(self.second(self.pool(fine)))
        return self.head(torch.cat([fine, coarse], 1))


_LAYERS = {
    2: (nn.Conv2d, nn.InstanceNorm2d, nn.MaxPool2d),
    3: (nn.Conv3d, nn.InstanceNorm3d, nn.MaxPool3d),
}


def tiny_unet(channels: int = 1, width: int = 4, ndim: int = 2) -> TinyUNet:
    """Return a U-Net with seeded weights and live instance norms."""
    generator = torch.Generator().manual_seed(0)
    model = TinyUNet(channels, width, ndim)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
    return model


def failing() -> nn.Module:
    """Fail as a factory with a missing licence would."""
    raise RuntimeError("no\nlicence")


def no_network() -> str:
    """Return something else than a network."""
    return "network"


def talkative() -> TinyUNet:
    """Return a network whose code prints, as debugging leaves behind."""
    print("building")  # noqa: T201 - the point
    model = tiny_unet()
    model.register_forward_hook(_say)
    return model


class Attentive(TinyUNet):
    """Lets every second pixel look at every other, after its instance norms."""

    def forward(self, x: Tensor) -> Tensor:
        coarse = self.second(self.pool(self.first(x)))
        tokens = coarse.flatten(2).transpose(1, 2)
        seen = nn.functional.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.up(seen.transpose(1, 2).reshape(coarse.shape))


def attentive() -> Attentive:
    """Return a network with convertible norms and an attention that is not."""
    torch.manual_seed(0)
    return Attentive()


def _say(module: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
    print("forward", tuple(output.shape))  # noqa: T201 - the point


class Wrapped(nn.Module):
    """A network whose every name begins with `module.`, as if DataParallel had saved it."""

    def __init__(self) -> None:
        super().__init__()
        self.module = tiny_unet()

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


class Tied(nn.Module):
    """Two convolutions share one weight; a counter and a table are integer buffers."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.a = nn.Conv2d(4, 4, 3, padding=1)
        self.b = nn.Conv2d(4, 4, 3, padding=1)
        self.b.weight = self.a.weight
        self.norm = nn.InstanceNorm2d(4)
        self.register_buffer("steps", torch.tensor(7))
        self.register_buffer("table", torch.arange(5))

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.norm(self.a(self.first(x))))


class Gained(TinyUNet):
    """A buffer that is not in the state dict follows the dtype of the network."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("gain", torch.ones(1), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.head.bias.sum() + super().forward(nn.functional.conv2d(x, self.gain.view(1, 1, 1, 1)))


class ExtraState(nn.Module):
    """A module below carries state that is no tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.net = tiny_unet()

    def get_extra_state(self) -> dict[str, int]:
        return {"version": 3}

    def set_extra_state(self, state: dict[str, int]) -> None:
        pass

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


def batched() -> nn.Module:
    """Return a network with batch norms on running statistics, which needs no images."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4, 1, 1))


class Reading(nn.Module):
    """A network of the caller's with an argument that names a file."""

    def __init__(self, weights_path: str = "") -> None:
        super().__init__()
        self.weights_path = weights_path
        self.bias = nn.Parameter(torch.zeros(1))
