"""What work tells is logged under `normfix`, and shown to nobody who did not ask."""

import logging
import subprocess
import sys

import pytest
import torch
from torch import nn

import normfix

SCRIPT = """
{setup}
import torch, normfix
from torch import nn
net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 1)).eval()
done = normfix.convert(net, torch.rand(1, 1, 64, 64))
normfix.predict(done.model, torch.rand(1, 1, 64, 64), tile=32)
"""


@pytest.fixture
def net():
    """A network of one live norm."""
    return nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 1)).eval()


@pytest.fixture(autouse=True)
def as_in_a_new_process(monkeypatch):
    """Loggers are as nobody has set them, whatever ran in this process before."""
    monkeypatch.setattr(logging.root.manager, "disable", logging.NOTSET)
    for logger in map(logging.getLogger, ("normfix", "normfix.progress")):
        for name, value in (("disabled", False), ("propagate", True), ("level", logging.NOTSET)):
            monkeypatch.setattr(logger, name, value)
        logger._cache.clear()


def test_a_script_hears_of_each_stage(net, caplog):
    """At level INFO convert tells of its stages, each until it is done; nothing below INFO is needed."""
    with caplog.at_level(logging.INFO, logger="normfix"):
        normfix.convert(net, torch.rand(1, 1, 64, 64))
    told = [r.getMessage() for r in caplog.records if r.name == "normfix.progress"]
    assert "scan: 1 of 1 done" in told
    assert told[-1] == "prove: 1 of 1 done"
    assert any(text.startswith("calibrate") for text in told)


def test_tiles_are_counted_for_who_wants_to_know(net, caplog):
    """At level DEBUG predict counts its tiles."""
    done = normfix.convert(net, torch.rand(1, 1, 64, 64))
    with caplog.at_level(logging.DEBUG, logger="normfix"):
        normfix.predict(done.model, torch.rand(1, 1, 64, 64), tile=32)
    told = [r.getMessage() for r in caplog.records if r.name == "normfix.progress"]
    assert told == [f"tile {n} of 4" for n in (1, 2, 3, 4)]


def test_a_callback_is_told_instead(net, caplog):
    """With progress= nothing is logged besides."""
    told = []
    with caplog.at_level(logging.INFO, logger="normfix.progress"):
        normfix.convert(net, torch.rand(1, 1, 64, 64), progress=lambda *what: told.append(what))
    assert ("prove", 1, 1) in told
    assert not [r for r in caplog.records if r.name == "normfix.progress" and r.levelno >= logging.INFO]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("setup", "heard"),
    [("", False), ("import logging; logging.basicConfig(level=logging.INFO)", True)],
)
def test_nothing_is_printed_unasked(setup, heard):
    """A script that does not configure logging prints nothing; one that does reads stages on stderr."""
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(setup=setup)], capture_output=True, text=True, check=True
    )
    assert done.stdout == ""
    assert ("normfix.progress:prove: 1 of 1 done" in done.stderr) is heard
    assert heard or done.stderr == ""
