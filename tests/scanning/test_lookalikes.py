"""What looks as if it knew the whole image and does not is left alone and converts; its global twin never passes."""

import pytest
import torch
import torch.nn.functional as F
from lookalikes import GLOBAL, LOCAL, Between, across, same, scripted
from torch import nn

import normfix

SLOW = {
    "a flip along the other axis",
    "attention over a grid",
    "block attention",
    "block attention of small blocks",
    "block attention, shifted",
    "custom operator beside a norm",
    "custom operator, bright",
    "custom operator, capped",
    "block attention, both",
    "block attention by products",
    "block mixing",
    "custom operator, above the mean",
    "custom operator, ranks",
    "custom operator, warp",
    "turns and mirrors averaged",
}
"""Forms of what another case shows, left to the zoo."""


def network(make):
    torch.manual_seed(0)
    return make().eval()


def image(*size):
    return torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(7))


def tiles(net, x, tile, halo):
    """Stitch tiles with an arithmetic of this file's own: windows of whole tiles, clipped at the border."""
    h, w = x.shape[2:]
    stitched = torch.full_like(x, torch.nan)
    for top in range(0, h, tile):
        for left in range(0, w, tile):
            first, start = max(0, top - halo), max(0, left - halo)
            part = net(x[..., first : top + tile + halo, start : left + tile + halo])
            kept = part[..., top - first : top - first + tile, left - start : left - start + tile]
            stitched[..., top : top + tile, left : left + tile] = kept
    return stitched


def cases(names):
    return [pytest.param(name, marks=pytest.mark.zoo if name in SLOW else ()) for name in names]


@pytest.mark.zoo
@pytest.mark.parametrize("name", cases(LOCAL))
def test_what_only_looks_global_is_exact_in_tiles(name):
    """It has no refused site, converts, and its tiles equal the whole in float64 by an arithmetic of the test's own."""
    done = normfix.convert(network(LOCAL[name]), image(96, 128))
    assert done.plan.left_live == ()
    assert done.proof.passed, done.proof.steps
    halo = max(n for span in done.scan.halo for n in span)
    unit = max(8, *done.scan.stride)
    net, x = done.model.double(), image(96, 128).double()
    with torch.no_grad():
        whole = net(x)
        stitched = tiles(net, x, 32, -(-halo // unit) * unit)
    assert float((whole - stitched).abs().max()) <= 1e-12 * float(whole.abs().max())


@pytest.mark.slow
@pytest.mark.parametrize("name", cases(GLOBAL))
def test_its_global_twin_is_refused(name):
    """Scan never calls it tile-invariant; a conversion fails or is refused, unless the statistic itself was frozen."""
    scan = normfix.scan(network(GLOBAL[name]), image(64, 64))
    assert not scan.tile_invariant
    done = normfix.convert(network(GLOBAL[name]), image(96, 128))
    assert not done.proof.passed or done.plan.converted


@pytest.mark.slow
@pytest.mark.parametrize(
    "name",
    [
        "flips averaged",
        pytest.param("block attention", marks=pytest.mark.zoo),
        "custom operator",
        "sampled at identity",
    ],
)
def test_a_scan_says_what_was_measured(name):
    """A finding NF252 stands in for the suspicion, which is gone; the network is tile-invariant."""
    scan = normfix.scan(network(LOCAL[name]), image(64, 64))
    assert scan.tile_invariant
    assert "NF252" in {finding.code for finding in scan.findings}
    assert not {"NF215", "NF241", "NF242", "NF244"} & {finding.code for finding in scan.findings}


def test_a_fast_scan_settles_nothing():
    """Control: without the dye a suspicion stands."""
    scan = normfix.scan(network(LOCAL["flips averaged"]), image(64, 64), fast=True)
    assert {site.function for site in scan.live} == {"flip"}
    assert not scan.tile_invariant


GATED = {
    "a flip where it is bright": lambda net, x: torch.where(x > 1e8, x.flip(-1), x),
    "a faint flip": lambda net, x: x + 1e-9 * x.flip(-1),
    "a flip that masks": lambda net, x: x * (x.flip(-1) < 50),
    "a maximum of mirrors": lambda net, x: torch.fmax(x, torch.fmax(x.flip(-1), x.flip(-2))),
    "blocks of a quarter": lambda net, x: quarters(x),
    "the mean of rows, NaN left out": lambda net, x: x - x.nanmean(3, keepdim=True),
    "the place of the maximum": lambda net, x: x + x.flatten(2).argmax(2)[..., None, None],
    "cells without a proportion": lambda net, x: (
        x + F.interpolate(F.adaptive_max_pool2d(x, [n // 2 + 3 for n in x.shape[2:]]), x.shape[2:])
    ),
    "a gate on the last pixel": lambda net, x: torch.where(x[..., -1:, -1:] < -3, -x, x),
    "the sign of the first pixel": lambda net, x: x * torch.sign(x[..., :1, :1] + 9),
    "rows of numpy": lambda net, x: x + torch.from_numpy(x.numpy() - x.numpy().mean()),
}


def eroded(net, x):
    """Keeps what has nothing dark within four pixels, which is rare in an image of noise."""
    return net.side(x * (F.max_pool2d(-x, 9, 1, 4) > -0.05))


def plainly(net, x):
    """The same reach without a comparison."""
    return net.side(F.max_pool2d(-x, 9, 1, 4))


@pytest.mark.slow
@pytest.mark.parametrize("function", [eroded, plainly])
def test_a_mask_reaches_as_far_as_what_it_is_made_of(function):
    """A comparison that takes NaN away shortens no halo, whatever ordinary values show of it."""
    net = network(lambda: Between(function, side=nn.Conv2d(4, 4, 3, padding=1)))
    scan = normfix.scan(net, image(64, 64))
    plain = normfix.scan(network(lambda: Between(plainly, side=nn.Conv2d(4, 4, 3, padding=1))), image(64, 64))
    assert scan.halo == plain.halo


def quarters(x):
    n, c, h, w = x.shape
    tokens = x.view(n, c, h, 4, w // 4).permute(0, 2, 3, 4, 1).reshape(-1, w // 4, c)
    tokens = F.scaled_dot_product_attention(tokens, tokens, tokens)
    return tokens.view(n, h, 4, w // 4, c).permute(0, 4, 1, 2, 3).reshape(x.shape)


@pytest.mark.slow
@pytest.mark.parametrize("name", GATED)
def test_what_hides_is_refused(name):
    """A dependence on the whole that ordinary values do not show, or that takes NaN away, is no less refused."""
    done = normfix.convert(network(lambda: Between(GATED[name])), image(96, 128))
    assert not done.scan.tile_invariant
    assert not done.proof.passed


class Heads(nn.Module):
    """Two outputs; what `between` does reaches the second alone."""

    def __init__(self, between):
        super().__init__()
        self.stem, self.first, self.second = (
            nn.Conv2d(i, o, 3, padding=1) for i, o in ((1, 4), (4, 1), (4, 1))
        )
        self.between = between

    def forward(self, x):
        x = self.stem(x)
        return {"first": self.first(x), "second": self.second(self.between(x))}


class Deep(Heads):
    def forward(self, x):
        both = super().forward(x)
        return both["first"], [both["second"], both["first"]]


class Centres(nn.Module):
    def forward(self, x):
        return x - x.mean((2, 3), keepdim=True)


class Mirrors(nn.Module):
    def forward(self, x):
        return x.flip(-1)


@pytest.mark.slow
@pytest.mark.parametrize("between", [nn.InstanceNorm2d(4), Centres(), Mirrors()])
@pytest.mark.parametrize(("kind", "output"), [(Heads, "first"), (Deep, 0)])
def test_what_another_output_alone_uses_is_left_alone(between, kind, output):
    """It is not live, and named so; the chosen output is tile-invariant and checks as such."""
    net = network(lambda: kind(between))
    scan = normfix.scan(net, image(64, 64), output=output)
    assert scan.tile_invariant
    assert all("output that counts does not depend" in site.reduces for site in scan.sites)
    assert normfix.check(net, image(96, 128), 32, output=output).passed


@pytest.mark.slow
@pytest.mark.parametrize("between", [nn.InstanceNorm2d(4), Centres(), Mirrors()])
def test_what_the_chosen_output_uses_is_live(between):
    """Control: of the other output the same site is live, also where a function picks or adds it."""
    net = network(lambda: Heads(between))
    assert normfix.scan(net, image(64, 64), output="second").live

    def added(net, x):
        both = net(x)
        return both["first"] + 2 * both["second"]

    assert normfix.scan(net, image(64, 64), forward_fn=added).live
    assert not normfix.scan(net, image(64, 64), forward_fn=lambda net, x: 2 * net(x)["first"]).live


@pytest.mark.slow
def test_a_path_that_no_census_sees_keeps_a_norm_live():
    """A norm whose only path leads through TorchScript is not taken for unused: other values change the output."""

    class Hidden(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.norm, self.head = nn.Conv2d(1, 4, 3), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 3)
            self.middle = scripted(nn.Sequential(nn.AvgPool2d(3, 1, 1)))

        def forward(self, x):
            x = self.stem(x)
            return self.head(x + self.middle(self.norm(x)))

    assert [site.owner for site in normfix.scan(network(Hidden), image(64, 64)).live] == ["norm"]


class Ragged(nn.Module):
    """Spatial attention as in OmniSR: a large pool without padding, resized to the image's extent."""

    def __init__(self, size):
        super().__init__()
        self.stem, self.down, self.head = (
            nn.Conv2d(1, 4, 3, padding=1),
            nn.Conv2d(4, 4, 3, 2),
            nn.Conv2d(4, 1, 1),
        )
        self.size = size

    def forward(self, x):
        x = self.stem(x)
        y = F.max_pool2d(self.down(x), *self.size)
        return self.head(x * F.interpolate(y, x.shape[2:], mode="bilinear").sigmoid())


@pytest.mark.slow
@pytest.mark.parametrize("size", [(7, 3), (5, 4)])
def test_the_culprit_is_the_resize_and_not_the_pool(size):
    """A small map of windows grows faster than the image, which is no comparison of all pixels."""
    scan = normfix.scan(network(lambda: Ragged(size)), image(64, 64))
    assert scan.live == ()
    assert not scan.tile_invariant
    assert any(f.code == "NF244" and "interpolate" in f.message for f in scan.findings)


def test_averages_over_flips_of_a_network_with_norms_convert():
    """Each pass of a network that is run on mirrored images has statistics of its own, which are frozen."""

    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(
                nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 3, padding=1)
            )

        def forward(self, x):
            return (same(self.net(x)) + across(self.net(across(x)))) / 2

    done = normfix.convert(network(Normed), image(96, 128))
    assert done.proof.passed
    assert len(done.plan.converted) == 2
