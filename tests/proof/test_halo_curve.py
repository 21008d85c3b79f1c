"""The error against the halo: zero at the exact one, larger before, and never a number where nothing was compared."""

import numpy as np
import pytest
import torch
from torch import nn

import normfix
from normfix import NormfixError
from normfix.cli import cli
from normfix.records.halo_curves import HaloCurve


def box(*kernel):
    """Return a mean over a box, which reads nothing beyond half of it."""
    conv = nn.Conv2d(1, 1, kernel, padding=tuple(k // 2 for k in kernel), bias=False)
    nn.init.constant_(conv.weight, 1 / np.prod(kernel))
    return conv


@pytest.fixture(scope="module")
def curve():
    """Return the curve of a network that reads 4 pixels along one axis and 2 along the other."""
    torch.manual_seed(0)
    net = nn.Sequential(box(5, 3), box(5, 3))
    return normfix.halo_curve(net, torch.rand(1, 1, 96, 64), tile=16, tolerance=2.5)


def test_the_exact_halo_is_exact_and_shorter_ones_are_not(curve):
    """The last point is rounding, those before it are not, and the first has no halo."""
    together = [point for point in curve.points if point.axis is None]
    assert together[0].halo == ((0, 0), (0, 0))
    assert together[-1].halo == curve.exact == ((4, 4), (2, 2))
    assert together[-1].max_sd < 1e-5
    assert all(point.max_sd > 1e-2 for point in together[:-1])


def test_axes_whose_halos_differ_are_measured_alone(curve):
    """Along each axis the others keep their exact halo."""
    assert {point.axis for point in curve.points} == {None, 0, 1}
    assert all(point.halo[1] == (2, 2) for point in curve.points if point.axis == 0)


def test_a_point_is_what_tiles_by_hand_give(curve):
    """Without a halo, tiles are the network on each tile alone, and each pixel is computed once."""
    torch.manual_seed(0)
    net, image = nn.Sequential(box(5, 3), box(5, 3)), torch.rand(1, 1, 96, 64)
    with torch.no_grad():
        expected = net(image)
        rows = [torch.cat([net(t) for t in row.split(16, 3)], 3) for row in image.split(16, 2)]
    off = (torch.cat(rows, 2) - expected).abs() / expected.std(correction=0)
    (first, *_) = [point for point in curve.points if point.axis is None]
    assert first.max_sd == pytest.approx(float(off.max()), rel=1e-4)
    assert first.mean_sd == pytest.approx(float(off.mean()), rel=1e-4)
    assert first.cost == 1


def test_the_smallest_halo_is_the_cheapest_from_which_all_are_within(curve):
    """What is named is within the tolerance, and no cheaper point of a tail is."""
    assert curve.met
    assert curve.smallest.max_sd <= 2.5
    assert curve.smallest.cost < curve.points[-1].cost
    longer = [p for p in curve.points if p.axis == curve.smallest.axis and p.cost >= curve.smallest.cost]
    assert all(point.max_sd <= 2.5 for point in longer)


def test_no_halo_helps_a_live_statistic():
    """An unconverted InstanceNorm stays off at the exact halo: nothing is named, and the site is."""
    net = nn.Sequential(box(5, 5), nn.InstanceNorm2d(1))
    curve = normfix.halo_curve(net, torch.rand(1, 1, 64, 64) ** 4, tile=16, tolerance=1e-3)
    assert not curve.met
    assert curve.points[-1].max_sd > 0.1
    assert len(curve.live) == 1


def test_windows_that_are_the_image_are_refused():
    """Where every window is the whole image nothing was compared (NF595)."""
    with pytest.raises(NormfixError) as info:
        normfix.halo_curve(box(5, 5), torch.rand(1, 1, 32, 32), tile=32)
    assert info.value.code == "NF595"


def test_a_network_without_a_halo_is_refused():
    """A cumulative sum reaches over everything: NF595 says why."""

    class Running(nn.Module):
        def forward(self, x):
            return x.cumsum(3)

    with pytest.raises(NormfixError) as info:
        normfix.halo_curve(Running(), torch.rand(1, 1, 64, 64), tile=16)
    assert info.value.code == "NF595"


@pytest.mark.slow
def test_the_command_line_names_the_halo(tmp_path, monkeypatch, capsys):
    """check --halo-curve prints the record; it exits 1 where no halo is within the tolerance, 2 for a stray option."""
    monkeypatch.chdir(tmp_path)
    np.save("image.npy", np.random.default_rng(0).random((96, 96), dtype=np.float32))
    words = ["check", "normfix.demo.network:nuclei_unet", "image.npy", "--scale", "zscore", "--tile", "32"]
    assert (
        cli.main([*words, "--halo-curve", "--tolerance", "100", "--format", "json"], standalone_mode=False)
        == 0
    )
    curve = HaloCurve.loads(capsys.readouterr().out, where="stdout")
    assert curve.smallest.halo == ((0, 0), (0, 0))
    assert cli.main([*words, "--halo-curve", "--tolerance", "0"], standalone_mode=False) == 1
    assert "no halo is within 0 sd" in capsys.readouterr().out
    with pytest.raises(Exception, match="--tolerance belongs to"):
        cli.main([*words, "--tolerance", "1"], standalone_mode=False)
