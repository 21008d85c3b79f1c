"""The indicators: their formulas, the kinds of output, and what they say where there is nothing to say."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from factories import tiny_unet
from networks import Anisotropic, LiveInstance, plain_unet
from torch import nn

import normfix
from normfix.diagnosis.disparity import disparity, patches
from normfix.diagnosis.reception import gradient, receptive_field
from normfix.errors import NormfixError
from normfix.networks.numerics import BOUNDLESS
from normfix.proof.indicators import compare, differences, profile, recognise
from normfix.records.diagnoses import DiagnosisRecord, Tiling
from normfix.tiling.grid import Geometry


def _diagnose(net, image, tile=32, **options):
    return normfix.diagnose(net.eval(), image, tile, **options)


def test_dice_by_hand():
    """Two masks of 3 and 2 pixels that share 1: 1 - 2 / 5, and half-probability is background."""
    a = torch.tensor([[[[0.9, 0.8, 0.7, 0.5]]]])
    b = torch.tensor([[[[0.1, 0.2, 0.9, 0.51]]]])
    assert compare(a, b, "probability", 1.0).dice == pytest.approx(1 - 2 / 5)


def test_continuous_differences_against_numpy():
    """Mean, 99th percentile and maximum are those numpy gives, in units of sd."""
    a, b = torch.randn(1, 2, 40, 50), torch.randn(1, 2, 40, 50)
    found = compare(a, b, "regression", 0.5)
    apart = np.abs(a.numpy().astype(float) - b.numpy()).ravel() / 0.5
    assert (found.mean_sd, found.max_sd) == pytest.approx((apart.mean(), apart.max()))
    assert found.p99_sd == pytest.approx(np.percentile(apart, 99, method="inverted_cdf"))
    assert (found.dice, found.pixels) == (None, 4000)


def test_logits_cut_at_zero():
    """Logits give the Dice of their sigmoid."""
    a, b = torch.randn(1, 1, 9, 9), torch.randn(1, 1, 9, 9)
    probabilities = compare(a.sigmoid(), b.sigmoid(), "probability", 1.0)
    assert compare(a, b, "logits", 1.0).dice == probabilities.dice > 0


def test_classes_by_argmax_without_background():
    """Softmax, its scores and its labels have one Dice, over every class but the first."""
    a, b = torch.randn(1, 3, 9, 9), torch.randn(1, 3, 9, 9)
    x, y = a.argmax(1).numpy(), b.argmax(1).numpy()
    both = sum(((x == c) & (y == c)).sum() for c in (1, 2))
    expected = 1 - 2 * both / ((x > 0).sum() + (y > 0).sum())
    given = {
        "softmax": (a.softmax(1), b.softmax(1)),
        "scores": (a, b),
        "labels": (a.argmax(1, keepdim=True), b.argmax(1, keepdim=True)),
    }
    assert [compare(*pair, kind, 1.0).dice for kind, pair in given.items()] == pytest.approx([expected] * 3)


def test_labels_differ_or_not():
    """Between labels the difference is the share of pixels that differ, whatever their numbers."""
    a, b = torch.tensor([[[[0, 1, 7, 7]]]]), torch.tensor([[[[0, 1, 2, 3]]]])
    assert compare(a, b, "labels", 1.0).mean_sd == 0.5


@pytest.mark.parametrize(
    ("make", "kind"),
    [
        (lambda x: x.sigmoid(), "probability"),
        (lambda x: x.softmax(1), "softmax"),
        (lambda x: x.argmax(1, keepdim=True), "labels"),
        (lambda x: x, "regression"),
    ],
    ids=["sigmoid", "softmax", "labels", "regression"],
)
def test_kinds_are_recognised(make, kind):
    """Outputs are told by their values; logits look like regression and must be declared."""
    assert recognise(make(torch.randn(1, 3, 8, 8))) == kind


def test_both_empty_is_no_mismatch():
    """Two empty masks agree: 1 - Dice is 0 by definition."""
    empty = torch.zeros(1, 1, 4, 4)
    assert compare(empty, empty + 0.1, "probability", 1.0).dice == 0


def test_one_empty_is_all_of_it():
    """A nucleus hallucinated in an empty tile is a mismatch of 1."""
    empty = torch.zeros(1, 1, 4, 4)
    assert compare(empty, empty + 0.9, "probability", 1.0).dice == 1


def test_a_constant_has_no_unit():
    """Without spread equal predictions differ by 0 and any others without bound; NaN is no agreement."""
    a, b = torch.zeros(1, 1, 2, 2), torch.ones(1, 1, 2, 2)
    assert float(differences(a, a, "regression", 0.0).max()) == 0
    assert float(differences(a, b, "regression", 0.0).min()) == BOUNDLESS
    assert float(differences(a * torch.nan, a, "regression", 1.0).min()) == BOUNDLESS


def test_nothing_compared_is_none():
    """No pixel in common gives no number, not 0."""
    assert compare(torch.empty(1, 1, 0, 4), torch.empty(1, 1, 0, 4), "regression", 1.0) is None


@pytest.mark.parametrize(
    ("course", "shape"),
    [
        (lambda d: 0 * d, "flat zero"),
        (lambda d: 0 * d + 1, "plateau"),
        (lambda d: (d < 3).double(), "decay"),
        (lambda d: (d % 8 == 0).double(), "comb"),
    ],
    ids=["zero", "plateau", "decay", "comb"],
)
def test_the_distance_profile_has_a_shape(course, shape):
    """A statistic shows as a plateau, a short halo as a decay, phase as a comb; distances count from the cut."""
    away = torch.tensor([63 - i if i < 64 else i - 64 for i in range(128)])
    found = profile(course(away).double().expand(1, 1, 16, 128), ([], [64]), 8)
    assert found.shape == shape
    assert found.mean_sd == pytest.approx(course(torch.arange(64)).double().tolist())


def test_an_uncut_image_has_no_profile():
    """Without a cut there is no distance from one."""
    assert profile(torch.zeros(1, 1, 8, 8), ([], []), 1) is None


@pytest.mark.slow
def test_tiles_of_a_local_network_agree_beyond_the_halo_only():
    """Control and claim: in the halo tiles differ even without a norm, beyond it to rounding only."""
    found = _diagnose(plain_unet(), torch.randn(1, 1, 96, 96))
    assert found.status == "passed"
    assert found.culprits == ()
    assert found.tile_mismatch.overlap.max_sd > 0.1
    assert found.tile_mismatch.beyond_halo.max_sd < 4 * max(found.record.noise, 1e-6)
    assert found.tile_mismatch.whole.max_sd < 4 * max(found.record.noise, 1e-6)


def test_tiles_of_a_live_network_disagree_beyond_the_halo():
    """A live InstanceNorm shows tile against tile and against the whole, and the profile is a plateau."""
    found = _diagnose(LiveInstance(), torch.rand(1, 1, 96, 96) * torch.linspace(0, 3, 96))
    assert found.status == "failed"
    assert found.tile_mismatch.beyond_halo.mean_sd > 0.05
    assert found.tile_mismatch.whole.mean_sd > 0.05
    assert found.record.profile.shape == "plateau"
    assert [c.cause for c in found.culprits] == ["instance"]
    assert found.record.after.max_sd < 1e-9


def test_overlap_numbers_are_those_of_two_plain_crops():
    """One pair of windows, cut and compared by hand."""
    net, image = LiveInstance().eval(), torch.rand(1, 1, 32, 96) * torch.linspace(0, 3, 96)
    found = _diagnose(net, image, 32)
    pair = found.tile_mismatch.pairs[0]
    with torch.no_grad():
        one, other = net(image[..., :33]), net(image[..., :17, :17])
        sd = float(net(image).std())
    apart = (one[..., :16, :16] - other[..., :16, :16]).abs() / sd
    assert (pair.first, pair.second) == ((0, 0), (0, 0))
    assert pair.mismatch.max_sd == pytest.approx(float(apart.max()), rel=1e-4)


def test_one_window_is_inconclusive():
    """A window that covers the image compares nothing, live norm or not."""
    found = _diagnose(LiveInstance(), torch.rand(1, 1, 48, 48), 64)
    assert found.status == "inconclusive"
    assert "NF407" in {f.code for f in found.record.findings}


@pytest.mark.slow
def test_windows_that_overlap_nowhere_far_enough_are_named():
    """Tiles without context, smaller than the halo on both sides, leave no pixel that two windows see beyond it."""
    net = nn.Sequential(*(nn.Conv2d(1, 1, 9, padding=4) for _ in range(4)))
    tiling = Tiling(tile=(24, 24), halo=((0, 0), (0, 0)))
    found = normfix.diagnose(net.eval(), torch.rand(1, 1, 96, 96), tiling=tiling)
    assert "NF607" in {f.code for f in found.record.findings}


def test_a_constant_output_is_inconclusive():
    """An output without spread is said to be one."""
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1))
    nn.init.zeros_(net[0].weight)
    found = _diagnose(net, torch.rand(1, 1, 96, 96))
    assert found.status == "inconclusive"
    assert "NF606" in {f.code for f in found.record.findings}


@pytest.mark.slow
def test_three_axes():
    """A 3D network is diagnosed with tiles and halos per axis."""
    found = _diagnose(Anisotropic(), torch.randn(1, 1, 8, 48, 48), (8, 16, 16))
    assert found.status == "passed"
    assert len(found.record.exact_halo) == 3


@pytest.mark.zoo
def test_one_of_several_outputs():
    """`output` names the one that counts, and another one may have another verdict."""

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = plain_unet(), LiveInstance()

        def forward(self, x):
            return {"plain": self.a(x), "live": self.b(x)}

    image = torch.rand(1, 1, 96, 96) * torch.linspace(0, 3, 96)
    assert [_diagnose(Two(), image, output=name).status for name in ("plain", "live")] == ["passed", "failed"]


def test_disparity_by_hand():
    """Two patches in one batch against eval mode, with batch statistics computed here."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2))
    nn.init.constant_(net[1].running_mean, 0.3)
    image = torch.rand(1, 1, 16, 16)
    found = _diagnose(net, image, 8, batches=(2,)).train_eval
    y = net[0](image).detach()
    rows = [torch.cat([y[..., r : r + 8, :8], y[..., r : r + 8, 8:]]) for r in (0, 8)]
    apart = []
    for batch in rows:
        mean = batch.mean((0, 2, 3), keepdim=True)
        sd = (batch.var((0, 2, 3), correction=0, keepdim=True) + 1e-5).sqrt()
        apart.append((((batch - mean) / sd) - (batch - 0.3) / (1 + 1e-5) ** 0.5).abs())
    unit = float(((y - 0.3) / (1 + 1e-5) ** 0.5).std())
    assert found[0].mismatch.mean_sd == pytest.approx(float(torch.cat(apart).mean()) / unit, rel=1e-4)
    assert "2 consecutive patches of 8x8" in found[0].composition


@pytest.mark.slow
def test_disparity_leaves_running_statistics_alone():
    """Updates are off, in the given network as well as in the copies, and dropout is off."""
    net = nn.Sequential(nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5)).train()
    before = {k: v.clone() for k, v in net.state_dict().items()}
    found = normfix.diagnose(net, torch.rand(1, 1, 32, 32), 8)
    again = normfix.diagnose(net, torch.rand(1, 1, 32, 32), 8)
    assert all(torch.equal(v, before[k]) for k, v in net.state_dict().items())
    assert net.training
    assert [c.cause for c in (*found.culprits, *again.culprits)] == ["train mode"] * 2


@pytest.mark.slow
def test_norms_frozen_in_a_training_network_stay_frozen():
    """Train mode is what uses batch statistics: a norm that its owner put in eval mode is no cause."""
    net = nn.Sequential(
        nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2), nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)
    )
    net.train()
    net[1].eval()
    net[3].eval()
    image = torch.rand(1, 1, 64, 64) * torch.linspace(0, 3, 64)
    assert normfix.diagnose(net, image, 16).culprits == ()
    net[3].train()
    half = normfix.diagnose(net, image, 16).culprits
    net[1].train()
    both = normfix.diagnose(net, image, 16).culprits
    assert [c.cause for c in (*half, *both)] == ["train mode"] * 2
    assert half[0].introduced != pytest.approx(both[0].introduced, rel=1e-4)


def test_a_batch_that_cannot_be_filled_is_left_out():
    """More patches than there are give no number."""
    places = patches((16, 16), (8, 8), (1, 1))
    assert len(places) == 4
    assert (
        disparity(nn.Identity(), nn.Identity(), torch.rand(1, 1, 16, 16), places, (5,), "regression", 1.0)
        == ()
    )


def test_effective_field_of_a_box():
    """A 5x5 mean looks 2 pixels to every side, all of them needed for 95 %."""
    net = nn.Conv2d(1, 1, 5, padding=2, bias=False)
    nn.init.constant_(net.weight, 1 / 25)
    geometry = Geometry(stride=(1, 1), halo=((2, 2),) * 2, scale=(1, 1), multiple=(1, 1))
    found = receptive_field(
        *gradient(net, torch.rand(1, 1, 40, 40), geometry, (20, 20)), geometry, bounded=True
    )
    assert found.effective == ((2, 2), (2, 2))
    assert found.outside == 0


@pytest.mark.slow
def test_a_live_norm_reaches_beyond_the_theoretical_field():
    """The gradient of a live statistic lies outside the field; that of a local network does not."""
    image = torch.rand(1, 1, 96, 96)
    assert _diagnose(LiveInstance(), image).receptive_field.outside > 0.01
    assert _diagnose(plain_unet(), image).receptive_field.outside == 0


@pytest.mark.slow
def test_moments_and_spread_of_a_site():
    """The table of sites has the whole image's mean and how far a tile's mean strays, checked by hand."""
    net = nn.Sequential(nn.Conv2d(1, 1, 1), nn.InstanceNorm2d(1))
    image = torch.rand(1, 1, 32, 64) * torch.linspace(0, 3, 64)
    (site,) = _diagnose(net, image, 32, per_site=True).record.sites
    y = net[0](image).detach()
    tiles = [y[..., :32], y[..., 32:]]
    sd = y.std(correction=0)
    assert site.mean[0] == pytest.approx(float(y.mean()), rel=1e-4)
    assert site.spread == pytest.approx(max(float((t.mean() - y.mean()).abs() / sd) for t in tiles), rel=1e-3)
    assert site.introduced == pytest.approx(site.removed)


@pytest.mark.slow
@pytest.mark.parametrize("truth", ["plane", "wrong"])
def test_accuracy_stands_beside_invariance(truth):
    """Dice of three predictions and a metric of the user's; labels of another shape are refused."""
    net = nn.Sequential(tiny_unet(), nn.Sigmoid())
    image = torch.rand(1, 1, 64, 64) * torch.linspace(0, 3, 64)
    if truth == "wrong":
        with pytest.raises(NormfixError, match="NF604"):
            _diagnose(net, image, labels=torch.zeros(63, 64))
        return
    labels = (net(image) > 0.5)[0, 0]
    converted = normfix.convert(net, image, tile=32).model
    found = _diagnose(
        net, image, labels=labels, converted=converted, metric=lambda p, t: float((p > 0.5).mean())
    )
    rows = {row.prediction: row for row in found.record.accuracy}
    assert list(rows) == ["original, untiled", "original, tiled", "converted, tiled"]
    assert rows["original, untiled"].dice == 1
    assert rows["converted, tiled"].dice > 0.999 > rows["original, tiled"].dice
    assert rows["original, untiled"].metric == pytest.approx(float(labels.float().mean()))


@pytest.mark.slow
def test_labels_that_judge_nothing_are_a_finding():
    """Where the output has no Dice with them and there is no metric, they are named; where there is, they are not."""
    net, image = nn.Sequential(LiveInstance(), nn.Conv2d(1, 1, 3, padding=1)), torch.rand(1, 1, 96, 96)
    labels = torch.ones(96, 96)

    def named(net, **options):
        found = _diagnose(net, image, labels=labels, batches=(1,), **options).record.findings
        return [f.message for f in found if (f.code, f.where) == ("NF557", "labels")]

    assert "regression" in named(net, kind="regression")[0]
    assert "extents" in named(nn.Sequential(net, nn.Upsample(scale_factor=2)), kind="logits")[0]
    assert not named(net, kind="logits")
    assert not named(net, kind="regression", metric=lambda prediction, labels: 1.0)


@pytest.mark.slow
def test_what_needs_labels_is_a_finding_without_them():
    """A metric and a converted network serve accuracy alone."""
    net, image = LiveInstance(), torch.rand(1, 1, 96, 96)

    def named(**options):
        found = _diagnose(net, image, batches=(1,), **options).record.findings
        return [f.where for f in found if f.code == "NF557"]

    judging = {"metric": lambda prediction, labels: 1.0, "converted": normfix.convert(net, image).model}
    assert named(**judging) == ["metric", "converted"]
    assert not named(**judging, labels=torch.ones(96, 96))
    assert not named()


def test_the_cost_is_stated_before_and_kept():
    """Experiments are announced once, before progress is made on them, and their number is what runs."""
    heard, stages = [], []
    found = _diagnose(
        LiveInstance(),
        torch.rand(1, 1, 96, 96),
        halo=0,
        announce=lambda cost: heard.append((cost, list(stages))),
        progress=lambda stage, done, total: stages.append((stage, done, total)),
    )
    ((cost, before),) = heard
    assert {stage for stage, _, _ in before} == {"scan"}
    runs = [total for stage, done, total in stages if stage == "experiments" and done == total]
    assert len(runs) == cost.experiments == 4
    assert cost == found.record.cost
    assert cost.seconds > 0


def test_the_record_survives_json():
    """A diagnosis turns into JSON and back without loss."""
    record = _diagnose(LiveInstance(), torch.rand(1, 1, 96, 96)).record
    assert DiagnosisRecord.from_json(record.to_json()) == record


def test_the_network_is_left_as_it_was():
    """A diagnosis changes neither weights nor modes nor gradients."""
    net = LiveInstance().train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    normfix.diagnose(net, torch.rand(1, 1, 96, 96), 32)
    assert all(torch.equal(value, before[name]) for name, value in net.state_dict().items())
    assert all(module.training for module in net.modules())
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@pytest.mark.slow
@pytest.mark.parametrize("tile", [(32,), (0, 32), -1], ids=str)
def test_a_tiling_that_does_not_fit_is_refused(tile):
    """Another number of axes, or no pixels, is NF602."""
    with pytest.raises(NormfixError, match="NF602"):
        _diagnose(plain_unet(), torch.rand(1, 1, 96, 96), tile)


@pytest.mark.slow
def test_a_size_the_network_refuses_is_extended_and_said():
    """Where the whole image cannot run as it is, it is extended, and a finding says so."""
    found = _diagnose(plain_unet(), torch.rand(1, 1, 100, 96))
    assert "NF603" in {f.code for f in found.record.findings}
    assert found.record.tiling.padded
    assert found.status == "passed"


@pytest.mark.slow
def test_a_stated_tiling_is_kept():
    """The user's own numbers stand in the record."""
    tiling = Tiling(tile=(32, 32), halo=((24, 24),) * 2, last="pushed back")
    assert _diagnose(plain_unet(), torch.rand(1, 1, 96, 96), tiling=tiling).record.tiling == replace(tiling)
