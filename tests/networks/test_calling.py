"""Which output of a network counts, and what it may be."""

import pytest
import torch
from torch import nn

import normfix
from normfix import NormfixError
from normfix.networks.calling import Caller


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


class Graded(nn.Module):
    """Switches gradients on in its forward, for as long as that takes or, carelessly, for good."""

    def __init__(self, *, careless):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 2, 1))
        self.careless = careless

    def forward(self, x):
        if self.careless:
            torch.set_grad_enabled(True)
            return self.layers(x)
        with torch.enable_grad():
            return self.layers(x)


@pytest.mark.parametrize("careless", [False, True])
def test_gradients_that_a_network_switches_on_end_with_its_call(careless):
    """Its output is plain numbers where nobody asked for gradients, and has them where somebody did."""
    net, image = Graded(careless=careless).eval(), torch.rand(1, 1, 16, 16)
    with torch.no_grad():
        assert not Caller()(net, image).requires_grad
        assert not torch.is_grad_enabled()
    assert Caller()(net, image).requires_grad


@pytest.mark.slow
@pytest.mark.parametrize("careless", [False, True])
def test_networks_that_switch_gradients_on_are_measured_in_stages(careless):
    """Their graph is traced without the way back, which what marks a site does not have."""
    net, image = Graded(careless=careless).eval().double(), torch.rand(1, 1, 48, 40).double()
    with torch.no_grad():
        expected = net(image)
    found = normfix.predict(net, image, 16, statistics="per-image", engine="stages")
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)
    done = normfix.convert(net, image)
    again = normfix.calibrate(done.model, [image], tile=16).model
    torch.testing.assert_close(normfix.predict(again, image, 16), expected, rtol=0, atol=1e-12)
    assert normfix.diagnose(net, image, 16).status == "failed"
    assert all(p.requires_grad for p in net.parameters())


class Descending(nn.Module):
    """A step down the gradient of an energy, as solvers and score networks make in their forward."""

    def __init__(self, way):
        super().__init__()
        self.features = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.ReLU())
        self.way = way

    def forward(self, x):
        with torch.enable_grad():
            x = x.detach().requires_grad_()
            energy = self.features(x).square().sum()
            if self.way == "grad":
                (slope,) = torch.autograd.grad(energy, x)
            else:
                energy.backward()
                slope = x.grad
        return x - 0.1 * slope


@pytest.mark.parametrize("way", ["grad", "backward"])
def test_gradients_that_end_at_a_held_statistic_are_named(way):
    """The refusal says that the way back ends there; another size of image would not help."""
    image = torch.rand(1, 1, 64, 64)
    with torch.no_grad():
        assert Descending(way)(image).isfinite().all()
    with pytest.raises(NormfixError, match=r"computes gradients in its forward \(torch.autograd\)") as caught:
        normfix.convert(Descending(way), image)
    assert caught.value.code == "NF109"
    assert "--input" not in caught.value.message


def test_a_network_that_fails_elsewhere_is_told_to_be_given_another_input():
    """The other way on stays: what fails outside of a way back may be the size."""
    with pytest.raises(NormfixError, match="Give an input it accepts") as caught:
        Caller()(nn.Conv2d(3, 4, 3), torch.rand(1, 1, 16, 16))
    assert caught.value.code == "NF109"
