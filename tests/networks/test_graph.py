"""The exported graph: captured, replayed, read for sites and held against the census."""

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from factories import tiny_unet
from networks import HiddenLive, InWindows, PadsItself, ResizesToSkip
from optional import needs_newer_torch
from torch import nn

from normfix.networks.calling import Caller
from normfix.networks.graph.capture import Captured, NotCaptured, capture, export, free_dimensions
from normfix.networks.graph.replaying import replay
from normfix.networks.releases import is_exporting
from normfix.records.sites import Family
from normfix.scanning.graph.look import graph_look
from normfix.scanning.graph.sites import read_sites
from normfix.scanning.sites import survey

IMAGE = torch.randn(1, 1, 32, 48, generator=torch.Generator().manual_seed(0))


class Nasty(nn.Module):
    """One norm called twice in a block that has two names, a functional norm, a norm of weights, a live mean."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(1, 4, 3, padding=1)
        self.first = Twice()
        self.again = self.first
        self.norm = nn.BatchNorm2d(4)
        self.channels = nn.LayerNorm(4)

    def forward(self, x):
        weight = self.stem.weight
        weight = F.batch_norm(weight.reshape(1, 4, -1), None, None, training=True).reshape_as(weight)
        x = F.conv2d(x, weight, padding=1)
        x = self.again(self.first(x))
        x = self.norm(x) * x.mean((2, 3), keepdim=True).sigmoid()
        return {"map": self.channels(x.movedim(1, -1)).movedim(-1, 1), "class": x.mean((2, 3))}


class Twice(nn.Module):
    """Calls its norm twice, then torch's function once."""

    def __init__(self):
        super().__init__()
        self.norm = nn.InstanceNorm2d(4, affine=True)

    def forward(self, x):
        return F.group_norm(self.norm(self.norm(x) * 2 + 1), 2)


def looked(model, output=None, image=IMAGE):
    """Return the sites of the census and the look of the graph."""
    caller = Caller(None, output)
    model = model.eval()
    with torch.no_grad():
        sites = survey(model, caller, image).sites
    return sites, graph_look(model, caller, image, sites)


def test_captures_with_free_batch_and_sizes():
    """Batch and space are free, and the program was compared on the example, another batch and another size."""
    captured = capture(tiny_unet(), Caller(), IMAGE)
    assert isinstance(captured, Captured)
    assert captured.free == (0, 2, 3)
    assert captured.replayed == ((1, 1, 32, 48), (2, 1, 64, 80))


@pytest.mark.parametrize("right", [True, False])
def test_what_a_network_gave_before_is_not_computed_again(right):
    """A graph is held against what the network gave; control: where that is something else, the network runs again."""
    runs = []

    def run(model, x):
        runs.append(is_exporting())
        return model(x)

    net, image = nn.Conv2d(1, 2, 3, padding=1).eval(), torch.randn(1, 1, 16, 24)
    gave = net(image).detach() + (0 if right else 1)
    captured = capture(net, run, IMAGE, once=True, known=[(image, gave)])
    assert isinstance(captured, Captured)
    assert captured.replayed == ((1, 1, 16, 24),)
    assert runs.count(False) == (0 if right else 1)


def test_what_is_made_for_two_images_is_captured_of_one():
    """A prompt for each image of a batch of two fixes the batch: such a graph is that of no single image."""

    class Prompted(nn.Module):
        def forward(self, x):
            prompt = torch.arange(float(x.shape[0])).view(-1, 1, 1, 1) if x.shape[0] == 2 else 0.0
            return x + prompt

    captured = capture(Prompted().eval(), lambda model, x: model(x), IMAGE)
    assert isinstance(captured, Captured)
    assert captured.free == (2, 3)


def test_data_is_traced():
    """What is read as x.data is an operator of the graph, not a constant without values."""

    class Padded(nn.Module):
        def forward(self, x):
            return torch.cat([x.data, torch.zeros_like(x)], 1)

    assert isinstance(capture(Padded().eval(), lambda model, x: model(x), IMAGE), Captured)


@pytest.mark.slow
def test_captures_three_axes():
    """A 3D network is captured with all its axes free."""
    captured = capture(tiny_unet(ndim=3), Caller(), torch.randn(1, 1, 8, 16, 16))
    assert isinstance(captured, Captured)
    assert captured.free == (0, 2, 3, 4)


@pytest.mark.slow
def test_leaves_the_network_alone():
    """Capturing changes neither weights, nor mode, nor hooks, nor the example."""
    model, image = Nasty().train(), IMAGE.clone()
    before = copy.deepcopy(model.state_dict())
    capture(model, Caller(None, "map"), image)
    assert model.training
    assert torch.equal(image, IMAGE)
    assert all(torch.equal(before[k], v) for k, v in model.state_dict().items())


@pytest.mark.slow
def test_one_size_frees_no_extent():
    """A network known to take one size is captured at that size; control: otherwise its extents are free."""
    free = [free_dimensions(export(tiny_unet(), IMAGE[:1], one_size=given)) for given in (True, False)]
    assert set(free[0]) == {0}
    assert {2, 3} <= set(free[1])


def test_a_network_that_writes_to_its_input_is_captured():
    """In-place work on the input does not reach the example."""

    class InPlace(nn.Module):
        def forward(self, x):
            return x.mul_(2).relu_()

    image = IMAGE.clone()
    assert isinstance(capture(InPlace(), lambda model, x: model(x), image), Captured)
    assert torch.equal(image, IMAGE)


@pytest.mark.parametrize(
    "error", [RuntimeError("a\nb"), KeyError("k"), NotImplementedError(), RecursionError()]
)
def test_whatever_export_raises_is_a_reason(error, monkeypatch):
    """Any exception of torch.export becomes one line."""

    def fail(*args, **kwargs):
        raise error

    monkeypatch.setattr(torch.export, "export", fail)
    found = capture(tiny_unet(), Caller(), IMAGE)
    assert isinstance(found, NotCaptured)
    assert found.reason.startswith(type(error).__name__)
    assert "\n" not in found.reason


def test_a_branch_on_values_is_a_reason():
    """A network whose path depends on pixel values is not captured, and the look says so."""

    class Branches(nn.Module):
        def forward(self, x):
            return x * 2 if x.max() > 1 else x

    _, look = looked(Branches())
    assert look.looked.status == "failed"
    assert [f.code for f in look.findings] == ["NF221"]


@pytest.mark.slow
def test_a_fixed_size_falls_back():
    """A network of one size is captured at that size, with what can be free free."""

    class OneSize(nn.Module):
        def __init__(self):
            super().__init__()
            self.position = nn.Parameter(torch.randn(1, 1, 32, 48))

        def forward(self, x):
            return F.instance_norm(x + self.position)

    sites, look = looked(OneSize())
    assert look.looked.status == "done"
    assert look.free == (0,)
    assert look.seen == {sites[0].id}


def test_a_wrong_capture_is_not_believed(monkeypatch):
    """A program that differs from the network, here by its weights, is refused on replay."""
    export = torch.export.export

    def wrong(module, *args, **kwargs):
        with torch.no_grad():
            list(module.parameters())[-2].mul_(1.5)
        return export(module, *args, **kwargs)

    monkeypatch.setattr(torch.export, "export", wrong)
    found = capture(tiny_unet(), Caller(), IMAGE)
    assert isinstance(found, NotCaptured)
    assert "differs" in found.reason


@pytest.mark.slow
@torch.no_grad()
def test_a_replay_tells_networks_apart():
    """A program is compared by value, shape and number of outputs; an input it does not take decides nothing."""
    captured = capture(tiny_unet(), Caller(), IMAGE)
    assert isinstance(captured, Captured)
    assert replay(captured.program, tiny_unet().eval(), IMAGE) is True
    assert replay(captured.program, nn.Identity(), IMAGE) is False
    assert replay(captured.program, nn.Conv2d(1, 2, 1), IMAGE) is False
    assert replay(captured.program, tiny_unet().eval(), IMAGE[..., 1:]) is None


@pytest.mark.slow
def test_sees_every_site_of_the_census():
    """Twice-called norms, second names, functional calls, weight norms and means are paired with census ids."""
    sites, look = looked(Nasty(), "map")
    assert look.seen == {site.id for site in sites}
    assert (look.unseen, look.surplus, look.disputed, look.findings) == ((), (), (), ())
    assert {"first.norm/3/instance_norm/0", "first/1/group_norm/0", "(root)/0/mean/0"} <= look.seen


@pytest.mark.slow
def test_provenance_decides():
    """A norm of weights is seen and not live; a norm over channels neither; a pool that meets a map is."""
    captured = capture(Nasty().eval(), Caller(None, "map"), IMAGE)
    seen = read_sites(captured, Nasty()).seen
    (weights,) = (s for s in seen if s.family is Family.BATCH and s.owner == "")
    (channels,) = (s for s in seen if s.family is Family.LAYER)
    pools = [s for s in seen if s.family is Family.REDUCTION]
    assert not weights.depends
    assert not weights.live
    assert not channels.live
    assert [s.live for s in pools] == [True, False]


@pytest.mark.slow
def test_a_site_the_census_missed_is_a_finding():
    """A node without a census site, and a census site without a node, are named."""
    model = tiny_unet().eval()
    sites, _ = looked(model)
    look = graph_look(model, Caller(), IMAGE, sites[:1])
    assert [s.owner for s in look.surplus] == ["second.1"]
    assert [f.code for f in look.findings] == ["NF222"]
    invented = replace(sites[0], owner="nowhere")
    assert graph_look(model, Caller(), IMAGE, [*sites, invented]).unseen == (invented.id,)


@pytest.mark.slow
def test_a_dispute_about_life_is_a_finding():
    """Census and graph disagreeing on liveness is named."""
    model = tiny_unet().eval()
    sites, _ = looked(model)
    look = graph_look(model, Caller(), IMAGE, [replace(sites[0], live=False), sites[1]])
    assert look.disputed == (sites[0].id,)


@pytest.mark.slow
def test_an_unknown_operator_is_unknown():
    """A sampling grid is an operator that nobody lists, and never passes as local."""

    class Samples(nn.Module):
        def forward(self, x):
            return F.grid_sample(x, x.movedim(1, -1).expand(-1, -1, -1, 2), align_corners=False)

    _, look = looked(Samples())
    assert [name for name, _ in look.unknown] == ["aten.grid_sampler.default"]
    assert "NF223" in [f.code for f in look.findings]


@pytest.mark.parametrize(
    ("operation", "family"),
    [
        (lambda x: x * F.softmax(x.flatten(2), -1).reshape(x.shape), Family.ATTENTION),
        (lambda x: torch.fft.fft2(x).real, Family.OTHER),
        (lambda x: x.cumsum(3), Family.OTHER),
        (lambda x: x.sort(2).values, Family.OTHER),
        (lambda x: x - x.amax((2, 3), keepdim=True), Family.REDUCTION),
        (lambda x: x * F.adaptive_avg_pool2d(x, 1), Family.POOL),
        (lambda x: x / x.norm(dim=(2, 3), keepdim=True), Family.REDUCTION),
        (lambda x: x - x.mean(3, keepdim=True), Family.REDUCTION),
    ],
)
def test_global_operations_are_seen(operation, family):
    """Whatever looks along space is found in the graph, by family."""

    class Global(nn.Module):
        def forward(self, x):
            return operation(x)

    reading = read_sites(capture(Global(), Caller(), IMAGE), Global())
    assert [s.family for s in reading.seen if s.live] == [family]


@pytest.mark.slow
@pytest.mark.parametrize("make", [tiny_unet, ResizesToSkip, PadsItself])
def test_local_networks_have_nothing_unknown(make):
    """Convolutions, pools, resampling, padding and cropping are known to be local."""
    model = make()
    captured = capture(model, Caller(), IMAGE)
    reading = read_sites(captured, model)
    assert reading.unknown == ()
    assert all(s.family is Family.INSTANCE for s in reading.seen)


def test_a_hidden_operand_is_found():
    """A norm whose operand went through a written view depends on the image."""
    captured = capture(HiddenLive(), Caller(), IMAGE)
    (site,) = (s for s in read_sites(captured, HiddenLive()).seen if s.family is Family.INSTANCE)
    assert site.depends
    assert site.live


def test_a_custom_operator_is_unknown():
    """An operator from outside torch is reported, whatever it computes."""

    @torch.library.custom_op("normfix_test::doubled", mutates_args=())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * 2

    doubled.register_fake(torch.empty_like)

    class Custom(nn.Module):
        def forward(self, x):
            return doubled(x) + 1

    reading = read_sites(capture(Custom(), Caller(), IMAGE), Custom())
    assert reading.unknown == (("normfix_test.doubled.default", 1),)


@pytest.mark.parametrize(
    "operation",
    [
        lambda x: x.view_as(x.clone()),
        lambda x: F.hardswish(x.clone(), inplace=True),
        lambda x: torch.hstack([x, x]),
        lambda x: torch.cat([x, x], 1)[:, [1, 0]],
        lambda x: F.pad(F.avg_pool2d(x, 16), (0, 1, 0, 1)),
    ],
)
def test_ordinary_operations_are_local(operation):
    """Shapes, activations in place, channels taken by number and padding of tiny maps are nothing to report."""

    class Local(nn.Module):
        def forward(self, x):
            return operation(x)

    reading = read_sites(capture(Local(), Caller(), IMAGE), Local())
    assert reading.unknown == ()
    assert reading.seen == ()


def test_picking_along_space_is_unknown():
    """Pixels taken by number may lie anywhere, so they are reported."""

    class Picks(nn.Module):
        def forward(self, x):
            return x[:, :, torch.arange(x.shape[2] - 1, -1, -1)]

    reading = read_sites(capture(Picks(), Caller(), IMAGE), Picks())
    assert [name for name, _ in reading.unknown] == ["aten.index.Tensor"]


def test_what_a_later_reduction_absorbs_is_no_dispute():
    """Softmax over space before a contraction over space is dead to the census, and the graph does not object."""

    class Context(nn.Module):
        def __init__(self):
            super().__init__()
            self.mask = nn.Conv2d(1, 1, 1)

        def forward(self, x):
            weights = F.softmax(self.mask(x).flatten(2), 2).transpose(1, 2)  # (n, h w, 1)
            return x * torch.matmul(x.flatten(2), weights)[..., None]

    sites, look = looked(Context())
    assert [site.function for site in sites if site.live] == ["matmul"]
    assert look.findings == ()


@pytest.mark.slow
def test_a_graph_that_cannot_be_read_takes_nothing_with_it(monkeypatch):
    """A fault while reading the graph is a finding, and the scan goes on."""
    from normfix.scanning.graph import look as looking

    def fail(*args):
        raise KeyError("val")

    monkeypatch.setattr(looking, "read_sites", fail)
    _, look = looked(tiny_unet())
    assert look.looked.status == "failed"
    assert [f.code for f in look.findings] == ["NF229"]


class _SameAsTensorFlow(nn.Module):
    """Breaks capture with free sizes: padding from the size, so each size is a formula with the last in it thrice."""

    def __init__(self, levels):
        super().__init__()
        self.levels = nn.ModuleList(nn.Conv2d(4 if i else 1, 4, 3, stride=2) for i in range(levels))

    def forward(self, x):
        for level in self.levels:
            rows, columns = (max((math.ceil(n / 2) - 1) * 2 + 3 - n, 0) for n in x.shape[2:])
            x = level(F.pad(x, (columns // 2, columns - columns // 2, rows // 2, rows - rows // 2)))
        return x


@pytest.mark.slow
@pytest.mark.parametrize(
    ("levels", "free"),
    [
        (1, (0, 2, 3)),
        pytest.param(5, (0,), marks=needs_newer_torch("sizes are computed in fewer steps, and stay free")),
    ],
)
def test_sizes_that_nest_are_not_left_free(levels, free):
    """One such padding keeps its sizes free; from the second on they are fixed, in seconds and not in hours."""
    captured = capture(_SameAsTensorFlow(levels).eval(), lambda model, x: model(x), torch.randn(1, 1, 64, 64))
    assert captured.free == free


@pytest.mark.zoo
def test_sizes_of_padded_windows_are_not_left_free():
    """Remainders within remainders make formulas that take minutes: the sizes are fixed, and the batch is free."""
    assert free_dimensions(export(InWindows(2).eval(), torch.randn(1, 1, 64, 64))) == (0,)


@pytest.mark.parametrize(("exact", "size"), [((), 32), ((64, 64), 128), ((96, 96), 96), ((80, 80), 32)])
def test_a_second_size_is_one_that_the_network_is_exact_for(exact, size):
    """Below its lattice a network may be another one, so multiples of it come first; where none is tried, any does."""
    seen = survey(nn.Conv2d(1, 1, 3, padding=1), Caller(), torch.randn(1, 1, 64, 64), exact=exact)
    assert seen.other.shape == (1, 1, size, size)
