"""The arithmetic of benchmarks/tradeoffs.py: tiles, mismatch and disparity see what they are for and nothing else."""

import pytest
import torch
from tradeoff.data import Region
from tradeoff.measuring import disparity, measured
from tradeoff.networks import SETTINGS, build

SETTING = SETTINGS["unet 2D"]


def region():
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(1, 1, 288, 192, generator=generator) * torch.linspace(0, 1, 288)[:, None]
    return Region(x, (x > 0.5).float())


def network(norm):
    torch.manual_seed(0)
    return build("unet 2D", norm).eval()


@pytest.mark.parametrize("norm", ["batch", "batchrenorm", "instance tracked"])
def test_tiles_of_constants_are_the_whole(norm):
    """Windows, halo and phase are right: without a live statistic both tilings are the whole image's prediction."""
    row = measured(lambda _: network(norm), region(), SETTING)
    assert row["max_sd"] < 1e-4
    assert row["tiled"] == pytest.approx(row["untiled"], abs=1e-4)


@pytest.mark.parametrize("norm", ["instance", "group"])
def test_a_live_norm_shows(norm):
    """Negative control: tiles of live statistics differ from each other."""
    assert measured(lambda _: network(norm), region(), SETTING)["max_sd"] > 0.1


def test_disparity_is_of_batch_statistics_only():
    """Batch norm on running statistics it never had shows; a norm that computes the same in both modes does not."""
    assert disparity(network("batch"), region(), SETTING, 2) > 0.01
    assert disparity(network("instance"), region(), SETTING, 2) == 0
