"""Scan and check say the same of one network, and no two lines of a scan contradict each other."""

import lookalikes
import nasty
import networks
import pytest
import torch

import normfix
from normfix.cli.texts import scan_text

NETWORKS = {
    kind.__name__: kind
    for kind in (
        networks.plain_unet,
        networks.DilatedStack,
        networks.HiddenStride,
        networks.AlignedCorners,
        networks.PureShift,
        networks.ResizesToSkip,
        networks.PadsItself,
        networks.PadsBothSides,
        networks.WideDilation,
        networks.FaintReach,
        networks.ValidConvolutions,
        networks.GrowsByTwo,
        networks.Patchify,
        networks.SuperResolution,
        networks.LiveInstance,
        networks.LiveSpread,
        networks.HiddenLive,
        networks.SwallowsDye,
        networks.Identity,
        *nasty.FROZEN,
        *nasty.REFUSED,
        *nasty.ALONE,
        nasty.HiddenExtent,
    )
} | {**lookalikes.LOCAL, **lookalikes.GLOBAL}
QUICK = (
    (
        "plain_unet",
        "AlignedCorners",
        "PureShift",
        "ResizesToSkip",
        "ValidConvolutions",
        "LiveInstance",
        "HiddenLive",
    )
    + (
        "SwallowsDye",
        "SqueezeExcite",
        "GlobalContext",
        "Median",
        "StripPool",
        "Fourier",
        "WeightNorms",
        "HiddenExtent",
    )
    + (
        "adaptive max, half",
        "flips averaged",
        "signs",
        "sampled at identity",
    )
    + ("a flip that stays", "adaptive max, one axis fixed", "custom operator of all")
)
AGAINST = {"NF212", "NF213", "NF214", "NF215", "NF216", "NF240", "NF242", "NF244", "NF245"}


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(n, marks=() if n in QUICK else pytest.mark.zoo) for n in NETWORKS]
)
def test_scan_and_check_agree(name):
    """A network is tile-invariant if tiles with the scan's halo pass, and then alone; each reason has a line."""
    torch.manual_seed(0)
    net = NETWORKS[name]().eval()
    scan = normfix.scan(net, torch.rand(1, 1, 64, 64))
    stride, halo = scan.stride or (32, 32), scan.halo or ((0, 0), (0, 0))
    tile = [max(n, 32 // n * n) for n in stride]
    size = [max(96, sum(h) + 4 * t) // t * t for h, t in zip(halo, tile, strict=True)]
    verdict = normfix.check(net, torch.rand(1, 1, *size), tile)
    assert (verdict.status == "passed") == scan.tile_invariant, (scan.findings, verdict.findings)
    codes = {finding.code for finding in scan.findings}
    assert scan.tile_invariant == (not scan.live and not codes & AGAINST)
    text = scan_text(scan)
    if "live sites: 0" in text and "tile-invariant: no" in text:
        assert any(code in text for code in AGAINST)
