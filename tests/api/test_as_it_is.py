"""By an image's own statistics an unconverted network predicts it as it is, at sizes that no tiles are exact at too."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfix
from normfix.api import prediction

SIZES = [(41, 53), (64, 47), (33, 64)]


class Skips(nn.Module):
    """Coarse features with a norm, resized to what they came from (as in LR-ASPP)."""

    def __init__(self, mode="bilinear"):
        super().__init__()
        self.mode = mode
        self.fine, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.coarse, self.last = nn.Conv2d(4, 4, 3, 4, 1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        y = self.norm(self.fine(x)).relu()
        return self.last(F.interpolate(self.coarse(y), y.shape[2:], mode=self.mode) + y)


class Joined(nn.Module):
    """Coarse features that are twice as fine again, and of the same extents at even sizes alone."""

    def __init__(self):
        super().__init__()
        self.fine, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.GroupNorm(2, 4)
        self.coarse, self.up = nn.Conv2d(4, 4, 3, 2, 1), nn.ConvTranspose2d(4, 4, 2, 2)

    def forward(self, x):
        y = self.norm(self.fine(x)).relu()
        return torch.cat([self.up(self.coarse(y)), y], 1)


def of(build, *options):
    torch.manual_seed(0)
    return build(*options).double().eval()


def image_of(size):
    image = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return image + torch.linspace(0, 2, size[1], dtype=torch.float64)


def apart(given, whole):
    return float((given - whole).abs().max() / whole.std())


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("mode", ["bilinear", "nearest"])
def test_a_size_that_is_no_multiple_is_the_whole_image_too(mode, size, caplog):
    net, image = of(Skips, mode), image_of(size)
    with torch.no_grad():
        whole = net(image)
    assert apart(normfix.predict(net, image, tile=16, statistics="per-image"), whole) < 1e-12
    assert "NF263" not in caplog.text


@pytest.mark.slow
def test_what_goes_to_a_file_is_the_same(tmp_path):
    net, image = of(Skips), image_of(SIZES[0])
    shape, _ = normfix.write_prediction(net, image, tmp_path / "whole.npy", 16, statistics="per-image")
    written = torch.from_numpy(np.load(tmp_path / "whole.npy")).reshape(1, 1, *SIZES[0])
    assert tuple(shape)[-2:] == SIZES[0]
    with torch.no_grad():
        assert apart(written, net(image)) < 1e-12


@pytest.mark.slow
def test_a_size_that_the_network_does_not_take_is_extended_and_that_is_said(caplog):
    net, image = of(Joined), image_of(SIZES[0])
    given = normfix.predict(net, image, tile=16, statistics="per-image")
    assert given.shape[2:] == image.shape[2:]
    assert caplog.text.count("NF263") == 1
    with torch.no_grad():
        whole = net(F.pad(image, (0, 1, 0, 1), mode="replicate"))[..., :41, :53]
    assert apart(given, whole) < 1e-12


class Squeezed(nn.Module):
    """No norm: a pool of the whole image between coarse features that are resized."""

    def __init__(self):
        super().__init__()
        self.fine, self.coarse = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, 4, 1)
        self.gate, self.last = nn.Conv2d(4, 4, 1), nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        y = self.fine(x).relu()
        z = self.coarse(y)
        z = z * self.gate(F.adaptive_avg_pool2d(z, 1)).sigmoid()
        return self.last(F.interpolate(z, y.shape[2:], mode="bilinear") + y)


@pytest.mark.slow
@pytest.mark.parametrize("size", SIZES)
def test_a_network_without_norms_is_the_whole_image_too(size, caplog):
    net, image = of(Squeezed), image_of(size)
    with torch.no_grad():
        whole = net(image)
    assert apart(normfix.predict(net, image, tile=16, statistics="per-image"), whole) < 1e-12
    assert "NF263" not in caplog.text


class Eighths(nn.Module):
    """Pools to an eighth of the image's extents, whatever they are, which no graph of free sizes holds."""

    def __init__(self):
        super().__init__()
        self.first, self.norm = nn.Conv2d(1, 4, 3, 2, 1), nn.InstanceNorm2d(4)
        self.last = nn.Conv2d(4, 1, 3, padding=1)

    def forward(self, x):
        y = self.norm(self.first(x))
        z = F.adaptive_max_pool2d(y, (x.shape[2] // 8, x.shape[3] // 8))
        return self.last(F.interpolate(y + F.interpolate(z, y.shape[2:]), x.shape[2:]))


@pytest.mark.slow
@pytest.mark.parametrize("largest", [1 << 18, 1 << 10], ids=["computed", "without numbers"])
def test_an_image_that_the_network_takes_and_stages_do_not_is_not_extended(monkeypatch, largest, caplog):
    """What an extended image gives is not what the network gives for the image, which is asked for."""
    monkeypatch.setattr(prediction, "LARGEST", largest)
    net, image = of(Eighths), image_of((75, 61))
    with pytest.raises(normfix.NormfixError, match="NF32"):
        normfix.predict(net, image, tile=16, statistics="per-image")
    assert "NF263" not in caplog.text
    normfix.predict(net, image, tile=16, statistics="per-image", engine="tiles")
    assert "NF263" in caplog.text
