"""Checking: what is tile-invariant passes, what is not fails, what was not compared is inconclusive."""

import json
from dataclasses import replace

import pytest
import torch
from networks import (
    Anisotropic,
    ConstantOutput,
    FaintReach,
    LiveInstance,
    LiveSpread,
    PadsBothSides,
    PadsItself,
    Patchify,
    SuperResolution,
    SwallowsDye,
    functions,
    plain_unet,
)
from torch import nn

import normfix
from normfix.errors import NormfixError
from normfix.networks.numerics import BOUNDLESS, deviation
from normfix.proof.comparison import Network, compare
from normfix.tiling.geometry import geometry_of, measure_locality, thinnest

LOCAL = {"unet": (plain_unet, 8), "scale 1/8": (Patchify, 8), "scale 2": (SuperResolution, 1)}


def _geometry(net, dilution=8, ndim=2):
    example = torch.randn(1, 1, *(64 if ndim == 2 else 32,) * ndim)
    return measure_locality(*functions(net), example, (dilution,) * ndim).geometry


def _compare(net, image, geometry, tile=32, double=None, **options):
    single, exact = functions(net)
    network = Network(single, double or exact, torch.float32)
    with torch.no_grad():
        cross = thinnest(network.double, image.double(), geometry)
        return compare(network, image, geometry, tile=tile, cross=cross, **options)


def _nearly_local():
    """Return the geometry of a 3x3 convolution."""
    return _geometry(nn.Conv2d(1, 1, 3, padding=1), 1)


def _codes(verdict):
    return {finding.code for finding in verdict.findings}


@pytest.mark.parametrize("name", LOCAL)
def test_a_local_network_passes(name):
    """With its own geometry a network without live statistics passes, at every output scale."""
    make, dilution = LOCAL[name]
    net = make()
    verdict = _compare(net, torch.randn(1, 1, 128, 136), _geometry(net, dilution))
    assert verdict.passed
    assert verdict.axes == (0, 1)


def test_a_live_instance_norm_is_caught():
    """InstanceNorm fails, in the comparison, by interference, and by name."""
    verdict = normfix.check(LiveInstance(), torch.randn(1, 1, 128, 128), tile=32)
    assert verdict.status == "failed"
    assert verdict.max_sd > 100 * verdict.threshold
    assert _codes(verdict) == {"NF401", "NF403"}


def test_a_live_norm_never_passes_where_windows_cover_the_image():
    """One window is the whole image, so nothing differs: inconclusive, and interference names what it saw."""
    verdict = normfix.check(LiveInstance(), torch.randn(1, 1, 64, 64), tile=64)
    assert verdict.max_sd == 0
    assert verdict.inconclusive
    assert {"NF403", "NF407"} <= _codes(verdict)


def test_windows_that_cover_the_image_are_inconclusive():
    """A network that would pass does not, if every window is the whole image."""
    net = plain_unet()
    verdict = _compare(net, torch.randn(1, 1, 64, 64), _geometry(net), tile=64)
    assert verdict.inconclusive
    assert _codes(verdict) == {"NF407"}


def test_only_axes_that_are_cut_count():
    """A pencil image is compared along its long axis, and the verdict says so."""
    net = plain_unet()
    assert _compare(net, torch.randn(1, 1, 32, 160), _geometry(net)).axes == (1,)


@pytest.mark.parametrize("side", [0, 1], ids=["before", "after"])
def test_a_halo_that_ordinary_images_excuse_is_caught(side):
    """One pixel short on one side: the comparison alone would pass, and interference fails it."""
    net = FaintReach()
    geometry = _geometry(net, 1)
    assert geometry.halo == ((24, 24), (24, 24))
    halo = (23, 24) if side == 0 else (24, 23)
    verdict = _compare(
        net, torch.randn(1, 1, 128, 128), replace(geometry, halo=(halo,) * 2), exact_halo=geometry.halo
    )
    assert verdict.max_sd <= verdict.tolerance
    assert verdict.status == "failed"
    assert _codes(verdict) == {"NF403"}
    assert "no tile of 32 can be exact with it; read at least 24/24" in verdict.findings[0].message


@pytest.mark.parametrize("side", [0, 1], ids=["before", "after"])
def test_a_halo_one_stride_short_is_caught(side):
    """On a U-Net, one stride less on either side fails."""
    net = plain_unet()
    geometry = _geometry(net)
    halo = (15, 23) if side == 0 else (23, 15)
    verdict = _compare(net, torch.randn(1, 1, 128, 128), replace(geometry, halo=(halo,) * 2))
    assert verdict.status == "failed"
    assert "NF403" in _codes(verdict)
    assert any("no tile of " in finding.message for finding in verdict.findings)


def test_a_short_halo_is_caught_on_a_dark_image():
    """A black corner, from which the strips are made, does not blind interference."""
    net = FaintReach()
    image = torch.zeros(1, 1, 128, 128)
    image[..., 100:, 100:] = torch.rand(28, 28)
    verdict = _compare(net, image, replace(_geometry(net, 1), halo=((23, 23),) * 2))
    assert verdict.status == "failed"


def test_a_constant_output_is_inconclusive():
    """Agreement of an output that does not vary proves nothing."""
    net = ConstantOutput().requires_grad_(False)
    net.bias.fill_(0.25)
    verdict = _compare(net, torch.randn(1, 1, 96, 96), _geometry(net, 1))
    assert verdict.inconclusive
    assert "NF404" in _codes(verdict)


def test_an_output_that_is_not_finite_is_inconclusive():
    """NaN everywhere is not agreement, and the verdict is still valid JSON."""
    net = plain_unet()
    geometry = _geometry(net)
    nn.init.constant_(net.head.bias, torch.nan)
    verdict = _compare(net, torch.randn(1, 1, 96, 96), geometry)
    assert not verdict.passed
    assert "NF404" in _codes(verdict)
    assert json.loads(verdict.dumps())["sd"] == 0


def test_nan_in_one_tile_only_is_a_failure():
    """A statistic that is fine on the image and 0/0 on a flat tile fails, in numbers that JSON can hold."""
    image = torch.randn(1, 1, 96, 96)
    image[..., :64, :64] = 0
    verdict = _compare(LiveSpread(), image, _nearly_local())
    assert verdict.status == "failed"
    assert verdict.max_sd == BOUNDLESS
    verdict.dumps()


def test_nan_is_not_a_small_difference():
    """Deviation counts NaN on either side as boundless."""
    one, nan = torch.ones(3), torch.tensor([1.0, torch.nan, 1.0])
    assert deviation(nan, one, 1.0)[0] == deviation(one, nan, 1.0)[0] == BOUNDLESS


@pytest.mark.parametrize("tile", [20, 4, (32, 20)], ids=str)
def test_a_tile_out_of_phase_is_refused(tile):
    """A tile that is no multiple of the stride raises NF402 rather than comparing."""
    net = plain_unet()
    with pytest.raises(NormfixError, match="NF402"):
        _compare(net, torch.randn(1, 1, 96, 96), _geometry(net), tile=tile)


def test_a_stride_that_is_wrong_is_caught():
    """Tiles out of phase with the network's own stride fail the comparison, though nothing leaks."""
    net = PadsItself()
    verdict = _compare(net, torch.randn(1, 1, 96, 96), replace(_geometry(net), stride=(1, 1)), tile=36)
    assert verdict.status == "failed"
    assert _codes(verdict) == {"NF406"}
    assert _compare(net, torch.randn(1, 1, 96, 96), _geometry(net), tile=40).passed


def test_an_odd_size_states_its_padding():
    """At 513 pixels the whole image is the one extended by 7, and the verdict says so."""
    net = plain_unet()
    verdict = _compare(net, torch.randn(1, 1, 513, 64), _geometry(net), tile=256)
    assert verdict.padding == (7, 0)
    assert verdict.passed


def test_a_network_that_pads_both_sides_fails_at_odd_sizes_if_called_exact():
    """Control for exact sizes: with multiple 1 the whole is out of phase with its tiles, and that is caught."""
    net = PadsBothSides()
    geometry = _geometry(net)
    image = torch.randn(1, 1, 97, 97)
    assert _compare(net, image, geometry).passed
    assert _compare(net, image, replace(geometry, multiple=(1, 1))).status == "failed"


@pytest.mark.slow
def test_three_axes_with_strides_of_their_own():
    """A 3D network of strides (1, 4, 4) passes with a tile per axis."""
    net = Anisotropic()
    geometry = measure_locality(*functions(net), torch.randn(1, 1, 16, 32, 32), (1, 4, 4)).geometry
    verdict = _compare(net, torch.randn(1, 1, 15, 48, 64), geometry, tile=(5, 16, 16))
    assert verdict.passed
    assert (verdict.axes, verdict.tile, verdict.stride) == ((0, 1, 2), (5, 16, 16), (1, 4, 4))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_pass(dtype):
    """A local network passes in float64 and in bfloat16, each against its own rounding."""
    verdict = normfix.check(plain_unet().to(dtype), torch.randn(1, 1, 128, 128, dtype=dtype), tile=32)
    assert verdict.passed
    assert (verdict.noise < 1e-10) == (dtype is torch.float64)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_precisions_do_not_excuse_a_live_norm(dtype):
    """InstanceNorm fails in float64, and in bfloat16 however coarse its rounding."""
    verdict = normfix.check(LiveInstance().to(dtype), torch.randn(1, 1, 128, 128, dtype=dtype), tile=32)
    assert verdict.status == "failed"


@pytest.mark.parametrize(
    ("factor", "codes"), [(0.5, set()), (8, {"NF408"}), (300, {"NF405"})], ids=["pass", "warn", "confirm"]
)
def test_the_noise_floor_rule(factor, codes):
    """Up to 4 n passes, up to 100 n warns, above it float64 decides; rounding passes all the same."""

    def tested(x):
        # the noise floor is read on a middle window: 26 pixels wide here; border windows are 25
        offset = {26: 1e-6, 25: 1e-6 * factor}.get(x.shape[-1], 0.0)
        return x + offset

    network = Network(tested, lambda x: x, torch.float32)
    verdict = compare(network, torch.randn(1, 1, 24, 96), _nearly_local(), tile=24, cross=(16, 16))
    assert verdict.passed
    assert _codes(verdict) == codes
    assert verdict.tolerance == pytest.approx(4 * verdict.noise)
    assert verdict.threshold == pytest.approx(100 * verdict.noise)


def test_a_difference_below_the_threshold_warns():
    """A user's threshold lets a difference pass that float64 would confirm, with a finding that says so."""
    out_of_phase = PadsItself()
    nn.init.constant_(out_of_phase.inner[0].weight, 1e-3)
    single, double = functions(out_of_phase)
    network = Network(lambda x: x + single(x), lambda x: x + double(x), torch.float32)
    image, geometry = torch.randn(1, 1, 96, 96), replace(_geometry(out_of_phase), stride=(1, 1))
    strict = compare(network, image, geometry, tile=36, cross=(16, 16))
    assert (strict.status, _codes(strict)) == ("failed", {"NF406"})
    lax = compare(network, image, geometry, tile=36, cross=(16, 16), threshold=0.1)
    assert (lax.status, _codes(lax)) == ("passed", {"NF408"})


def test_no_threshold_excuses_a_leak():
    """Interference fails a halo that is too short, whatever difference the user allows."""
    net = FaintReach()
    short = replace(_geometry(net, 1), halo=((1, 1), (1, 1)))
    assert _compare(net, torch.randn(1, 1, 96, 96), short, threshold=10.0).status == "failed"


def test_a_mismatch_is_told_for_probabilities_only():
    """1 - Dice needs outputs between 0 and 1."""
    conv = nn.Conv2d(1, 1, 3, padding=1)
    image = torch.randn(1, 1, 96, 96)
    assert _compare(conv, image, _geometry(conv, 1)).tile_mismatch is None
    assert _compare(nn.Sequential(conv, nn.Sigmoid()), image, _geometry(conv, 1)).tile_mismatch == 0


def test_labels_are_compared_with_the_halo_of_their_graph():
    """A network that swallows dye has the halo that its graph bounds: tiles with it agree, without they do not."""
    image = torch.randn(1, 1, 96, 96, generator=torch.Generator().manual_seed(0))
    assert normfix.check(SwallowsDye(), image, tile=32).passed
    assert normfix.check(SwallowsDye(), image, tile=32, halo=0).status == "failed"


def test_the_network_is_left_as_it_was():
    """A check changes neither weights nor modes."""
    net = LiveInstance().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    normfix.check(net, torch.randn(1, 1, 96, 96), tile=32)
    assert all(module.training for module in net.modules())
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())


def test_geometry_survives_the_record():
    """A scan's geometry in text is the geometry that was measured."""
    found = normfix.scan(Patchify(), torch.randn(1, 1, 128, 128))
    assert geometry_of(found) == _geometry(Patchify())


def test_an_image_that_is_read_by_window_is_checked_as_a_tensor_is():
    """What holds the pixels makes no difference to the verdict."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)).eval()
    image = torch.rand(1, 1, 96, 80, generator=torch.Generator().manual_seed(0))
    opened = normfix.open_image(image[0, 0].numpy(), net)
    assert normfix.check(net, opened, tile=32) == normfix.check(net, image, tile=32)
