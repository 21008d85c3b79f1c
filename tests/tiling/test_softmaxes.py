"""Softmax over all positions in blocks: its sum is that of the whole image."""

import pytest
import torch
from torch import nn

import normfix
from normfix.errors import NormfixError
from normfix.tiling.stages import softmaxes
from normfix.tiling.stages.bins import Bins

IMAGE = torch.rand(1, 1, 42, 54, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
IMAGE += torch.linspace(0, 3, 54, dtype=torch.float64)


def whole(net, image):
    with torch.no_grad():
        return net(image)


class Between(nn.Module):
    """A function of a map of 6 channels, a norm before it, between convolutions."""

    def __init__(self, function):
        super().__init__()
        self.function = function
        self.inner, self.norm, self.outer = (
            nn.Conv2d(1, 6, 3, padding=1),
            nn.GroupNorm(2, 6),
            nn.Conv2d(6, 1, 3),
        )

    def forward(self, x):
        return self.outer(self.function(self.norm(self.inner(x)) * 3))


def of_map(y):
    """Each channel's, over a flattened map (Finn et al., arXiv 1509.06113)."""
    return y.flatten(2).softmax(-1).view_as(y) * 300


def of_tokens(y):
    return (y.flatten(2).transpose(1, 2).softmax(1) * 300).transpose(1, 2).reshape(y.shape)


def of_heads(y):
    return y.unflatten(1, (2, 3)).flatten(3).softmax(-1).reshape(y.shape) * 300


def of_one_channel(y):
    n, _, h, w = y.shape
    return y * y.mean(1).view(n, -1).softmax(-1).view(n, 1, h, w) * 300


def logarithm(y):
    return torch.log_softmax(y.flatten(2), -1).view_as(y)


def twice(y):
    return of_map(of_map(y) + y)


def of_large_values(y):
    """Exponentials of what is above the largest value alone are numbers."""
    return (y * 300 + 1e4).flatten(2).softmax(-1).view_as(y)


def along_rows(y):
    return y.softmax(-1)


def of_all_channels(y):
    return y.flatten(1).softmax(-1).view_as(y)


def predicted(function, image):
    net = Between(function).double().eval()
    return normfix.predict(net, image, tile=16, statistics="per-image"), whole(net, image)


@pytest.mark.slow
@pytest.mark.parametrize(
    "function", [of_map, of_tokens, of_heads, of_one_channel, logarithm, twice, of_large_values]
)
def test_softmax_over_space_is_that_of_the_whole_image(function, caplog):
    """In blocks, to rounding; a block's own softmax is another."""
    torch.manual_seed(0)
    found, expected = predicted(function, IMAGE)
    assert float((found - expected).abs().max() / expected.std()) < 1e-11
    assert "in passes over whole images" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize("function", [along_rows, of_all_channels])
def test_softmax_along_one_axis_or_over_channels_too_is_refused(function):
    """It is none over the positions of a channel."""
    with pytest.raises(NormfixError, match="NF324"):
        predicted(function, IMAGE)


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["the block's own", "a block is left out", "another largest value"])
def test_planted_mistakes_are_caught(monkeypatch, mistake):
    """The comparison of blocks with the whole sees a sum that is not the whole's, and bins a block that is missing."""
    if mistake == "the block's own":
        monkeypatch.setattr(softmaxes, "_over_space", lambda nodes, maps, shapes: iter(()))
    elif mistake == "a block is left out":
        merged = Bins.merged
        monkeypatch.setattr(
            Bins, "merged", lambda self, parts, *rest: merged(self, parts[:-1] or parts, *rest)
        )
    else:
        monkeypatch.setattr(torch, "maximum", lambda a, b: b)
    # what was found out of a network counts for others that are alike, so each mistake has one of its own
    factor = float(len(mistake))
    with pytest.raises(NormfixError, match=r"NF32[45]"):
        predicted(lambda y: of_map(y) + y * factor, IMAGE)


@pytest.mark.slow
def test_half_precision_sums_in_float32():
    """A sum of more than half precision's largest number of positions is none of it."""
    torch.manual_seed(0)
    net = Between(of_map).eval()
    image = torch.rand(1, 1, 260, 256)
    found = normfix.predict(net.bfloat16(), image.bfloat16(), tile=64, statistics="per-image")
    assert float((found - whole(net.float(), image)).abs().max()) < 0.1
