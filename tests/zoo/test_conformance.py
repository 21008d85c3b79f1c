"""Real architectures fare as the package says, judged by arithmetic of the zoo's own; and the zoo can say no."""

import os
import re
import time
from collections import Counter
from dataclasses import replace
from fractions import Fraction

import pytest
import torch
from torch import nn

import normfix

from . import agreeing
from .agreeing import agreement
from .catalogue import ENTRIES, by_name
from .columns import local_names, with_geometry
from .entry import Entry
from .examining import CATEGORIES, GOOD, examine
from .geometry import against, attends, examine_geometry, reach_of_tiles
from .preparing import prepared
from .running import apart, missing
from .table import page
from .tiling import Pencil, distance, stitched

REPRESENTATIVE = {
    "monai UNet instance 2D": "converted",
    "monai UNet instance 3D": "converted",
    "monai DynUNet residual 2D": "converted",
    "monai SegResNet pixelshuffle 2D": "converted",
    "monai AutoEncoder batch 2D": "local",
    "timm resnet18": "local",
    "timm resnet18 classifier": "not dense",
    "torchvision resnet18 layer2": "local",
}
QUICK = (
    "monai UNet instance 2D",
    "monai SegResNet pixelshuffle 2D",
    "timm resnet18 classifier",
    "timm resnet18",
)


def _fares(name):
    entry = by_name(name)
    if missing(entry):
        pytest.skip(f"{entry.library} is not installed: pip install normfix[zoo]")
    return apart(entry)


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.zoo) for n in REPRESENTATIVE]
)
def test_a_representative_network_fares_as_it_should(name):
    """Scan, conversion and proof of the network end under the heading they should."""
    row = _fares(name)
    assert row["category"] == REPRESENTATIVE[name], row


@pytest.mark.zoo
@pytest.mark.parametrize("name", [entry.name for entry in ENTRIES])
def test_every_network_is_proved_or_named(name):
    """The network is proved tile by tile, or what stands in the way is named: nothing fails or stays open."""
    row = _fares(name)
    assert row["category"] in GOOD, row
    assert row["category"] not in ("refused", "size fixed") or row["cause"]


def _nnunet(kind):
    """Return an architecture of nnU-Net, which registers every norm twice."""

    def build():
        import dynamic_network_architectures.architectures.unet as unets

        options = {"norm_op": nn.InstanceNorm2d, "norm_op_kwargs": {"affine": True}, "conv_bias": True}
        options |= {"nonlin": nn.LeakyReLU, "nonlin_kwargs": {"inplace": True}}
        return getattr(unets, kind)(1, 3, (4, 8, 8), nn.Conv2d, 3, (1, 2, 2), (1, 1, 1), 2, (1, 1), **options)

    return Entry(name=kind, library="dynamic_network_architectures", build=build, shape=(1, 1, 64, 64))


NNUNET = (_nnunet("PlainConvUNet"), _nnunet("ResidualEncoderUNet"))


def _agree(entry):
    if missing(entry):
        pytest.skip(f"{entry.library} is not installed")
    found = agreement(entry)
    if "skipped" in found:
        return found
    ways = {way: found[way] for way in ("passes", "stages", "per-image")}
    assert max(ways.values()) <= found["limit"], found
    return found


@pytest.mark.slow
@pytest.mark.parametrize("entry", [NNUNET[0], by_name("monai DynUNet group 2D")], ids=lambda e: e.name)
def test_statistics_of_a_representative_network_agree_with_the_original(entry):
    """Measured in passes, in stages and per image, they give the original's output of another image to 1e-9 sd."""
    assert _agree(entry)["engine"] == "stages"


@pytest.mark.zoo
@pytest.mark.parametrize("entry", [NNUNET[1], *ENTRIES], ids=lambda e: e.name)
def test_statistics_agree_with_the_original(entry):
    """Of every network with live norms that is converted; the others have nothing to measure."""
    _agree(entry)


@pytest.mark.slow
def test_a_stale_statistic_disagrees(monkeypatch):
    """Control: a site that is measured under the old constants of the one before it is off by far more than 1e-9."""
    two = replace(
        SMALL, build=lambda: nn.Sequential(_Live(), nn.Conv2d(4, 4, 3, padding=1), nn.InstanceNorm2d(4))
    )
    assert max(v for v in _agree(two).values() if isinstance(v, float)) <= 1e-9
    calibrate = normfix.calibrate

    def stale(model, image, **keywords):
        done = calibrate(model, image, **keywords)
        if "tile" in keywords:
            done.model[2].running_var.mul_(1.001)
        return done

    monkeypatch.setattr(normfix, "calibrate", stale)
    assert agreement(two)["stages"] > 1e-6


def _trained():
    """Return a live norm beside a batch norm whose running statistics are far from those of any image here."""
    network = nn.Sequential(_Live(), nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 3))
    network[2].running_mean.fill_(5.0)
    network[2].running_var.fill_(9.0)
    return network


@pytest.mark.slow
def test_a_trained_batch_norm_is_measured_anew_with_the_rest():
    """Calibrating gives what the original gives with this norm measured on the image; `predict` leaves it alone."""
    found = _agree(replace(SMALL, build=_trained))
    assert found["trained"] == 1


@pytest.mark.slow
def test_a_trained_batch_norm_that_kept_its_statistics_disagrees(monkeypatch):
    """Control: held against the original in eval mode, the same measurements are far off."""
    output = agreeing._output
    monkeypatch.setattr(agreeing, "_output", lambda *args, anew=(): output(*args))
    assert agreement(replace(SMALL, build=_trained))["passes"] > 1e-3


def test_the_zoo_is_large_and_its_names_are_unique():
    """At least 300 architectures of six libraries, 2D and 3D, dense and not."""
    assert len({entry.name for entry in ENTRIES}) == len(ENTRIES) >= 300
    assert len({entry.library for entry in ENTRIES}) == 6
    assert {entry.ndim for entry in ENTRIES} == {1, 2, 3}
    assert Counter(entry.dense for entry in ENTRIES)[True] >= 250


class _Live(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.InstanceNorm2d(4)

    def forward(self, x):
        return self.norm(self.conv(x))


class _Slow(_Live):
    """Computes for ever once it has been called a few times."""

    calls = 0

    def forward(self, x):
        self.calls += 1
        while self.calls > 12:
            pass
        return super().forward(x)


SMALL = Entry(name="small", library="torch", build=_Live, shape=(1, 1, 32, 32))


def test_the_zoo_converts_what_is_simple():
    """A convolution and an InstanceNorm are converted and proved, and the original's tiles differ."""
    row = examine(SMALL)
    assert row["category"] == "converted", row
    assert row["before"] > 0.1
    assert row["frozen_after"] < 1e-9


def test_a_missed_site_is_silently_wrong(monkeypatch):
    """Control: where a scan overlooks a live site, the zoo's own tiles say so."""
    scan = normfix.scan

    def overlooking(*args, **kwargs):
        found = scan(*args, **kwargs)
        return replace(found, sites=tuple(replace(site, live=False) for site in found.sites))

    monkeypatch.setattr(normfix, "scan", overlooking)
    assert examine(SMALL)["category"] == "silently wrong"


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["mean", "lost"])
def test_a_wrong_conversion_that_was_passed_is_silently_wrong(monkeypatch, mistake):
    """Control: a statistic that is off by 1e-3, or live again, is found although the proof passed."""
    convert = normfix.convert

    def mistaken(*args, **kwargs):
        done = convert(*args, **kwargs)
        if mistake == "lost":
            done.model.norm = nn.InstanceNorm2d(4)
        else:
            done.model.norm.running_mean += 1e-3
        assert done.proof.passed
        return done

    monkeypatch.setattr(normfix, "convert", mistaken)
    row = examine(SMALL)
    assert row["category"] == "silently wrong", row
    assert ("tiles" in row["cause"]) is (mistake == "lost")


@pytest.mark.slow
def test_a_halo_that_is_short_is_silently_wrong(monkeypatch):
    """Control: the zoo's own tiles find a halo that is a pixel short, on either side."""
    scan = normfix.scan
    plain = replace(SMALL, build=lambda: nn.Conv2d(1, 1, 5, padding=2))
    for short in ((1, 2), (2, 1)):
        monkeypatch.setattr(
            normfix, "scan", lambda *a, cut=short, **k: replace(scan(*a, **k), halo=(cut, cut))
        )
        assert examine(plain)["category"] == "silently wrong"
    monkeypatch.setattr(normfix, "scan", scan)
    assert examine(plain)["category"] == "local"


def test_a_constant_output_is_inconclusive():
    """A network whose output does not vary proves nothing."""
    dead = replace(SMALL, build=lambda: nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Threshold(1e9, 0.0)))
    row = examine(dead)
    assert row["category"] not in ("converted", "local"), row


@pytest.mark.slow
def test_a_wrong_word_on_density_fails():
    """What the catalogue calls a classifier must not be scanned as dense."""
    assert examine(replace(SMALL, dense=False))["category"] == "failed"


@pytest.mark.slow
def test_a_network_that_hangs_is_stopped():
    """A time limit ends the process of a network and leaves a row."""
    row = apart(replace(SMALL, build=lambda: time.sleep(60)), limit=1, patience=2)
    assert row["category"] == "timeout"
    assert "build" in row["cause"]


@pytest.mark.slow
def test_a_network_that_computes_for_ever_is_stopped():
    """The limit is on processor time, however long the clock says it took."""

    def endless():
        while True:
            pass

    row = apart(replace(SMALL, build=endless), limit=1, patience=60)
    assert row["category"] == "timeout"


@pytest.mark.slow
def test_what_runs_out_of_time_says_where():
    """A timeout names the function of the package at work, and what a pass costs; a network that ends does not."""
    row = apart(replace(SMALL, build=_Slow), limit=2, patience=60)
    assert row["category"] == "timeout", row
    assert re.match(r"during scan, in \w+ of [\w/]+\.py < \w+ of [\w/]+\.py", row["cause"])
    assert "a pass of the example takes" in row["cause"]
    assert "place" not in apart(SMALL)


def test_a_network_that_dies_leaves_a_row():
    """A crash of the interpreter is a failure with its exit status."""
    row = apart(replace(SMALL, build=lambda: os._exit(7)))
    assert row["category"] == "failed"
    assert "7" in row["cause"]


def test_an_exception_is_a_failure_with_its_place():
    """What a network raises is told with file and line."""
    row = examine(replace(SMALL, build=lambda: nn.Conv2d(1, 1, 3, groups=2)))
    assert row["category"] in CATEGORIES
    assert row["category"] == "failed"
    assert "build" in row["cause"]


@pytest.mark.parametrize(
    ("stride", "halo", "scale"), [(1, (0, 0), 1), (8, (23, 5), 1), (4, (100, 64), 0.25), (2, (3, 3), 2)]
)
def test_no_window_covers_the_pencil(stride, halo, scale):
    """The zoo's tiler puts windows of an identity together again, each smaller than the pencil."""
    pencil = Pencil((16, 8), 0, stride, halo, Fraction(scale))
    image = torch.arange(float(pencil.length)).reshape(1, 1, -1, 1).expand(1, 1, -1, 8).contiguous()
    if scale == 0.25:
        result = stitched(lambda x: x[:, :, ::4], image, pencil)
        assert torch.equal(result, image[:, :, ::4])
    else:
        result = stitched(lambda x: x.repeat_interleave(int(scale), 2), image, pencil)
        assert torch.equal(result, image.repeat_interleave(int(scale), 2))
    assert pencil.length > pencil.before + pencil.tile + pencil.after


def test_an_output_that_ends_early_is_put_together():
    """Convolutions without padding give less than a whole tile at the end of the pencil."""
    pencil = Pencil((8, 8), 1, 2, (4, 6), Fraction(1, 2))
    image = torch.randn(1, 1, 8, pencil.length)
    net = nn.Sequential(nn.Conv2d(1, 1, 4, 2, 1), nn.Conv2d(1, 1, 4, 1, 1)).requires_grad_(False)
    assert distance(stitched(net, image, pencil), net(image)) < 1e-5
    assert net(image).shape[-1] < pencil.length // 2


def test_distance_is_infinite_where_it_must_be():
    """NaN and other shapes are never close."""
    a = torch.randn(1, 1, 4, 4)
    assert distance(a, a) == 0
    assert distance(a * torch.nan, a) == float("inf")
    assert distance(a[..., :2], a) == float("inf")


@pytest.mark.slow
def test_the_page_counts_every_network_once():
    """Outcomes and networks without a row add up to the catalogue; what went wrong is named with its cause."""
    good = examine(SMALL) | {"seconds": 1.0}
    bad = {"name": "other", "library": "torch", "category": "timeout", "cause": "during scan", "seconds": 9.0}
    text = page([good, bad], ["small", "other", "third"])
    assert "| not run | 1 |" in text
    assert "| all | 3 |" in text
    assert "- other: timeout. during scan" in text
    assert "over 60 s of processor time\n\nNothing." in text
    slow = page([good | {"seconds": 99.0}], ["small"])
    assert f"- small: 99.0 s (scan {good['scan_s']} s, conversion {good['frozen_s']} s; a pass" in slow
    assert "1 networks; converted and proved: 1 (100.0 %" in text
    assert "| small | 1/1 instance | " in text


@pytest.mark.slow
def test_what_the_plan_misses_is_on_the_page(monkeypatch):
    """The page counts sites that the dye sees; control: one that a plan leaves out is named there."""
    row = examine(SMALL) | {"seconds": 1.0}
    assert "misses: 0 of 1 live sites in 1 networks (target 0; 1 without a dye look)" in page(
        [row, {"name": "other", "library": "torch", "category": "timeout", "seconds": 9.0}], ["small"]
    )
    plan = normfix.plan
    monkeypatch.setattr(normfix, "plan", lambda *a, **k: replace(plan(*a, **k), decisions=()))
    careless = examine(SMALL) | {"seconds": 1.0}
    assert "misses: 1 of 1 live sites in 1 networks" in page([careless], ["small"])
    assert "small norm/0/instance_norm/0" in page([careless], ["small"])


def test_nothing_constant_is_left_in_the_weights():
    """Zero gains and tiny layer scales, which would hide a site, are redrawn; running statistics are measured."""

    class Hiding(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(1)
            self.scale = nn.Parameter(torch.full((3, 1, 1), 1e-6))
            self.last = nn.Parameter(torch.zeros(4, 3))

        def forward(self, x):
            return self.norm(x)

    model = prepared(replace(SMALL, build=Hiding))
    assert float(model.scale.min()) >= 0.2
    assert float(model.last.std()) > 0.1
    assert float(model.norm.weight) != 1
    assert float(model.norm.running_mean) != 0


PAGE = page(
    [{"name": name, "library": "x", "category": "local", "halo": [[4, 4]]} for name in ("a", "b", "c")],
    ["a", "b", "c"],
)
ROW = {
    "name": "a",
    "category": "bounded",
    "stride": [4],
    "bound": [[8, 6]],
    "measured": [[8, 8]],
    "brute": [[6, 6]],
    "cause": "",
}


def test_a_run_of_the_geometry_is_put_into_a_page():
    """Its columns stand beside the halo, a second time in their own place; what has no row is counted and empty."""
    broken = {**ROW, "category": "broken", "cause": "brute exceeds bound", "attends": True}
    text = with_geometry(PAGE, {"a": ROW, "b": broken})
    assert "convolutional networks bounded by the graph: 1 of 1 (100.0 %)" in text
    assert "| a |  |  | 4 | 8+6 | 8 | 6 |  | local |" in text
    assert "| c |  |  | 4 |  |  |  |  | local |" in text
    assert "| not run | 1 |" in text
    assert "fails for 1 (target 0) b" in text
    assert "2 pixels more in the median, 2 at worst; ratio 1.17" in text
    assert with_geometry(text, {"a": ROW, "b": ROW}).count("## Geometry") == 1
    assert local_names(text) == {"a", "b", "c"}


def _strided():
    return nn.Sequential(nn.Conv2d(1, 4, 4, 2, 1), nn.ReLU(), nn.Upsample(scale_factor=2, mode="bilinear"))


@pytest.mark.slow
def test_geometry_alone_is_held_against_brute_force():
    """A strided network's bound is what its derivative shows, and its dye lies between them in whole strides."""
    row = examine_geometry(replace(SMALL, build=_strided))
    assert row["category"] == "bounded", row
    assert row["bound"] == row["brute"]


def test_a_bound_that_is_too_small_is_broken():
    """Control: a pixel less than brute force shows is a fault, and so is a dye that shows less in whole strides."""
    row = {"stride": (4,), "bound": ((8, 8),), "measured": ((8, 8),), "brute": ((8, 8),)}
    assert not against(row)
    assert against({**row, "bound": ((7, 8),)})
    assert against({**row, "measured": ((8, 4),)})


@pytest.mark.parametrize(
    ("call", "attends_"),
    [
        (lambda x: nn.functional.scaled_dot_product_attention(x, x, x), True),
        (lambda x: x.softmax(-1), True),
        (lambda x: x.softmax(1), False),
    ],
)
def test_attention_is_seen_in_a_forward_pass(call, attends_):
    """Torch's own, and a softmax along the last dimension; one over channels is none."""
    assert attends(nn.Identity(), replace(SMALL, call=lambda net, x: call(x))) is attends_


def test_brute_force_sees_what_no_derivative_shows():
    """A far pixel that only a comparison looks at is found by changing it."""
    x = torch.rand(1, 1, 24, dtype=torch.float64)

    def gated(x):
        return x * (torch.nn.functional.pad(x, (5, 0))[..., :-5] > 100)

    assert reach_of_tiles(gated, x, 0, 8, 1, 1, Fraction(1), (5, 5)) == (5, 0)
