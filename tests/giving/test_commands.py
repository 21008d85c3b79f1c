"""Their own commands (of nnU-Net, its predictor), unchanged, on what was given back: before, seams; after, none.

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
"""As near, in sd, as probabilities come that were weighted and added up in half precision, also in corners: 0.015."""
SEAM = 0.9
"""Less, in sd, than the windows of the original differ by from its whole: 1.04."""
FOLDS = (0, 1)
WINDOW, WHOLE = [96, 64], [192, 64]


class Ensemble(torch.nn.Module):
    """Gives the probabilities of several networks' mean, as nnU-Net makes them of folds."""

    def __init__(self, networks):
        super().__init__()
        self.networks = torch.nn.ModuleList(networks)

    def forward(self, image):
        return sum(network(image) for network in self.networks).div(len(self.networks)).softmax(1)


@pytest.fixture(scope="module")
def folds(tmp_path_factory):
    """Convert two folds of an nnU-Net folder and give them back; return both folders, the record, the original."""
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed")
    root = tmp_path_factory.mktemp("nnunet")
    model = placed(root, "model")
    model.mkdir(parents=True)
    nnunet_folder(model, FOLDS)
    paths = [model / f"fold_{fold}" / "checkpoint_final.pth" for fold in FOLDS]
    networks = [normfix.load(path, allow_classes=("numpy.*",)).eval() for path in paths]
    done = [normfix.convert(network, SCALED) for network in networks]
    given = {"original": model, "allow_classes": ("numpy.*",)}
    return root, normfix.give_back(done, placed(root, "back"), **given), Ensemble(networks)


def placed(results: Path, name: str) -> Path:
    """Return where nnU-Net looks for a trained model in one of several folders of results."""
    return results / name / "Dataset001_Cells" / "nnUNetTrainer__nnUNetPlans__2d"


SCALED = (IMAGE - IMAGE.mean()) / IMAGE.std()


def set_window(folder: Path, patch) -> None:
    """Set the size of nnU-Net's windows."""
    plans = json.loads((folder / "plans.json").read_text())
    plans["configurations"]["2d"]["patch_size"] = patch
    (folder / "plans.json").write_text(json.dumps(plans))


def nnunet_command(root: Path, name: str, patch) -> np.ndarray:
    """Call nnUNetv2_predict on a folder of one image, by the dataset's number, with all folds; return probabilities."""
    import tifffile

    set_window(placed(root, name), patch)
    images, out = root / "images", root / f"{name}-{patch[0]}"
    images.mkdir(exist_ok=True)
    tifffile.imwrite(images / "a_0000.tif", IMAGE[0, 0].numpy())
    entry = "from nnunetv2.inference.predict_from_raw_data import predict_entry_point as p; p()"
    words = ["-c", entry, "-i", images, "-o", out, "-d", "1", "-c", "2d", "-f", *FOLDS, "-step_size", "1"]
    words += ["--disable_tta", "--save_probabilities", "-device", "cpu", "-npp", "1", "-nps", "1"]
    command(*words, cwd=root, nnUNet_raw=".", nnUNet_preprocessed=".", nnUNet_results=str(root / name))
    return np.load(out / "a.npz")["probabilities"]


def test_nnunet_command(folds):
    """The original's windows disagree; given back they differ at their border alone, and not with one window."""
    root, record, ensemble = folds
    original, halves, whole = (
        apart(nnunet_command(root, name, patch), ensemble, SCALED)
        for name, patch in (("model", WINDOW), ("back", WINDOW), ("back", WHOLE))
    )
    assert off_the_cut(original, record) > SEAM
    assert off_the_cut(halves, record) < HALF < halves.max()
    assert whole.max() < HALF
    card = (placed(root, "back") / "README.md").read_text()
    large = 4 * max(side for pair in record.verdict.halo_rounded for side in pair)
    assert all(words in card for words in ("`-step_size` at 0.5", f"four halos, {[large, large]}"))


def nnunet_predict(folder: Path, patch, step: float) -> np.ndarray:
    """Let nnU-Net's predictor open a folder and predict an image with windows of a size; return probabilities."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    set_window(folder, patch)
    predictor = nnUNetPredictor(
        tile_step_size=step,
        use_mirroring=False,
        perform_everything_on_device=False,
        device=torch.device("cpu"),
        allow_tqdm=False,
    )
    predictor.initialize_from_trained_model_folder(
        str(folder), tuple(map(str, FOLDS)), "checkpoint_final.pth"
    )
    # (1, c, y, x) -> (c, 1, y, x)
    return predictor.predict_logits_from_preprocessed_data(SCALED[0][:, None]).float().softmax(0).numpy()


@pytest.mark.parametrize("step", [0.5, 1.0])
def test_what_nnunet_shows_depends_on_its_windows(folds, step):
    """One window of the whole image shows no seam of the original; one larger than the image is of another image.

    nnU-Net fills up with zeros what is smaller than a window, and an instance norm counts these.
    """
    root, record, ensemble = folds
    shown = {
        (name, size): apart(nnunet_predict(placed(root, name), [size, 64], step), ensemble, SCALED)
        for name in ("model", "back")
        for size in (96, 192, 256)
    }
    (_, after), _ = record.verdict.halo_rounded
    assert shown["model", 96].max() > SEAM
    # four halos and more
    if step == 0.5:
        assert shown["back", 96].max() < HALF
    assert shown["model", 192].max() < HALF
    assert shown["model", 256].max() > 0.5
    # the zeros stand where the network's own padding has zeros of a later layer
    inside = shown["back", 256][:, after:-after]
    assert inside.max() < HALF
    assert shown["back", 192].max() < HALF
