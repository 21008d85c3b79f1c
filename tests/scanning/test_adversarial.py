"""Networks that once got through: each is now converted right, or refused by name."""

import warnings
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfix
from normfix.scanning.sightings import confirmed, dye_look
from normfix.scanning.sites import survey


def conv(inputs, outputs, kernel=3, **arguments):
    return nn.Conv2d(inputs, outputs, kernel, padding=arguments.pop("padding", kernel // 2), **arguments)


@pytest.fixture
def image():
    return torch.rand(1, 1, 192, 192)


def circular():
    """Wraps around at the border of whatever it is given."""
    layers = [conv(1, 8, padding_mode="circular"), nn.BatchNorm2d(8), nn.ReLU()]
    return nn.Sequential(*layers, conv(8, 1, padding_mode="circular")).eval()


@pytest.mark.zoo
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_circular_padding_never_passes(image, dtype):
    """A tile's own border is not the image's, and no noise floor excuses it."""
    done = normfix.convert(circular().to(dtype), image.to(dtype))
    assert done.proof.step("tiles").status == "failed"


@pytest.mark.slow
def test_noise_far_from_zero_excuses_nothing():
    """On values near 1000 the noise floor is large; a structural difference fails all the same."""
    x = torch.rand(1, 1, 192, 192) * 1e-3 + 1000
    assert normfix.check(circular(), x, tile=64).status == "failed"


class ScaleInvariant(nn.Module):
    """Normalises each pixel over channels first, so that amplifying the outside changes nothing."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 1, bias=False)
        self.body = nn.Sequential(*(conv(8, 8) for _ in range(8)))

    def forward(self, x):
        return self.body(F.normalize(self.stem(x), dim=1))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_short_halo_where_interference_is_blind(dtype):
    """A halo shorter than measured fails, also where nothing that is amplified can be seen."""
    verdict = normfix.check(
        ScaleInvariant().to(dtype), torch.rand(1, 3, 160, 160, dtype=dtype), tile=32, halo=4
    )
    assert verdict.status == "failed"
    assert any(f.code == "NF403" and "reaches 8/8" in f.message for f in verdict.findings)


class PadsToEight(nn.Module):
    """Pads on both sides to a multiple of 8 around a network of stride 4."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv2d(1, 8, 4, stride=4),
            nn.InstanceNorm2d(8),
            conv(8, 8),
            nn.ConvTranspose2d(8, 1, 4, stride=4),
        )

    def forward(self, x):
        h, w = x.shape[2:]
        below, right = -h % 8, -w % 8
        top, left = below // 2, right // 2
        x = self.net(F.pad(x, (left, right - left, top, below - top), mode="reflect"))
        return x[..., top : top + h, left : left + w]


@pytest.mark.slow
def test_extents_have_a_unit_of_their_own(image):
    """Windows are cut on multiples of 8, not of the stride 4, and odd sizes are what the network makes of them."""
    done = normfix.convert(PadsToEight(), image)
    assert done.proof.passed
    assert done.scan.stride == (8, 8)
    with pytest.raises(normfix.NormfixError, match="NF402"):
        normfix.predict(done.model, image, tile=100)
    odd = image[..., :180, :188]
    with torch.no_grad():
        whole = done.model.eval()(odd)
    assert float((normfix.predict(done.model, odd, tile=64) - whole).abs().max()) < 1e-5


class Branching(nn.Module):
    """Lets one number computed from the whole image decide what is done."""

    def __init__(self, decide):
        super().__init__()
        self.net, self.decide = nn.Sequential(conv(1, 8), nn.InstanceNorm2d(8), nn.ReLU(), conv(8, 1)), decide

    def forward(self, x):
        return self.net(x / 255 if self.decide(x) else x)


def brighter(x):
    return x.max() > 1.5


def negative(x):
    return bool(torch.any(x < 0))


def dim(x):
    return x.mean().item() < 0.2


def dark(x):
    return int(x.mean() < 0.2)


@pytest.mark.slow
@pytest.mark.parametrize("decide", [brighter, negative, dim, dark])
def test_a_statistic_that_decides_a_branch_is_frozen(image, decide):
    """A reduction whose value leaves tensors is live, and frozen: every tile takes the image's branch."""
    scan = normfix.scan(Branching(decide), image)
    assert scan.live[0].reduces == "space"
    done = normfix.convert(Branching(decide), image)
    assert done.proof.passed
    assert [d.site.function for d in done.plan.converted][1:] == ["instance_norm"]


@pytest.mark.slow
@pytest.mark.parametrize("decide", [brighter, negative, dim, dark])
def test_a_branch_that_is_kept_live_fails(image, decide):
    """Control: with the statistic kept, the tiles fail."""
    done = normfix.convert(Branching(decide), image, keep=("",))
    assert done.proof.step("tiles").status == "failed"


@pytest.mark.slow
def test_axes_that_windows_cover_are_proved_on_strips():
    """An image that is narrow on one axis does not hide what happens along that axis."""

    class Wraps(nn.Module):
        def __init__(self):
            super().__init__()
            self.first, self.norm, self.last = conv(1, 4), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 15)

        def forward(self, x):
            x = F.pad(self.norm(self.first(x)), (0, 0, 7, 7))
            return self.last(F.pad(x, (7, 7, 0, 0), mode="circular"))

    done = normfix.convert(Wraps(), torch.rand(1, 1, 256, 20))
    assert done.proof.step("tiles").status == "failed"


def test_the_callers_image_is_not_modified(image):
    """A network that works in place on its input gets a copy of it."""

    class InPlace(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(conv(1, 8), nn.InstanceNorm2d(8), conv(8, 1))

        def forward(self, x):
            x.sub_(0.4).clamp_(-0.2, 0.2)
            return self.body(x)

    before = image.clone()
    done = normfix.convert(InPlace(), image)
    assert done.proof.passed
    normfix.predict(done.model, image, tile=64)
    normfix.check(done.model, image, tile=64)
    assert torch.equal(image, before)


def test_a_closure_over_the_original_is_refused(image):
    """A lambda that still runs the original's modules would change them; it is refused before it does."""

    class Closure(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.norm = conv(1, 8), nn.BatchNorm2d(8)
            self.step = lambda x: self.norm(self.conv(x))

        def forward(self, x):
            return self.step(x)

    model = Closure()
    before = model.norm.running_mean.clone()
    for use in (normfix.scan, normfix.convert, normfix.check):
        with pytest.raises(normfix.NormfixError, match=r"NF208.*closure"):
            use(model, image)
    assert torch.equal(model.norm.running_mean, before)
    assert not model.conv._forward_pre_hooks


def test_the_random_state_is_the_callers(image):
    """Scanning and converting leave the global random state as it was, also for lazy networks."""
    torch.manual_seed(3)
    before = torch.get_rng_state()
    normfix.convert(nn.Sequential(nn.LazyConv2d(8, 3), nn.InstanceNorm2d(8)), image)
    assert torch.equal(torch.get_rng_state(), before)


def test_buffers_that_count_are_given_back(image):
    """A counter that every forward raises is, after the conversion, what it was in the caller's network."""

    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(conv(1, 8), nn.InstanceNorm2d(8), conv(8, 1))
            self.register_buffer("count", torch.zeros((), dtype=torch.long))

        def forward(self, x):
            self.count += 1
            return self.body(x)

    done = normfix.convert(Counting(), image)
    assert done.proof.passed
    assert int(done.model.count) == 0


class SafeInHalf(nn.GroupNorm):
    """Casts to float32 and back, as diffusion U-Nets do."""

    def forward(self, x):
        return super().forward(x.float()).type(x.dtype)


def test_norms_that_cast_to_float32_are_proved_in_float64(image):
    """A cast to float32 inside the network does not spoil the geometry, which is measured in float64."""
    model = nn.Sequential(conv(1, 8), SafeInHalf(2, 8), nn.ReLU(), conv(8, 1))
    done = normfix.convert(model, image)
    assert done.proof.passed
    assert done.scan.halo == ((2, 2), (2, 2))


@pytest.mark.slow
def test_tied_group_norms(image):
    """Norms that share their affine map get their own where each is re-expressed."""
    first, second = nn.GroupNorm(2, 8), nn.GroupNorm(4, 8)
    second.weight, second.bias = first.weight, first.bias
    model = nn.Sequential(conv(1, 8), first, nn.ReLU(), conv(8, 8), second)
    for to in ("frozen", "batchrenorm"):
        assert normfix.convert(model, image, to).proof.passed


@pytest.mark.slow
def test_strides_that_are_no_power_of_two():
    """A network of stride 5 is measured and proved."""
    model = nn.Sequential(
        nn.Conv2d(1, 8, 5, stride=5), nn.InstanceNorm2d(8), nn.ConvTranspose2d(8, 1, 5, stride=5)
    )
    done = normfix.convert(model, torch.rand(1, 1, 200, 300))
    assert done.proof.passed
    assert done.scan.stride == (5, 5)


class Asking(nn.Module):
    """Doubles the map where a question about all of it is answered with yes; `ask` returns no tensor."""

    def __init__(self, ask):
        super().__init__()
        self.stem, self.norm, self.head, self.ask = conv(1, 4), nn.InstanceNorm2d(4), conv(4, 1), ask

    def forward(self, x):
        x = self.norm(self.stem(x))
        return self.head(x * 2 if self.ask(x) else x)


ASKED = {
    "equal": lambda x: torch.equal(x, x.abs()),
    "allclose": lambda x: torch.allclose(x, x.abs()),
    "__contains__": lambda x: 1e3 in x,
    "nonzero": lambda x: len((x > 100).nonzero()) > 0,
    "masked_select": lambda x: x[x > 100].numel() > 0,
    "unique": lambda x: torch.unique(x > 100).numel() > 1,
    "numpy": lambda x: x.numpy().max() > 100,
    "tolist": lambda x: max(x[0, 0, 0].tolist()) > 100,
    "__dlpack__": lambda x: np.from_dlpack(x).max() > 100,
}


@pytest.mark.slow
@pytest.mark.parametrize(
    "function", [pytest.param(name, marks=pytest.mark.zoo if name == "tolist" else ()) for name in ASKED]
)
def test_values_that_leave_as_no_number_are_live(image, function):
    """What a map's values tell outside of tensors, or by a size, is live and refused, though no image shows it."""
    scan = normfix.scan(Asking(ASKED[function]), image)
    assert [site.function for site in scan.live] == ["instance_norm", function]
    assert not scan.tile_invariant
    assert not normfix.convert(Asking(ASKED[function]), image).proof.passed


class Remembering(nn.Module):
    """Subtracts what `remember` made of earlier maps."""

    def __init__(self, remember):
        super().__init__()
        self.stem, self.head, self.remember, self.kept = conv(1, 4), conv(4, 1), remember, None

    def forward(self, x):
        x = self.stem(x)
        return self.head(x - self.remember(self, x.mean((2, 3), keepdim=True)))


def first(network, mean):
    network.kept = mean if network.kept is None else network.kept
    return network.kept


def last(network, mean):
    before, network.kept = network.kept, mean
    return 0 if before is None else before


def average(network, mean):
    network.kept = mean if network.kept is None else 0.9 * network.kept + 0.1 * mean
    return network.kept


@pytest.mark.parametrize("remember", [first, last, average])
def test_networks_that_remember_are_refused(image, remember):
    """A statistic of an earlier image looks like a constant, and is none."""
    for use in (normfix.scan, normfix.convert, normfix.check):
        with pytest.raises(normfix.NormfixError, match="NF246 Remembering"):
            use(Remembering(remember), image)


class Rewriting(nn.Module):
    """Changes its weights where it runs, by `change`, and gives the same all the same."""

    def __init__(self, change):
        super().__init__()
        self.stem, self.norm, self.change = conv(1, 4, bias=False), nn.InstanceNorm2d(4), change

    def forward(self, x):
        self.change(self.stem.weight)
        return self.norm(self.stem(x).sign())


def halved(weight):
    weight.data = weight.data / 2


def halved_in_place(weight):
    with torch.no_grad():
        weight.div_(2)


@pytest.mark.parametrize("change", [halved, halved_in_place])
def test_networks_that_change_their_weights_are_refused(image, change):
    """Twins share them with the caller's own, so that a prediction would change these."""
    net = Rewriting(change)
    before = net.stem.weight.detach().clone()
    for use in (normfix.scan, partial(normfix.predict, tile=64, statistics="per-image")):
        with pytest.raises(normfix.NormfixError, match=r"NF246 Rewriting.*parameter stem\.weight"):
            use(net, image)
    torch.testing.assert_close(net.stem.weight.detach(), before, rtol=0, atol=0)


def test_weights_that_are_written_and_stay_what_they_are_do_no_harm(image):
    """Control: a constraint that training left fulfilled."""
    net = Rewriting(lambda weight: weight.data.clamp_(-10, 10))
    assert normfix.scan(net, image).reach is not None


class Table(nn.Module):
    """Multiplies by a row that is kept, and made anew by `row` where it is too short."""

    def __init__(self, row):
        super().__init__()
        self.stem, self.norm, self.row, self.kept = conv(1, 4), nn.InstanceNorm2d(4), row, {}

    def forward(self, x):
        if self.kept.get("row", torch.empty(0)).shape[0] < x.shape[3]:
            self.kept["row"] = self.row(x.shape[3])
        return self.norm(self.stem(x)) * self.kept["row"][: x.shape[3]]


def stretched(n):
    return 1 + torch.arange(n).fmod(4) * (n // 70)


def relative(n):
    return torch.arange(1, n + 1) / n


@pytest.mark.parametrize("row", [stretched, relative])
def test_a_table_that_is_another_once_it_has_grown_is_a_memory(image, row):
    """Small inputs give something else after a large one, which those of one size never show."""
    with pytest.raises(normfix.NormfixError, match="NF246 Table"):
        normfix.scan(Table(row), image)


def test_a_table_that_grows_and_keeps_its_values_is_none(image):
    """Control: what was kept for small inputs is the same for large ones."""
    assert normfix.scan(Table(lambda n: 1 + torch.arange(n).fmod(4)), image).reach is not None


def test_what_is_kept_but_not_used_is_no_memory(image):
    """Control: a network that only stores what it computed is converted."""
    assert normfix.convert(Remembering(lambda network, mean: mean), image).proof.passed


def centred(x):
    return x - x.mean((2, 3), keepdim=True)


def test_statistics_in_hooks_are_frozen_in_the_module_around(image):
    """A hook runs in the forward of the module around its own, which is where it is intercepted."""

    def network():
        model = nn.Sequential(conv(1, 4), nn.ReLU(), conv(4, 1))
        model[0].register_forward_hook(lambda module, args, output: centred(output))
        model[2].register_forward_pre_hook(lambda module, args: (centred(args[0]),))
        return model

    done = normfix.convert(network(), image)
    assert done.proof.passed
    assert [d.site.id for d in done.plan.converted] == ["(root)/0/mean/0", "(root)/0/mean/1"]


@pytest.mark.parametrize("before", [True, False])
def test_statistics_in_hooks_of_the_network_are_refused(image, before):
    """Around the network's own hooks is nothing to intercept them in; what has a forward is converted."""
    model = nn.Sequential(conv(1, 4), nn.InstanceNorm2d(4), conv(4, 1))
    if before:
        model.register_forward_pre_hook(lambda module, args: (centred(args[0]),))
    else:
        model.register_forward_hook(lambda module, args, output: centred(output))
    done = normfix.convert(model, image)
    (left,) = done.plan.left_live
    assert "a hook of the network" in left.reason
    assert done.proof.partial


def test_a_scripted_part_is_refused_by_name(image):
    """What a TorchScript module computes is seen by the dye, and not converted."""

    class Centre(nn.Module):
        def forward(self, x):
            return x - x.mean((2, 3), keepdim=True)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls TorchScript deprecated
        scripted = torch.jit.script(Centre())
    done = normfix.convert(nn.Sequential(conv(1, 4), nn.InstanceNorm2d(4), scripted, conv(4, 1)), image)
    assert [d.site.function for d in done.plan.left_live] == ["hidden.mean"]
    assert not done.proof.passed


@pytest.mark.slow
def test_a_compiled_part_is_refused_by_name(image):
    """torch.compile hides the calls of a part as it does those of the whole."""
    model = nn.Sequential(conv(1, 4), torch.compile(nn.Sequential(nn.InstanceNorm2d(4))), conv(4, 1))
    with pytest.raises(normfix.NormfixError, match=r"NF118.*of 1\."):
        normfix.convert(model, image)


@pytest.mark.parametrize("to", ["frozen", "batchrenorm"])
def test_a_norm_shared_between_containers(image, to):
    """The layer of a run inside a container of its own is kept where no container would run it."""
    norm = nn.GroupNorm(2, 4)
    model = nn.Sequential(conv(1, 4), norm, nn.ReLU(), norm, conv(4, 4), nn.Sequential(norm), conv(4, 1))
    done = normfix.convert(model, image, to)
    assert done.proof.passed
    assert len(done.plan.converted) == 3


def test_as_many_results_as_there_are_rows(image):
    """unbind gives another number of results at another size; that is no reason to stop."""

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = conv(1, 4), conv(4, 1)

        def forward(self, x):
            x = self.stem(x)
            return self.head(x - x.unbind(2)[0].mean(-1)[..., None, None])

    found = survey(Rows().eval(), lambda model, x: model(x), image[..., :32, :32])
    assert [site.id for site in found.sites if site.live] == ["(root)/0/mean/0"]


def test_labels_prove_nothing(image):
    """An output of integers has no standard deviation; identity is inconclusive, and says what to choose."""

    class Labels(nn.Sequential):
        def forward(self, x):
            return super().forward(x).argmax(1, keepdim=True)

    step = normfix.convert(Labels(conv(1, 4), nn.InstanceNorm2d(4)), image).proof.step("identity")
    assert step.status == "inconclusive"
    assert "int64" in step.note


@pytest.mark.slow
@pytest.mark.parametrize("wrap", [lambda x: x.roll(3, 3), lambda x: F.pad(x, (3, 3, 0, 0), "circular")])
def test_scan_does_not_call_wrapping_invariant(image, wrap):
    """What wraps around the border of a tile is no statistic, and yet no tile of it equals the whole."""

    class Wraps(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = conv(1, 1)

        def forward(self, x):
            return self.body(wrap(x))

    scan = normfix.scan(Wraps(), image)
    assert scan.live == ()
    assert not scan.tile_invariant


def _columns(x, places):
    return x[..., places % x.shape[3]]


_BEYOND = {
    "rolled": lambda x: x.roll(5, 3),
    "joined": lambda x: torch.cat([x[..., 5:], x[..., :5]], -1),
    "padded": lambda x: F.pad(x, (2, 2, 0, 0), "circular")[..., 4:],
    "indexed": lambda x: _columns(x, torch.arange(x.shape[3]) + 7),
    "counted from the end": lambda x: x[..., torch.arange(x.shape[3]) - 3],
}
_GATES = {
    "a rectifier": lambda x, y: x + F.relu(y - 1000),
    "a comparison": lambda x, y: torch.where(y < -1000, y, x),
    "a maximum": lambda x, y: torch.maximum(x, y - 1000),
}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("beyond", "gate"),
    [*((beyond, "a rectifier") for beyond in _BEYOND), ("rolled", "a comparison"), ("joined", "a maximum")],
)
def test_no_gate_hides_the_other_border(image, beyond, gate):
    """What the image's own values keep shut opens on another one, and a tile at the border is another then."""
    net = Through(lambda x: _GATES[gate](x, _BEYOND[beyond](x))).eval()
    scan = normfix.scan(net, image)
    assert not scan.tile_invariant
    assert scan.halo is None


@pytest.mark.slow
def test_what_is_brought_around_the_border_and_cut_off_is_local(image):
    """Control: a shift by roll whose wrapped part is replaced by zeros."""
    scan = normfix.scan(Through(lambda x: F.pad(x.roll(5, 3)[..., 5:], (5, 0))).eval(), image)
    assert scan.tile_invariant
    assert scan.halo[1] == (7, 1)


_PLACES = {
    "a ramp": lambda x: x * torch.linspace(0, 1, x.shape[-1]),
    "every third column": lambda x: x * (torch.arange(x.shape[-1]) % 3 == 0),
    "a running sum of ones": lambda x: x * torch.ones_like(x[:, :1]).cumsum(-1),
    "a stretched table": lambda x: x * F.interpolate(torch.eye(4)[None, None], size=x.shape[2:]),
    "a triangle": lambda x: x.tril(),
    "the size": lambda x: 100 * x / x.shape[-1],
    "corners aligned": lambda x: F.interpolate(
        F.avg_pool2d(x, 2), size=x.shape[2:], mode="bilinear", align_corners=True
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("place", _PLACES)
def test_no_gate_hides_a_place_or_the_size(image, place):
    """As above, of what is computed with the place of a pixel: the gate is shut on the image at hand."""
    net = Through(lambda x: x + F.relu(_PLACES[place](x) - 1000)).eval()
    scan = normfix.scan(net, image)
    assert not scan.tile_invariant


def _in_band(other):
    """Return what takes another value where its own lies between two numbers, and neither below nor above."""
    return lambda x: torch.where((x > 200) & (x < 300), other(x), x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", [lambda x: x.roll(5, -1), lambda x: torch.cat([x[..., -5:], x[..., :-5]], -1)]
)
@pytest.mark.parametrize("scale", [30, 1e6])
def test_no_band_hides_the_other_border(other, scale):
    """A gate that is shut for larger values as for smaller ones opens for few pixels of any one magnitude."""
    image = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(2)) * scale
    assert not normfix.scan(Through(_in_band(other)).eval(), image).tile_invariant


@pytest.mark.slow
@pytest.mark.parametrize(
    "other", [lambda x: F.max_pool2d(x, 5, 1, 2), lambda x: F.pad(x, (3, 3)).roll(2, -1)[..., 3:-3]]
)
def test_a_band_of_what_is_near_is_local(other):
    """Control: what comes around the border is what was padded, and is cut away."""
    image = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(2)) * 30
    assert normfix.scan(Through(_in_band(other)).eval(), image).tile_invariant


def _flat(x):
    """Tell where eight neighbours are the same."""
    return (F.max_pool2d(x, 3, 1, 1) + F.max_pool2d(-x, 3, 1, 1)).abs() < 1e-6


def _positive(x):
    """Tell where nearly all around is positive."""
    return F.avg_pool2d((x > 0).to(x.dtype), 5, 1, 2) > 0.97


@pytest.mark.slow
@pytest.mark.parametrize("gate", [_flat, _positive])
def test_no_texture_hides_a_place(image, gate):
    """The gate opens by what lies around a pixel, not by how large it is."""
    net = Through(lambda x: x + gate(x) * torch.arange(x.shape[-1])).eval()
    assert not normfix.scan(net, image - 0.5).tile_invariant


@pytest.mark.slow
@pytest.mark.parametrize("gate", [_flat, _positive])
def test_a_texture_alone_is_local(image, gate):
    """Control: the column of the window is the same in every tile."""
    net = Through(lambda x: x + gate(x) * (torch.arange(x.shape[-1]) * 0 + 7)).eval()
    assert normfix.scan(net, image - 0.5).tile_invariant


@pytest.mark.slow
def test_sines_of_large_numbers_tell_nothing(image):
    """Control: where the last bit of a value counts, images of other magnitudes are no evidence."""
    net = Through(lambda x: torch.sin(30 * x) + 0 * torch.arange(x.shape[-1])).eval()
    assert normfix.scan(net, image).tile_invariant


class Through(nn.Module):
    """A convolution, a function of the map, a convolution."""

    def __init__(self, function):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.function = conv(1, 4), conv(4, 1), function

    def forward(self, x):
        return self.head(self.function(self.stem(x)))


KERNEL = torch.tensor([[1.0, 2, 1], [2, 4, 2], [1, 2, 1]])[None, None] / 16


def blurred(x):
    return F.conv2d(x, KERNEL.to(x).expand(4, 1, 3, 3), padding=1, groups=4)


def shifted(x):
    return x + torch.ones(4, 1, 1).type_as(x).expand_as(x)


def unpooled(x):
    return F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)


@pytest.mark.slow
@pytest.mark.parametrize(("function", "reach"), [(blurred, 3), (shifted, 2), (unpooled, 3)])
def test_what_is_local_is_not_refused(image, function, reach):
    """A constant that takes only its type or shape from the map is no statistic; unpooling reads its window."""
    scan = normfix.scan(Through(function), image)
    assert scan.tile_invariant, scan.findings
    assert scan.halo == ((reach, reach),) * 2
    assert not scan.findings


def test_a_stored_map_of_the_maps_type_is_named(image):
    """Control: a table that is stretched and cast to the map's type is a position embedding, not a constant."""
    table = torch.rand(1, 4, 8, 8)
    scan = normfix.scan(Through(lambda x: x + F.interpolate(table.to(x), size=x.shape[2:])), image)
    assert {"NF213", "NF244"} <= {finding.code for finding in scan.findings}


@pytest.mark.parametrize("condition", ["W <= 300", "H*N*W <= 500000"])
def test_a_branch_on_the_size_is_named(image, condition):
    """What runs something else above a size is no tile-exact network, though no tile here is that large."""

    def branch(x):
        large = x.shape[-1] > 300 if "300" in condition else x[:, 0].numel() > 500000
        return x * 2 if large else x

    scan = normfix.scan(Through(branch), image)
    assert [f.code for f in scan.findings] == ["NF244"]
    assert condition in scan.findings[0].message
    assert not scan.tile_invariant


@pytest.mark.slow
def test_what_every_size_of_a_stride_takes_is_no_branch(image):
    """Control: conditions on divisibility and on least sizes, as of skips and reflected borders, are no branch."""

    def skips(x):
        down = F.avg_pool2d(F.pad(x, (2, 2, 2, 2), "reflect")[..., 2:-2, 2:-2], 2)
        return torch.cat([x[:, :2], F.interpolate(down, scale_factor=2)[:, :2]], 1)

    assert normfix.scan(Through(skips), image).tile_invariant


def dyed(function, extent):
    """Return what the dye shows of a function of a map at one size."""
    return dye_look(Through(function), lambda model, x: model(x), torch.rand(1, 1, extent, extent))


def test_attention_in_windows_with_a_halo_is_local():
    """Windows that overlap, on a map of few of them, are no attention over all pixels."""

    def attended(x, block=8, halo=3):
        n, c, h, w = x.shape
        rows, columns, wide = h // block, w // block, block + 2 * halo
        q = x.view(n, c, rows, block, columns, block).permute(0, 2, 4, 3, 5, 1).reshape(-1, block**2, c)
        k = F.pad(x, (halo,) * 4).unfold(2, wide, block).unfold(3, wide, block)
        k = k.permute(0, 2, 3, 4, 5, 1).reshape(-1, wide**2, c)
        y = (q @ k.transpose(1, 2)).softmax(-1) @ k
        return y.view(n, rows, columns, block, block, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)

    small, large = (dyed(attended, extent) for extent in (8, 16))
    assert small.found
    assert large.found
    assert confirmed(small, large, frozenset()).found == ()


def test_attention_over_all_pixels_is_confirmed():
    """Control: what takes from all pixels is kept, at both sizes."""

    def attended(x):
        t = x.flatten(2).transpose(1, 2)
        return ((t @ t.transpose(1, 2)).softmax(-1) @ t).transpose(1, 2).view(x.shape)

    found = confirmed(dyed(attended, 8), dyed(attended, 16), frozenset()).found
    assert [s.function for s in found][:1] == ["matmul"]


LAYOUTS = {
    "channels last": (lambda x: x.permute(0, 2, 3, 1), "permute(0, 3, 1, 2)"),
    "tokens": (lambda x: x.flatten(2).transpose(1, 2), "1x65536x4 follows the image, but"),
    "a classifier": (lambda x: x.mean((2, 3)), "1x4 does not follow"),
}


@pytest.mark.parametrize("layout", LAYOUTS)
def test_what_is_no_map_says_what_it_is(layout):
    """An output that is no map is refused with its shape and what brings it to one."""
    function, words = LAYOUTS[layout]

    class Laid(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = conv(1, 4)

        def forward(self, x):
            return function(self.stem(x))

    (finding,) = normfix.scan(Laid(), torch.rand(1, 1, 256, 256), fast=True).findings
    assert finding.code == "NF214"
    assert words in finding.message


@pytest.mark.slow
@pytest.mark.parametrize("axes", [(0, 1, 3, 2), (0, 1, 3, 2, 4)], ids=["2d", "3d"])
def test_a_map_whose_axes_are_turned_is_no_fault_of_a_rule(axes):
    """Height and width in each other's place, at any size, are said; turned back they are a map."""
    rank = len(axes)

    class Turned(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = [nn.Conv2d, nn.Conv3d][rank - 4](1, 2, 3, padding=1)

        def forward(self, x):
            return self.stem(x).permute(axes)

    turned, sample = Turned(), torch.rand(1, 1, *(16, 24, 32)[: rank - 2])
    (finding,) = normfix.scan(turned, sample).findings
    assert (finding.code, "another order" in finding.message) == ("NF214", True)
    assert normfix.scan(turned, sample, forward_fn=lambda net, x: net(x).permute(axes)).tile_invariant


def test_a_norm_inside_a_call_says_how_it_is_written_out(image):
    """F.normalize over space hides its norm; the refusal says how to write it, and so written it is converted."""
    hidden = normfix.scan(Through(lambda x: F.normalize(x.flatten(2), dim=2).view_as(x)), image, fast=True)
    assert "x.norm(dim=..., keepdim=True).clamp_min(eps)" in hidden.live[0].refusal

    def written(x):
        return x / x.norm(dim=(2, 3), keepdim=True).clamp_min(1e-12)

    assert normfix.convert(Through(written), image).proof.passed
