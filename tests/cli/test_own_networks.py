"""A network of the user's own works through the installed program, and what it prints can be typed."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from factories import tiny_unet
from warm import PROGRAM, warm_program

PROJECT = """
import torch
from torch import nn


class Mine(nn.Sequential):
    def __init__(self, width=4):
        layers = nn.Conv2d(1, width, 3, padding=1), nn.InstanceNorm2d(width), nn.ReLU(), nn.Conv2d(width, 1, 1)
        super().__init__(*layers)
"""
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not PROGRAM.exists(), reason="normfix is not installed as a program here"),
]


def run(*command, code: int = 0, cwd: Path | None = None) -> subprocess.CompletedProcess:
    """Run a command in the working directory, as a user would: nothing else is on Python's path."""
    environment = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    done = subprocess.run(command, env=environment, cwd=cwd, capture_output=True, text=True, check=False)
    assert done.returncode == code, done.stderr
    return done


@pytest.fixture(scope="module")
def program():
    """The file to call."""
    return warm_program()


@pytest.fixture(scope="module")
def template(tmp_path_factory):
    """A folder with a network's source, its weights, the whole network pickled, and an image."""
    folder = tmp_path_factory.mktemp("project")
    (folder / "nets").mkdir()
    for name in ("my_model.py", "nets/my_unet.py"):
        (folder / name).write_text(PROJECT)
    run(
        sys.executable,
        "-c",
        "import sys; sys.path.insert(0, ''); import torch, my_model; torch.manual_seed(0); net = my_model.Mine(); "
        "torch.save(net.state_dict(), 'weights.pth'); torch.save(net, 'whole.pth')",
        cwd=folder,
    )
    free = dict.fromkeys((0, 2, 3), torch.export.Dim.AUTO)
    program = torch.export.export(tiny_unet(), (torch.zeros(2, 1, 64, 64),), dynamic_shapes=(free,))
    torch.export.save(program, folder / "net.pt2")
    pixels = np.random.default_rng(0).integers(0, 255, (64, 64), dtype=np.uint8)
    iio.imwrite(folder / "image.png", pixels)
    return folder


@pytest.fixture
def project(template, tmp_path, monkeypatch):
    """Stand in such a folder."""
    shutil.copytree(template, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    return tmp_path


SOURCES = {
    "module": ["my_model:Mine"],
    "file": ["nets/my_unet.py:Mine"],
    "weights": ["weights.pth", "--arch", "my_model.py:Mine", "--arch-args", '{"width": 4}'],
    "pickle": ["whole.pth", "--trust-pickle"],
    "program": ["net.pt2"],
    "library": ["normfix.demo.network:nuclei_unet"],
}


@pytest.mark.parametrize(
    "source",
    [
        pytest.param(s, marks=pytest.mark.zoo if s in ("module", "library", "program") else ())
        for s in SOURCES
    ],
)
def test_what_convert_wrote_opens_as_it_prints(project, program, source):
    """The line of Python and the line of the shell, each in a fresh process."""
    out = "fixed.pt2" if source == "program" else "fixed"
    words = ["--scale", "unit", "--to", "frozen", "-o", out]
    said = run(program, "convert", *SOURCES[source], "image.png", *words).stderr
    python = re.search(r"Load it with (normfix\.load\(.*?\)), or run", said)[1]
    shell = re.search(r"^  (normfix predict .*)$", said, re.MULTILINE)[1]
    run(sys.executable, "-c", f"import sys; sys.path.insert(0, ''); import normfix; {python}")
    run("sh", "-c", shell.replace("normfix", str(program), 1).replace("IMAGE", "image.png") + " --tile 32")
    assert iio.imread("prediction.tif").shape[-2:] == (64, 64)


@pytest.mark.parametrize(
    ("method", "named"),
    [
        ("state_dict(self, *args, **options)", "Odd.state_dict"),
        ("__repr__(self)", "Odd.__repr__"),
        ("train(self, mode=True)", "Odd.train"),
    ],
)
def test_a_method_of_the_network_that_fails_is_named(project, program, method, named):
    """What fails beside forward is the network's own, and no fault inside normfix."""
    body = f"    def {method}:\n        return self.nobody.wrote()\n"
    (project / "odd.py").write_text(f"from my_model import Mine\n\n\nclass Odd(Mine):\n{body}")
    words = ["image.png", "--scale", "unit", "--to", "frozen", "-o", "fixed"]
    said = run(program, "convert", "odd.py:Odd", *words, code=2, cwd=project).stderr
    assert ("NF118" in said, f"{named} (" in said, "NF901" in said) == (True, True, False)


def test_a_project_trusts_its_own_module_once_and_a_folder_never_itself(project, program):
    """pyproject.toml of the project counts; the same file inside the network's folder does not."""
    run(program, "convert", "my_model:Mine", "image.png", "--scale", "unit", "--to", "frozen", "-o", "fixed")
    words = ["fixed", "image.png", "--tile", "32"]
    assert "NF113" in run(program, "check", *words, code=2).stderr
    trusting = project / "pyproject.toml"
    trusting.write_text('[tool.normfix]\ntrust = ["my_model"]\n')
    run(program, "check", *words)
    shutil.move(trusting, project / "fixed")
    inside = subprocess.run(
        [program, "check", "../fixed", "../image.png", "--tile", "32"],
        cwd=project / "fixed",
        capture_output=True,
        text=True,
        check=False,
    )
    assert inside.returncode == 2
    assert "does not count" in inside.stderr
    assert "NF113" in inside.stderr


def test_diagnose_opens_the_conversion_of_the_network_that_it_names(project, program):
    """`--converted` needs no second naming."""
    run(program, "convert", "my_model:Mine", "image.png", "--scale", "unit", "--to", "frozen", "-o", "fixed")
    words = ["my_model:Mine", "image.png", "--scale", "unit", "--tile", "32", "--converted", "fixed"]
    done = run(program, "diagnose", *words, code=1)
    assert "NF" not in done.stderr
