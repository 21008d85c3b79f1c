"""Which output of a network counts, and what it may be."""

import pytest
import torch
from torch import nn

import normfix
from normfix import NormfixError


class Spectral(nn.Module):
    """Gives complex values, as networks that reconstruct from frequencies do."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 1))

    def forward(self, x):
        return torch.complex(*self.layers(x).chunk(2, 1))


def as_channels(net, image):
    return torch.view_as_real(net(image)).movedim(-1, 1).flatten(1, 2)


def test_a_complex_output_is_given_as_channels():
    """Compared as real numbers its imaginary part would count nothing, so it is refused; as channels it passes."""
    net, image = Spectral().eval(), torch.rand(1, 1, 48, 48)
    for verb in (normfix.scan, normfix.convert):
        with pytest.raises(NormfixError, match=r"NF110.*view_as_real"):
            verb(net, image)
    assert normfix.convert(net, image, forward_fn=as_channels).proof.passed


class Gives(nn.Module):
    """A network whose output goes through a function at the end."""

    def __init__(self, last):
        super().__init__()
        self.conv, self.norm, self.last = nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2), last

    def forward(self, x):
        return self.last(self.norm(self.conv(x)))


def _sparse(x):
    return x.to_sparse()


def _meta(x):
    return x.to("meta")


def _nothing(x):
    return x[:, :0]


def _cropped(x):
    return x[..., 30:-30, 30:-30]


@pytest.mark.parametrize(
    ("last", "code"),
    [(_sparse, "NF110.*sparse"), (_meta, "NF110.*meta device"), (_nothing, "NF109.*gives nothing")],
)
def test_an_output_without_values_is_refused(last, code):
    """There is nothing to compare in it, which ended in errors of torch without a code."""
    net, image = Gives(last).eval(), torch.rand(1, 1, 40, 40)
    for verb in (normfix.scan, normfix.convert, normfix.check):
        with pytest.raises(NormfixError, match=code):
            verb(net, image)
    if last is _sparse:  # the way on that the error names
        assert normfix.convert(net, image, forward_fn=lambda model, x: model(x).to_dense()).proof.passed


def test_an_image_that_leaves_nothing_of_the_output_is_too_small():
    """A network that crops its output is not tried on what it crops whole."""
    with pytest.raises(NormfixError, match=r"NF109.*1x1x40x40.*larger"):
        normfix.convert(Gives(_cropped).eval(), torch.rand(1, 1, 40, 40))
