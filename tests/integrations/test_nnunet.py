"""nnU-Net's own prediction from files, with exact tiles: the whole image's classes, which its windows do not give."""

import json

import imageio.v3 as iio
import numpy as np
import pytest
import torch
from nnunet import nnunet_folder
from pages import ROOT, blocks

from normfix.errors import NormfixError

pytest.importorskip("nnunetv2")


from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

from normfix.integrations.nnunet import ExactPredictor

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore")]

RESAMPLING = "resample_data_or_seg_to_shape"
SMOOTH = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
PLANS = {
    "image_reader_writer": "NaturalImage2DIO",
    "transpose_forward": [0, 1, 2],
    "transpose_backward": [0, 1, 2],
    "foreground_intensity_properties_per_channel": {"0": {}},
}
CONFIGURATION = {
    **{f"resampling_fn_{what}": RESAMPLING for what in ("data", "seg", "probabilities")},
    **{f"resampling_fn_{what}_kwargs": SMOOTH for what in ("data", "seg", "probabilities")},
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A model of two folds as nnU-Net leaves it, and an image that is darker on one side."""
    folder = tmp_path_factory.mktemp("nnunet")
    nnunet_folder(folder)
    plans = json.loads((folder / "plans.json").read_text()) | PLANS
    plans["configurations"]["2d"] |= CONFIGURATION
    (folder / "plans.json").write_text(json.dumps(plans))
    checkpoint = torch.load(folder / "fold_0" / "checkpoint_final.pth", weights_only=False)
    for tensor in checkpoint["network_weights"].values():
        tensor.mul_(1.2)
    (folder / "fold_1").mkdir()
    torch.save(checkpoint, folder / "fold_1" / "checkpoint_final.pth")
    noise = np.random.default_rng(0).random((96, 64)) * np.linspace(20, 255, 64)
    iio.imwrite(folder / "cell_0000.tif", noise.astype("uint8"))
    return folder


def opened(kind, folder, folds=(0,), **options):
    """Return a predictor that has opened the folder."""
    predictor = kind(device=torch.device("cpu"), allow_tqdm=False, **options)
    predictor.initialize_from_trained_model_folder(str(folder), folds, "checkpoint_final.pth")
    return predictor


def whole(predictor, networks):
    """Return what nnU-Net's own mirroring gives for the whole image, averaged over networks."""
    (plane,) = predictor._planes(predictor._prepared([str(predictor.folder / "cell_0000.tif")]))
    logits = []
    for network in networks:
        predictor.network = network
        logits.append(predictor._internal_maybe_mirror_and_predict(plane)[0])
    return torch.stack(logits).mean(0)


def apart(actual, expected):
    """Return the largest difference in sd of what is expected."""
    return float((actual - expected).abs().max() / expected.std())


@pytest.fixture(scope="module")
def predictor(folder):
    """Two folds, converted by nnU-Net's own reading of the file."""
    predictor = opened(ExactPredictor, folder, (0, 1), tile=32, use_mirroring=False)
    predictor.folder = folder
    predictor.done = predictor.convert([[str(folder / "cell_0000.tif")]])
    assert all(one.proof.passed for one in predictor.done)
    return predictor


def test_logits_are_those_of_the_whole_image(folder, predictor):
    """Exact tiles of both folds are the mean of what the originals give for the whole image; nnU-Net's windows not."""
    data = predictor._prepared([str(folder / "cell_0000.tif")])
    expected = whole(predictor, [one.original for one in predictor.done])[:, None]
    assert apart(predictor.predict_logits_from_preprocessed_data(data), expected) < 1e-5
    theirs = opened(nnUNetPredictor, folder, (0, 1), use_mirroring=False)
    assert apart(theirs.predict_logits_from_preprocessed_data(data).float(), expected) > 0.1


def test_mirroring_is_nnunets_own(folder, predictor):
    """With mirroring the result is nnU-Net's average over mirrored whole images."""
    mirroring = opened(ExactPredictor, folder, tile=32)
    mirroring.folder = folder
    mirroring.use(predictor.networks[0])
    data = mirroring._prepared([str(folder / "cell_0000.tif")])
    found = mirroring.predict_logits_from_preprocessed_data(data)
    expected = whole(mirroring, predictor.networks[:1])[:, None]
    plain = whole(predictor, predictor.networks[:1])[:, None]
    assert apart(found, expected) < 1e-5
    assert apart(found, plain) > 1e-2


def test_files_are_predicted(folder, predictor, tmp_path):
    """nnU-Net reads, predicts and writes: the classes are those of the whole image."""
    predictor.predict_from_files_sequential([[str(folder / "cell_0000.tif")]], [str(tmp_path / "cell")])
    expected = whole(predictor, [one.original for one in predictor.done]).argmax(0)
    np.testing.assert_array_equal(iio.imread(tmp_path / "cell.tif"), expected.numpy())


def test_the_block_on_the_page_runs(folder, tmp_path, monkeypatch):
    """What docs/loops.md shows for nnU-Net writes a segmentation of the file."""
    (tmp_path / "nnunet_model").symlink_to(folder)
    (tmp_path / "image_0000.tif").write_bytes((folder / "cell_0000.tif").read_bytes())
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "docs" / "loops.md", "py")
    exec(compile(block, "loops.md", "exec"), {})
    assert iio.imread(tmp_path / "segmentation.tif").shape == (96, 64)


def test_nothing_is_predicted_before_it_is_converted(folder):
    """nnU-Net's own network is live, so without conversion there is no exact tile."""
    with pytest.raises(NormfixError, match="NF586"):
        opened(ExactPredictor, folder).predict_logits_from_preprocessed_data(torch.zeros(1, 1, 32, 32))
