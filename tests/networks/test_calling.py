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
