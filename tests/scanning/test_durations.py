"""What takes long is announced before it starts, in seconds told from one forward pass; what does not is not."""

import logging
import re

import pytest
import torch
from factories import tiny_unet
from torch import nn

import normfix
from normfix.cli.showing import telling
from normfix.networks.calling import Caller
from normfix.scanning import durations
from normfix.scanning.durations import Durations
from normfix.tiling.grid import Geometry


@pytest.fixture
def told():
    """Listen to what stages will take; return what is said."""
    logger, lines, handler = logging.getLogger("normfix"), [], logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    yield lines
    logger.removeHandler(handler)
    logger.setLevel(level)


@pytest.fixture
def everything(monkeypatch):
    """Tell whatever it takes."""
    monkeypatch.setattr(durations, "_NOTABLE", 0.0)


@pytest.mark.slow
def test_a_scan_announces_itself(everything, told):
    """The seconds are those of passes, so more than one pass takes."""
    normfix.scan(tiny_unet().eval())
    (line,) = told
    assert re.fullmatch(r"scan: about [1-9]\d* (seconds|minutes)", line)


def test_a_conversion_announces_its_stages_in_order(everything, told):
    """Scan, calibration and proof, each before it starts."""
    seen = []

    def progress(stage, done, total):
        if not done:
            seen.append((stage, [line.partition(":")[0] for line in told]))

    normfix.convert(tiny_unet().eval(), torch.rand(1, 1, 64, 64), progress=progress)
    assert seen == [("scan", ["scan"]), ("prove", ["scan", "calibrate", "prove"])]


@pytest.mark.slow
def test_what_is_quick_is_not_announced(told):
    """A small network says nothing."""
    normfix.scan(tiny_unet().eval())
    assert told == []


@pytest.mark.slow
def test_nobody_who_does_not_listen_pays_for_it(everything, monkeypatch):
    """Without a listener no pass is timed."""
    monkeypatch.delattr(Durations, "of")
    assert normfix.scan(tiny_unet().eval()).sites


def test_one_image_is_two_passes_and_several_are_one_per_site():
    """Pixels count: an image of four times the example's takes four times its second."""
    seconds = Durations(seconds=1.0, pixels=100)
    assert seconds.calibration([(20, 20)], sites=10) == 2 * 4
    assert seconds.calibration([(20, 20), (10, 10)], sites=10) == (10 / 2 + 1) * 5
    assert seconds.calibration([(20, 20)], sites=0) == 0


def test_a_larger_halo_makes_a_longer_proof():
    """Tiles are read with their halo, so they take more the larger it is."""

    def proof(halo):
        geometry = Geometry(stride=(1, 1), halo=((halo, halo),) * 2, scale=(1, 1), multiple=(1, 1))
        return Durations(seconds=1.0, pixels=100).proof([(400, 400)], geometry, 100)

    assert proof(0) < proof(20) < proof(100)
    assert proof(1000) == proof(2000)  # windows end at the image's border


def test_timing_a_pass_leaves_the_mode():
    """A training network is timed in eval mode and trains on."""
    network = nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2)).train()
    before = network[1].running_mean.clone()
    assert Durations.of(network, torch.rand(1, 1, 32, 32), Caller()).seconds > 0
    assert network.training
    torch.testing.assert_close(network[1].running_mean, before, rtol=0, atol=0)


def test_a_duration_is_a_line_on_stderr(everything, capsys):
    """The command line says what will take minutes, beside the result, and stops listening afterwards."""
    with telling():
        durations.tell_notable("scan", lambda: 150.0)
    durations.tell_notable("scan", lambda: 150.0)
    out, err = capsys.readouterr()
    assert (out, err) == ("", "scan: about 2 minutes\n")
