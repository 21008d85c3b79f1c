"""The main path on a second device, without one: it fails wherever tensors of two devices meet.

Stages are left out: torch does not run its fake tensors on a device of Python. tests/test_cuda.py has them.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.utils import backend_registration

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not hasattr(backend_registration, "_setup_privateuseone_for_python_backend"),
        reason=f"torch {torch.__version__} has no backends in Python",
    ),
]

STEPS = [
    "scan",
    "convert",
    "calibrate whole",
    "predict in tiles",
    "check",
    "diagnose",
    "save and load",
]
PLANTED = ["planted: a buffer stays behind"]


@pytest.fixture(scope="module")
def found():
    """What went wrong in each step, in a process of its own: a backend is registered for good."""
    here = Path(__file__).parent / "support"
    done = subprocess.run(
        [sys.executable, str(here / "stand_in_runs.py")],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parents[1])])},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return json.loads(done.stdout)


@pytest.mark.parametrize("step", STEPS)
def test_the_step_stays_on_its_device(found, step):
    """The step runs on the second device, and no operation is given tensors of both."""
    assert found[step] == ""


@pytest.mark.parametrize("step", PLANTED)
def test_a_planted_mix_is_caught(found, step):
    """A tensor that is left on the host on purpose is found."""
    assert "same device" in found[step]


def test_every_step_is_judged(found):
    """No step of the run is left out here."""
    assert set(found) == {*STEPS, *PLANTED}
