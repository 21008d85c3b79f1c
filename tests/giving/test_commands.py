"""Their own commands, unchanged and in processes of their own, on what was given back: before, seams; after, none.

Where a tool crops its windows the result is the whole image's; where it blends them, what is left is at the windows'
borders, and gone with windows of the whole image.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from nnunet import nnunet_folder
from originals import bundle, unet3d_run

import normfix

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

IMAGE = torch.rand(1, 1, 192, 64, generator=torch.Generator().manual_seed(0))
# darker on one side, so that tiles have statistics of their own
IMAGE = IMAGE * torch.linspace(0.2, 2, 192).view(1, 1, 192, 1)


def command(*words, cwd, **environment) -> None:
    """Run a command of Python's, where normfix is not on the path."""
    done = subprocess.run(
        [sys.executable, *map(str, words)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]


def apart(actual, network, image=IMAGE) -> np.ndarray:
    """Return the differences (c, *space) from a network's output for the whole image, in sd of that."""
    with torch.no_grad():
        wanted = network.eval()(image)[0].numpy()
    return np.abs(np.asarray(actual).reshape(wanted.shape) - wanted) / wanted.std()


def off_the_cut(differences: np.ndarray, record) -> float:
    """Return the largest difference further than the halo from the cut between two windows of half the image."""
    (before, after), _ = record.verdict.halo_rounded
    middle = differences.shape[1] // 2
    return float(max(differences[:, : middle - after].max(), differences[:, middle + before :].max()))


def given_back(original: Path, folder: Path, image=IMAGE, **options):
    """Convert and give back; return the record and the original network."""
    network = normfix.load(original, **options)
    done = normfix.convert(network, image)
    return normfix.give_back(done, folder, original=original, **options), network.eval()


@pytest.fixture
def monai_run(tmp_path):
    """Call `python -m monai.bundle run` on a bundle and return what it wrote."""
    pytest.importorskip("fire")
    nibabel = pytest.importorskip("nibabel")
    pytest.importorskip("ignite")
    (tmp_path / "images").mkdir()
    nibabel.save(nibabel.Nifti1Image(IMAGE[0, 0].numpy(), np.eye(4)), tmp_path / "images" / "a.nii.gz")

    def run(folder: Path, window) -> np.ndarray:
        out = tmp_path / f"{folder.name}-{window[0]}"
        words = ["-m", "monai.bundle", "run", "--config_file", folder / "configs" / "inference.json"]
        words += ["--bundle_root", folder, "--dataset_dir", tmp_path / "images", "--output_dir", out]
        command(*words, "--window", str(list(window)), cwd=tmp_path)
        (path,) = out.rglob("*.nii.gz")
        return np.asarray(nibabel.load(path).dataobj)

    return run


def test_monai_bundle_run(tmp_path, monai_run):
    """The original's windows disagree; given back they differ at their border alone, and not with one window."""
    bundle(tmp_path / "bundle")
    record, network = given_back(tmp_path / "bundle", tmp_path / "back")
    original, halves, whole = (
        apart(monai_run(tmp_path / name, window), network)
        for name, window in (("bundle", (96, 64)), ("back", (96, 64)), ("back", (192, 64)))
    )
    assert off_the_cut(original, record) > 0.1
    assert off_the_cut(halves, record) < 1e-4 < halves.max()
    assert whole.max() < 1e-4


def predict3dunet(folder: Path, order: str, halo, out: Path, cwd: Path) -> np.ndarray:
    """Call pytorch-3dunet's own command with its own configuration."""
    import h5py
    import yaml

    model = yaml.safe_load((folder / "config.yml").read_text())["model"]
    assert model["layer_order"] == order
    config = {
        "model_path": str(folder / "best_checkpoint.pytorch"),
        "model": model,
        "device": "cpu",
        "predictor": {"name": "StandardPredictor"},
        "loaders": {
            "output_dir": str(out),
            "batch_size": 1,
            "num_workers": 0,
            "raw_internal_path": "raw",
            "test": {
                "file_paths": [str(cwd / "image.h5")],
                "slice_builder": {
                    "name": "SliceBuilder",
                    "patch_shape": [1, 32, 32],
                    "stride_shape": [1, 32, 32],
                    "halo_shape": halo,
                    "skip_shape_check": True,
                },
                "transformer": {"raw": [{"name": "ToTensor", "expand_dims": True}]},
            },
        },
    }
    out.mkdir()
    (out / "test.yml").write_text(yaml.safe_dump(config))
    command("-m", "pytorch3dunet.predict", "--config", out / "test.yml", cwd=cwd)
    with h5py.File(out / "image_predictions.h5") as file:
        return file["predictions"][...]


def test_predict3dunet(tmp_path):
    """With the halo that the README states, its tiles are the whole image's, mirrored at its border as it always is."""
    unet3d_run(tmp_path / "run")
    import h5py

    with h5py.File(tmp_path / "image.h5", "w") as file:
        file["raw"] = IMAGE[0].numpy()
    record, network = given_back(tmp_path / "run", tmp_path / "back")
    halo = max(side for pair in record.verdict.halo_rounded for side in pair)
    assert f"halo_shape: [0, {halo}, {halo}]" in (tmp_path / "back" / "README.md").read_text()
    before = predict3dunet(tmp_path / "run", "gcr", [0, halo, halo], tmp_path / "out", tmp_path)
    after = predict3dunet(tmp_path / "back", "bcr", [0, halo, halo], tmp_path / "out-back", tmp_path)
    inside = slice(halo, -halo)
    with torch.no_grad():
        wanted = network(IMAGE)[0].numpy()
    cut = (..., inside, inside)
    sd = wanted.std()
    assert np.abs(after.reshape(wanted.shape) - wanted)[cut].max() < 1e-4 * sd
    assert np.abs(before.reshape(wanted.shape) - wanted)[cut].max() > 0.1 * sd


HALF = 0.02
"""As near, in sd, as probabilities come that were added up in half precision."""

PLANS = {
    "image_reader_writer": "NaturalImage2DIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "original_median_spacing_after_transp": [999.0, 1.0, 1.0],
    "original_median_shape_after_transp": [1, 192, 64],
    "experiment_planner_used": "ExperimentPlanner",
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {"0": {}},
}
RESAMPLING = {
    f"resampling_fn_{what}": "resample_data_or_seg_to_shape" for what in ("data", "seg", "probabilities")
} | {
    f"resampling_fn_{what}_kwargs": {
        "is_seg": what == "seg",
        "order": 1,
        "order_z": 0,
        "force_separate_z": None,
    }
    for what in ("data", "seg", "probabilities")
}


def sharpen(path: Path) -> None:
    """Give a checkpoint's network probabilities that differ by more than half precision rounds."""
    content = torch.load(path, weights_only=False)
    for name, tensor in content["network_weights"].items():
        if "seg_layers" in name:
            tensor.mul_(30)
    torch.save(content, path)


def nnunet_predict(folder: Path, patch, cwd: Path) -> np.ndarray:
    """Call nnUNetv2_predict_from_modelfolder with windows of a size and return its probabilities."""
    plans = json.loads((folder / "plans.json").read_text())
    plans |= PLANS
    plans["configurations"]["2d"] |= {**RESAMPLING, "patch_size": patch}
    (folder / "plans.json").write_text(json.dumps(plans))
    out = cwd / f"{folder.name}-{patch[0]}"
    entry = (
        "from nnunetv2.inference.predict_from_raw_data import predict_entry_point_modelfolder as run; run()"
    )
    words = ["-i", cwd / "images", "-o", out, "-m", folder, "-f", "0", "-device", "cpu"]
    words += ["--disable_tta", "--save_probabilities", "-npp", "1", "-nps", "1", "-step_size", "1"]
    places = {f"nnUNet_{name}": str(cwd) for name in ("raw", "preprocessed", "results")}
    command("-c", entry, *words, cwd=cwd, **places)
    return np.load(out / "case.npz")["probabilities"]


def test_nnunet_predict(tmp_path):
    """The original's windows disagree; given back they differ at their border alone, and not with one window."""
    pytest.importorskip("nnunetv2")
    tifffile = pytest.importorskip("tifffile")
    (tmp_path / "model").mkdir()
    (tmp_path / "images").mkdir()
    pixels = (IMAGE[0, 0] * 60).round().to(torch.uint8)
    tifffile.imwrite(tmp_path / "images" / "case_0000.tif", pixels.numpy())
    scaled = pixels.float()
    scaled = ((scaled - scaled.mean()) / scaled.std(correction=0))[None, None]
    nnunet_folder(tmp_path / "model")
    sharpen(tmp_path / "model" / "fold_0" / "checkpoint_final.pth")
    record, network = given_back(tmp_path / "model", tmp_path / "back", scaled, allow_classes=("numpy.*",))
    probabilities = torch.nn.Sequential(network, torch.nn.Softmax(1))
    original, halves, whole = (
        apart(nnunet_predict(tmp_path / name, patch, tmp_path), probabilities, scaled)
        for name, patch in (("model", [96, 64]), ("back", [96, 64]), ("back", [192, 64]))
    )
    # the command adds windows up in half precision
    assert whole.max() < HALF
    assert off_the_cut(halves, record) < HALF
    assert off_the_cut(original, record) > 3 * HALF
