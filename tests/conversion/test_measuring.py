"""Calibration: population statistics of whole images, each site measured under the frozen ones before it."""

import pytest
import torch
from networks import TOLERANCE
from torch import nn
from torch.testing import assert_close

import normfix
from normfix.conversion.measuring import measure_sites_, settle_sites_
from normfix.conversion.targets import NormTarget, planned_targets
from normfix.errors import NormfixError
from normfix.images.sources import TensorImage, whole
from normfix.layers import FrozenNorm2d
from normfix.networks.calling import Caller
from normfix.networks.copying import copy_of

SIZES = [(48, 64), (96, 64), (64, 32)]
EPS = 1e-5


def _network():
    """Build three convolutions with an instance, a group and a batch-statistics norm between them."""
    return nn.Sequential(
        nn.Conv2d(1, 4, 3, padding=1),
        nn.InstanceNorm2d(4, affine=True),
        nn.ReLU(),
        nn.Conv2d(4, 6, 3, padding=1),
        nn.GroupNorm(2, 6),
        nn.ReLU(),
        nn.Conv2d(6, 4, 3, padding=1),
        nn.BatchNorm2d(4, track_running_stats=False),
        nn.ReLU(),
        nn.Conv2d(4, 2, 1),
    )


def taken(images):
    return [TensorImage(image) for image in images]


def _images(dtype=torch.float32):
    generator = torch.Generator().manual_seed(3)
    return [
        ((k + 1) * torch.randn(1, 1, *size, generator=generator) + 2 * k).to(dtype)
        for k, size in enumerate(SIZES)
    ]


def _reference(net, images):
    """Return {index: (mean, var)} layer by layer in float64: each from all pixels of all images at once."""
    maps = [image.double() for image in images]
    statistics = {}
    for index, layer in enumerate(net):
        if isinstance(layer, nn.Conv2d):
            kernel, bias = layer.weight.double(), layer.bias.double()
            maps = [nn.functional.conv2d(x, kernel, bias, padding=layer.padding) for x in maps]
        elif isinstance(layer, nn.ReLU):
            maps = [x.clamp(min=0) for x in maps]
        else:
            channels = maps[0].shape[1]
            groups = layer.num_groups if isinstance(layer, nn.GroupNorm) else channels
            pixels = torch.cat([x.reshape(channels, -1) for x in maps], 1)
            members = pixels.reshape(groups, -1)
            mean = members.mean(1).repeat_interleave(channels // groups)
            var = (
                ((members - members.mean(1, keepdim=True)) ** 2).mean(1).repeat_interleave(channels // groups)
            )
            statistics[index] = (mean, var)
            shape = (1, -1, 1, 1)
            scale = layer.weight.double() / (var + EPS).sqrt()
            offset = layer.bias.double() - mean * scale
            maps = [x * scale.reshape(shape) + offset.reshape(shape) for x in maps]
    return statistics


def _randomised(net):
    for layer in net:
        if getattr(layer, "weight", None) is not None and layer.weight.dim() == 1:
            nn.init.normal_(layer.weight, 1, 0.3)
            nn.init.normal_(layer.bias)
    return net


@pytest.mark.slow
@torch.no_grad()
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("count", [1, 3])
def test_statistics_equal_a_sequential_float64_reference(count, dtype):
    """At every site mean and variance are those of all pixels, everything before it frozen."""
    net, images = _randomised(_network()).to(dtype), _images(dtype)[:count]
    converted = normfix.convert(net, images).model
    for index, (mean, var) in _reference(net, images).items():
        assert_close(converted[index].running_mean.double(), mean, **TOLERANCE[dtype])
        assert_close(converted[index].running_var.double(), var, **TOLERANCE[dtype])


@torch.no_grad()
def test_live_statistics_in_one_pass_are_something_else():
    """Control: measuring all sites while they are live misses the reference by more than 10 %."""
    net, images = _randomised(_network()).double(), _images(torch.float64)
    operands = []
    net[7].register_forward_pre_hook(lambda module, args: operands.append(args[0].flatten(2)))
    for image in images:
        net(image)
    live = torch.cat(operands, 2)[0].var(1, correction=0)
    _, expected = _reference(net, images)[7]
    assert ((live / expected - 1).abs()).max() > 0.1


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_residual_is_zero_and_one(dtype):
    """Re-measured under the stored statistics, every site has mean shift 0 and variance ratio 1 to 1e-6."""
    done = normfix.convert(_randomised(_network()).to(dtype), _images(dtype))
    for site in done.calibration.summary.sites:
        assert site.mean_shift < 1e-6
        assert site.variance_ratio == pytest.approx((1, 1), abs=1e-6)


def test_the_residual_sees_a_wrong_statistic():
    """Control: a store that writes something else shows in the residual."""
    net, targets = _frozen()
    honest = targets[0].write

    def dishonest(moments):
        honest(moments)
        targets[0].holder.running_mean.add_(0.1)
        targets[0].holder.running_var.mul_(2)

    wrong = NormTarget(targets[0].name, targets[0].module, targets[0].holder, dishonest, targets[0].expected)
    first, second = measure_sites_(net, [wrong, targets[1]], taken(_images()), Caller()).sites
    assert first.mean_shift > 1e-2
    assert first.variance_ratio == pytest.approx((0.5, 0.5), abs=1e-3)
    assert second.mean_shift < 1e-6


def _frozen():
    net = nn.Sequential(nn.Conv2d(1, 3, 3), FrozenNorm2d(3), nn.ReLU(), nn.Conv2d(3, 2, 3), FrozenNorm2d(2))

    def target(index):
        layer = net[index]
        return NormTarget(
            str(index), layer, layer, lambda m: layer.set_statistics_(m.mean, m.var), lambda moments: moments
        )

    return net, [target(1), target(4)]


def test_spread_tells_images_apart():
    """The spread is the largest distance of an image's mean from the population's, in population sd."""
    net, targets = _frozen()
    images = [torch.randn(1, 1, 32, 32), torch.randn(1, 1, 32, 32) + 5]
    summary = measure_sites_(net, targets, taken(images), Caller())
    with torch.no_grad():
        values = [net[0](image).double().transpose(0, 1).flatten(1) for image in images]
    together = torch.cat(values, 1)
    sd = (together.var(1, correction=0) + EPS).sqrt()
    expected = max(float(((v.mean(1) - together.mean(1)).abs() / sd).max()) for v in values)
    assert summary.sites[0].spread == pytest.approx(expected, rel=1e-5)


def test_one_image_has_no_spread():
    """A population of one image spreads by 0."""
    net, targets = _frozen()
    assert all(s.spread == 0 for s in measure_sites_(net, targets, taken(_images()[:1]), Caller()).sites)


def test_elements_are_counted_over_all_images():
    """A site's elements are its values per channel on all images."""
    net, targets = _frozen()
    summary = measure_sites_(net, targets, taken(_images()), Caller())
    assert summary.sites[0].elements == sum((h - 2) * (w - 2) for h, w in SIZES)
    assert summary.images == tuple((1, 1, *size) for size in SIZES)


def _state(net):
    return {name: value.clone() for name, value in net.state_dict().items()}


def _hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("run_that_fails", [1, 2])
def test_an_error_midway_leaves_everything_as_it_was(count, run_that_fails):
    """An exception in any pass leaves no hook, the old modes and the old statistics."""
    net, targets = _frozen()
    net.train()
    net[3].eval()
    before, runs = _state(net), []

    def run(model, image):
        runs.append(1)
        output = model(image)
        if len(runs) > run_that_fails * count // 2:
            raise RuntimeError("power cut")
        return output

    with pytest.raises(RuntimeError, match="power cut"):
        measure_sites_(net, targets, taken(_images()[:count]), run)
    assert _hooks(net) == 0
    assert [m.training for m in net] == [True, True, True, False, True]
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_success_leaves_no_hook_and_the_old_modes():
    """After a calibration only the statistics have changed."""
    net, targets = _frozen()
    net.train()
    net[1].eval()
    measure_sites_(net, targets, taken(_images()), Caller())
    assert _hooks(net) == 0
    assert [m.training for m in net] == [True, False, True, True, True]


def test_a_batch_norm_that_the_user_froze_stays_frozen():
    """calibrate_ on a network in train mode gives every module its own mode back."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)).train()
    net[1].eval()
    normfix.calibrate_(net, torch.randn(1, 1, 64, 64))
    assert [m.training for m in net] == [True, False, True, True]


@torch.no_grad()
def test_plain_batch_norms_are_recalibrated_in_order():
    """A network on running statistics gets those of the images, the second under the new first."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2)
    )
    net.double().eval()
    images = _images(torch.float64)
    expected = _reference(net, images)
    normfix.calibrate_(net, images)
    for index, (mean, var) in expected.items():
        assert_close(net[index].running_mean, mean, **TOLERANCE[torch.float64])
        assert_close(net[index].running_var, var, **TOLERANCE[torch.float64])


def test_calibrate_leaves_the_network_alone():
    """Calibrate returns a copy; the network keeps its statistics."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    before = _state(net)
    calibrated = normfix.calibrate(net, torch.randn(1, 1, 64, 64)).model
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert not torch.equal(calibrated[1].running_mean, net[1].running_mean)


@pytest.mark.parametrize("images", [iter([torch.zeros(1, 1, 64, 64)]), []], ids=["generator", "empty"])
def test_what_cannot_be_read_again_is_refused(images):
    """Images are read several times, so a generator is NF103, and so is nothing."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2))
    with pytest.raises(NormfixError, match="NF103"):
        normfix.calibrate(net, images)


class Drawn:
    """Images of a data set, with noise of each draw's own where `noise` is not 0."""

    def __init__(self, count, noise):
        self.images, self.noise = [torch.randn(1, 1, 24, 20 + 4 * n) for n in range(count)], noise

    def __len__(self):
        return len(self.images)

    def __getitem__(self, number):
        image = self.images[number]
        return image + self.noise * torch.randn_like(image)


@pytest.mark.parametrize("count", [1, 3])
def test_a_data_set_that_is_drawn_anew_in_each_pass_is_refused(count):
    """Its sites would be measured on different images; the network is as it was, and what is drawn once is taken."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 3), nn.BatchNorm2d(2))
    before = _state(net)
    with pytest.raises(NormfixError, match=r"NF331 .*list\(images\)"):
        normfix.calibrate_(net, Drawn(count, 0.1))
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    for images in (Drawn(count, 0), list(Drawn(count, 0.1))):
        normfix.calibrate_(net, images)
    assert not torch.equal(net[1].running_mean, before["1.running_mean"])


class Skips(nn.Module):
    """Breaks the plan: leaves its norm out on narrow images, or runs it twice on wide ones."""

    def __init__(self):
        super().__init__()
        self.norm = FrozenNorm2d(1)

    def forward(self, x):
        for _ in range(max(0, x.shape[-1] // 32 - 1)):
            x = self.norm(x)
        return x


@pytest.mark.parametrize("widths", [(32,), (96,), (64, 32), (64, 96)], ids=str)
def test_a_site_off_the_plan_is_refused(widths):
    """A norm that runs never or twice on an image is NF301, and the old statistics are back."""
    net = Skips()
    target = NormTarget(
        "norm", net.norm, net.norm, lambda m: net.norm.set_statistics_(m.mean, m.var), lambda moments: moments
    )
    before = _state(net)
    with pytest.raises(NormfixError, match="NF301"):
        measure_sites_(net, [target], taken([torch.randn(1, 1, 32, w) + 3 for w in widths]), Caller())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_progress_ends_at_the_number_of_passes():
    """Several images take one pass per site and one to re-measure."""
    heard = []
    net, targets = _frozen()
    measure_sites_(net, targets, taken(_images()), Caller(), lambda *step: heard.append(step))
    assert heard == [("calibrate", n, 3) for n in (1, 2, 3)]


HUGE = {
    torch.float32: 3e38,
    torch.float64: 1e300,
    torch.float16: 3e4,
}
"""Values that are finite, and whose sums or squares are not."""


@pytest.mark.parametrize("tile", [None, 32])
@pytest.mark.parametrize("dtype", HUGE, ids=str)
def test_statistics_that_are_not_finite_are_an_error(dtype, tile):
    """On images that overflow in the network calibrate names site and statistic, and leaves the model as it was."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4)).to(dtype)
    model = normfix.convert(net, torch.randn(1, 1, 64, 64).to(dtype)).model
    before = _state(model)
    signs = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(0)).sign().to(dtype)
    with pytest.raises(NormfixError, match=r"NF148 1/0/instance_norm.*not finite in float"):
        normfix.calibrate_(model, signs * HUGE[dtype], tile=tile)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Brightest(nn.Module):
    """Normalises by a statistic of its own, the mean square."""

    def forward(self, x):
        return x / x.square().mean((2, 3), keepdim=True).sqrt()


def test_a_statistic_that_is_no_norm_is_finite_too():
    """A mean of squares that overflows is named as well, when converting and when calibrating on several images."""
    huge = torch.full((1, 1, 64, 64), 1e25)
    huge[..., ::2] = 1.0
    with pytest.raises(NormfixError, match=r"NF148 .*mean.*not finite in float32"):
        normfix.convert(Brightest(), huge)
    model = normfix.convert(Brightest(), torch.rand(1, 1, 64, 64)).model
    with pytest.raises(NormfixError, match=r"NF148 .*mean.*not finite in float32"):
        normfix.calibrate(model, [huge, torch.rand(1, 1, 64, 64)])


class OneByOne(nn.Module):
    """Two norms; takes as many images at a time as it is told."""

    def __init__(self, most):
        super().__init__()
        torch.manual_seed(0)
        self.most = most
        self.first, self.second = nn.Conv2d(1, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)
        self.one, self.two = nn.InstanceNorm2d(4), nn.InstanceNorm2d(4)

    def forward(self, x):
        assert len(x) <= self.most
        return self.two(self.second(torch.relu(self.one(self.first(x)))))


@pytest.mark.parametrize("most", [1, 8])
def test_images_that_run_together_have_what_each_has(most):
    """Settled in one pass, or one by one where a network takes no more, constants are those of measuring in turn."""
    images = [TensorImage(torch.rand(1, 1, 16, 16, generator=seeded(n)) * (n + 1)) for n in range(3)]
    done = normfix.convert(OneByOne(8).eval(), whole(images[0]))
    expected = copy_of(done.model)
    measure_sites_(expected, planned_targets(expected, done.plan), images, done.caller.exactly)
    model = copy_of(done.model)
    model.most = most
    settle_sites_(model, planned_targets(model, done.plan), images, done.caller.exactly)
    for mine, theirs in zip(model.buffers(), expected.buffers(), strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def seeded(seed):
    """Return a generator."""
    return torch.Generator().manual_seed(seed)
