"""Each library's own files come back with its own norm switched, and all else as it was."""

import json
import os
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from nnunet import nnunet_folder, scrambled
from originals import bundle, torch_em_run, unet3d_run

import normfix
from normfix.errors import NormfixError
from normfix.giving.formats import monai_bundle, nnunet, torch_em, unet3d
from normfix.giving.gift import write_tensors
from normfix.giving.refusals import NotAlone, NotGiven, Unfit
from normfix.storage.opening.formats.nnunet import resolved

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


@pytest.fixture(scope="module")
def converted_bundle(tmp_path_factory):
    """Return a bundle and the conversion of its network."""
    folder = tmp_path_factory.mktemp("bundles") / "bundle"
    bundle(folder)
    return folder, normfix.convert(normfix.load(folder), IMAGE)


def test_what_others_folders_link_to_is_not_copied(tmp_path, converted_bundle):
    """A link out of the folder is left out and named, whatever its name; what lies in the folder becomes a file."""
    folder, done = converted_bundle
    original = shutil.copytree(folder, tmp_path / "bundle")
    secret = tmp_path / "id_rsa"
    secret.write_text("mine")
    (original / "docs" / "a.md").symlink_to(secret)
    (original / "configs" / "b.json").symlink_to(secret)
    (original / os.fsdecode(b"\xff")).symlink_to(secret)
    (original / "c").symlink_to(tmp_path)
    (original / "d").symlink_to("d")
    (original / "e.md").symlink_to("docs/README.md")
    for name in ("README.md", "README-normfix.md"):
        (original / name).mkdir()
    record = normfix.give_back(done, tmp_path / "back", original=original)
    assert names(tmp_path / "back") == names(folder) - {"models/model.ts"} | {"e.md", "README-normfix-2.md"}
    left = {change.name for change in record.changes if change.kind == "left out"}
    assert left == {"model.ts", "a.md", "b.json", "c", "d", "\\udcff"}
    assert record.dumps().encode()


def test_a_snapshot_of_the_hub_is_copied(tmp_path, converted_bundle):
    """In the hub's cache files are links into its blobs; a link from there on leads out."""
    folder, done = converted_bundle
    original, blobs = tmp_path / "snapshots" / "main", tmp_path / "blobs"
    shutil.copytree(folder, original)
    blobs.mkdir()
    for number, path in enumerate(sorted(p for p in original.rglob("*") if p.is_file())):
        path.rename(blobs / str(number))
        path.symlink_to(blobs / str(number))
    (tmp_path / "secret").write_text("mine")
    (blobs / "secret").symlink_to(tmp_path / "secret")
    (original / "secret").symlink_to(blobs / "secret")
    normfix.give_back(done, tmp_path / "back", original=original)
    assert names(tmp_path / "back") == names(folder) - {"models/model.ts"} | {"README.md"}


def test_a_folder_is_not_copied_into_itself(tmp_path, converted_bundle):
    """An output within the original is refused, and the original stays as it was."""
    folder, done = converted_bundle
    original = shutil.copytree(folder, tmp_path / "bundle")
    with pytest.raises(NormfixError, match=r"NF114.*copied into itself"):
        normfix.give_back(done, original / "new" / "back", original=original)
    assert {p.relative_to(original) for p in original.rglob("*")} == {
        p.relative_to(folder) for p in folder.rglob("*")
    }


@pytest.mark.skipif(sys.platform != "linux", reason="the system limits the length of files there")
@pytest.mark.parametrize("length", [300, 4000])
def test_a_disk_that_fills_up_is_an_error(tmp_path, converted_bundle, length):
    """While files are copied or tensors written: NF114, and nothing is left."""
    import resource

    folder, done = converted_bundle
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
    try:
        with pytest.raises(NormfixError, match="NF114"):
            normfix.give_back(done, tmp_path / "back", original=folder)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert not list(tmp_path.iterdir())


@pytest.mark.skipif(sys.platform != "linux", reason="the system limits the length of files there")
@pytest.mark.parametrize("length", [10, 300, 3000])
def test_tensors_without_room_are_the_system_s_error(tmp_path, length):
    """torch complains of a place in the file; what the file said is what is raised."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (length, before[1]))
    try:
        with pytest.raises(OSError, match="too large"):
            write_tensors({"a": torch.zeros(5000)}, tmp_path / ".odd")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    write_tensors({"a": torch.zeros(2)}, tmp_path / "new" / ".odd")
    assert torch.load(tmp_path / "new" / ".odd", weights_only=True)["a"].shape == (2,)


@pytest.mark.zoo
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


def test_a_model_of_panseg_comes_back(tmp_path):
    """Its folder has the configuration under panseg's name, which is kept."""
    unet3d_run(tmp_path / "run")
    (tmp_path / "run" / "config.yml").rename(tmp_path / "run" / "config_train.yml")
    returned(tmp_path / "run", tmp_path / "back")
    assert "layer_order: bcr" in (tmp_path / "back" / "config_train.yml").read_text()


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


@pytest.mark.parametrize(
    "other", [None, 5, {"inherits_from": "other"}, {"inherits_from": ["2d"]}, {"inherits_from": "no"}]
)
def test_plans_that_nnunet_does_not_write_are_named(other):
    """A configuration beside the network's that is none is NF120, since what it inherits would change."""
    design = {"arch_kwargs": {"norm_op": "torch.nn.InstanceNorm2d"}}
    plans = {"configurations": {"2d": {"architecture": design}, "other": other}}
    gift = SimpleNamespace(
        file="checkpoint_final.pth",
        checkpoint={"init_args": {"configuration": "2d"}},
        args={"settings": {"norm_op": "torch.nn.BatchNorm2d"}},
    )
    with pytest.raises(NormfixError, match="NF120"):
        nnunet._plans_switched_(plans, gift)


FOLDS = (0, 1, "all")


@pytest.fixture(scope="module")
def converted_folds(tmp_path_factory):
    """Return a folder of three folds, and the conversion of each."""
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed")
    model = tmp_path_factory.mktemp("folds") / "model"
    model.mkdir()
    nnunet_folder(model, FOLDS)
    done = {}
    for fold in FOLDS:
        network = normfix.load(model / f"fold_{fold}/checkpoint_final.pth", allow_classes=("numpy.*",))
        done[fold] = normfix.convert(network, IMAGE)
    return model, done


def test_all_folds_of_an_nnunet_folder_come_back(tmp_path, converted_folds):
    """In whichever order they are given, each fold's file has its own weights and constants."""
    model, done = converted_folds
    given = [done["all"].model, done[0], done[1]]
    record = normfix.give_back(given, tmp_path / "back", original=model, allow_classes=("numpy.*",))
    assert names(tmp_path / "back") == names(model) | {"README.md"}
    for fold in FOLDS:
        path = tmp_path / "back" / f"fold_{fold}" / "checkpoint_final.pth"
        weights = torch.load(path, weights_only=True)["network_weights"]
        for name, tensor in done[fold].model.state_dict().items():
            assert torch.equal(weights[name], tensor)
    plans = [change.name for change in record.changes if change.file == "plans.json"]
    own, heirs = ".2d.architecture.arch_kwargs.norm_op", ".2d_bs8.architecture"
    assert plans == [f"configurations{own}", f"configurations{heirs}"]
    assert record.alone_sd < 1e-4


def test_a_fold_that_was_not_converted_is_left_out(tmp_path, converted_folds):
    """A fold's checkpoint stays only if its own constants are there, and the change says why it is gone."""
    model, done = converted_folds
    record = normfix.give_back([done[1]], tmp_path / "back", original=model, allow_classes=("numpy.*",))
    left = {c.file: c.after for c in record.changes if c.kind == "left out"}
    assert set(left) == {"fold_0/checkpoint_final.pth", "fold_all/checkpoint_final.pth"}
    assert "convert it too" in left["fold_0/checkpoint_final.pth"]


def test_a_network_of_another_folder_has_no_fold(tmp_path, converted_folds):
    """A conversion that has the weights of no fold is NF553, and so is one that is given twice."""
    model, done = converted_folds
    other = tmp_path / "other"
    other.mkdir()
    nnunet_folder(other, (4,))
    done_other = normfix.convert(normfix.load(other, allow_classes=("numpy.*",)), IMAGE)
    for given in ([done[0], done_other], [done[0], done[0]]):
        with pytest.raises(NotGiven, match=r"NF553.*network 2 of 2"):
            normfix.give_back(given, tmp_path / "back", original=model, allow_classes=("numpy.*",))
    assert not (tmp_path / "back").exists()


def test_several_networks_need_an_original(tmp_path, converted_folds):
    """Without an original there is no folder that several go into."""
    _, done = converted_folds
    with pytest.raises(NotGiven, match="give --original"):
        normfix.give_back([done[0], done[1]], tmp_path / "back")


def test_old_plans_of_nnunet_stay_and_the_trainer_is_that_with_batch_norms(tmp_path):
    """Plans from before 2.4 name no norm: they are copied, and nnUNetTrainerBN builds the network."""
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed")
    (tmp_path / "model").mkdir()
    nnunet_folder(tmp_path / "model", old=True)
    record = returned(tmp_path / "model", tmp_path / "back", allow_classes=("numpy.*",))
    plans = [(tmp_path / side / "plans.json").read_bytes() for side in ("model", "back")]
    assert plans[0] == plans[1]
    (change,) = [change for change in record.changes if change.kind == "config"]
    assert change.line.splitlines() == [
        '- fold_0/checkpoint_final.pth: trainer_name = "nnUNetTrainer"',
        '+ fold_0/checkpoint_final.pth: trainer_name = "nnUNetTrainerBN"',
    ]


def test_configurations_keep_their_own_norm(tmp_path):
    """The configuration gets the norm itself; what it inherits from and what inherits from it keep theirs."""
    from normfix.giving.formats.nnunet import _switched_

    def norm(name):
        return resolved(made, name)["architecture"]["arch_kwargs"]["norm_op"]

    full = {"architecture": {"arch_kwargs": {"norm_op": "a.InstanceNorm3d", "n_stages": 2}}}
    made = {
        "2d": {"architecture": {"arch_kwargs": {"norm_op": "a.InstanceNorm2d"}}},
        "full": full,
        "large": {"inherits_from": "full", "batch_size": 4},
        "larger": {"inherits_from": "large", "batch_size": 8},
    }
    _switched_(made, "large", {"norm_op": "a.BatchNorm3d", "n_stages": 2})
    assert {name: norm(name) for name in made} == {
        "2d": "a.InstanceNorm2d",
        "full": "a.InstanceNorm3d",
        "large": "a.BatchNorm3d",
        "larger": "a.InstanceNorm3d",
    }
    assert made["larger"]["inherits_from"] == "large"


def torch_em_original(folder: Path) -> dict[str, object]:
    """Write a trainer's folder; return how its file is opened."""
    models = pytest.importorskip("torch_em.model", reason="torch-em is not installed")
    args = {"in_channels": 1, "out_channels": 1, "initial_features": 4, "depth": 2}
    torch.manual_seed(0)
    torch_em_run(folder, scrambled(models.UNet2d(**args)))
    return {"arch": "torch_em.model:UNet2d", "args": args}


def nnunet_original(folder: Path) -> dict[str, object]:
    """Write a folder of one fold; return how it is opened."""
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed")
    folder.mkdir()
    nnunet_folder(folder)
    return {"allow_classes": ("numpy.*",)}


def monai_original(folder: Path) -> dict[str, object]:
    """Write a bundle."""
    bundle(folder)
    return {}


def unet3d_original(folder: Path) -> dict[str, object]:
    """Write a run."""
    unet3d_run(folder)
    return {}


def kernels(content) -> list[torch.Tensor]:
    """Return the convolutions' weights in what a file holds."""
    if isinstance(content, torch.Tensor):
        return [content] if content.dim() == 4 and content.is_floating_point() else []
    return [one for value in content.values() for one in kernels(value)] if isinstance(content, dict) else []


@pytest.mark.parametrize(
    ("library", "original"),
    [
        (monai_bundle, monai_original),
        (unet3d, unet3d_original),
        (nnunet, nnunet_original),
        (torch_em, torch_em_original),
    ],
    ids=lambda one: getattr(one, "NAME", ""),
)
def test_a_weight_that_was_changed_in_the_file_is_caught(tmp_path, monkeypatch, library, original):
    """Negative control: whichever library reads its own file, one changed weight is seen, and nothing appears."""
    options = original(tmp_path / "original")
    path = tmp_path / "original" / "best.pt" if "arch" in options else tmp_path / "original"
    done = normfix.convert(normfix.load(path, **options), IMAGE)
    write = library.write

    def spoiled(draft, gifts):
        changes = write(draft, gifts)
        file = draft / gifts[0].file
        content = torch.load(file, weights_only=False)
        # the first kernel under every name that it has
        first = kernels(content)[0]
        for kernel in [one for one in kernels(content) if torch.equal(one, first)]:
            kernel[(0,) * 4] = first.max() + 0.1
        torch.save(content, file)
        return changes

    monkeypatch.setattr(library, "write", spoiled)
    given = {"source": options.pop("arch", None), "args": options.pop("args", None), **options}
    with pytest.raises(NotAlone, match=r"NF554.*differs by"):
        normfix.give_back(done, tmp_path / "back", original=tmp_path / "original", **given)
    assert not (tmp_path / "back").exists()


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


def test_a_folder_of_diffusers_is_refused_by_name(tmp_path):
    """diffusers has no argument for the norm, and the refusal says so, with and without its folder."""
    bundle(tmp_path / "bundle")
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text('{"_diffusers_version": "0.33.0"}')
    done = normfix.convert(normfix.load(tmp_path / "bundle"), IMAGE)
    for given in ({"original": tmp_path / "vae"}, {"source": "diffusers:AutoencoderKL"}):
        with pytest.raises(Unfit, match=r"NF551.*diffusers builds GroupNorm into"):
            normfix.give_back(done, tmp_path / "back", **given)


@pytest.mark.slow
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
