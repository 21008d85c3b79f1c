"""What a network takes is found by running it, not read off the convolution that is registered first."""

import numpy as np
import pytest
import torch
from torch import nn

import normfix
from normfix.networks.intake import Intake


class HeadFirst(nn.Module):
    """A head of 8 channels is declared before the stem that meets the image."""

    def __init__(self):
        super().__init__()
        self.head = nn.Conv2d(8, 2, 1)
        self.stem, self.norm = nn.Conv2d(3, 8, 3, padding=1), nn.InstanceNorm2d(8)

    def forward(self, x):
        return self.head(torch.relu(self.norm(self.stem(x))))


class DecoderOnly(nn.Module):
    """An autoencoder of which only the decoder runs; its latent has 4 channels, its encoder takes 3."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.Conv2d(8, 4, 3, padding=1))
        self.decoder = nn.Sequential(nn.Conv2d(4, 8, 3, padding=1), nn.GroupNorm(2, 8), nn.Conv2d(8, 3, 1))

    def forward(self, x):
        return self.decoder(x)


class Weighed(nn.Module):
    """The channels' weights come from a 1D convolution that is registered before the 3D one (ECA)."""

    def __init__(self):
        super().__init__()
        self.eca, self.stem = nn.Conv1d(1, 1, 3, padding=1), nn.Conv3d(2, 4, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        weights = self.eca(x.mean((2, 3, 4))[:, None]).sigmoid()[:, 0]
        return x * weights[..., None, None, None]


def folded(factor, ndim=2):
    """A stem that sees blocks of pixels as channels."""
    return nn.Sequential(nn.PixelUnshuffle(factor), nn.Conv2d(3 * factor**ndim, 8, 3, padding=1))


class Grey(nn.Module):
    """Colours are averaged before the stem, so that any number of channels runs."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 2, 3, padding=1)

    def forward(self, x):
        return self.stem(x.mean(1, keepdim=True))


class Sized(nn.Module):
    """Takes images of one size only, as a network with a table of positions does."""

    def __init__(self):
        super().__init__()
        self.head, self.stem = nn.Conv2d(5, 1, 1), nn.Conv2d(2, 5, 3, padding=1)
        self.table = nn.Parameter(torch.zeros(1, 5, 72, 40))

    def forward(self, x):
        return self.head(self.stem(x) + self.table)


@pytest.mark.parametrize(
    ("network", "channels", "ndim"),
    [
        (HeadFirst, 3, 2),
        (DecoderOnly, 4, 2),
        (Weighed, 2, 3),
        (lambda: folded(2), 3, 2),
        (lambda: folded(4), 3, 2),
    ],
)
def test_channels_and_axes_are_those_the_network_runs_with(network, channels, ndim):
    """Whatever is registered first, an example is made of what runs."""
    intake = Intake(network().eval())
    assert (intake.channels, intake.ndim) == (channels, ndim)


def test_scan_makes_an_example_the_network_takes():
    """A scan without an example runs where the first convolution's channels would not."""
    assert normfix.scan(DecoderOnly().eval(), fast=True).example[1] == 4


@pytest.mark.parametrize(
    ("network", "shape"),
    [
        (HeadFirst, (3, 40, 56)),
        (HeadFirst, (40, 56, 3)),
        (DecoderOnly, (4, 40, 56)),
        (lambda: folded(2), (3, 40, 56)),
    ],
)
def test_an_array_is_read_in_the_order_the_network_runs_on(network, shape):
    """Where one order of the axes runs and the other does not, there is no doubt."""
    window = normfix.open_image(np.zeros(shape, "float32"), network().eval())
    assert window.shape[2:] == (40, 56)


@pytest.mark.parametrize("axes", ["CYX", "YXC"])
def test_named_axes_are_believed_where_both_orders_run(axes):
    """A network that averages channels takes any number of them; the name decides, and without one it is refused."""
    array = np.zeros((3, 40, 56), "float32")
    assert normfix.open_image(array, Grey().eval(), axes=axes).shape[1] == (3 if axes == "CYX" else 56)
    with pytest.raises(normfix.NormfixError, match=r"NF106 .*either way"):
        normfix.open_image(array, Grey().eval())


def test_a_wrong_number_of_channels_is_refused_with_the_right_one():
    """The error names how many channels the network runs with."""
    with pytest.raises(normfix.NormfixError, match="takes 3 channels, the image has 4"):
        normfix.open_image(np.zeros((4, 40, 56), "float32"), HeadFirst().eval(), axes="CYX")


def test_which_output_counts_decides_nothing_about_what_goes_in():
    """A network that returns a mapping, and one that never runs, leave the image's axes to whoever runs them."""

    class Mapping(nn.Conv2d):
        def forward(self, x):
            return {"out": super().forward(x)}

    class Needs(nn.Conv2d):
        def forward(self, x, y):
            return super().forward(x) + y

    assert normfix.open_image(np.zeros((3, 64, 96), "float32"), Mapping(3, 2, 1)).shape == (1, 3, 64, 96)
    assert normfix.open_image(np.zeros((64, 96), "float32"), Needs(1, 2, 1)).shape == (1, 1, 64, 96)


def test_a_network_of_one_size_is_run_on_the_image_itself():
    """Its channels are told from an image of that size, which no small example would tell."""
    assert normfix.open_image(np.zeros((2, 72, 40), "float32"), Sized().eval()).shape == (1, 2, 72, 40)


def test_a_network_that_never_runs_is_not_refused_for_its_channels():
    """What needs a second input fails whatever the channels; named axes are then believed."""

    class Conditional(HeadFirst):
        def forward(self, x, t):
            return super().forward(x) * t

    assert (
        normfix.open_image(np.zeros((3, 40, 56), "float32"), Conditional().eval(), axes="CYX").shape[1] == 3
    )


def test_the_network_is_not_modified():
    """Mode, buffers and weights are what they were."""
    network = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)).train()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    Intake(network).refusal((1, 48, 48))
    assert network.training
    for name, value in network.state_dict().items():
        torch.testing.assert_close(value, before[name], rtol=0, atol=0)


class TimeStep(HeadFirst):
    """A diffusion network: the image and a step."""

    def forward(self, x, t):
        return super().forward(x) * t


class NoiseLevel(HeadFirst):
    """A noise level that only a keyword gives, and labels it can do without."""

    def forward(self, x, labels=None, *, sigma):
        return super().forward(x) * sigma


class Embedded(HeadFirst):
    """An input that may be left out by its signature, not by its code."""

    def forward(self, x, context=None):
        return super().forward(x) * context.mean()


@pytest.mark.parametrize(
    ("network", "says"),
    [
        (TimeStep, r"forward\(x, t\) needs t\..*forward_fn=lambda net, image: net\(image, t=t\)"),
        (NoiseLevel, r"needs sigma\..*net\(image, sigma=sigma\)"),
        (Embedded, r"may need context\..*net\(image, context=context\)"),
    ],
)
def test_a_second_input_is_named_with_the_way_to_give_it(network, says):
    """No shape of image can help a network that lacks an input, so the error names that input and forward_fn."""
    with pytest.raises(normfix.NormfixError, match=rf"NF109 .*{says}") as caught:
        normfix.scan(network().eval(), torch.rand(1, 3, 48, 48))
    assert "--input" not in str(caught.value)


@pytest.mark.slow
def test_what_the_error_advises_works():
    """With forward_fn the same network is scanned."""
    found = normfix.scan(TimeStep().eval(), forward_fn=lambda net, image: net(image, t=0.5))
    assert found.halo == ((1, 1), (1, 1))


def test_a_network_of_one_input_is_advised_another_shape():
    """Where nothing but the image is taken, its shape is what to change."""
    with pytest.raises(normfix.NormfixError, match=r"NF109 .*--input NxCxHxW"):
        normfix.scan(HeadFirst().eval(), torch.rand(1, 2, 48, 48))
