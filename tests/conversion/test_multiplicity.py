"""An image may have several of a statistic of which a part of it has one."""

from contextlib import nullcontext

import pytest
import torch
from torch import nn

import normfix
from normfix.conversion.multiplicity import have_as_many
from normfix.conversion.planning import decide
from normfix.conversion.rewriting import rewrite
from normfix.conversion.targets import measured_targets
from normfix.images.sources import TensorImage
from normfix.networks.calling import Caller
from normfix.tiling.stages.cache import program_of
from normfix.tiling.stages.refusals import NotInStages


class InBlocks(nn.Module):
    """Runs its layers on blocks of columns that are stacked as a batch, padded to whole ones."""

    def __init__(self, *layers, width):
        super().__init__()
        self.layers, self.width = nn.Sequential(*layers), width

    def forward(self, x):
        columns = x.shape[-1]
        blocks = nn.functional.pad(x, (0, -columns % self.width)).unfold(-1, self.width, self.width)
        blocks = blocks.movedim(-2, 1).flatten(0, 1)  # (n, c, *, blocks, width) -> (n*blocks, c, *, width)
        whole = self.layers(blocks).unflatten(0, (len(x), -1)).movedim(1, -2).flatten(-2)
        return whole[..., :columns]


class Halves(nn.Module):
    """Stacks the halves of what is wide."""

    def __init__(self, inner, widest=160):
        super().__init__()
        self.inner, self.widest = inner, widest

    def forward(self, x):
        if x.shape[-1] > self.widest:
            return torch.cat(self.inner(torch.cat(x.chunk(2, -1))).chunk(2), -1)
        return self.inner(x)


def test_a_part_with_one_statistic_does_not_stand_for_an_image_with_several():
    """Its identity on a part of the image says nothing of the image, which is refused."""
    image = torch.randn(1, 1, 32, 256) + torch.linspace(0, 9, 256)
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Halves(nn.InstanceNorm2d(2))).eval()
    with pytest.raises(normfix.NormfixError) as caught:
        normfix.predict(network, image, 32, statistics="per-image")
    assert caught.value.code == "NF409"


def test_a_converted_network_has_one_statistic_of_what_its_example_has():
    """What was proved on an image of one block is not used for one of several, whose own statistics were asked for."""
    torch.manual_seed(0)
    network = InBlocks(nn.Conv1d(1, 2, 3, padding=1), nn.InstanceNorm1d(2), width=256)
    model = normfix.convert(network.eval(), torch.rand(1, 1, 256)).model
    with pytest.raises(normfix.NormfixError, match=r"NF409.*several of a statistic"):
        normfix.predict(model, torch.rand(1, 1, 512), 256, statistics="per-image")
    with pytest.raises(normfix.NormfixError, match=r"NF409.*several of a statistic"):
        normfix.calibrate(model, torch.rand(1, 1, 512))


class Pooled(nn.Module):
    """Divides by the mean of windows as large as the image, up to a bound."""

    def forward(self, x):
        least = min(96, *x.shape[2:])
        return x / (
            1 + nn.functional.avg_pool2d(x.abs(), least, least, ceil_mode=True).mean((2, 3), keepdim=True)
        )


def test_windows_that_an_image_has_several_of_are_no_mean_of_it():
    """A pool over all of the example is one over parts of a larger image, wherever the branch by size is taken."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Pooled()).eval()
    model = normfix.convert(network, torch.rand(1, 1, 64, 64)).model
    with pytest.raises(normfix.NormfixError, match=r"NF409.*several of a statistic"):
        normfix.predict(model, torch.rand(1, 1, 128, 128), 32, statistics="per-image")


def test_statistics_are_counted_without_numbers():
    """One image of a block has as many as another, one of two has not, and a run that needs numbers tells none."""
    network = nn.Sequential(nn.Conv1d(1, 2, 3, padding=1), InBlocks(nn.InstanceNorm1d(2), width=64)).eval()
    plan = decide(normfix.scan(network, torch.rand(1, 1, 64), fast=True).sites, model="net", to="frozen")
    frozen = rewrite(network, plan).eval()

    def compared(model, *sizes):
        shapes = tuple((1, 1, n) for n in sizes)
        return have_as_many(model, frozen, measured_targets(frozen, plan), Caller(), shapes)

    assert compared(network, 64, 32)
    assert compared(network, 128, 256)
    assert compared(network, 64, 128) is False
    frozen.register_forward_hook(lambda module, args, result: result * float(result.sum()))
    assert compared(frozen, 64, 128) is None


def test_a_program_knows_the_sizes_that_it_was_captured_for():
    """A branch by the width is one side of it, and the part of an image that tells no values tells the other size."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Halves(nn.ReLU())).eval()
    with program_of(network, Caller(), (), TensorImage(torch.rand(1, 1, 32, 128)), (32, 32)) as program:
        assert program.takes((1, 1, 32, 96))
        assert not program.takes((1, 1, 32, 256))
    with program_of(network, Caller(), (), TensorImage(torch.rand(1, 1, 32, 256)), (32, 32)) as other:
        assert other is not program
        assert other.takes((1, 1, 32, 256))


@pytest.mark.parametrize(("inner", "same"), [(nn.ReLU(), True), (nn.Softmax(-1), False)])
def test_beyond_a_branch_a_program_is_used_where_it_computes_the_same(inner, same):
    """An image wider than what is captured is on the other side: the halves of a pointwise layer are its whole."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Halves(inner, widest=300)).eval()
    image = TensorImage(torch.rand(1, 1, 32, 320))
    with (
        nullcontext() if same else pytest.raises(NotInStages, match=r"NF321.*branch by size"),
        program_of(network, Caller(), (), image, (32, 32)) as program,
    ):
        assert program.takes((1, 1, 32, 256))


class Gained(nn.Module):
    """Adds where an image is wide what a weight says, and clamps there to a bound."""

    def __init__(self, bound=torch.inf):
        super().__init__()
        self.gain, self.bound = nn.Parameter(torch.zeros(())), bound

    def forward(self, x):
        return (x + self.gain * x.tanh()).clamp(max=self.bound) if x.shape[-1] > 300 else x


@pytest.mark.parametrize("width", [320, 1 << 14])
def test_what_a_program_computes_beyond_a_branch_is_of_the_weights_of_now(width):
    """It may have been the same before they were trained; control: weights that keep it the same."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Gained()).eval()
    image = TensorImage(torch.rand(1, 1, 32, width))
    for bias in (0, 1):
        network[0].bias.data.fill_(bias)
        with program_of(network, Caller(), (), image, (32, 32)):
            pass
    network[1].gain.data.fill_(1)
    with pytest.raises(NotInStages, match="NF321"), program_of(network, Caller(), (), image, (32, 32)):
        pass


def test_what_a_program_computes_beyond_a_branch_is_of_brighter_images_too():
    """A bound that an image does not reach another does, or the same elsewhere than on its first rows."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Gained(bound=60.0)).eval()
    image = TensorImage(torch.rand(1, 1, 32, 320))
    with pytest.raises(NotInStages, match="NF321"), program_of(network, Caller(), (), image, (32, 32)):
        pass


class Remembers(nn.Module):
    """Keeps a map for each size of image that it saw, as networks keep masks and tables of positions."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.maps = nn.Conv2d(1, 3, 3, padding=1), nn.InstanceNorm2d(3), {}

    def forward(self, x):
        size = tuple(x.shape[2:])
        if size not in self.maps:
            self.maps[size] = torch.full(size, 0.5)
        return self.norm(self.conv(x)) * self.maps[size]


def test_counting_leaves_nothing_in_what_a_network_keeps():
    """A map made while shapes alone were computed has no numbers, and was met in the next run."""
    net, image = Remembers().eval(), torch.rand(1, 1, 48, 40, generator=torch.Generator().manual_seed(0))
    expected = net(image).detach()
    own = normfix.predict(net, image, tile=16, statistics="per-image")
    torch.testing.assert_close(own, expected, rtol=1e-4, atol=1e-5)
    assert list(net.maps) == [(48, 40)]
