"""predict and check on networks that changed, and on arguments that make no sense."""

import copy
import pickle
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from types import MethodType, SimpleNamespace

import pytest
import torch
from branching import UNRECORDED, Branching
from networks import (
    Blocks,
    Extractor,
    MaskedLate,
    ReadByNumber,
    Resized,
    UNet,
    ValidUNet,
    max_pool,
    nearest,
    strided,
)
from optional import needs_zarr
from torch import nn

import normfix
from normfix.api import prediction
from normfix.networks.provenance import attach_, is_current, provenance_of
from normfix.tiling import lengths
from normfix.tiling.stages import cache


class Two(nn.Module):
    """Returns a fine and a coarse output of different reach."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 8, 3, padding=1), nn.InstanceNorm2d(8)
        self.near, self.far = nn.Conv2d(8, 1, 1), nn.Conv2d(8, 1, 3, padding=9, dilation=9)

    def forward(self, x):
        x = self.norm(self.conv(x))
        return self.near(x), self.far(x)


class Stacks(nn.Module):
    """Normalises parts of an image that it stacks as a batch: halves of the channels, or planes of a volume."""

    def __init__(self, planes):
        super().__init__()
        convolution = nn.Conv3d if planes else nn.Conv2d
        self.planes, self.conv = planes, convolution(1, 4, 3, padding=1)
        self.norm, self.head = nn.InstanceNorm2d(4 if planes else 2), convolution(4, 1, 1)

    def forward(self, x):
        x = torch.relu(self.conv(x))
        if self.planes:
            y = self.norm(x.transpose(1, 2).flatten(0, 1)).unflatten(0, (x.shape[0], -1)).transpose(1, 2)
        else:
            y = self.norm(x.reshape(-1, 2, *x.shape[2:])).reshape(x.shape)
        return self.head(y)


def _network():
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.InstanceNorm2d(8), nn.Conv2d(8, 2, 3, padding=1))


@pytest.fixture
def network():
    return _network()


@pytest.fixture
def image():
    return torch.rand(1, 1, 96, 128)


@pytest.fixture(scope="module")
def converted_once():
    torch.manual_seed(0)
    return normfix.convert(_network(), torch.rand(1, 1, 96, 128)).model.eval()


@pytest.fixture
def converted(converted_once):
    return copy.deepcopy(converted_once)


def largest(model, image, tile=32):
    """Return the largest difference between tiled and whole prediction."""
    with torch.no_grad():
        return float((normfix.predict(model, image, tile=tile) - model(image)).abs().max())


def test_a_new_head_is_measured_anew(converted, image):
    """A head of larger reach put on a converted network gets the halo it needs."""
    converted[2] = nn.Conv2d(8, 2, 3, padding=12, dilation=12)
    assert largest(converted, image) < 1e-5


class Rated(nn.Module):
    """Reads the dilation of its head from an attribute that nothing prints, and counts its calls."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4)
        self.weight, self.rate, self.calls = nn.Parameter(torch.randn(1, 4, 3, 3)), 1, 0

    def forward(self, x):
        self.calls += 1
        x = self.norm(self.conv(x))
        return nn.functional.conv2d(x, self.weight, padding=self.rate, dilation=self.rate)


@pytest.mark.slow
def test_a_changed_attribute_or_hook_is_measured_anew(image):
    """What changes the reach alone gets the halo it needs; what each call changes is no change."""
    model = normfix.convert(Rated().eval(), image).model
    model(image)
    assert is_current(model)
    model.rate = 9
    assert largest(model, image) < 1e-5
    model.rate = 1
    assert is_current(model)
    model.conv.register_forward_hook(lambda _, args, y: nn.functional.avg_pool2d(y, 15, 1, 7))
    assert largest(model, image) < 1e-5


class Pooled(nn.Module):
    """Pools as far as objects that no module prints say, and keeps what it computed once."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.head = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.InstanceNorm2d(4),
            nn.Conv2d(4, 1, 1),
        )
        self.settings, self.sizes, self.kept = SimpleNamespace(sizes=[1]), torch.tensor([1]), {}
        self.pool, self.size = partial(pool, size=1), 1

    def resize(self, size):
        self.size = size

    def forward(self, x):
        x = self.kept[x.shape] = self.norm(self.conv(x))
        x = smoothed(self.pool(pool(x, self.size)))
        return self.head(pool(x, max(*self.settings.sizes, int(self.sizes[0]))))


WIDTH, SETTINGS = 1, SimpleNamespace(width=1)
"""What a function reads that a forward calls."""


def pool(x, size):
    return nn.functional.avg_pool2d(x, size, 1, size // 2)


def smoothed(x):
    return pool(x, WIDTH * SETTINGS.width)


class WideConv2d(nn.Conv2d):
    """Prints as any convolution, which it is not."""

    def forward(self, x):
        return pool(super().forward(x), 15)

    def _get_name(self):
        return "Conv2d"


CHANGES = {
    "number in an object": lambda model: model.settings.sizes.append(15),
    "tensor beside the state": lambda model: model.sizes.fill_(15),
    "argument of a partial": lambda model: model.pool.keywords.update(size=15),
    "method that sets": lambda model: model.resize(15),
    "method of one object": lambda model: setattr(
        model.conv, "forward", MethodType(WideConv2d.forward, model.conv)
    ),
    "class of a module": lambda model: setattr(model.conv, "__class__", WideConv2d),
    "shape of a weight": lambda model: setattr(model.conv.weight, "data", torch.ones(4, 1, 5, 5)),
    "method of our layer": lambda model: setattr(model.norm, "forward", nn.functional.instance_norm),
}


@pytest.fixture(scope="module")
def pooled():
    """A converted network that pools, and an image."""
    image = torch.randn(1, 1, 64, 64)
    return normfix.convert(Pooled().eval(), image).model, image


@pytest.mark.slow
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES)
def test_a_change_that_nothing_prints_is_noticed(pooled, change):
    """Whatever a forward reads makes the geometry that travels out of date."""
    model = copy.deepcopy(pooled[0])
    change(model)
    assert not is_current(model)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "value"), [("WIDTH", 15), ("SETTINGS", SimpleNamespace(width=15))])
def test_a_global_that_a_forward_reads_is_noticed(name, value, pooled, monkeypatch):
    """A plain value of the module, which a function of it reads that the forward calls; tiles equal the whole."""
    monkeypatch.setattr(sys.modules[__name__], name, value)
    assert not is_current(pooled[0])
    if name == "WIDTH":
        assert largest(copy.deepcopy(pooled[0]), pooled[1]) < 1e-5


def test_a_conversion_whose_proof_failed_is_not_predicted_with_in_silence(caplog):
    """What failed is said where tiles are the whole; where they are not, they are refused."""
    image = torch.randn(1, 1, 64, 64) * torch.linspace(0.1, 2, 64)
    done = normfix.convert(Stacks(planes=False).eval(), image)
    assert done.proof.step("identity").status == "failed"
    normfix.predict(done.model, image, tile=32)
    assert "NF570" in caplog.text
    assert "identity failed" in caplog.text
    known = provenance_of(done.model)
    tiles = replace(done.proof.step("tiles"), status="failed")
    attach_(done.model, replace(known, unproved=(tiles,)))
    with pytest.raises(normfix.NormfixError, match="NF570"):
        normfix.predict(done.model, image, tile=32)


def test_what_keeps_a_network_the_same_is_no_change(pooled):
    """Copies, pickles, forward passes and other weights keep the geometry that travels."""
    model, image = pooled
    copied = pickle.loads(pickle.dumps(copy.deepcopy(model)))
    with torch.no_grad():
        copied.double()(image.double())
        copied.conv.weight.mul_(2)
    assert is_current(copied)


@pytest.mark.slow
def test_a_changed_object_is_measured_anew(pooled):
    """Tiles equal the whole with the halo that an object of the network asks for now."""
    model = copy.deepcopy(pooled[0])
    CHANGES["number in an object"](model)
    assert largest(model, pooled[1]) < 1e-5


class Decides(nn.Sequential):
    """Gives a mask, as truth values or in a mapping with numbers for keys."""

    def __init__(self, give):
        super().__init__(nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2), nn.Conv2d(2, 1, 3, padding=1))
        self.give = give

    def forward(self, x):
        return self.give(super().forward(x) > 0)


@pytest.mark.parametrize(("give", "output"), [(lambda y: y, None), (lambda y: {0: y, 1: y.sum()}, 0)])
def test_truth_values_are_predicted(give, output):
    """By tiles and per image, as the network gives them."""
    network, image = Decides(give).eval(), torch.randn(1, 1, 40, 48)
    with torch.no_grad():
        expected = network(image) if output is None else network(image)[output]
    model = normfix.convert(network, image, output=output).model
    assert provenance_of(model).scan.halo == ((2, 2), (2, 2))
    tiles = normfix.predict(model, image, tile=16)
    live = normfix.predict(network, image, tile=16, statistics="per-image", output=output)
    for given in (tiles, live):
        assert given.dtype == torch.bool
        assert torch.equal(given, expected)


@pytest.mark.slow
def test_each_of_a_batch_has_its_own_statistics(network, image):
    """Statistics per image share nothing, as the norms of the original did not."""
    images = torch.cat([image, 3 * image**4 - 1])
    with torch.no_grad():
        expected = network.eval()(images)
    given = normfix.predict(network, images, tile=64, statistics="per-image")
    assert (given - expected).abs().max() < 1e-4 * expected.std()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("mixed", "count"),
    [
        (lambda x: x + x.mean(0, keepdim=True), 3),
        (lambda x: x * 1.5 + 1 if x.shape[0] == 2 else x, 2),
        (lambda x: x * 1.5 + 1 if len(x) == 2 else x, 2),
    ],
    ids=["a mean", "a count", "a length"],
)
def test_a_batch_that_is_not_treated_apart_has_no_statistics_per_image(mixed, count):
    """Its images one by one are another thing, and exact; control: a count that the network does not know."""
    net, images = Branching(mixed).double().eval(), torch.rand(count, 1, 40, 48, dtype=torch.float64)
    with pytest.raises(normfix.NormfixError, match=r"NF409.*images of a batch"):
        normfix.predict(net, images, tile=16, statistics="per-image")
    single = images[:1]
    with torch.no_grad():
        assert (
            normfix.predict(net, single, tile=16, statistics="per-image") - net(single)
        ).abs().max() < 1e-9
        if count == 2:
            more = torch.cat([images, images])
            given = normfix.predict(net, more, tile=16, statistics="per-image")
            assert (given - net(more)).abs().max() < 1e-9


def test_a_new_live_norm_is_noticed(converted, image):
    """A live norm put into a converted network is refused by predict and fails check."""
    converted[2] = nn.Sequential(nn.InstanceNorm2d(8), nn.Conv2d(8, 2, 1))
    with pytest.raises(normfix.NormfixError, match=r"NF409.*2\.0/0/instance_norm/0 is live"):
        normfix.predict(converted, image)
    assert normfix.check(converted, image, tile=32).status == "failed"


def test_a_kept_live_norm_is_refused(network, image):
    """A conversion that kept a live norm is not predicted with as if it were exact."""
    done = normfix.convert(network, image, keep="1")
    with pytest.raises(normfix.NormfixError, match=r"NF409.*1/0/instance_norm/0 is live"):
        normfix.predict(done.model, image)


@pytest.mark.slow
@pytest.mark.parametrize("planes", [False, True])
def test_an_unconverted_network_that_constants_do_not_reproduce_is_refused(planes):
    """Its own statistics are no excuse: what convert would not prove is not predicted either."""
    volume = torch.randn(1, 1, *(8, 24, 24) if planes else (40, 48))
    with pytest.raises(normfix.NormfixError, match=r"NF409.* another output for that image|NF409.*is live"):
        normfix.predict(Stacks(planes).eval(), volume, tile=16, statistics="per-image")


def test_another_output_has_its_own_geometry(image):
    """Asking for another output than the one converted with measures that one's halo."""
    model = normfix.convert(Two(), image, output=0).model.eval()
    with torch.no_grad():
        whole = model(image)[1]
    assert float((normfix.predict(model, image, tile=32, output=1) - whole).abs().max()) < 1e-5


def test_trained_weights_keep_the_geometry(converted, image, monkeypatch):
    """Changed weights alone do not make a network be scanned again."""
    with torch.no_grad():
        converted[2].weight.mul_(2)
    monkeypatch.setattr("normfix.scanning.known.look", None)
    assert largest(converted, image) < 1e-5


def test_less_halo_than_needed_is_refused(converted, image):
    """Predicting with less context than measured is refused, with more it is exact."""
    with pytest.raises(normfix.NormfixError, match="NF410"):
        normfix.predict(converted, image, tile=32, halo=1)
    assert normfix.predict(converted, image, tile=32, halo=16).shape == (1, 2, 96, 128)


@pytest.mark.parametrize(
    "halo", [-1, 1.5, None, "x", (3, 3, 3), (), (3, -1), (3, "a"), True, 10**22, (3, 65_537)]
)
def test_impossible_halo(converted, image, halo):
    """A halo that is no number of pixels, nor one per axis, is refused with a code."""
    with pytest.raises(normfix.NormfixError, match="NF410"):
        normfix.check(converted, image, tile=32, halo=halo)


def test_a_halo_may_be_said_per_axis(network, image):
    """Axes of different reach take different halos, and less than one of them needs is not enough."""
    network[2] = nn.Conv2d(8, 2, (3, 9), padding=(1, 4))
    model = normfix.convert(network, image).model
    assert normfix.check(model, image, tile=(32, 16), halo=(2, 5)).passed
    assert normfix.check(model, image, tile=32, halo=(5, 2)).status == "failed"
    whole = normfix.predict(model, image, tile=(16, 32), halo=(2, 5))
    torch.testing.assert_close(whole, model(image))
    with pytest.raises(normfix.NormfixError, match="NF410 halo=5,2"):
        normfix.predict(model, image, halo=(5, 2))


@pytest.mark.parametrize("prove", [False, True], ids=["convert", "prove"])
def test_tiles_to_prove_with_may_be_said_per_axis(network, image, prove, monkeypatch):
    """The verdict is of the tiles that were asked for, and another number of axes is NF402."""
    monkeypatch.setattr("normfix.proof.prove._FORMS", ())
    model = normfix.convert(network, image).model

    def verdict(tile):
        return (
            normfix.prove(model, image, tile) if prove else normfix.convert(network, image, tile=tile).proof
        ).verdict

    assert verdict((32, 16)).tile == (32, 16)
    with pytest.raises(normfix.NormfixError, match="NF402"):
        verdict((32, 16, 8))


@pytest.mark.parametrize("tile", [0, -4, 1.5, "a", (32,), (32, 1.5)])
def test_impossible_tile(converted, image, tile):
    """A tile that is no number of pixels is refused with a code."""
    with pytest.raises(normfix.NormfixError, match="NF402"):
        normfix.check(converted, image, tile=tile)


@pytest.mark.parametrize("threshold", [float("nan"), float("inf"), -1.0])
def test_impossible_threshold(converted, image, threshold):
    """A threshold that nothing could exceed, or everything, is refused."""
    with pytest.raises(normfix.NormfixError, match="NF410"):
        normfix.check(converted, image, tile=32, threshold=threshold)


@pytest.mark.parametrize("shape", [(1, 3, 96, 128), (1, 96, 128), (1, 1, 8, 96, 128)])
@pytest.mark.parametrize("use", ["check", "predict", "calibrate"])
def test_an_image_of_another_kind_is_refused(converted, shape, use):
    """Another number of channels or axes than the network was converted with is refused."""
    with pytest.raises(normfix.NormfixError, match="NF106"):
        getattr(normfix, use)(converted, torch.rand(shape))


@pytest.mark.parametrize("shape", [(1, 96, 128), (1, 1, 8, 96, 128)])
def test_axes_are_checked_before_conversion(network, shape):
    """An image without a batch axis would be convolved as something else, so it is refused."""
    with pytest.raises(normfix.NormfixError, match="NF106"):
        normfix.convert(network, torch.rand(shape))


def test_images_must_agree_in_channels(network, image):
    """A second image of other channels is refused with its number."""
    with pytest.raises(normfix.NormfixError, match="NF106 image 1"):
        normfix.convert(network, [image, image.repeat(1, 2, 1, 1)])


def test_an_image_too_small_for_the_network(network, image):
    """An image the network fails on is named by its shape, with the network's own words."""
    with pytest.raises(normfix.NormfixError, match=r"NF109.*1x1x1x1"):
        normfix.convert(network, [image, image[..., :1, :1]])


@pytest.mark.parametrize("model", ["name", len, None])
def test_what_is_no_network(model, image):
    """Anything but a module is refused by every verb; to check, a function is a pipeline, if it answers maps."""
    for use in (normfix.scan, normfix.convert, normfix.check, normfix.predict, normfix.calibrate):
        code = "NF605" if use is normfix.check and callable(model) else "NF118"
        with pytest.raises(normfix.NormfixError, match=code):
            use(model, image)


def test_a_compiled_network_is_refused(network, image):
    """torch.compile hides the calls; the message says what to give instead."""
    with pytest.raises(normfix.NormfixError, match=r"NF118.*_orig_mod"):
        normfix.convert(torch.compile(network, backend="eager"), image)


def test_a_network_without_data_is_refused(network, image):
    """A network on the meta device has no weights to convert."""
    with pytest.raises(normfix.NormfixError, match=r"NF118.*meta"):
        normfix.convert(copy.deepcopy(network).to("meta"), image)


def test_an_unknown_target_is_refused(network, image):
    """A conversion to anything but the two kinds is refused."""
    with pytest.raises(normfix.NormfixError, match="NF205"):
        normfix.convert(network, image, to="Frozen")


def test_ambient_autocast_does_not_soften_the_proof(network, image):
    """Inside the caller's autocast, the proof is still made in float32."""
    with torch.autocast("cpu", dtype=torch.bfloat16):
        done = normfix.convert(network, image)
    assert done.proof.step("identity").bound == 1e-4
    assert done.proof.passed


def test_calibrating_without_a_converted_layer(converted, image):
    """If a converted layer was replaced since, calibration says so."""
    converted[1] = nn.Identity()
    with pytest.raises(normfix.NormfixError, match="NF302"):
        normfix.calibrate(converted, image)


def _huge():
    """Return an image that is finite and whose convolution is not."""
    huge = torch.full((1, 1, 96, 128), 3e38)
    huge[..., ::2] = -3e38
    return huge


@pytest.mark.slow
@pytest.mark.parametrize("engine", ["tiles", "stages"])
def test_a_prediction_that_is_not_finite_is_an_error(converted, image, engine):
    """Where the network overflows the prediction is refused by name, and comes where that is allowed."""
    huge = _huge()
    with pytest.raises(normfix.NormfixError, match=r"NF149.*NaN or infinite on a finite image, in float32"):
        normfix.predict(converted, huge, tile=32, engine=engine)
    allowed = normfix.predict(converted, huge, tile=32, engine=engine, allow_nonfinite=True)
    assert not torch.isfinite(allowed).all()
    assert torch.isfinite(normfix.predict(converted, image, tile=32, engine=engine)).all()


@pytest.mark.parametrize("engine", ["tiles", "stages"])
@pytest.mark.parametrize("suffix", [".npy", pytest.param(".zarr", marks=needs_zarr)])
def test_a_file_is_not_written_with_values_that_are_not_finite(converted, tmp_path, engine, suffix):
    """Of such a prediction nothing has the output's name, unless it is allowed."""
    out, huge = tmp_path / f"p{suffix}", _huge()
    with pytest.raises(normfix.NormfixError, match="NF149"):
        normfix.write_prediction(converted, huge, out, 32, engine=engine)
    assert not list(tmp_path.iterdir())
    normfix.write_prediction(converted, huge, out, 32, engine=engine, allow_nonfinite=True)
    assert out.exists()


class Rare(nn.Module):
    """Means an infinite value: a logit of -inf wherever the image has its value for no data."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4)
        self.head = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        return self.head(self.norm(self.conv(x))).masked_fill(x < -9, -torch.inf)


def test_infinite_values_that_a_network_means_can_be_taken(image):
    """A network that masks by -inf is predicted where that is allowed, exactly as the whole, and refused else."""
    model = normfix.convert(Rare(), image).model.eval()
    holes = image.clone()
    holes[0, 0, 10:20, 40:50] = -10
    with pytest.raises(normfix.NormfixError, match=r"NF149.*100 of .*--allow-nonfinite"):
        normfix.predict(model, holes, tile=32)
    found = normfix.predict(model, holes, tile=32, allow_nonfinite=True)
    with torch.no_grad():
        expected = model(holes)
    assert torch.equal(found.isinf(), expected.isinf())
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_half_precision_network_that_overflows_is_named(network, image):
    """60000 fits float16 and its sums do not; 100000 does not fit to begin with."""
    model = normfix.convert(network.half(), image.half()).model
    with pytest.raises(normfix.NormfixError, match=r"NF149.*float16"):
        normfix.predict(model, torch.full((1, 1, 96, 128), 60000.0).half(), tile=32)
    with pytest.raises(normfix.NormfixError, match=r"NF104.*float16"):
        normfix.predict(model, torch.full((1, 1, 96, 128), 1e5), tile=32)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "shape", "tile"),
    [
        (lambda: Resized(1.5, live=True), (61, 50), 20),
        (lambda: Resized(0.75, live=True), (61, 50), 20),
        (ValidUNet, (68, 60), 20),
        (Extractor, (1203,), 160),
    ],
)
def test_outputs_of_other_extents_are_placed_rightly(make, shape, tile):
    """Converted and tiled, a network of scale 3/2, or without padding, is the original at sizes off its stride."""
    net = make().eval().double()
    image = torch.rand(1, 1, *shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    done = normfix.convert(net.double(), image)
    with torch.no_grad():
        expected = net(image)
    found = normfix.predict(done.model, image, tile, engine="tiles")
    assert found.shape == expected.shape
    assert float((found - expected).abs().max() / expected.std()) < 1e-10


def _own_tiles(net, image, tile, halo, scale):
    """Stitch along the last axis with plain slices: what any tool does that is told a stride and a halo."""
    whole, parts = image.shape[-1], []
    for start in range(0, whole, tile):
        first, last = max(0, start - halo[0]), min(whole, start + tile + halo[1])
        out = net(image[..., first:last])
        skipped = int((start - first) * scale)
        parts.append(out[..., skipped : skipped + int(tile * scale)])
    return torch.cat(parts, -1)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("make", "scale"),
    [
        (lambda: UNet(strided, nearest), 1),
        (lambda: UNet(max_pool, nearest, depth=2), 1),
        (Blocks, 1),
        (lambda: nn.Sequential(UNet(strided, nearest, depth=2), nn.Upsample(scale_factor=2)), 2),
        (lambda: nn.Sequential(UNet(strided, nearest, depth=2), nn.Conv2d(1, 1, 4, 4)), 1 / 4),
    ],
)
def test_the_rounded_halo_is_enough_for_any_tool(make, scale):
    """Tiles that read exactly `Scan.halo_rounded` are exact in float64; a stride less on both sides is not."""
    net = make().eval()
    scan = normfix.scan(net, fast=True)
    (before, after), stride = scan.halo_rounded[1], scan.stride[1]
    assert 0 <= before - scan.halo[1][0] < stride
    double, shape = copy.deepcopy(net).double(), (1, 1, 32, 10 * stride + 64)
    image = 1e6 * torch.rand(shape, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    with torch.no_grad():
        whole = double(image)
        exact = _own_tiles(double, image, 2 * stride, (before, after), scale)
        short = _own_tiles(
            double, image, 2 * stride, (max(0, before - stride), max(0, after - stride)), scale
        )
    assert float((exact - whole).abs().max() / whole.std()) < 1e-11
    assert float((short - whole).abs().max() / whole.std()) > 1e-11


@pytest.mark.parametrize("largest", [1 << 18, 1])
@pytest.mark.parametrize("engine", ["auto", "tiles"])
@pytest.mark.parametrize(
    "net",
    [MaskedLate(700), ReadByNumber(lambda n: n.clamp(max=700))],
    ids=["a mask", "rows that are read"],
)
def test_places_that_count_far_from_the_corner_alone_are_refused(monkeypatch, net, engine, largest):
    """What was compared is shorter, and shows nothing: tiles are held against the whole at the size, or on a strip."""
    monkeypatch.setattr(lengths, "LARGEST", largest)
    with pytest.raises(normfix.NormfixError, match=r"NF264 .* at 720x\d+ pixels.*laid over the image"):
        normfix.predict(net.eval(), torch.rand(1, 1, 720, 20), tile=16, engine=engine)


class _Cornered(MaskedLate):
    """Doubles what is far along both axes."""

    def forward(self, x):
        x = self.conv(x)
        rows, columns = torch.arange(x.shape[2])[:, None], torch.arange(x.shape[3])
        return torch.where(rows + columns >= self.rows, 2 * x, x)


def test_a_corner_far_along_both_axes_is_refused():
    """No strip shows it, the image's own size does."""
    net = _Cornered(700).eval()
    with pytest.raises(normfix.NormfixError, match=r"NF264 .* at 400x400 pixels"):
        normfix.predict(net, torch.rand(1, 1, 400, 400), tile=64, engine="tiles")


def test_a_size_at_which_tiles_were_compared_is_not_compared_again(monkeypatch):
    """Control: of a network with a mask an image that ends before it is predicted as the whole."""
    net, image = MaskedLate(700).eval(), torch.rand(1, 1, 600, 20)
    with torch.no_grad():
        assert (normfix.predict(net, image, tile=16, engine="tiles") - net(image)).abs().max() < 1e-6
        monkeypatch.setattr(prediction, "differing", lambda *_: pytest.fail("compared"))
        normfix.predict(net, image, tile=16, engine="tiles")
        with pytest.raises(pytest.fail.Exception, match="compared"):
            normfix.predict(net, image[:, :, :-1], tile=16, engine="tiles")


@pytest.mark.parametrize("name", UNRECORDED)
def test_a_size_that_no_graph_records_is_compared_itself(name):
    """Converted at another size, and proved there: it is refused where it is another network; control: where it is not.

    Its windows count as the whole image does, of 64 pixels where tiles of 60 have two of halo.
    """
    net = Branching(UNRECORDED[name]).double().eval()
    shapes = [(96, 96), (64, 64), (100, 64), (80, 132), (90, 90)]
    first, *others, beside = [torch.rand(1, 1, *shape, dtype=torch.float64) for shape in shapes]
    done = normfix.convert(net, first)
    assert done.proof.passed
    for image, tile in zip(others, (16, 16, 60), strict=True):
        with pytest.raises(normfix.NormfixError, match=r"NF264|NF260"):
            normfix.predict(done.model, image, tile=tile)
    with torch.no_grad():
        assert (normfix.predict(done.model, beside, tile=40) - done.model(beside)).abs().max() < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("name", ["table", "text", "compared as a tensor", "unless it is captured"])
def test_per_image_prediction_is_of_the_network_at_that_size(name):
    """As it is, in stages or tiles: what it gives for the whole image, or refused; control: exact beside that size."""
    net = Branching(UNRECORDED[name]).double().eval()
    for shape in ((64, 64), (96, 64), (80, 72)):
        image = torch.rand(1, 1, *shape, dtype=torch.float64)
        with pytest.raises(normfix.NormfixError, match=r"NF260|NF264") if 64 in shape else nullcontext():
            given = normfix.predict(net, image, tile=16, statistics="per-image")
            with torch.no_grad():
                assert (given - net(image)).abs().max() < 1e-9


@pytest.mark.parametrize(("rows", "said"), [(64, True), (40, False)])
def test_an_image_that_was_not_compared_whole_is_said_to_be_so(monkeypatch, caplog, rows, said):
    """Strips and a window are no proof of both extents at once; control: an image small enough."""
    monkeypatch.setattr(lengths, "LARGEST", 2000)
    net, image = Branching(UNRECORDED["text"]).eval(), torch.rand(1, 1, 96, 96)
    model = normfix.convert(net, image).model
    normfix.predict(model, image[:, :, :rows, :48], tile=16)
    assert any("NF261" in message and "not compared whole" in message for message in caplog.messages) == said


@pytest.mark.parametrize(("dtype", "is_refused"), [(torch.float64, True), (torch.float32, False)])
def test_what_differs_in_float64_is_refused_whatever_other_images_show(monkeypatch, dtype, is_refused):
    """`y * (y == y.amax())` turns on the last bit, which noise need not show; control: float32 may be rounding."""
    net = Branching(UNRECORDED["unless it is captured"]).to(dtype).eval()
    done = normfix.convert(net, torch.rand(1, 1, 96, 96, dtype=dtype))
    monkeypatch.setattr(prediction, "differing", lambda *_: None)
    with pytest.raises(normfix.NormfixError, match=r"NF264.*in float64") if is_refused else nullcontext():
        normfix.predict(done.model, torch.rand(1, 1, 64, 64, dtype=dtype), tile=16, engine="tiles")


def test_tiles_that_give_more_than_the_image_has_are_no_difference():
    """Of 33 rows the network makes 34, as its tiles do, which is more than belongs to the image."""
    torch.manual_seed(0)
    down, up = nn.Conv2d(1, 2, 3, 2, 1), nn.ConvTranspose2d(2, 1, 3, 2, 1, 1)
    net = nn.Sequential(down, nn.ReLU(), up).double().eval()
    image = torch.rand(1, 1, 33, 47, dtype=torch.float64)
    given = normfix.predict(net, image, tile=16, engine="tiles")
    with torch.no_grad():
        assert (given - net(image)[..., : given.shape[2], : given.shape[3]]).abs().max() < 1e-12


def _both(x):
    """Twice the image where both extents are large, which no strip has."""
    return 2 * x if x.shape[2] > 80 and x.shape[3] > 80 else x


def _each(x):
    """The same numbers in another way along each axis that is long, which strips show."""
    for dim in (2, 3):
        if x.shape[dim] > 80:
            x = torch.cat(x.chunk(2, dim), dim)
    return x


@pytest.mark.parametrize(("way", "is_other"), [(_both, True), (_each, False)])
@pytest.mark.parametrize("engine", ["tiles", "stages"])
def test_a_branch_on_both_extents_is_refused_where_strips_alone_are_compared(
    monkeypatch, way, is_other, engine
):
    """It was predicted as the network of small images: strips had shown that the first of its conditions passes."""
    monkeypatch.setattr(lengths, "LARGEST", 7000)
    monkeypatch.setattr(cache, "LARGEST", 7000)
    monkeypatch.setattr(cache, "EXTENT", {2: 64})
    net = Branching(way).double().eval()
    done = normfix.convert(net, torch.rand(1, 1, 64, 64, dtype=torch.float64))
    image = torch.rand(1, 1, 96, 96, dtype=torch.float64)
    codes = {"tiles": "NF264", "stages": "NF321"}
    with pytest.raises(normfix.NormfixError, match=codes[engine]) if is_other else nullcontext():
        given = normfix.predict(done.model, image, tile=32, engine=engine)
        with torch.no_grad():
            assert (given - done.model(image)).abs().max() < 1e-9
    with pytest.raises(normfix.NormfixError, match="NF264") if is_other else nullcontext():
        own = normfix.predict(net, image, tile=32, statistics="per-image")
        with torch.no_grad():
            assert (own - net(image)).abs().max() < 1e-9


class _Told(MaskedLate):
    """Doubles the rows from one on that a buffer says, and may give a class."""

    def __init__(self, rows, *, classes=False):
        super().__init__(rows)
        self.classes = classes
        self.register_buffer("first", torch.tensor(float(rows)))

    def forward(self, x):
        x = self.conv(x)
        x = torch.where((torch.arange(x.shape[2]) >= self.first)[:, None], 2 - x, x)
        return (x > 0.5).to(torch.uint8) if self.classes else x


@pytest.mark.parametrize(("engine", "code"), [("tiles", "NF264"), ("stages", "NF325")])
def test_values_that_change_in_place_are_compared_again(engine, code):
    """A size is known with the values that the network had then; the stages are as they were."""
    net, image = _Told(900).eval(), torch.rand(1, 1, 700, 20)
    with torch.no_grad():
        assert (normfix.predict(net, image, tile=16, engine=engine) - net(image)).abs().max() < 1e-6
    converted = normfix.convert(net, image[:, :, :64]).model
    for one in (net, converted):
        normfix.predict(one, image, tile=16, engine=engine)
        one.first.fill_(500)
        with pytest.raises(normfix.NormfixError, match=code):
            normfix.predict(one, image, tile=16, engine=engine)


def test_classes_are_compared_at_an_images_size():
    """They differ or they do not; control: a mask that begins behind the image."""
    net, image = _Told(700, classes=True).eval(), torch.rand(1, 1, 720, 20)
    with pytest.raises(normfix.NormfixError, match="NF264"):
        normfix.predict(net, image, tile=16, engine="tiles")
    assert torch.equal(
        normfix.predict(net, image[:, :, :700], tile=16, engine="tiles"), net(image[:, :, :700])
    )


class _Shifted(ReadByNumber):
    """Reads the row so many below each that a buffer says."""

    def __init__(self):
        super().__init__(lambda n: (n + self.below).clamp(max=n.shape[0] - 1))
        self.register_buffer("below", torch.tensor(1))
        self.norm = nn.InstanceNorm2d(1)

    def forward(self, x):
        return super().forward(self.norm(x))


def test_rows_that_change_in_place_are_measured_again():
    """The halo that travels with a network is that of the whole numbers that it held then."""
    image = torch.rand(1, 1, 96, 16)
    net = normfix.convert(_Shifted().eval(), image).model
    for below in (1, 20):
        net.below.fill_(below)
        with torch.no_grad():
            assert (normfix.predict(net, image, tile=16, engine="tiles") - net(image)).abs().max() < 1e-5


class _Picked(MaskedLate):
    """Adds one row to all."""

    def forward(self, x):
        x = self.conv(x)
        return x + x.index_select(2, torch.tensor([self.rows]))


@pytest.mark.parametrize("statistics", ["auto", "per-image"])
def test_a_row_that_is_picked_by_number_is_refused_with_a_code(statistics):
    """On the short strips that are tried the network has no such row."""
    with pytest.raises(normfix.NormfixError, match="NF"):
        normfix.predict(_Picked(40).eval(), torch.rand(1, 1, 80, 24), tile=16, statistics=statistics)
