"""calibrate, predict and convert in stages: the same numbers as without, in less memory."""

import copy
import gc
import weakref
from pathlib import Path
from types import MethodType

import numpy as np
import pytest
import tifffile
import torch
from networks import TOLERANCE, LiveInstance
from streamed_networks import DividesBySize, Squeezed, TwoLevels
from torch import nn
from torch.testing import assert_close

import normfix
from normfix import Blocks
from normfix.api import prediction
from normfix.errors import NormfixError
from normfix.images.scaling import scaled
from normfix.records.saved import Scaling
from normfix.tiling.stages import cache


def _image(*size, seed=1, dtype=torch.float64):
    return (
        torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) ** 3
    ).to(dtype)


@pytest.fixture(scope="module")
def converted():
    """A converted U-Net in float64."""
    torch.manual_seed(0)
    return normfix.convert(TwoLevels().double(), _image(64, 48))


def _statistics(model):
    return {name: buffer.clone() for name, buffer in model.named_buffers() if "running" in name}


@pytest.mark.slow
def test_calibrating_in_blocks_equals_passes(converted):
    """With and without `tile` the statistics agree to 1e-9 for several images, and the summary says which way."""
    images = [_image(40, 64, seed=2), 3 * _image(36, 20, seed=3)]
    passes, stages = (
        normfix.calibrate(converted.model, images),
        normfix.calibrate(converted.model, images, tile=16),
    )
    for name, expected in _statistics(passes.model).items():
        assert_close(stages.model.get_buffer(name), expected, rtol=1e-9, atol=1e-11)
    assert (passes.summary.engine, stages.summary.engine) == ("passes", "stages")
    for one, other in zip(passes.summary.sites, stages.summary.sites, strict=True):
        assert one.site == other.site
        assert one.elements == other.elements
        assert_close(other.spread, one.spread, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("site", [nn.InstanceNorm2d, nn.BatchNorm2d], ids=["converted", "as it is"])
def test_what_a_hook_makes_of_an_operand_is_what_blocks_measure(site):
    """A hook of the network changes what a norm is given; stages took the statistic of what came before it."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), site(4)).double().eval()
    net[1].register_forward_pre_hook(lambda module, inputs: 3 * inputs[0].square())
    image = _image(40, 64, seed=2)
    if site is nn.InstanceNorm2d:
        net = normfix.convert(net, _image(64, 48)).model
    stages, passes = normfix.calibrate(net, image, tile=16), normfix.calibrate(net, image)
    assert stages.summary.engine == "stages"
    for name, expected in _statistics(passes.model).items():
        assert_close(stages.model.get_buffer(name), expected, rtol=1e-9, atol=1e-11)


@pytest.mark.slow
def test_float32_agrees_to_its_rounding(converted):
    """In float32 statistics from blocks are those of passes to float32's rounding."""
    model, image = (
        normfix.convert(converted.original.float(), _image(64, 48, dtype=torch.float32)).model,
        None,
    )
    image = _image(48, 40, seed=5, dtype=torch.float32)
    passes, stages = normfix.calibrate(model, image), normfix.calibrate(model, image, tile=16)
    for name, expected in _statistics(passes.model).items():
        assert_close(stages.model.get_buffer(name), expected, **TOLERANCE[torch.float32])
    converted.original.double()


def test_sizes_the_stride_does_not_divide(converted):
    """An odd image means the image extended by its edge pixels, in stages as in passes and tiles."""
    image = _image(45, 51, seed=4)
    passes, stages = (
        normfix.calibrate(converted.model, image),
        normfix.calibrate(converted.model, image, tile=16),
    )
    for name, expected in _statistics(passes.model).items():
        assert_close(stages.model.get_buffer(name), expected, rtol=1e-9, atol=1e-11)
    tiles = normfix.predict(converted.model, image, tile=16, engine="tiles")
    assert_close(
        normfix.predict(converted.model, image, tile=16, engine="stages"), tiles, **TOLERANCE[torch.float64]
    )


@torch.no_grad()
def test_prediction_in_stages_equals_the_untiled_output(converted):
    """Stages give the converted network's untiled output, and on the calibration image the original's."""
    image = _image(64, 48)
    stages = normfix.predict(converted.model, image, tile=16, engine="stages")
    assert_close(stages, converted.model(image), **TOLERANCE[torch.float64])
    assert_close(stages, converted.original(image), **TOLERANCE[torch.float64])


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("engine", ["stages", "tiles"])
def test_per_image_statistics_are_the_original_network(converted, engine):
    """With its own statistics every image gets the original network's prediction of it, tiled."""
    other = 4 * _image(48, 80, seed=9) + 1
    own = normfix.predict(converted.model, other, tile=16, engine=engine, statistics="per-image")
    assert_close(own, converted.original(other), **TOLERANCE[torch.float64])
    stored = normfix.predict(converted.model, other, tile=16, engine=engine)
    assert (stored - own).abs().max() > 0.1  # the statistics do matter on this image


class _Walks:
    """A watch that counts how often the stages are begun."""

    timed = False

    def __init__(self):
        self.count = 0

    def begin(self, outlook):
        self.count += 1

    def block(self, step):
        """Expect nothing of a block."""


class Switched(nn.Module):
    """Takes another branch, with a norm of its own, where an image is bright."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 1, 3, padding=1)
        self.dark, self.bright = nn.InstanceNorm2d(3), nn.InstanceNorm2d(3, affine=True)

    def forward(self, x):
        norm = self.bright if float(x.amax()) > 1 else self.dark
        return self.head(norm(self.stem(x)).relu() ** 2)


def _counted(monkeypatch, module, name):
    """Count the calls of a function of a module."""
    calls, function = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *args, **kw: calls.append(name) or function(*args, **kw))
    return calls


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(("make", "walks"), [(TwoLevels, 1), (Squeezed, 2)])
def test_statistics_of_the_image_are_measured_on_the_way(make, walks, monkeypatch):
    """One walk measures and predicts, unless statistics may move the geometry; the next image is not scanned for."""
    torch.manual_seed(0)
    net = type("Own", (make,), {})().double().eval()  # of which no other test leaves a capture
    scans, captures = (
        _counted(monkeypatch, prediction, "look"),
        _counted(monkeypatch, cache, "captured_program"),
    )
    for seed, scale in ((3, 1), (4, 5)):
        image, watch = scale * _image(48, 80, seed=seed), _Walks()
        options = {"engine": "stages", "statistics": "per-image", "blocks": Blocks(watch=watch)}
        own = normfix.predict(net, image, tile=16, **options)
        assert_close(own, net(image), **TOLERANCE[torch.float64])
        assert watch.count == walks
        assert len(scans) == 1
        assert len(captures) == 1


@pytest.mark.slow
@torch.no_grad()
def test_what_is_held_of_a_network_is_of_its_present_values(monkeypatch):
    """A weight that changed in place is scanned anew and counts; what did not change is not scanned."""
    torch.manual_seed(0)
    net, image = TwoLevels().double().eval(), _image(48, 80)
    scans = _counted(monkeypatch, prediction, "look")
    predicted = []
    for factor, seen in ((1, 1), (1, 1), (-2, 2)):
        net.head.weight.data.mul_(factor)
        own = normfix.predict(net, image, tile=16, statistics="per-image")
        assert_close(own, net(image), **TOLERANCE[torch.float64])
        assert len(scans) == seen
        predicted.append(own)
    assert torch.equal(*predicted[:2])
    assert (predicted[2] - predicted[1]).abs().max() > 0.1


@pytest.mark.slow
@torch.no_grad()
def test_an_image_that_takes_another_branch_is_not_predicted_by_the_first():
    """What is held of one image is of another too only where the network computes the same; else it is refused."""
    torch.manual_seed(0)
    net = Switched().double().eval()
    outcomes = []
    for image in (_image(48, 80) / 2, 4 * _image(48, 80, seed=2), _image(48, 80, seed=3) / 2):
        try:
            own = normfix.predict(net, image, tile=16, statistics="per-image")
        except NormfixError as error:
            outcomes.append(error.code)
            continue
        outcomes.append("right")
        assert_close(own, net(image), **TOLERANCE[torch.float64])
    assert outcomes[0] == outcomes[2] == "right"


class Smooths(nn.Module):
    """Averages over as many pixels as an object says that Python does not see into."""

    def __init__(self, setting):
        super().__init__()
        self.stem, self.norm, self.setting = nn.Conv2d(1, 3, 3), nn.InstanceNorm2d(3), setting

    def forward(self, x):
        size = self.setting.size
        return nn.functional.avg_pool2d(self.norm(self.stem(x)).relu() ** 2, size, 1, size // 2)


class _Setting:
    __slots__ = ("size",)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize(
    "is_held_by", ["network", "function", "function of a network without live statistics"]
)
def test_what_changes_in_place_unseen_is_scanned_for_anew(is_held_by):
    """A halo is not kept that hangs on what may change in place and compare equal: tiles would differ."""
    torch.manual_seed(0)
    setting, image, options = _Setting(), _image(48, 80), {}
    if is_held_by == "network":
        net = Smooths(setting).double().eval()
    else:
        norm = nn.InstanceNorm2d(3) if is_held_by == "function" else nn.BatchNorm2d(3)
        net = nn.Sequential(nn.Conv2d(1, 3, 3), norm, nn.ReLU()).double().eval()
        options["forward_fn"] = lambda model, x: nn.functional.avg_pool2d(
            model(x), setting.size, 1, setting.size // 2
        )
    for setting.size in (3, 9):
        kind = "stored" if "without" in is_held_by else "per-image"
        own = normfix.predict(net, image, tile=16, engine="tiles", statistics=kind, **options)
        whole = options["forward_fn"](net, image) if options else net(image)
        assert_close(own, whole, **TOLERANCE[torch.float64])


class _Doubling:
    def __init__(self, model):
        self.model = model

    def call(self, model, x):
        return 2 * model(x)

    def closure(self):
        return lambda model, x: (self.model is not None) * model(x)


@pytest.mark.zoo
@torch.no_grad()
@pytest.mark.parametrize("statistics", ["stored", "per-image"])
@pytest.mark.parametrize("form", ["closure", "method"])
def test_what_is_kept_of_a_network_does_not_keep_it(statistics, form):
    """A network goes that the function refers to by which it is called, though its captures are found again."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2) if statistics == "stored" else nn.InstanceNorm2d(2)
    )
    net.double().eval()
    owner = _Doubling(net)
    function = owner.call if form == "method" else owner.closure()
    for _ in range(2):
        normfix.predict(
            net, _image(32, 48), tile=16, engine="stages", statistics=statistics, forward_fn=function
        )
    assert net in cache._CAPTURES
    gone = weakref.ref(net)
    del net, owner, function
    gc.collect()
    assert gone() is None


@pytest.mark.slow
def test_what_cannot_run_in_stages_takes_passes_and_says_why():
    """A network whose blocks differ from its whole is calibrated in passes, with the reason in the summary."""
    torch.manual_seed(0)
    net = torch.nn.Sequential(DividesBySize(), torch.nn.InstanceNorm2d(1)).double()
    image = _image(32, 32)
    model = normfix.convert(net, image).model
    passes, stages = normfix.calibrate(model, image), normfix.calibrate(model, image, tile=16)
    assert stages.summary.engine == "passes"
    assert "NF324" in stages.summary.reason
    for name, expected in _statistics(passes.model).items():
        assert torch.equal(stages.model.get_buffer(name), expected)


@pytest.mark.slow
def test_an_error_on_the_way_leaves_the_old_statistics(converted):
    """If the store is full in the middle, the model has the statistics it had."""
    model = converted.model
    before = _statistics(model)
    with pytest.raises(NormfixError, match="NF326"):
        normfix.calibrate_(model, _image(48, 40, seed=5), tile=16, blocks=Blocks(budget=60_000))
    assert all(torch.equal(model.get_buffer(name), value) for name, value in before.items())


@pytest.mark.slow
def test_a_changed_weight_counts_in_the_next_prediction(converted):
    """The captured graph is kept, but always with the model's present weights."""
    model, image = normfix.calibrate(converted.model, _image(64, 48), tile=32).model, _image(32, 32)
    first = normfix.predict(model, image, tile=16, engine="stages")
    with torch.no_grad():
        model.head.weight.mul_(2)
        model.head.bias.mul_(2)
    assert_close(
        normfix.predict(model, image, tile=16, engine="stages"), 2 * first, **TOLERANCE[torch.float64]
    )


@pytest.mark.zoo
def test_a_changed_behaviour_is_captured_anew(converted):
    """A capture that is no longer what the model computes is not used, though no module or weight changed."""
    model, image = normfix.calibrate(converted.model, _image(64, 48), tile=32).model, _image(32, 32)
    normfix.predict(model, image, tile=16, engine="stages")
    model.stem[2].negative_slope = 0.7
    with torch.no_grad():
        expected = model.eval()(image)
    assert_close(
        normfix.predict(model, image, tile=16, engine="stages"), expected, **TOLERANCE[torch.float64]
    )


class Bounded(nn.Module):
    """Bounds a map between two batch norms and answers with labels, so that its output tells little of its maps."""

    most = 1e9

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 2, 3, padding=1)
        self.norm, self.last = nn.BatchNorm2d(3), nn.BatchNorm2d(2)

    def forward(self, x):
        x = self.norm(self.first(x)).clamp(max=self.most)
        return (self.last(self.second(x)) > 1e3).to(x)


def _lower(net):
    net.most = 0.25


def _hook(net):
    net.norm.register_forward_hook(lambda module, given, result: result.abs())


def _patch(net):
    net.norm.forward = MethodType(lambda norm, x: nn.BatchNorm2d.forward(norm, x).tanh(), net.norm)


@pytest.mark.slow
@pytest.mark.parametrize("change", [_lower, _hook, _patch])
def test_what_an_image_or_an_output_does_not_show_is_captured_anew(change):
    """Attributes, hooks and replaced methods count for the next calibration, whatever the first image let see."""
    torch.manual_seed(0)
    net = Bounded().double()
    dark, image = torch.zeros(1, 1, 300, 20, dtype=torch.float64), 9 * _image(36, 40)
    dark[..., 280:, :] = 1  # beyond what a network is captured on
    normfix.calibrate(net, dark, tile=64)
    change(net)
    passes, stages = normfix.calibrate(net, image), normfix.calibrate(net, image, tile=16)
    assert stages.summary.engine == "stages"
    for name, expected in _statistics(passes.model).items():
        assert_close(stages.model.get_buffer(name), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_what_did_not_change_is_not_captured_again(monkeypatch):
    """Control: another image, other blocks and other weights take the capture of last time."""
    net = Bounded().double()
    normfix.calibrate(net, _image(36, 40), tile=16)
    with torch.no_grad():
        net.second.weight.mul_(2)
    monkeypatch.setattr(cache, "captured_program", None)
    assert normfix.calibrate(net, _image(52, 70), tile=24).summary.engine == "stages"


@pytest.mark.slow
def test_a_copy_takes_the_capture_of_the_network_it_was_made_of(monkeypatch):
    """What a copy computes is known from its original, whatever its weights; a changed copy is captured anew."""
    net = Bounded().double()
    normfix.calibrate(net, _image(36, 40), tile=16)
    copied, changed = copy.deepcopy(net), copy.deepcopy(net)
    with torch.no_grad():
        copied.first.weight.mul_(-2)
    changed.most = 0.25
    captures = []

    def captured(*arguments):
        captures.append(arguments[0])
        return captured_program(*arguments)

    captured_program = cache.captured_program
    monkeypatch.setattr(cache, "captured_program", captured)
    for model, count in ((copied, 0), (net, 0), (changed, 1)):
        image = _image(52, 70)
        passes, stages = normfix.calibrate(model, image), normfix.calibrate(model, image, tile=24)
        assert len(captures) == count
        for name, expected in _statistics(passes.model).items():
            assert_close(stages.model.get_buffer(name), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
def test_a_tensor_that_is_no_buffer_is_cast_on_the_way():
    """What a network casts to the dtype of its image, the proof of its stages in float64 casts as well."""

    class Scaled(Bounded):
        def __init__(self):
            super().__init__()
            self.kernel = torch.rand(3, 3, 3, 3)

        def forward(self, x):
            x = self.norm(self.first(x))
            return self.last(self.second(torch.conv2d(x, self.kernel.to(x), padding=1))).float()

    net, image = Scaled(), _image(36, 40, dtype=torch.float32)
    passes, stages = normfix.calibrate(net, image), normfix.calibrate(net, image, tile=16)
    assert stages.summary.engine == "stages"
    for name, expected in _statistics(passes.model).items():
        assert_close(stages.model.get_buffer(name), expected, **TOLERANCE[torch.float32])


def test_batch_norms_of_an_unconverted_network_are_measured_in_blocks():
    """Plain BatchNorm networks are recalibrated in stages as well."""
    net = torch.nn.Sequential(
        torch.nn.Conv2d(1, 3, 3, padding=1),
        torch.nn.BatchNorm2d(3),
        torch.nn.ReLU(),
        torch.nn.Conv2d(3, 2, 3, padding=1),
    ).double()
    net.append(torch.nn.BatchNorm2d(2).double())
    image = _image(64, 96)
    passes, stages = normfix.calibrate(net, image), normfix.calibrate(net, image, tile=20)
    assert stages.summary.engine == "stages"
    for name, expected in _statistics(passes.model).items():
        assert_close(stages.model.get_buffer(name), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("count", [1, 2])
def test_statistics_that_are_no_norms_are_measured_in_blocks(count):
    """Means and maxima of hand-written gates are put together from blocks by their population laws."""
    torch.manual_seed(0)
    net, images = Squeezed().double(), [_image(40, 32), 2 * _image(24, 48, seed=2)][:count]
    model = normfix.convert(net, images[0]).model
    passes, stages = normfix.calibrate(model, images), normfix.calibrate(model, images, tile=12)
    assert (stages.summary.engine, stages.summary.reason) == ("stages", "")
    assert len(stages.summary.sites) == 3
    buffers = dict(passes.model.named_buffers())
    for name, value in stages.model.named_buffers():
        assert_close(value, buffers[name], rtol=1e-9, atol=1e-12)
    if count == 1:
        whole = normfix.predict(stages.model, images[0], tile=12, engine="stages")
        assert_close(whole, net(images[0]), **TOLERANCE[torch.float64])


class _Valid(nn.Module):
    """Convolves without padding, so that its maps have fewer positions than the image has pixels."""

    def __init__(self):
        super().__init__()
        self.a, self.n1 = nn.Conv2d(1, 4, 5), nn.InstanceNorm2d(4)
        self.b, self.n2, self.up = nn.Conv2d(4, 4, 3), nn.GroupNorm(2, 4), nn.ConvTranspose2d(4, 4, 2, 2)
        self.head = nn.Conv2d(8, 1, 3)

    def forward(self, x):
        skip = self.n1(self.a(x)).relu()
        y = self.up(self.n2(self.b(torch.nn.functional.max_pool2d(skip, 2))).relu())
        cut = (skip.shape[2] - y.shape[2]) // 2
        return self.head(torch.cat([skip[:, :, cut : cut + y.shape[2], cut : cut + y.shape[3]], y], 1))


@pytest.mark.slow
@pytest.mark.parametrize(("size", "tile"), [((60, 48), 16), ((62, 50), 18)])
def test_valid_convolutions_run_in_stages(size, tile, tmp_path):
    """The last blocks of maps that end before the image does have positions, kept on disk or in memory."""
    torch.manual_seed(0)
    network = _Valid().double().eval()
    model = normfix.convert(network, _image(48, 72)).model
    image = _image(*size, seed=3)
    with torch.no_grad():
        expected = network(image)
        for options in ({}, {"blocks": Blocks(store=tmp_path)}):
            measured = normfix.calibrate(model, image, tile=tile, **options)
            assert measured.summary.engine == "stages"
            assert_close(measured.model(image), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_a_network_that_leaves_nothing_of_a_small_block_runs_in_stages():
    """Strips that a crop leaves nothing of were measured all the same, which ended in an error of torch."""
    torch.manual_seed(0)
    layers = nn.Conv2d(1, 2, 3, padding=1), nn.InstanceNorm2d(2), _Crop()
    done = normfix.convert(nn.Sequential(*layers).double().eval(), _image(48, 56))
    image = _image(50, 41, seed=3)
    with torch.no_grad():
        expected = done.model(image)
    assert done.proof.passed
    for engine in ("tiles", "stages"):
        assert_close(
            normfix.predict(done.model, image, 16, engine=engine), expected, **TOLERANCE[torch.float64]
        )


class _Crop(nn.Module):
    def forward(self, x):
        return x[:, :, 5:, 5:]


def test_calibrating_what_was_not_converted_is_refused():
    """A network whose plan converts nothing has no statistic to measure, in passes or in stages."""
    model = normfix.convert(nn.Conv2d(1, 1, 3, padding=1).double().eval(), _image(48, 48)).model
    for options in ({}, {"tile": 16}):
        with pytest.raises(NormfixError, match="NF302"):
            normfix.calibrate(model, _image(48, 48), **options)


@pytest.mark.parametrize("given", [{"engine": "magic"}, {"statistics": "batch"}])
def test_unknown_choices_are_refused(converted, given):
    """Another engine or kind of statistics is an error."""
    with pytest.raises(NormfixError, match="NF410"):
        normfix.predict(converted.model, _image(16, 16), tile=16, **given)


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"engine": "dsk"}, "NF410 engine='dsk': give local or dask"),
        ({"engine": "tiles"}, "NF410 engine='tiles': give local or dask"),
        ({"workers": 0}, "NF410 workers=0"),
        ({"batch": 0}, "NF410 batch=0"),
        ({"tile": 0}, "NF402"),
        ({"tile": (16, 1.5)}, "NF402"),
        ({"scheduler": "tcp://127.0.0.1:1"}, "NF334"),
        ({"engine": "dask", "scheduler": "tcp://127.0.0.1:1"}, "NF334.* a store"),
        ({"engine": "dask", "store": Path()}, "NF334.*scheduler's address"),
    ],
    ids=str,
)
def test_options_of_blocks_are_checked_in_one_place(options, code):
    """What blocks cannot be is refused when it is stated, whoever they are for."""
    with pytest.raises(NormfixError, match=code):
        normfix.Blocks(**options)


@pytest.mark.parametrize("verb", [normfix.calibrate, normfix.calibrate_, normfix.predict])
def test_blocks_have_one_size(converted, verb):
    """A tile beside blocks of another size is refused; of the same it is the same."""
    with pytest.raises(NormfixError, match=r"NF414 tile=16.*32"):
        verb(converted.model, _image(16, 16), 16, blocks=normfix.Blocks(tile=32))
    assert normfix.Blocks(tile=32).sized(32) == normfix.Blocks(tile=32)


def test_a_store_is_named_by_a_text_too(tmp_path):
    assert normfix.Blocks(store=str(tmp_path)) == normfix.Blocks(store=tmp_path)


@pytest.mark.slow
def test_a_halo_of_the_caller_is_of_tiles(converted):
    """Stages measure their own halo, so another is refused with them."""
    with pytest.raises(NormfixError, match="NF410 halo=64: a halo belongs to engine tiles"):
        normfix.predict(converted.model, _image(16, 16), halo=64, engine="stages")


def test_live_networks_are_not_predicted_in_stages():
    """A live network is refused by predict whatever the engine."""
    with pytest.raises(NormfixError, match="NF409"):
        normfix.predict(LiveInstance().double(), _image(64, 64), tile=16, engine="stages")


@pytest.mark.slow
def test_a_file_is_calibrated_and_predicted_by_window(converted, tmp_path):
    """A scaled TIFF read by window gives what its array gives, and the prediction lands in a file."""
    values = (_image(61, 50, seed=8) * 60000).numpy()[0, 0].astype(np.uint16)
    tifffile.imwrite(tmp_path / "in.tif", values, tile=(16, 16))
    with tifffile.TiffFile(tmp_path / "in.tif") as file:  # any object with shape, dtype and slicing
        image = normfix.open_image(file.asarray(), converted.model, axes="YX", scaling=Scaling(kind="zscore"))
    whole = torch.from_numpy(scaled(values.astype(np.float64)[None], Scaling(kind="zscore")))[None]
    assert_close(image.read([(0, 61), (0, 50)]), whole, rtol=0, atol=1e-6)
    whole = image.read([(0, 61), (0, 50)])
    passes, stages = (
        normfix.calibrate(converted.model, whole),
        normfix.calibrate(converted.model, image, tile=20),
    )
    for name, expected in _statistics(passes.model).items():
        assert_close(stages.model.get_buffer(name), expected, rtol=1e-9, atol=1e-11)
    for name in ("out.npy", "out.zarr", "out.tif"):
        normfix.write_prediction(
            passes.model,
            image,
            tmp_path / name,
            tile=20,
            blocks=Blocks(budget=10_000, store=tmp_path),
            engine="stages",
        )
        with normfix.open_image(tmp_path / name, TwoOut()) as file:
            written = file.read([(0, 61), (0, 50)])
        assert_close(written.double(), normfix.predict(passes.model, whole, tile=20), rtol=1e-6, atol=1e-6)


class TwoOut(torch.nn.Conv2d):
    """Takes two channels, as the prediction has."""

    def __init__(self):
        super().__init__(2, 1, 1)


@pytest.mark.slow
@torch.no_grad()
def test_converting_within_a_budget(tmp_path):
    """With a budget the image is measured in stages, proved, and the constants are those of the whole image."""
    torch.manual_seed(0)
    net, image = TwoLevels().double(), _image(128, 96)
    limited = normfix.convert(net, image, tile=32, blocks=Blocks(budget=100_000, store=tmp_path))
    assert limited.proof.passed, limited.proof
    assert limited.calibration.summary.engine == "stages"
    assert limited.calibration.summary.images == ((1, 1, 128, 96),)
    assert_close(limited.model(image), net.eval()(image), **TOLERANCE[torch.float64])
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "layers",
    [
        (nn.MaxPool2d(3, 2, 1, ceil_mode=True), nn.Upsample(scale_factor=2)),
        (nn.Conv2d(2, 2, 3, 2, 1), nn.ConvTranspose2d(2, 2, 3, 2)),
    ],
    ids=["rounded up", "transposed"],
)
def test_an_output_that_is_larger_than_its_image_is_whole(layers, tmp_path):
    """Nothing is cut off where nothing was extended, in memory or in a file."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), *layers, nn.Conv2d(2, 1, 1)).double().eval()
    image = _image(36, 48)
    with torch.no_grad():
        expected = net(image)
    assert expected.shape[2] > 36
    assert_close(normfix.predict(net, image, tile=24, engine="stages"), expected)
    normfix.write_prediction(net, image, tmp_path / "out.npy", tile=24, engine="stages")
    assert_close(torch.from_numpy(np.load(tmp_path / "out.npy")).reshape(expected.shape), expected)


@pytest.mark.slow
def test_a_stage_that_does_not_run_on_a_block_is_refused_by_name():
    """Between a pad and the slice that takes it back a small block has nothing left."""

    class Shifted(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](torch.nn.functional.pad(self[0](x), (7, 0))[..., :-7]))

    net = Shifted(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Conv2d(2, 1, 3, padding=1)).double()
    with pytest.raises(normfix.NormfixError) as caught:
        normfix.predict(net.eval(), _image(36, 48), tile=24, engine="stages")
    assert caught.value.code == "NF325"


class MeanOfPositive(torch.nn.Module):
    """Takes off the mean of what is positive: a sum by a count, which is a whole number."""

    def __init__(self):
        super().__init__()
        self.stem = torch.nn.Conv2d(1, 4, 3, padding=1)

    def forward(self, x):
        y = self.stem(x)
        positive = y > 0
        return y - (y * positive).sum((2, 3), keepdim=True) / positive.sum((2, 3), keepdim=True).clamp_min(1)


@pytest.mark.parametrize("size", [(88, 144), (57, 91)])
def test_a_count_over_blocks_is_the_count_of_the_whole(size):
    """It is exact, not one less: the rest of the network is computed to rounding."""
    torch.manual_seed(0)
    net = MeanOfPositive().double().eval()
    for seed in range(3):
        image = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        with torch.no_grad():
            whole = net(image)
        found = normfix.predict(net, image, tile=24, statistics="per-image")
        assert float((found - whole).abs().max() / whole.std()) < 1e-11


class Placed(nn.Module):
    """Adds, between two norms, what a gate lets through of a map that knows the place of a pixel or the size."""

    def __init__(self, place, threshold):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.head, self.place, self.threshold = (
            nn.Conv2d(1, 2, 3, padding=1),
            nn.Conv2d(2, 1, 3, padding=1),
            place,
            threshold,
        )
        self.first, self.last = nn.InstanceNorm2d(2), nn.InstanceNorm2d(1)

    def forward(self, x):
        y = self.stem(x)
        y = self.first(y) if self.threshold < 100 else y
        return self.last(self.head(y + torch.relu(self.place(y) - self.threshold)))


PLACES = {
    "half": lambda y: y * (torch.arange(y.shape[-1]) > y.shape[-1] // 2),
    "size": lambda y: 100 * y / y.shape[-1],
    "third": lambda y: y * (torch.arange(y.shape[-1]) % 3 == 0),
    "flat": lambda y: 1e3 * _flat(y) * torch.arange(y.shape[-1]),
}


def _flat(y):
    pool = nn.functional.max_pool2d
    return (pool(y, 3, 1, 1) + pool(-y, 3, 1, 1)).abs() < 1e-6


@pytest.mark.slow
@pytest.mark.parametrize(
    ("place", "threshold"), [("half", 1000), ("size", 1000), ("third", 1000), ("half", 12), ("flat", 12)]
)
def test_no_gate_hides_a_place_from_stages(place, threshold):
    """Blocks number their own columns: behind a gate that noise leaves shut they were not seen to."""
    net = Placed(PLACES[place], threshold).double().eval()
    image = torch.rand(1, 1, 96, 128, dtype=torch.float64)
    with pytest.raises(normfix.NormfixError, match=r"NF32[45]|NF402|NF409"):
        normfix.predict(net, image, 32, statistics="per-image")


@pytest.mark.slow
def test_no_band_of_values_hides_a_place_of_the_image_itself(caplog):
    """No image that is tried has values in the band but the one that is predicted; another is, exactly."""
    net = Placed(lambda y: 2e3 * ((y - 3e6).abs() < 30) * torch.arange(y.shape[-1]), 1000).double().eval()
    noise = torch.rand(1, 1, 96, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    gain = float(net.stem.weight[0].detach().sum())
    with torch.no_grad():
        other = net(noise + 3.1e6 / gain)
        found = normfix.predict(net, noise + 3.1e6 / gain, 32, statistics="per-image", engine="stages")
    assert float((found - other).abs().max() / other.std()) < 1e-6
    with pytest.raises(normfix.NormfixError, match="NF409"):
        normfix.predict(net, noise + 3e6 / gain, 32, statistics="per-image", engine="stages")
    assert "NF325 size (96, 128)" in caplog.text


@pytest.mark.slow
def test_a_stretched_table_behind_a_gate_is_exact_in_stages():
    """Control: a map that is laid over the image is the image's own in each block, on a bright image too."""
    table = torch.rand(1, 1, 16, 16, dtype=torch.float64)
    net = Placed(lambda y: y * nn.functional.interpolate(table.to(y), size=y.shape[2:]), 1000).double().eval()
    for image in (torch.rand(1, 1, 96, 128, dtype=torch.float64), torch.randn(1, 1, 96, 128).double() * 1e5):
        with torch.no_grad():
            expected = net(image)
        found = normfix.predict(net, image, 32, statistics="per-image")
        assert float((found - expected).abs().max() / expected.std()) < 1e-9
