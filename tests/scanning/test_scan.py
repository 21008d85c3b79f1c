"""Scanning with all looks: what each site carries, how the looks went, and what a scan costs at most."""

import json

import pytest
import torch
from networks import DilatedStack, HiddenLive, NeedsRoom, SwallowsDye, ValidConvolutions, plain_unet
from optional import needs_newer_torch
from torch import nn
from torch.nn import functional as F
from torchvision.ops import DeformConv2d

import normfix
from normfix.cli.texts import scan_text
from normfix.networks import calling
from normfix.networks.calling import Caller
from normfix.networks.graph.capture import capture
from normfix.networks.releases import is_exporting
from normfix.records.sites import Scan
from normfix.scanning.census import census
from normfix.scanning.growth import look_again
from normfix.scanning.sites import survey


class Deforms(nn.Module):
    """A deformable convolution between two ordinary ones."""

    def __init__(self):
        super().__init__()
        self.stem, self.offset = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 18, 3, padding=1)
        self.deform = DeformConv2d(4, 1, 3, padding=1)

    def forward(self, x):
        x = self.stem(x)
        return self.deform(x, self.offset(x))


class Sorts(nn.Sequential):
    """A statistic that no list of calls names."""

    def __init__(self):
        super().__init__(nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2), _Ranks())


class _Ranks(nn.Module):
    def forward(self, x):
        return x.flatten(2).cummax(-1)[0].view_as(x)


def _scan(net, **options):
    return normfix.scan(net.eval(), torch.randn(1, 1, 128, 128), **options)


@pytest.fixture(scope="module")
def sorting():
    return _scan(Sorts())


def test_every_site_carries_the_looks_that_saw_it(sorting):
    """A norm is seen by census and dye, a running maximum by the dye at least."""
    norm, ranks = sorting.live
    assert norm.looks == ("census", "graph", "dye")
    assert "dye" in ranks.looks
    assert (ranks.function, ranks.owner, ranks.convertible) == ("cummax", "2", False)


def test_what_the_dye_sees_is_in_the_plan(sorting):
    """The plan refuses it with the reason, and no geometry is claimed."""
    decisions = {d.site.function: d for d in normfix.plan(sorting).decisions}
    assert decisions["cummax"].action == "refuse"
    assert sorting.halo is None
    assert "NF215" in [finding.code for finding in sorting.findings]


def test_fast_says_that_the_dye_was_skipped():
    """Without the dye a site carries the census alone, and the record and the text say so."""
    found = _scan(Sorts(), fast=True)
    assert {look.name: look.status for look in found.looks}["dye"] == "skipped"
    assert "dye skipped (the scan was asked to be fast)" in " ".join(scan_text(found).split())
    assert all("dye" not in site.looks for site in found.sites)


@pytest.mark.slow
def test_deformable_convolution_is_never_called_local():
    """Neither look crashes on it; it is unknown by name, and the network is not tile-invariant."""
    found = _scan(Deforms())
    assert not found.tile_invariant
    assert found.halo is None
    assert {"NF242", "NF245"} <= {finding.code for finding in found.findings}
    assert any("deform_conv2d" in finding.message for finding in found.findings)


@pytest.mark.slow
def test_fast_is_as_safe_before_deformable_convolution():
    """Skipping the dye does not let NaN reach the kernel when the halo is read."""
    assert "NF245" in [finding.code for finding in _scan(Deforms(), fast=True).findings]


@pytest.mark.slow
def test_a_live_site_of_the_dye_outvotes_the_census():
    """What the census holds for a norm of weights is live if the dye shows it to be."""
    found = _scan(HiddenLive())
    assert [site.function for site in found.live] == ["instance_norm"]


@pytest.mark.slow
def test_an_ordinary_network_has_no_finding():
    """Negative control: all looks agree on a U-Net with norms frozen by nature."""
    found = _scan(plain_unet())
    assert (found.findings, found.tile_invariant) == ((), True)


def test_a_classifier_has_no_live_pool():
    """Its final pool is seen by census and dye and is live for neither."""
    found = _scan(nn.Sequential(nn.Conv2d(1, 4, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2)))
    assert not found.live
    assert not found.dense
    assert [f.code for f in found.findings if f.code.startswith("NF24")] == []


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "least"),
    [(plain_unet, 8), (DilatedStack, 1), (NeedsRoom, 21), (ValidConvolutions, 5)],
)
def test_the_smallest_tile_is_what_the_network_runs_on(make, least):
    """The least extent on the stride grid: one stride, or the room that reflection or valid borders need."""
    assert _scan(make()).smallest_tile == (least, least)


def test_the_text_fits_a_terminal(sorting):
    """No line is wider than 100 columns, and each site has all its facts."""
    text = scan_text(sorting)
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    assert "1/0/instance_norm/0 instance, live; reduces space, per image and channel;" in words
    assert "seen by census, graph, dye; convertible by swapping its module" in words
    assert "not convertible: it mixes the whole extent" in words
    assert "stride, halo and exact sizes: none" in words


def test_the_record_survives_json(sorting):
    """`--format json` holds looks, sites and findings without loss."""
    assert Scan.from_json(json.loads(json.dumps(sorting.to_json()))) == sorting


class _Pixels:
    """Counts the pixels a network is given, float64 twice."""

    def __init__(self):
        self.total = 0

    def __call__(self, model, x):
        if is_exporting():  # which computes no pixel
            return model(x)
        self.total += x.shape[2:].numel() * x.shape[0] * (2 if x.dtype == torch.float64 else 1)
        return model(x)


@pytest.mark.slow
@needs_newer_torch("a capture computes pixels as well")
def test_a_scan_costs_about_seven_forward_passes():
    """In pixels of the example, float64 counted double, with the dye's second run on top."""
    count, net = _Pixels(), nn.Sequential(nn.InstanceNorm2d(1), plain_unet()).eval()
    found = normfix.scan(net, torch.randn(1, 1, 256, 256), forward_fn=count)
    assert found.halo is not None
    assert count.total / 256**2 < 8


def test_labels_have_the_halo_of_their_graph():
    """A network that answers with labels swallows the dye: its graph bounds the halo; measured, it is a finding."""
    found = _scan(SwallowsDye())
    assert (found.halo, found.reach.measured) == (((2, 2), (2, 2)), None)
    measured = _scan(SwallowsDye(), halo="measured")
    assert measured.halo is None
    assert "NF216" in [finding.code for finding in measured.findings]


@pytest.mark.slow
@pytest.mark.parametrize("size", [2, 3])
def test_a_response_over_channels_is_no_statistic(size):
    """LocalResponseNorm pads and pools channels, which is local; the norm beside it is found as ever."""
    response = nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.LocalResponseNorm(size))
    assert normfix.scan(response).tile_invariant
    assert [s.id for s in normfix.scan(nn.Sequential(*response, nn.InstanceNorm2d(8))).live] == [
        "2/0/instance_norm/0"
    ]


def test_a_network_of_one_size_is_said_to_be_one():
    """Where no second size runs, space is told from channels by position, and the scan says so."""
    net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.LayerNorm((2, 32, 32)))
    found = normfix.scan(net, torch.rand(1, 1, 32, 32)).findings
    assert [(f.code, f.where) for f in found if f.code == "NF201"] == [("NF201", "input size")]


class KeepsMask(nn.Module):
    """Keeps a mask of 32 x 32 pixels, and makes one for any other size, as SwinIR does."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.ones(32, 32))

    def forward(self, x):
        if x.shape[2:] == (32, 32):
            return x * self.mask
        return x * torch.ones_like(x).clamp(max=2)


def test_a_size_of_which_a_mask_is_kept_is_said_to_be_another():
    """The example's own size is the exception: a look at it alone says so, and where another is."""
    seen = survey(KeepsMask(), Caller(), torch.rand(1, 1, 32, 32))
    (said,) = seen.findings
    assert (said.code, seen.elsewhere) == ("NF201", (64, 64))
    assert "other calls than at 64x64" in said.message
    assert "example of another size" in said.message
    other = survey(KeepsMask(), Caller(), torch.rand(1, 1, 40, 40))
    assert (other.findings, other.elsewhere) == ((), None)


class OneSizeApart(nn.Module):
    """Makes other calls for images of 64 x 64 pixels, where it may be another function as well.

    Where `hidden`, it asks for the size as a text, which no graph records.
    """

    def __init__(self, *, same, hidden):
        super().__init__()
        self.before, self.after = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.same, self.hidden = same, hidden

    def forward(self, x):
        y = self.before(x)
        apart = str(tuple(x.shape[2:])) == "(64, 64)" if self.hidden else x.shape[2:] == (64, 64)
        if apart:
            y = y + torch.zeros(64, 64) if self.same else y.sigmoid() + torch.zeros(64, 64)
        return self.after(y)


@pytest.mark.slow
@pytest.mark.parametrize("hidden", [False, True], ids=["asked", "hidden"])
def test_a_network_is_looked_at_beside_the_one_size_at_which_it_makes_other_calls(hidden):
    """Where tiles equal the whole at that size as well, by float64, it is tiled there and beside it."""
    torch.manual_seed(0)
    net = OneSizeApart(same=True, hidden=hidden).double().eval()
    for size in [(64, 64), (65, 127), (64, 40)]:
        image = torch.rand(1, 1, *size, dtype=torch.float64)
        found = normfix.scan(net, image)
        assert (found.stride, found.halo) == ((1, 1), ((2, 2), (2, 2)))
        assert "NF201" not in {f.code for f in found.findings}
        if size == (64, 64):
            assert (found.example, found.tile_invariant) == ((1, 1, 32, 32), True)
            assert all(c.text.startswith("H != 64") for c in found.sizes.crossed)
        with torch.no_grad():
            whole = net(image)
        assert (normfix.predict(net, image, tile=16) - whole).abs().max() < 1e-12
        assert normfix.check(net, image, tile=16).passed


class OneWidthApart(nn.Module):
    """Is another function for images 64 pixels wide, of any height; it looks the width up, which no graph records."""

    def __init__(self):
        super().__init__()
        self.before, self.after = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 1, 3, padding=1)
        self.gains = {64: 1.5}

    def forward(self, x):
        y, width = self.before(x).relu(), x.shape[-1]
        return self.after(y * self.gains[width] if width in self.gains else y)


@pytest.mark.slow
@pytest.mark.parametrize("size", [(96, 64), (200, 64)])
def test_an_extent_apart_counts_by_itself(size):
    """Seen at 64 x 64, where the middle of an image so wide is looked at; which extent decides is not known."""
    torch.manual_seed(0)
    net = OneWidthApart().double().eval()
    with pytest.raises(normfix.NormfixError, match="NF260"):
        normfix.predict(net, torch.rand(1, 1, *size, dtype=torch.float64), tile=16)
    assert any(
        "other calls at one size" in reason
        for reason in normfix.scan(net, torch.rand(1, 1, 64, 64)).sizes.unknown
    )
    beside = torch.rand(1, 1, 96, 96, dtype=torch.float64)
    with torch.no_grad():
        assert (normfix.predict(net, beside, tile=16) - net(beside)).abs().max() < 1e-12


@pytest.mark.parametrize("hidden", [False, True], ids=["asked", "hidden"])
def test_where_one_size_is_another_function_its_images_are_refused(hidden):
    """Control: at that size tiles are not the whole, which the scan says and predict refuses; at others they are."""
    torch.manual_seed(0)
    net, image = OneSizeApart(same=False, hidden=hidden).eval(), torch.rand(1, 1, 64, 64)
    found = normfix.scan(net, image)
    assert (found.tile_invariant, found.sizes.crossed) == (False, ())
    assert found.sizes.broken((64, 64))
    assert not found.sizes.broken((64, 65))[1:]
    with pytest.raises(normfix.NormfixError, match="NF260"):
        normfix.predict(net, image, tile=16)
    assert not normfix.check(net, image, tile=16).passed
    beside = torch.rand(1, 1, 66, 50)
    with torch.no_grad():
        whole = net(beside)
    assert (normfix.predict(net, beside, tile=16) - whole).abs().max() < 1e-5


def test_a_small_example_of_a_network_that_branches_on_larger_ones_is_looked_at_as_it_is():
    """No size that is larger by tens of pixels makes its calls; one smaller by a few does, so it is no size apart."""

    class Large(nn.Module):
        def forward(self, x):
            return F.avg_pool2d(x, 3, 1, 1).sigmoid() if x.shape[2] > 48 else F.avg_pool2d(x, 3, 1, 1)

    image = torch.rand(1, 1, 24, 24, dtype=torch.float64)
    found = normfix.scan(Large(), image)
    assert (found.example, found.halo) == ((1, 1, 24, 24), ((1, 1), (1, 1)))
    assert [condition.text for condition in found.sizes.conditions] == ["H <= 48"]
    assert (normfix.predict(Large(), image, tile=8) - Large()(image)).abs().max() < 1e-6


def test_a_network_that_forward_fn_runs_twice_is_refused_by_name():
    """Each run has other statistics, and no module is there that ran once."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4)).eval()
    flipped = normfix.scan(
        net, torch.randn(1, 1, 32, 32), forward_fn=lambda model, x: model(x) + model(x.flip(2)).flip(2)
    )
    assert len(flipped.live) == 2
    assert all("more than once" in site.refusal for site in flipped.live)


@pytest.mark.parametrize(("stride", "extent"), [(50, 250), (60, 256), (80, 256)])
def test_strides_that_sizes_leave_open_are_found(stride, extent):
    """Few coarse pixels fit several factors, and a map coarser than what the image grows by does not grow at all."""
    net = nn.Sequential(nn.Conv2d(1, 2, stride, stride), nn.ConvTranspose2d(2, 1, stride, stride))
    found = normfix.scan(net.eval(), torch.rand(1, 1, extent, extent))
    assert (found.stride, found.halo) == ((stride, stride), ((0, 0), (0, 0)))


@pytest.mark.parametrize(("step", "first", "size"), [(25, 0, (101, 77)), (50, 3, (256, 256))])
def test_strides_made_by_slicing_are_found(step, first, size):
    """At sizes that they divide or not: the step of a slice is a stride that a call is given."""

    class Sliced(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x):
            return self.inner(x)[..., first::step, first::step]

    assert normfix.scan(Sliced().eval(), torch.rand(1, 1, *size)).stride == (step, step)


class Kept(nn.Module):
    """Maxima of bins whose places are thrown away."""

    def forward(self, x):
        value, _ = F.adaptive_max_pool2d(x, 4, return_indices=True)
        return x + F.interpolate(value, size=x.shape[2:])


class Biased(nn.Module):
    """Attention whose bias is a softmax over numbers of positions."""

    def forward(self, x):
        tokens, numbers = x.flatten(2).mT, torch.arange(x.shape[2] * x.shape[3]) * 0.01
        bias = (numbers[:, None] - numbers).softmax(-1)
        return F.scaled_dot_product_attention(tokens, tokens, tokens, bias).mT.reshape(x.shape)


@pytest.mark.parametrize("net", [Kept, Biased])
def test_what_is_made_by_a_function_with_places_or_of_positions_is_a_site(net):
    """The whole extent counts in both, and no constant stands for it."""
    (site,) = normfix.scan(net().eval(), torch.rand(1, 1, 32, 32)).live
    assert site.refusal


def test_a_map_of_one_size_is_told_from_a_coarse_one():
    """Control: what no image makes larger, however far it grows, follows none."""

    class Fixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner = nn.Conv2d(1, 2, 3, padding=1)

        def forward(self, x):
            return F.adaptive_avg_pool2d(self.inner(x), 8)

    found = normfix.scan(Fixed().eval(), torch.rand(1, 1, 64, 64))
    assert not found.dense
    assert "NF214" in {f.code for f in found.findings}


@pytest.mark.parametrize("kind", ["pixels", "pixels, torch's module", "no attention"])
def test_no_attention_is_run_on_a_far_larger_image(kind):
    """A map that stays as it is calls for a larger image, but not where each pixel is compared with all."""

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.module = nn.MultiheadAttention(4, 1, batch_first=True)

        def forward(self, x):
            tokens = x.flatten(2).mT
            if kind == "pixels":
                tokens = F.scaled_dot_product_attention(tokens, tokens, tokens)
            elif kind != "no attention":
                tokens = self.module(tokens, tokens, tokens)[0]
            return tokens.mT.unflatten(2, x.shape[2:]) + F.adaptive_avg_pool2d(x, 2).relu().mean()

    net, example, extents = Net().eval(), torch.rand(1, 4, 16, 16), []

    def run(model, x):
        extents.append(x.shape[2])
        return model(x)

    look_again(net, run, example, census(net, run, example)[0])
    assert (max(extents) >= 256) == (kind == "no attention")


class _AllPairs(nn.Module):
    """Attention between all voxels, written out."""

    def forward(self, x):
        tokens = x.flatten(2)
        return (tokens @ (tokens.mT @ tokens).softmax(1)).view_as(x)


@pytest.mark.parametrize(("network", "grown"), [(_AllPairs(), (12, 14, 13)), (nn.Tanh(), (36, 38, 37))])
def test_an_image_grows_by_what_all_pairs_of_pixels_leave_room_for(monkeypatch, network, grown):
    """Of a volume of 16x24x20 voxels 32 more along each axis are 78 GB of products; other maps grow as the image."""
    monkeypatch.setattr(calling, "_PAIRS", 1 << 25)
    example = torch.rand(1, 1, 4, 6, 5)

    def run(model, x):
        return model(x)

    again = look_again(network, run, example, census(network, run, example)[0])
    assert tuple(again.example.shape[2:]) == grown


class _BesideBins(nn.Module):
    """A function of maps, and a map that stays as it is, however large the image."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x) + F.adaptive_avg_pool2d(x, 2).relu().mean()


@pytest.mark.parametrize(("function", "far"), [(_AllPairs(), False), (nn.Tanh(), True)])
def test_a_far_larger_image_is_none_for_all_pairs_of_pixels(monkeypatch, function, far):
    """A map that stays as it is calls for one, but not beside attention that is written out."""
    monkeypatch.setattr(calling, "_PAIRS", 1 << 25)
    net, example, extents = _BesideBins(function), torch.rand(1, 1, 16, 16), []

    def run(model, x):
        extents.append(x.shape[2])
        return model(x)

    look_again(net, run, example, census(net, run, example)[0])
    assert (max(extents) >= 256) == far


def test_a_graph_with_all_pairs_is_compared_at_what_fits_in_memory(monkeypatch):
    """Its sizes are free, which a larger image shows, and one that was too large left unsaid."""
    monkeypatch.setattr(calling, "_PAIRS", 1 << 25)
    found = capture(_AllPairs(), Caller(), torch.rand(1, 1, 4, 6, 5))
    assert found.free == (0, 2, 3, 4)
    assert max(shape[2:] for shape in found.replayed) == (8, 12, 10)
