"""Pipelines of users: what their own steps do to seams is found, from outside and by probes from inside."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from networks import LiveInstance, UNet, max_pool, nearest, plain_unet
from torch import nn

import normfix
from normfix.errors import NormfixError

ROI, SIZE = 48, 160


@pytest.fixture
def local():
    """A U-Net of stride 2 that reaches 5 pixels."""
    return UNet(max_pool, nearest, depth=1).eval()


def image(n=SIZE):
    return torch.rand(1, 1, n, n) * torch.linspace(0.2, 3, n)


def zscore(x):
    return (x - x.mean()) / x.std()


def cropping(halo=8, roi=ROI, scale=None, whole=True, pad=False):
    """Make a pipeline that reads windows with context and keeps their cores, as torch-em does.

    A stand-in for torch_em.util.prediction.predict_with_halo: blocks, a halo on every side that ends at the
    image's border, or is mirrored there (`pad`), the core kept, `scale` applied to every block.
    """

    def predict(x, network):
        x = zscore(x) if whole else x
        out, core = torch.zeros_like(x), roi - 2 * halo
        height, width = x.shape[-2:]
        for top in range(0, height, core):
            for left in range(0, width, core):
                rows, columns = _reads(top, halo, roi, height, pad), _reads(left, halo, roi, width, pad)
                block = x[..., [_mirror(i, height) for i in rows], :][
                    ..., [_mirror(i, width) for i in columns]
                ]
                y = network(scale(block) if scale else block)
                y0, x0 = top - rows[0], left - columns[0]
                target = out[..., top : top + core, left : left + core]
                target.copy_(y[..., y0 : y0 + target.shape[-2], x0 : x0 + target.shape[-1]])
        return out

    return predict


def _reads(start, halo, roi, n, pad):
    first = start - halo if pad else min(max(0, start - halo), n - roi)
    return range(first, first + roi)


def _mirror(i, n):
    return -i if i < 0 else 2 * (n - 1) - i if i >= n else i


def blending(step=24, roi=ROI):
    """Make a pipeline that averages overlapping windows, its last window pushed back.

    A stand-in for nnU-Net's predictor: evenly spread steps, a weight that falls towards the window's border.
    """

    def predict(x, network):
        height, width = x.shape[-2:]
        weight = torch.hann_window(roi + 2, periodic=False)[1:-1].clamp_min(1e-3)
        weight = weight[:, None] * weight
        total, count = torch.zeros_like(x), torch.zeros_like(x)
        for top in _pushed_back(height, roi, step):
            for left in _pushed_back(width, roi, step):
                here = (..., slice(top, top + roi), slice(left, left + roi))
                total[here] += network(x[here]) * weight
                count[here] += weight
        return total / count

    return predict


def _pushed_back(n, roi, step):
    return [min(s, n - roi) for s in range(0, n - roi + step, step)]


def causes(predict, network, **options):
    with torch.no_grad():
        return {c.cause for c in normfix.diagnose(predict, image(), ROI, network=network, **options).culprits}


@pytest.mark.slow
def test_a_right_pipeline_passes(local):
    """Control: enough context, aligned, scaled as a whole... of a fixed scale: nothing is named."""
    predict = cropping(whole=False)
    with torch.no_grad():
        found = normfix.diagnose(predict, image(), ROI, network=local, margin=32)
    assert found.status == "passed"
    assert found.culprits == ()
    assert found.record.context == ((8, 8), (8, 8))


@pytest.mark.slow
@pytest.mark.parametrize(
    ("predict", "cause"),
    [
        (cropping(halo=2, whole=False), "halo"),
        (cropping(halo=7, roi=47, whole=False), "phase"),
        (cropping(whole=False, scale=zscore), "tile scaling"),
        (cropping(whole=False, pad=True), "border padding"),
    ],
    ids=["halo", "phase", "tile scaling", "border padding"],
)
def test_probes_name_the_step(local, predict, cause):
    """Short context, unaligned starts, scaling per tile and mirrored borders are each named, and nothing else."""
    local = nn.Sequential(nn.ZeroPad2d((0, 1, 0, 1)), local) if cause == "phase" else local
    found = causes(predict, _Crops(local) if cause == "phase" else local, margin=32, stride=2)
    assert found == {cause}


def quantile(x, q):
    return x.flatten().quantile(q)


def cut_at_the_border(scale=None, finish=None, halo=8, tile=32):
    """Make a pipeline whose windows end where the image ends, so that they have several sizes."""

    def predict(x, network):
        out = torch.zeros_like(x)
        height, width = x.shape[-2:]
        for top in range(0, height, tile):
            for left in range(0, width, tile):
                y, z = max(0, top - halo), max(0, left - halo)
                window = x[..., y : top + tile + halo, z : left + tile + halo]
                answer = network(scale(window) if scale else window)
                answer = finish(answer) if finish else answer
                target = out[..., top : top + tile, left : left + tile]
                y, z = top - y, left - z
                target.copy_(answer[..., y : y + target.shape[-2], z : z + target.shape[-1]])
        return out

    return predict


SCALINGS = {
    "zscore": zscore,
    "percentile": lambda x: (x - quantile(x, 0.01)) / (quantile(x, 0.998) - quantile(x, 0.01)),
    "clipped percentile": lambda x: ((x - quantile(x, 0.05)) / (quantile(x, 0.95) - quantile(x, 0.05))).clamp(
        0, 1
    ),
    "min-max": lambda x: (x - x.min()) / (x.max() - x.min()),
    "maximum": lambda x: x / x.max(),
    "median": lambda x: x - x.median(),
    "deviation of the logarithm": lambda x: zscore(torch.log1p(x)),
    "clipping alone": lambda x: x.clamp(float(quantile(x, 0.1)), float(quantile(x, 0.9))),
    "ranks": lambda x: x.flatten().argsort().argsort().float().view_as(x) / x.numel(),
}


@pytest.fixture(scope="module")
def convolutions():
    """Takes every extent; reaches 2 pixels."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.ReLU(), nn.Conv2d(8, 1, 3, padding=1)).eval()


def diagnosed(predict, network, height, width):
    with torch.no_grad():
        return normfix.diagnose(predict, image(width)[..., :height, :] + 0.3, 32, network=network, margin=16)


@pytest.mark.parametrize("scaling", sorted(SCALINGS))
@pytest.mark.parametrize("width", [96, 104], ids=["whole tiles", "a ragged last tile"])
def test_scaling_per_tile_is_named_whatever_it_is_by(convolutions, scaling, width):
    """Mean and deviation, percentiles, extremes, median, also clipped or bent, in windows of several sizes."""
    found = diagnosed(cut_at_the_border(SCALINGS[scaling]), convolutions, 64, width)
    assert [c.cause for c in found.culprits] == ["tile scaling"]
    assert found.record.context == ((8, 8), (8, 8))
    assert found.record.findings == ()


@pytest.mark.slow
def test_a_filter_that_the_halo_is_wide_enough_for_is_no_cause(convolutions):
    """Control: near a window's cut it gives other values there, which are cropped with the halo."""
    found = diagnosed(
        cut_at_the_border(lambda x: nn.functional.avg_pool2d(x, 3, 1, 1) + x), convolutions, 64, 104
    )
    assert found.record.verdict.status == "passed"
    assert found.culprits == ()


@pytest.mark.parametrize("pick", [lambda y: y["out"], lambda y: y["aux"][1]], ids=["first", "nested"])
def test_a_network_of_several_outputs_is_probed(convolutions, pick):
    """Probes answer in the structure that the network answers in."""

    class Several(nn.Module):
        def __init__(self):
            super().__init__()
            self.inner, self.levels = convolutions, 2

        def forward(self, x):
            y = self.inner(x)
            return {"out": y, "aux": [y.mean((2, 3)), y + 1], "levels": self.levels}

    def predict(x, network):
        assert network.levels == 2
        return cut_at_the_border(halo=1)(x, lambda window: pick(network(window)))

    with torch.no_grad():
        found = normfix.diagnose(
            predict, image(96)[..., :64, :], 32, network=Several().eval(), margin=16, output="out"
        )
    assert [c.cause for c in found.culprits] == ["halo"]


def test_a_float64_network_is_probed_in_float64(convolutions):
    """A pipeline casts to the dtype of the network's parameters, and finds the network's own there."""
    network = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1)).double().eval()

    def predict(x, network):
        return cut_at_the_border()(x.to(next(network.parameters()).dtype), network)

    with torch.no_grad():
        found = normfix.diagnose(predict, image(96)[..., :64, :].double(), 32, network=network, margin=16)
    assert (found.status, found.culprits) == ("passed", ())


def test_a_failure_that_no_probe_explains_is_said(convolutions):
    """Scaling of all that a pipeline is given moves with a crop of it; no step is named, and that is said."""
    found = diagnosed(lambda x, network: cut_at_the_border()(zscore(x), network), convolutions, 64, 104)
    assert (found.record.verdict.status, found.culprits) == ("failed", ())
    assert [f.code for f in found.record.findings] == ["NF609"]


@pytest.mark.parametrize(
    "scaling",
    [None, lambda x: (x.clamp(0.2, 2.5) - 0.1) / 2, lambda x: x.clamp_min(0) ** 0.5, lambda x: 1 - x],
    ids=["none", "fixed, clipped", "gamma", "inverted"],
)
def test_a_scale_that_all_windows_share_is_no_cause(convolutions, scaling):
    """Control: constants of the pipeline move every window alike, and it passes."""
    found = diagnosed(cut_at_the_border(scaling), convolutions, 64, 104)
    assert (found.status, found.culprits, found.record.findings) == ("passed", (), ())


@pytest.mark.parametrize(
    "finish",
    [lambda y: (y - y.min()) / (y.max() - y.min()), lambda y: (y - y.mean()) / (y.std() + 1e-6)],
    ids=["min-max", "zscore"],
)
def test_outputs_that_are_scaled_per_tile_are_named(convolutions, finish):
    """A factor and a shift of the network's output change nothing then; it is not taken for blending."""
    found = diagnosed(cut_at_the_border(finish=finish), convolutions, 64, 96)
    assert [c.cause for c in found.culprits] == ["output scaling"]


@pytest.mark.parametrize("finish", [torch.sigmoid, lambda y: (y > 0.5).float()], ids=["sigmoid", "threshold"])
def test_what_is_done_to_each_pixel_of_an_output_is_no_cause(convolutions, finish):
    """Control: windows are still told apart, and their context is measured."""
    found = diagnosed(cut_at_the_border(finish=finish), convolutions, 64, 96)
    assert found.culprits == ()
    assert found.record.context == ((8, 8), (8, 8))


def test_short_context_is_found_in_windows_of_several_sizes(convolutions):
    """The least context of any pixel counts, whatever the window's size."""
    found = diagnosed(cut_at_the_border(halo=1), convolutions, 64, 104)
    assert [c.cause for c in found.culprits] == ["halo"]
    assert found.record.context == ((1, 1), (1, 1))


@pytest.mark.parametrize(
    ("scale", "finish", "says"),
    [
        (lambda x: x - nn.functional.avg_pool2d(x, 9, 1, 4), None, "scaled by themselves"),
        (lambda x: x.flip(-1), lambda y: y.flip(-1), "no window was found"),
    ],
    ids=["background", "turned"],
)
def test_what_the_probes_cannot_see_is_said(convolutions, scale, finish, says):
    """No cause named is not no cause: local contrast and turned windows hide what the probes look for."""
    found = diagnosed(cut_at_the_border(scale, finish), convolutions, 64, 96)
    assert found.culprits == ()
    assert any(f.code == "NF609" and says in f.message for f in found.record.findings)


class _Crops(nn.Module):
    """Takes any extent: pads by one at the end where it is odd and crops again."""

    def __init__(self, inner):
        super().__init__()
        self.inner = inner[1]

    def forward(self, x):
        h, w = x.shape[2:]
        return self.inner(nn.functional.pad(x, (0, w % 2, 0, h % 2)))[..., :h, :w]


@pytest.mark.zoo
def test_blending_is_named(local):
    """Averaging windows is a cause of its own, and so is the pushed-back window it comes with."""
    with torch.no_grad():
        found = normfix.diagnose(blending(), image(161)[..., :160, :160], ROI, network=local, margin=32)
    assert {c.cause for c in found.culprits} == {"blending"}
    assert found.record.context is None
    assert found.record.verdict.status == "failed"


@pytest.mark.slow
def test_a_pushed_back_window_is_told_from_phase(local):
    """Where only the windows at the end are off the grid, it is the last tile."""
    net = _Crops([None, local])
    with torch.no_grad():
        found = normfix.diagnose(blending(), image(161), ROI, network=net, margin=32, stride=2)
    assert {c.cause for c in found.culprits} == {"blending", "last tile"}


@pytest.mark.zoo
def test_the_networks_own_statistic_is_told_from_the_pipelines_steps():
    """A live norm is named with its site; with it held the same pipeline passes."""
    with torch.no_grad():
        found = normfix.diagnose(cropping(whole=False), image(), ROI, network=LiveInstance(), margin=32)
    assert [c.cause for c in found.culprits] == ["instance"]
    assert found.record.verdict.status == "failed"
    assert found.record.held.status == "passed"


class OfOneSize(nn.Module):
    """A norm, and attention among 4 x 4 tokens that are numbered: windows of 32 pixels and no others."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4)
        self.patches, self.place = nn.Conv2d(4, 4, 8, 8), nn.Parameter(torch.randn(1, 4, 4, 4))
        self.back, self.last = nn.ConvTranspose2d(4, 4, 8, 8), nn.Conv2d(4, 1, 1)

    def forward(self, x):
        y = self.norm(self.first(x))
        tokens = (self.patches(y) + self.place).flatten(2).transpose(1, 2)
        seen = F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2)
        return self.last(y + self.back(seen.reshape(len(x), 4, 4, 4)))


@pytest.mark.slow
def test_what_a_network_of_one_size_stays_with_is_measured():
    """Its norm is held at the windows' values; attention is named with why nothing holds it, and its share stays."""
    predict, whole = blending(step=16, roi=32), image(96)[..., :64, :]
    with torch.no_grad():
        found = normfix.diagnose(predict, whole, 32, network=OfOneSize().eval(), margin=16, stride=8)
    remedies = {c.cause: c.remedy for c in found.culprits}
    assert remedies["instance"] == "freeze its statistic: normfix convert"
    assert remedies["attention"].startswith("none by constants (every pixel")
    assert found.status == "failed"
    assert 0.01 < found.record.held.mean_sd < 0.9 * found.record.verdict.mean_sd


def test_scaling_of_the_whole_crop_moves_with_it(local):
    """A scale of whatever array is given fails against crops: the statistic of a crop is another one."""
    predict = cropping(whole=True)
    with torch.no_grad():
        assert normfix.check(lambda x: predict(x, local), image(), ROI, margin=32).status == "failed"


def test_arrays_are_taken_as_tensors_are(local):
    """A function of numpy arrays (H, W) gets the same verdict."""
    predict = cropping(whole=False)

    def of_arrays(array):
        with torch.no_grad():
            return predict(torch.from_numpy(array)[None, None], local)[0, 0].numpy()

    verdict = normfix.check(of_arrays, image()[0, 0].numpy(), ROI, margin=32, stride=8)
    assert verdict.passed
    assert ("margin", "32") in verdict.settings
    assert verdict.axes == (0, 1)


def test_a_margin_below_the_halo_fails_a_right_pipeline():
    """The margin is part of the claim: near a cut the crop's border is felt."""
    with torch.no_grad():
        net = plain_unet().eval()
        verdict = normfix.check(net.forward, image(), ROI, margin=2, stride=8)
        assert verdict.status == "failed"
        assert normfix.check(net.forward, image(), ROI, margin=24, stride=8).passed


def test_nothing_left_to_compare_is_inconclusive(local):
    """A margin that eats the crops compares nothing."""
    verdict = normfix.check(local.forward, image(48).detach(), ROI, margin=30)
    assert verdict.inconclusive
    assert {f.code for f in verdict.findings} >= {"NF407"}


@pytest.mark.parametrize(
    "wrong",
    [lambda x: x[..., :-1], lambda x: None, lambda x: 1 / 0, lambda x: x + torch.randn(x.shape)],
    ids=["extents", "nothing", "fails", "random"],
)
def test_what_is_no_pipeline_is_refused(wrong):
    """Other extents, no array, an exception and chance are each NF605."""
    with pytest.raises(NormfixError, match="NF605"):
        normfix.check(wrong, image(), ROI)


def test_an_assertion_takes_a_pipeline(local):
    """The test-suite form fails on a pipeline with short context, naming the crop."""
    predict = cropping(halo=2, whole=False)
    with torch.no_grad(), pytest.raises(AssertionError, match="NF608"):
        normfix.assert_tile_invariant(lambda x: predict(x, local), image(), ROI, margin=32)


@pytest.mark.slow
def test_monai_blends_by_default_and_can_be_made_exact():
    """SlidingWindowInferer: Gaussian weights are named; a weight map of cores with aligned steps passes."""
    from monai.inferers import sliding_window_inference

    net, x = plain_unet().eval(), image(128)

    def gaussian(x, network):
        return sliding_window_inference(x, 64, 4, network, overlap=0.5, mode="gaussian")

    with torch.no_grad():
        found = normfix.diagnose(gaussian, x, 64, network=net, margin=40)
    assert {c.cause for c in found.culprits} == {"blending"}

    halo, roi = 24, 64

    def core(coordinates, size):
        """Mark what each window is responsible for: all but the halo, up to the image's border."""
        masks = torch.zeros(len(coordinates), 1, roi, roi)
        for mask, (*_, rows, columns) in zip(masks, coordinates, strict=True):
            y, x = (
                [halo * (s.start > 0), roi - halo * (s.stop < n)]
                for s, n in zip((rows, columns), size, strict=True)
            )
            mask[:, slice(*y), slice(*x)] = 1
        return masks

    def exact(x, network):
        def run(f):
            options = {"overlap": 2 * halo / roi, "mode": "constant", "with_coord": True}
            return sliding_window_inference(x, roi, 4, f, **options)

        kept = run(lambda window, places: network(window) * core(places, x.shape[2:]))
        return kept / run(lambda window, places: core(places, x.shape[2:]))

    with torch.no_grad():
        whole = net(x)
        assert float((exact(x, net) - whole).abs().max() / whole.std()) < 1e-4
        assert normfix.check(lambda x: exact(x, net), x, roi, margin=40, stride=8).passed
        assert not normfix.check(lambda x: gaussian(x, net), x, roi, margin=40, stride=8).passed


def test_input_is_not_changed():
    """The pipeline gets copies: one that works in place does not spoil the comparison."""

    def in_place(x):
        return x.mul_(2)

    x = image()
    before = x.clone()
    assert normfix.check(in_place, x, ROI, margin=8).passed
    assert torch.equal(x, before)
    assert isinstance(np.asarray(x), np.ndarray)
