"""Each format opens from a real file that its own library wrote, and gives the network that was saved."""

import json
import os
import zipfile
from fractions import Fraction

import factories
import numpy as np
import pytest
import torch
from nnunet import DATASET, PLANS, nnunet_folder, scrambled
from payloads import Payload
from safetensors.torch import save_file

import normfix
from normfix.errors import NormfixError
from normfix.networks.provenance import declared_window
from normfix.storage.opening import open_model
from normfix.storage.opening.candidates import candidates
from normfix.storage.opening.pickles import read_torch
from normfix.storage.opening.pretrained import folder_weights
from normfix.storage.opening.request import Request

ARCH = "factories:tiny_unet"
IMAGE = torch.linspace(-1, 1, 4096).reshape(1, 1, 64, 64)


def refusal(function, *args, **options) -> NormfixError:
    """Return the error a call gives, which must be one paragraph."""
    with pytest.raises(NormfixError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def first(output):
    """Return the tensor of an output."""
    return output if isinstance(output, torch.Tensor) else next(iter(output.values()))


def assert_same(opened, expected, image=IMAGE):
    """The network that was opened has the weights that were saved and gives the same."""
    with torch.no_grad():
        actual, wanted = first(opened.eval()(image)), first(expected.eval()(image))
    torch.testing.assert_close(actual, wanted, rtol=0, atol=0)
    assert wanted.std() > 0


def roundtrip(source, folder, tmp_path):
    """A folder that normfix saves of the opened network names a builder that a file may name."""
    from normfix.storage.opening.factories import rebuild

    again = rebuild(source)
    again.load_state_dict(open_model(str(folder)).model.state_dict())
    return again


# -- segmentation-models-pytorch, torchvision, timm


@pytest.mark.slow
def test_an_smp_folder_opens(tmp_path):
    """segmentation-models-pytorch's save_pretrained gives its network, with nothing fetched."""
    smp = pytest.importorskip("segmentation_models_pytorch")
    model = scrambled(smp.Unet("resnet18", encoder_weights=None, in_channels=1, classes=2))
    model.save_pretrained(tmp_path / "smp")
    opened = open_model(str(tmp_path / "smp"))
    assert opened.source.spec == "segmentation_models_pytorch:Unet"
    assert_same(opened.model, model)
    assert_same(roundtrip(opened.source, tmp_path / "smp", tmp_path), model)


@pytest.mark.slow
def test_a_torchvision_checkpoint_opens(tmp_path):
    """A checkpoint as torchvision's reference scripts write it opens with the factory's name."""
    pytest.importorskip("torchvision")
    from torchvision.models import resnet18

    model = scrambled(resnet18(num_classes=3))
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-6, momentum=0.9)
    model(torch.ones(2, 3, 32, 32)).sum().backward()
    optimizer.step()
    torch.save(
        {"model": model.state_dict(), "optimizer": optimizer.state_dict(), "epoch": 1}, tmp_path / "w.pth"
    )
    opened = open_model(
        str(tmp_path / "w.pth"), arch="torchvision.models:resnet18", arch_args={"num_classes": 3}
    )
    assert_same(opened.model, model, torch.randn(1, 3, 64, 64))


def test_a_timm_folder_opens(tmp_path):
    """What timm pushes to the hub gives its network."""
    timm = pytest.importorskip("timm")
    from timm.models import save_for_hf

    model = scrambled(timm.create_model("test_resnet", num_classes=3, in_chans=1))
    args = {"in_chans": 1, "num_classes": 3}
    save_for_hf(model, str(tmp_path / "timm"), model_args=args, safe_serialization=True)
    opened = open_model(str(tmp_path / "timm"))
    assert opened.source.spec == "timm:test_resnet"
    assert_same(opened.model, model)


def test_a_timm_checkpoint_with_an_average_asks_which(tmp_path):
    """timm's own CheckpointSaver writes both; --weights picks the average, and without it both are named."""
    timm = pytest.importorskip("timm")
    from timm.utils import CheckpointSaver, ModelEmaV2

    model = scrambled(timm.create_model("test_resnet", num_classes=3, in_chans=1))
    average = ModelEmaV2(timm.create_model("test_resnet", num_classes=3, in_chans=1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    saver = CheckpointSaver(model, optimizer, model_ema=average, checkpoint_dir=str(tmp_path))
    saver.save_checkpoint(0)
    path, args = str(tmp_path / "last.pth.tar"), {"num_classes": 3, "in_chans": 1}
    error = refusal(open_model, path, arch="timm:test_resnet", arch_args=args)
    assert (error.code, "state_dict_ema" in error.message) == ("NF119", True)
    for name, expected in (("state_dict", model), ("state_dict_ema", average.module)):
        opened = open_model(path, arch="timm:test_resnet", arch_args=args, weights=name)
        assert_same(opened.model, expected)
        assert name in opened.notes[0]


def test_an_architecture_that_would_open_another_place_is_refused(tmp_path):
    """A timm folder that names a repository or folder as its architecture is NF113."""
    text = json.dumps({"architecture": "local-dir:/tmp", "num_features": 3, "pretrained_cfg": {}})
    (tmp_path / "config.json").write_text(text)
    assert refusal(open_model, str(tmp_path)).code == "NF113"


# -- transformers, diffusers


def segformer():
    """Return a small SegFormer."""
    transformers = pytest.importorskip("transformers")
    config = transformers.SegformerConfig(
        num_channels=1,
        hidden_sizes=[8, 8, 8, 8],
        depths=[1, 1, 1, 1],
        decoder_hidden_size=8,
        num_attention_heads=[1, 1, 1, 1],
        num_labels=2,
    )
    return scrambled(transformers.SegformerForSemanticSegmentation(config))


@pytest.mark.filterwarnings("ignore")  # of transformers' own
def test_a_transformers_folder_opens(tmp_path):
    """transformers' save_pretrained gives its network, and its config rebuilds it."""
    model = segformer()
    model.save_pretrained(tmp_path / "hf")
    opened = open_model(str(tmp_path / "hf"))
    assert_same(opened.model, model)
    assert_same(roundtrip(opened.source, tmp_path / "hf", tmp_path), model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "setting",
    [
        {"auto_map": {"AutoModel": "evil.Model"}},
        {"attn_implementation": "someone/kernel"},
        {"_attn_implementation": "someone/kernel"},
        {"backbone": "someone/network"},
        {"sub_config": {"quantization_config": {"load_in_8bit": True}}},
        {"architectures": ["os.system"]},
        {"architectures": ["AutoModel"]},
        {"architectures": ["PreTrainedConfig"]},
        {"architectures": []},
    ],
)
def test_a_transformers_config_that_reaches_further_is_refused(tmp_path, setting):
    """Code, kernels and backbones that a config names are not fetched: NF113, or NF119 without a class."""
    segformer().save_pretrained(tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    (tmp_path / "hf" / "config.json").write_text(json.dumps(config | setting))
    assert refusal(open_model, str(tmp_path / "hf")).code in {"NF113", "NF119"}


@pytest.mark.filterwarnings("ignore")
def test_transformers_weights_that_are_incomplete_are_refused(tmp_path):
    """Weights that transformers would fill up with random ones and a log line are NF105."""
    from safetensors.torch import load_file, save_file

    segformer().save_pretrained(tmp_path / "hf")
    weights = load_file(tmp_path / "hf" / "model.safetensors")
    del weights["decode_head.classifier.bias"]
    save_file(weights, tmp_path / "hf" / "model.safetensors", metadata={"format": "pt"})
    error = refusal(open_model, str(tmp_path / "hf"))
    assert (error.code, "decode_head.classifier.bias" in error.message) == ("NF105", True)


@pytest.mark.filterwarnings("ignore")
def test_a_pickle_in_a_transformers_folder_is_not_run(tmp_path):
    """A pytorch_model.bin that would run something is NF102 before transformers sees it."""
    segformer().save_pretrained(tmp_path / "hf")
    (tmp_path / "hf" / "model.safetensors").unlink()
    torch.save(Payload(tmp_path), tmp_path / "hf" / "pytorch_model.bin")
    assert refusal(open_model, str(tmp_path / "hf")).code == "NF102"
    assert not (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of diffusers' own
def test_a_diffusers_folder_opens(tmp_path):
    """diffusers' save_pretrained gives its network, and its config rebuilds it."""
    diffusers = pytest.importorskip("diffusers")
    model = diffusers.AutoencoderKL(
        in_channels=1, out_channels=1, block_out_channels=(8,), norm_num_groups=4, latent_channels=2
    )
    scrambled(model).save_pretrained(tmp_path / "vae")
    opened = open_model(str(tmp_path / "vae"))
    with torch.no_grad():
        torch.testing.assert_close(opened.model(IMAGE).sample, model(IMAGE).sample, rtol=0, atol=0)
    again = roundtrip(opened.source, tmp_path / "vae", tmp_path).eval()
    with torch.no_grad():
        torch.testing.assert_close(again(IMAGE).sample, model(IMAGE).sample, rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_diffusers_pipeline_names_its_networks(tmp_path):
    """A pipeline's folder is NF119, naming the folders of its networks."""
    diffusers = pytest.importorskip("diffusers")
    unet = diffusers.UNet2DModel(
        sample_size=8,
        layers_per_block=1,
        block_out_channels=(8,),
        norm_num_groups=4,
        down_block_types=("DownBlock2D",),
        up_block_types=("UpBlock2D",),
    )
    diffusers.DDPMPipeline(unet, diffusers.DDPMScheduler()).save_pretrained(tmp_path / "pipe")
    error = refusal(open_model, str(tmp_path / "pipe"))
    assert (error.code, "unet" in error.message) == ("NF119", True)


# -- MONAI


def bundle(tmp_path, **definition):
    """Let MONAI write a bundle."""
    pytest.importorskip("monai")
    from monai.bundle import init_bundle
    from monai.networks.nets import BasicUNet

    model = scrambled(BasicUNet(2, 1, 2, features=(4, 4, 8, 8, 8, 4)))
    network = {
        "_target_": "BasicUNet",
        "spatial_dims": 2,
        "in_channels": "@channels",
        "out_channels": 2,
        "features": [4, 4, 8, 8, 8, "@sizes#last"],
    }
    config = {"channels": 1, "sizes": {"last": 4}, "network_def": network | definition}
    config |= {"inferer": {"_target_": "SlidingWindowInferer", "roi_size": [48, 32]}}
    init_bundle(tmp_path / "bundle", network=model, inference_str=config)
    return tmp_path / "bundle", model


@pytest.mark.filterwarnings("ignore")  # of MONAI's own
def test_a_monai_bundle_opens(tmp_path):
    """The network_def of a bundle with its references followed, and models/model.pt, give its network."""
    folder, model = bundle(tmp_path)
    opened = open_model(str(folder))
    assert opened.source.spec == "monai.networks.nets:BasicUNet"
    assert declared_window(opened.model) == (48, 32)
    assert_same(opened.model, model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "definition",
    [
        {"in_channels": "$__import__('os').system('touch ran')"},
        {"_target_": "$print"},
        {"_target_": "os.system"},
        {"in_channels": "@nowhere"},
        {"in_channels": "@network_def#in_channels"},
    ],
)
def test_a_bundle_that_computes_its_network_is_refused(tmp_path, monkeypatch, definition):
    """Expressions, other targets and references that lead nowhere are NF120, and run nothing."""
    folder, _ = bundle(tmp_path, **definition)
    monkeypatch.chdir(tmp_path)
    assert refusal(open_model, str(folder)).code == "NF120"
    assert not (tmp_path / "ran").exists()


# -- pytorch-3dunet, nnU-Net


def test_a_pytorch_3dunet_checkpoint_opens(tmp_path):
    """A checkpoint that pytorch-3dunet saved beside its config.yml gives its network."""
    pytest.importorskip("pytorch3dunet")
    yaml = pytest.importorskip("yaml")
    from pytorch3dunet.unet3d.model import get_model
    from pytorch3dunet.unet3d.utils import save_checkpoint

    config = {
        "name": "UNet2D",
        "in_channels": 1,
        "out_channels": 2,
        "f_maps": [8, 16],
        "layer_order": "gcr",
        "num_groups": 4,
        "final_sigmoid": True,
    }
    model = scrambled(get_model(config))
    optimizer = torch.optim.Adam(model.parameters())
    model(IMAGE).sum().backward()
    optimizer.step()
    model.eval()
    state = {
        "num_epochs": 2,
        "num_iterations": 10,
        "model_state_dict": model.state_dict(),
        "best_eval_score": 0.5,
        "optimizer_state_dict": optimizer.state_dict(),
    }
    save_checkpoint(state, True, str(tmp_path / "run"))
    patches = {"train": {"slice_builder": {"name": "SliceBuilder", "patch_shape": [1, 64, 32]}}}
    said = {"model": config, "device": "cpu", "loaders": patches}
    (tmp_path / "run" / "config.yml").write_text(yaml.safe_dump(said))
    for place in ("run", "run/best_checkpoint.pytorch"):
        opened = open_model(str(tmp_path / place))
        assert opened.source.spec == "normfix.storage.opening.formats.unet3d:network"
        assert declared_window(opened.model) == (64, 32)
        assert_same(opened.model, model)


@pytest.mark.parametrize(
    "text",
    [
        "model: {name: os.system}",
        "model: !!python/object/apply:os.system ['touch ran']",
        "other: 1",
        "a: &a [x, x]\nmodel: {name: [*a, *a]}",
        "[",
    ],
)
def test_a_config_of_3dunet_runs_nothing(tmp_path, monkeypatch, text):
    """Other classes, Python tags, aliases and broken YAML are NF101 or NF120, and run nothing."""
    torch.save({"model_state_dict": {"w": torch.ones(1)}}, tmp_path / "best_checkpoint.pytorch")
    (tmp_path / "config.yml").write_text(text)
    monkeypatch.chdir(tmp_path)
    assert refusal(open_model, str(tmp_path)).code in {"NF101", "NF120"}
    assert not (tmp_path / "ran").exists()


@pytest.fixture
def trained_folder(tmp_path, monkeypatch):
    """Let nnU-Net's own trainer build the network and write its checkpoint."""
    for name in ("nnUNet_raw", "nnUNet_preprocessed", "nnUNet_results"):
        monkeypatch.setenv(name, str(tmp_path / name))
    pytest.importorskip("nnunetv2", reason="nnU-Net is not installed")
    try:
        from nnunetv2.training.nnUNetTrainer.nnUNetTrainer import nnUNetTrainer
    except ImportError as error:
        pytest.skip(f"nnU-Net is not complete here: {error}")
    (tmp_path / "nnUNet_preprocessed" / "Dataset001_Cells").mkdir(parents=True)
    trainer = nnUNetTrainer(
        {**PLANS, "continue_training": False}, "2d_bs8", 0, DATASET, device=torch.device("cpu")
    )
    monkeypatch.setenv("nnUNet_compile", "f")
    trainer.num_input_channels = 1
    trainer.network = trainer.build_network_architecture(
        trainer.plans_manager, trainer.configuration_manager, 1, 2, enable_deep_supervision=True
    )
    scrambled(trainer.network)
    trainer.optimizer, trainer.lr_scheduler = trainer.configure_optimizers()
    folder = tmp_path / "model"
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(PLANS))
    (folder / "dataset.json").write_text(json.dumps(DATASET))
    trainer.logger.log("train_losses", 0.5, 0)
    trainer.save_checkpoint(str(folder / "fold_0" / "checkpoint_final.pth"))
    trainer.network.decoder.deep_supervision = False
    return folder, trainer.network


@pytest.mark.filterwarnings("ignore")  # of nnU-Net's own
@pytest.mark.parametrize("place", ["", "fold_0/checkpoint_final.pth"])
def test_an_nnunet_model_opens(trained_folder, place):
    """A folder that nnU-Net's trainer wrote, or its checkpoint, gives the network without deep supervision."""
    folder, model = trained_folder
    opened = open_model(str(folder / place), allow_classes=("numpy.*",))
    assert opened.source.spec == "normfix.storage.opening.formats.nnunet:network"
    assert_same(opened.model, model)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_an_nnunet_model_is_converted_saved_and_reloaded(tmp_path):
    """An nnU-Net of InstanceNorms is frozen, saved, and reloads from the folder alone."""
    nnunet_folder(tmp_path)
    opened = open_model(str(tmp_path))
    assert declared_window(opened.model) == (32, 32)
    done = normfix.convert(opened.model, IMAGE)
    normfix.save(done, tmp_path / "fixed", opened.source)
    assert_same(normfix.load(tmp_path / "fixed"), done.model)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "change",
    [
        {"network_class_name": "os.system"},
        {"network_class_name": "pathlib.Path"},
        {"network_class_name": "planted.PlainConvUNet"},
        {"arch_kwargs": {"conv_op": "os.system"}, "_kw_requires_import": ["conv_op"]},
        {"arch_kwargs": {"conv_op": "torch.nn.modules.module.torch"}, "_kw_requires_import": ["conv_op"]},
    ],
)
def test_plans_name_only_nnunets_networks(tmp_path, change):
    """Plans that name another class or another layer are NF111, without importing it."""
    nnunet_folder(tmp_path, **change)
    assert refusal(open_model, str(tmp_path)).code == "NF111"


def test_several_folds_are_named(tmp_path):
    """A model folder with two folds is NF119, naming both."""
    for name in ("fold_0", "fold_1"):
        (tmp_path / name).mkdir()
        torch.save({}, tmp_path / name / "checkpoint_final.pth")
    for name in ("plans.json", "dataset.json"):
        (tmp_path / name).write_text("{}")
    error = refusal(open_model, str(tmp_path))
    assert (error.code, "fold_1" in error.message) == ("NF119", True)


# -- Lightning


def lightning_checkpoint(tmp_path, average=False):
    """Let Lightning train a module for a step and write its checkpoint."""
    lightning = pytest.importorskip("lightning")
    from lightning_module import Lit

    torch.manual_seed(3)
    module = Lit(width=6)
    callbacks = []
    if average:
        pytest.importorskip("lightning", minversion="2.6", reason="Lightning averages weights from 2.6 on")
        from lightning.pytorch.callbacks import EMAWeightAveraging

        callbacks = [EMAWeightAveraging(decay=0.5)]
    trainer = lightning.Trainer(
        max_steps=2,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
        callbacks=callbacks,
    )
    loader = torch.utils.data.DataLoader(torch.randn(4, 1, 16, 16), batch_size=2)
    trainer.fit(module, loader)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    return module.eval(), str(tmp_path / "last.ckpt")


@pytest.mark.filterwarnings("ignore")  # of Lightning's own
@pytest.mark.parametrize("arch", ["lightning_module:Lit", ARCH])
def test_a_lightning_checkpoint_opens(tmp_path, arch):
    """The LightningModule, or the network inside it, is built with the stored hyperparameters and filled."""
    module, path = lightning_checkpoint(tmp_path)
    opened = open_model(path, arch=arch)
    assert json.loads(opened.source.args)["width"] == 6
    assert_same(opened.model, module if arch != ARCH else module.net)


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_checkpoint_with_an_average_asks_which(tmp_path):
    """Averaged and current weights are named, and each can be chosen."""
    _, path = lightning_checkpoint(tmp_path, average=True)
    error = refusal(open_model, path, arch=ARCH)
    assert (error.code, "averaged" in error.message) == ("NF119", True)
    stored = torch.load(path, weights_only=True)
    for name, key in (("averaged", "state_dict"), ("current", "current_model_state")):
        opened = open_model(path, arch=ARCH, weights=name).model
        torch.testing.assert_close(opened.head.weight, stored[key]["net.head.weight"], rtol=0, atol=0)


@pytest.mark.filterwarnings("ignore")
def test_a_lightning_checkpoint_without_an_architecture_is_refused(tmp_path):
    """Without --arch it is NF112."""
    _, path = lightning_checkpoint(tmp_path)
    assert refusal(open_model, path).code == "NF112"


def test_a_pipe_is_no_checkpoint_of_nnunet(tmp_path):
    """It is not opened, which would wait without end."""
    nnunet_folder(tmp_path)
    checkpoint = next(tmp_path.rglob("checkpoint_*.pth"))
    checkpoint.unlink()
    os.mkfifo(checkpoint)
    with pytest.raises(NormfixError, match="NF119"):
        open_model(str(tmp_path))


@pytest.mark.parametrize(("default", "code"), [("=None", None), ("", "NF111")])
def test_hyperparameters_that_are_no_json_are_said(tmp_path, monkeypatch, default, code):
    """A tensor among them is named in a note where the factory does without, and in the refusal where it does not."""
    name = f"taking_a_tensor{len(default)}"
    lines = (
        f"import factories\ndef build(class_weights{default}, width=4): return factories.tiny_unet(1, width)"
    )
    (tmp_path / f"{name}.py").write_text(lines)
    monkeypatch.syspath_prepend(tmp_path)
    stored = {"width": 6, "class_weights": torch.ones(3), "lr": torch.ones(1)}
    model = factories.tiny_unet(width=6)
    content = {
        "pytorch-lightning_version": "2.5",
        "state_dict": model.state_dict(),
        "hyper_parameters": stored,
    }
    torch.save(content, tmp_path / "last.ckpt")
    if code is None:
        notes = open_model(str(tmp_path / "last.ckpt"), arch=f"{name}:build").notes
        assert any("class_weights were left" in note for note in notes)
        assert not any("lr" in note for note in notes)
    else:
        error = refusal(open_model, str(tmp_path / "last.ckpt"), arch=f"{name}:build")
        assert (error.code, "class_weights were left" in error.message) == (code, True)


@pytest.mark.parametrize("modern", [True, False])
def test_numbers_of_numpy_in_a_checkpoint_are_read(tmp_path, modern):
    """A best score as trainers keep it, of either order of bytes, is a number; nothing of numpy's is called for it."""
    kinds = [np.float64, np.float32, np.int8, np.uint64, np.bool_, np.dtype(">f4").type]
    model = factories.tiny_unet()
    content = {"state_dict": model.state_dict(), "best": [kind(1) for kind in kinds], "curve": np.arange(4.0)}
    torch.save(content, tmp_path / "w.pt", _use_new_zipfile_serialization=modern)
    assert read_torch(tmp_path / "w.pt", Request())["best"] == [1] * 6
    assert_same(open_model(str(tmp_path / "w.pt"), arch=ARCH).model, model.eval())


def test_a_number_of_numpy_that_is_none_is_nothing(tmp_path):
    """Texts, dates and objects come out as nothing, and a number of another length than its kind is refused."""
    torch.save({"a": np.str_("x" * 9), "b": np.datetime64("2020-01-01")}, tmp_path / "w.pt")
    assert read_torch(tmp_path / "w.pt", Request()) == {"a": None, "b": None}

    class Long:
        def __reduce__(self):
            return np.float64(1).__reduce__()[0], (np.dtype("f8"), b"12345")

    torch.save({"a": Long()}, tmp_path / "long.pt")
    assert refusal(read_torch, tmp_path / "long.pt", Request()).code == "NF101"


def test_a_class_that_is_allowed_does_not_lose_its_arrays(tmp_path):
    """Where more than numbers is needed, arrays of numpy are not passed over in silence: NF122, as before."""
    torch.save({"rate": Fraction(1, 2), "curve": np.arange(4.0)}, tmp_path / "w.pt")
    request = Request(allow_classes=("fractions.Fraction", "numpy.*"))
    assert refusal(read_torch, tmp_path / "w.pt", request).code == "NF122"


# -- candidates


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    ("build", "expected"),
    [
        ("monai.networks.nets:BasicUNet", "monai.networks.nets:BasicUNet"),
        ("monai.networks.nets:UNet", "monai.networks.nets:UNet"),
        ("torchvision.models:resnet18", "torchvision.models:resnet50"),
        ("segmentation_models_pytorch:Unet", "segmentation_models_pytorch:Unet"),
    ],
)
def test_the_error_names_candidates(tmp_path, build, expected):
    """Weights without an architecture are NF112, which names what their names look like."""
    pytest.importorskip(build.partition(":")[0])
    args = {
        "BasicUNet": {"features": (4, 4, 4, 4, 4, 4)},
        "UNet": {"spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": (4, 8), "strides": (2,)},
        "Unet": {"encoder_name": "resnet18", "encoder_weights": None},
    }.get(build.partition(":")[2], {})
    torch.save(open_model(build, arch_args=args).model.state_dict(), tmp_path / "w.pt")
    error = refusal(open_model, str(tmp_path / "w.pt"))
    assert (error.code, expected in error.message) == ("NF112", True)


def test_unknown_names_have_no_candidates():
    """Negative control: names of no known library give no guess."""
    assert candidates(["a.weight", "b.bias"]) == ()


def test_a_torch_archive_that_says_lightning_later_is_no_lightning(tmp_path):
    """Negative control: an ordinary checkpoint is not taken for Lightning's."""
    from normfix.storage.opening.formats import lightning

    torch.save({"w": torch.ones(1)}, tmp_path / "w.pt")
    assert zipfile.is_zipfile(tmp_path / "w.pt")
    assert not lightning.recognises(tmp_path / "w.pt")


@pytest.mark.parametrize("ending", ["safetensors", "bin"])
def test_a_weight_in_two_files_of_a_folder_is_refused(tmp_path, ending):
    """Programs disagree about which of them counts; where each holds its own, both are read."""
    stem = "model" if ending == "safetensors" else "pytorch_model"
    write = save_file if ending == "safetensors" else torch.save
    for number, names in enumerate(("ab", "c")):
        write({name: torch.ones(1) for name in names}, tmp_path / f"{number}.{ending}")
    index = {"weight_map": {"a": f"0.{ending}", "c": f"1.{ending}"}}
    (tmp_path / f"{stem}.{ending}.index.json").write_text(json.dumps(index))
    assert folder_weights(tmp_path, Request()).keys() == set("abc")
    write({name: torch.zeros(1) for name in "bc"}, tmp_path / f"1.{ending}")
    with pytest.raises(NormfixError, match=r"NF101.*holds b as well"):
        folder_weights(tmp_path, Request())


def test_of_a_fold_the_checkpoint_that_nnunet_loads_comes_first(tmp_path):
    """Where the last epoch is the best, both hold the same weights, and the constants go to the one that is loaded."""
    from normfix.storage.opening.formats.nnunet import checkpoint_of, checkpoints_of

    for name in (
        "fold_1/checkpoint_best",
        "fold_0/checkpoint_best",
        "fold_0/checkpoint_final",
        "fold_1/checkpoint_a",
    ):
        path = tmp_path / f"{name}.pth"
        path.parent.mkdir(exist_ok=True)
        path.touch()
    found = [path.relative_to(tmp_path).as_posix() for path in checkpoints_of(tmp_path)]
    assert found == [
        f"fold_{name}.pth"
        for name in ("0/checkpoint_final", "0/checkpoint_best", "1/checkpoint_a", "1/checkpoint_best")
    ]
    assert checkpoint_of(tmp_path) == tmp_path / "fold_0" / "checkpoint_final.pth"
