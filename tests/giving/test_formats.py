"""Each library's own files come back with its own norm switched, and all else as it was."""

import json
from pathlib import Path

import pytest
import torch
from nnunet import nnunet_folder
from originals import bundle, unet3d_run

import normfix
from normfix.giving.refusals import NotGiven

IMAGE = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))

pytestmark = pytest.mark.filterwarnings("ignore")  # of the libraries' own


def returned(original: Path, folder: Path, **options):
    """Convert what an original holds and give it back; return the record."""
    model = normfix.load(original, **options)
    done = normfix.convert(model, IMAGE)
    return normfix.give_back(done, folder, original=original, **options)


def names(folder: Path) -> set[str]:
    """Return the files in a folder and below."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}


def test_a_monai_bundle_comes_back_with_one_line_changed(tmp_path):
    """The norm of each definition of the network is another, its program is left out, all else is the same."""
    bundle(tmp_path / "bundle")
    record = returned(tmp_path / "bundle", tmp_path / "back")
    before, after = (
        (tmp_path / side / "configs" / "inference.json").read_text().splitlines()
        for side in ("bundle", "back")
    )
    differing = [(a, b) for a, b in zip(before, after, strict=True) if a != b]
    assert differing == [('        "norm": "instance"', '        "norm": "batch"')]
    assert json.loads((tmp_path / "back/configs/train.json").read_text())["network"]["norm"] == "batch"
    assert names(tmp_path / "back") == names(tmp_path / "bundle") - {"models/model.ts"} | {"README.md"}
    assert {c.kind for c in record.changes} == {"config", "added", "left out"}
    assert record.format == "MONAI bundle"


@pytest.mark.parametrize(
    "definition",
    [
        {"norm": ["group", {"num_groups": 2, "eps": 1e-3}]},
        {
            "_target_": "BasicUNet",
            "features": [4, 4, 4, 4, 4, 4],
            "norm": ["instance", {"affine": True}],
        },
        {
            "_target_": "DynUNet",
            "kernel_size": [3, 3, 3],
            "strides": [1, 2, 2],
            "upsample_kernel_size": [2, 2],
            "filters": [4, 4, 4],
            "norm_name": "instance",
        },
    ],
    ids=["UNet with groups", "BasicUNet", "DynUNet"],
)
def test_the_argument_of_a_monai_network_is_found(tmp_path, definition):
    """Whatever the class calls its norm, and however it is written, it is switched."""
    bundle(tmp_path / "bundle", **definition)
    record = returned(tmp_path / "bundle", tmp_path / "back")
    assert all("batch" in change.after for change in record.changes if change.kind == "config")


@pytest.mark.parametrize("order", ["gcr", "cgr", "crg", "gcl", "cge", "gcrd"])
def test_every_order_of_pytorch_3dunet_comes_back(tmp_path, order):
    """Each g becomes b where it stands, in the model's section alone, and the comment stays."""
    unet3d_run(tmp_path / "run", order)
    record = returned(tmp_path / "run", tmp_path / "back")
    new = order.replace("g", "b")
    before = (tmp_path / "run" / "config.yml").read_text()
    assert (tmp_path / "back" / "config.yml").read_text() == before.replace(
        f"layer_order: {order}", f"layer_order: {new}"
    )
    removed = [c.name for c in record.changes if c.kind == "removed"]
    assert removed
    assert all(".groupnorm." in name for name in removed)
    content = torch.load(tmp_path / "back" / "best_checkpoint.pytorch", weights_only=True)
    assert content["num_epochs"] == 3
    assert not (tmp_path / "back" / "last_checkpoint.pytorch").exists()


def test_an_nnunet_folder_comes_back_under_all_names(tmp_path):
    """The plans name BatchNorm, and constants stand under every name that the checkpoint has for a norm."""
    pytest.importorskip("nnunetv2")
    (tmp_path / "model").mkdir()
    nnunet_folder(tmp_path / "model")
    returned(tmp_path / "model", tmp_path / "back", allow_classes=("numpy.*",))
    plans = json.loads((tmp_path / "back" / "plans.json").read_text())
    kwargs = plans["configurations"]["2d"]["architecture"]["arch_kwargs"]
    assert kwargs["norm_op"] == "torch.nn.modules.batchnorm.BatchNorm2d"
    path = tmp_path / "back" / "fold_0" / "checkpoint_final.pth"
    content = torch.load(path, weights_only=True)
    own, all_modules = (
        content["network_weights"][f"encoder.stages.0.0.convs.0.{name}.running_mean"]
        for name in ("norm", "all_modules.1")
    )
    assert torch.equal(own, all_modules)
    assert (own != 0).any()
    assert content["trainer_name"] == "nnUNetTrainer"


def test_a_configuration_that_inherits_gets_the_norm_itself(tmp_path):
    """Where the architecture is its parent's, the parent keeps its own."""
    from normfix.giving.formats.nnunet import _switched_

    parent = {"architecture": {"arch_kwargs": {"norm_op": "a.InstanceNorm3d", "n_stages": 2}}}
    plans = {"configurations": {"full": parent, "large": {"inherits_from": "full", "batch_size": 4}}}
    _switched_(plans, "large", {"norm_op": "a.BatchNorm3d", "n_stages": 2})
    made = plans["configurations"]
    assert made["full"]["architecture"]["arch_kwargs"]["norm_op"] == "a.InstanceNorm3d"
    assert made["large"]["architecture"]["arch_kwargs"] == {"norm_op": "a.BatchNorm3d", "n_stages": 2}


def test_another_original_is_refused(tmp_path):
    """A folder of another architecture than was converted is NF553, and nothing is written."""
    bundle(tmp_path / "bundle")
    bundle(tmp_path / "other", channels=[8, 8])
    done = normfix.convert(normfix.load(tmp_path / "bundle"), IMAGE)
    source = normfix.Source(kind="factory", spec="monai.networks.nets:UNet", args='{"channels": [4, 8]}')
    with pytest.raises(NotGiven, match="NF553"):
        normfix.give_back(done, tmp_path / "back", source, original=tmp_path / "other")
    assert not (tmp_path / "back").exists()


def test_an_original_of_no_known_format_is_refused(tmp_path):
    """A folder that is none of the formats is NF553, with their names."""
    bundle(tmp_path / "bundle")
    (tmp_path / "empty").mkdir()
    done = normfix.convert(normfix.load(tmp_path / "bundle"), IMAGE)
    with pytest.raises(NotGiven, match=r"NF553.*MONAI bundle"):
        normfix.give_back(done, tmp_path / "back", original=tmp_path / "empty")


def test_a_saved_folder_knows_its_source(tmp_path):
    """Saved and loaded, a network of a bundle is given back by its own folder's word."""
    bundle(tmp_path / "bundle")
    args = {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": [4, 8], "strides": [2]}
    done = normfix.convert(normfix.load(tmp_path / "bundle"), IMAGE)
    normfix.save(done, tmp_path / "fixed", "monai.networks.nets:UNet", {**args, "norm": "instance"})
    record = normfix.give_back(
        normfix.load(tmp_path / "fixed"), tmp_path / "back", original=tmp_path / "bundle"
    )
    assert record.format == "MONAI bundle"
    state = normfix.give_back(normfix.load(tmp_path / "fixed"), tmp_path / "plain")
    assert state.format == "state dict"
