"""Large float64 convolutions in slabs are what torch gives for the whole, and small ones are torch's own."""

import pytest
import torch

from normfix.networks import slabs
from normfix.networks.calling import Caller


@pytest.mark.parametrize(
    ("shape", "kernel", "options"),
    [
        ((1, 6, 40, 9, 8), (4, 6, 3, 3, 3), {"padding": 1}),
        ((2, 4, 9, 41, 8), (6, 2, 3, 5, 2), {"padding": (1, 0, 1), "groups": 2, "stride": (1, 3, 2)}),
        ((1, 3, 9, 8, 43), (2, 3, 1, 3, 3), {"padding": [0, 2, 4], "dilation": (1, 2, 4)}),
        ((1, 3, 50, 33), (5, 3, 4, 3), {"padding": (3,), "stride": 4}),
        ((1, 3, 17, 33), (5, 3, 3, 3), {"padding": "same"}),
    ],
)
def test_slabs_are_the_whole(monkeypatch, shape, kernel, options):
    """Strides, dilations, groups and paddings fall where they fall in the whole, over every slab's edge."""
    monkeypatch.setattr(slabs, "_WHOLE", 0)
    monkeypatch.setattr(slabs, "_SLAB", 4000)
    x, weight, bias = (torch.randn(s, dtype=torch.float64) for s in (shape, kernel, kernel[:1]))
    conv = torch.conv2d if len(shape) == 4 else torch.conv3d
    with torch.no_grad():
        whole, parts = conv(x, weight, bias, **options), slabs.in_slabs(conv, x, weight, bias, **options)
    assert parts.shape == whole.shape
    assert float((parts - whole).abs().max()) < 1e-13


def test_a_large_convolution_in_float64_is_cut(monkeypatch):
    """A network in float64 without gradients runs on slabs; in float32, or with gradients, on the whole."""
    monkeypatch.setattr(slabs, "_WHOLE", 0)
    monkeypatch.setattr(slabs, "_SLAB", 4000)
    cuts, cat = [], torch.cat
    monkeypatch.setattr(torch, "cat", lambda *a: cuts.append(len(a[0])) or cat(*a))
    net, x = torch.nn.Conv2d(2, 2, 3, padding=1), torch.randn(1, 2, 40, 8)
    with torch.no_grad():
        Caller().in_double(net, x)
        assert not cuts
        Caller().in_double(net.double(), x.double())
    assert len(cuts) == 1
    assert cuts[0] > 3
    Caller().in_double(net, x.double())
    assert len(cuts) == 1


def test_what_torch_refuses_is_refused():
    """A kernel larger than its input, or other channels, raise what torch raises."""
    weight = torch.randn(2, 3, 5, 5, dtype=torch.float64)
    for shape in ((1, 3, 4, 4), (1, 2, 8, 8)):
        with pytest.raises(RuntimeError), torch.no_grad():
            slabs.in_slabs(torch.conv2d, torch.randn(shape, dtype=torch.float64), weight)
