"""The pages of tools are followed with the tools themselves, command by command, where they are installed."""

import json
import os
import shlex
import subprocess
import sys
from importlib.metadata import entry_points
from pathlib import Path

import numpy as np
import pytest
import tifffile
import torch
from cyclegan import define_G
from nnunet import nnunet_folder, scrambled
from originals import bundle, torch_em_run, unet3d_run
from pages import ROOT, shown

from normfix.cli import cli

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

PIXELS = np.random.default_rng(0).random((192, 128), dtype=np.float32)


def nnunet() -> list[str]:
    """Make a folder of two folds and a folder of images."""
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed")
    Path("model").mkdir()
    nnunet_folder(Path("model"), (0, 1))
    Path("images").mkdir()
    for name in ("image.tif", "images/a_0000.tif"):
        tifffile.imwrite(name, PIXELS)
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        os.environ.setdefault(name, ".")
    return ["predictions/a.tif"]


def monai() -> list[str]:
    """Make a bundle, a folder of images for it, and a file of weights."""
    pytest.importorskip("fire", reason="monai.bundle's command line needs fire")
    pytest.importorskip("ignite", reason="MONAI's evaluator needs ignite")
    nibabel = pytest.importorskip("nibabel", reason="the images are NIfTI")
    bundle(Path("bundle"))
    Path("images").mkdir()
    nibabel.save(nibabel.Nifti1Image(PIXELS, np.eye(4)), "images/a.nii.gz")
    args = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": [4, 8], "strides": [2]}
    Path("unet.json").write_text(json.dumps({**args, "norm": "instance"}))
    torch.save(torch.load("bundle/models/model.pt", weights_only=True), "unet.pt")
    return ["predictions/a_trans.nii.gz", "unet_fixed/unet.pt"]


def unet3d() -> list[str]:
    """Make a run, an image for it, and the page's own configuration."""
    h5py = pytest.importorskip("h5py", reason="pytorch-3dunet reads HDF5")
    unet3d_run(Path("run"))
    with h5py.File("image.h5", "w") as file:
        file["raw"] = PIXELS[None]
    ((_, text),) = shown(ROOT / "docs" / "giving-back-pytorch-3dunet.md", "yaml")
    Path("predict.yml").write_text(text)
    return ["predictions/image_predictions.h5"]


def torch_em() -> list[str]:
    """Make a trainer's folder."""
    models = pytest.importorskip("torch_em.model", reason="torch-em is not installed")

    args = {"in_channels": 1, "out_channels": 1, "initial_features": 4, "depth": 2}
    Path("unet.json").write_text(json.dumps(args))
    torch_em_run(Path("run"), scrambled(models.UNet2d(**args)))
    return ["run_fixed/best.pt"]


def checkpoints() -> list[str]:
    """Make a generator's file beside its source."""
    import cyclegan

    Path("networks.py").write_text(Path(cyclegan.__file__).read_text())
    args = {"input_nc": 1, "output_nc": 1, "ngf": 4, "norm": "instance"}
    Path("options.json").write_text(json.dumps(args))
    torch.save(scrambled(define_G(**args)).state_dict(), "latest_net_G.pth")
    return ["fixed_generator/latest_net_G.pth", "fixed_again/latest_net_G.pth"]


PAGES = {
    "nnunet": nnunet,
    "monai": monai,
    "pytorch-3dunet": unet3d,
    "torch-em": torch_em,
    "checkpoints": checkpoints,
}


@pytest.mark.parametrize("name", PAGES)
def test_a_page_of_a_tool_can_be_followed(name, tmp_path, monkeypatch):
    """Each command exits with 0, each block runs, and what the tool writes is there."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(str(ROOT / "tests" / "giving"))
    monkeypatch.setattr(os, "environ", os.environ.copy())
    np.save("image.npy", PIXELS)
    written = PAGES[name]()
    for language, text in shown(ROOT / "docs" / f"giving-back-{name}.md", "bash", "py"):
        if language == "py":
            exec(compile(text, name, "exec"), {})
            continue
        for line in text.splitlines():
            follow(line)
    assert all(Path(path).exists() for path in written), sorted(tmp_path.iterdir())


def test_there_is_a_test_for_each_page():
    """A page of a tool without one would be followed by nobody."""
    pages = {path.stem.removeprefix("giving-back-") for path in (ROOT / "docs").glob("giving-back-*.md")}
    assert pages == set(PAGES)


def follow(line: str) -> None:
    """Run a command as a shell does: ours here, others as their package installs them."""
    expanded = subprocess.run(
        ["sh", "-c", f"printf '%s\\0' {line}"], capture_output=True, text=True, check=True
    )
    name, *words = expanded.stdout.rstrip("\0").split("\0")
    if name == "normfix":
        assert not cli.main(words, standalone_mode=False), line
        return
    if name == "python":
        call = [sys.executable, *words]
    else:
        (script,) = entry_points(group="console_scripts", name=name)
        call = [sys.executable, "-c", f"from {script.module} import {script.attr} as run; run()", *words]
    done = subprocess.run(call, capture_output=True, text=True, check=False, env=dict(os.environ))
    assert done.returncode == 0, f"{shlex.join(call)}\n{done.stderr[-2000:]}"
