"""Folders whose configs reach out or ask for too much, one writer for each format, and openers for `attacks`."""

from __future__ import annotations

import json
import shutil
from functools import cache
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

__all__ = ["BIG", "CORPUS", "RESNET", "bundle", "frozen_folder", "hub_folder", "plans_folder", "rebuilt"]

BIG = 1 << 18
"""The largest number that any config may hold."""

RESNET = {
    "architectures": ["ResNetModel"],
    "model_type": "resnet",
    "transformers_version": "5",
    "num_channels": 1,
    "embedding_size": 4,
    "hidden_sizes": [4, 4],
    "depths": [1, 1],
    "layer_type": "basic",
}
_UNET = {
    "_class_name": "UNet2DModel",
    "_diffusers_version": "0.30",
    "block_out_channels": [8],
    "norm_num_groups": 4,
}
_UNET |= {"down_block_types": ["DownBlock2D"], "up_block_types": ["UpBlock2D"], "layers_per_block": 1}
_SMP = {"_model_class": "Unet", "encoder_name": "resnet18", "encoder_weights": "imagenet", "classes": 1}
_PLAIN = "dynamic_network_architectures.architectures.unet.PlainConvUNet"


def rebuilt(path: str) -> nn.Module:
    """Build what a file of a factory and its arguments names, with the hub within reach."""
    import huggingface_hub.constants

    from normfix.records.saved import Source
    from normfix.storage.opening.factories import rebuild

    huggingface_hub.constants.HF_HUB_OFFLINE = False
    spec, args = json.loads(Path(path).read_text())
    return rebuild(Source(kind="factory", spec=spec, args=json.dumps(args)))


def hub_folder(folder: Path, config: dict[str, Any] | str, **files: str) -> Path:
    """Write a config.json, tiny weights under both libraries' names, and other files."""
    folder.mkdir()
    (folder / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    for name in ("model", "diffusion_pytorch_model"):
        save_file({"x": torch.zeros(1)}, folder / f"{name}.safetensors", metadata={"format": "pt"})
    for name, text in files.items():
        (folder / name.replace("__", ".")).write_text(text)
    return folder


def bundle(folder: Path, definition: Any, *, yaml: str = "", **config: Any) -> Path:
    """Write a MONAI bundle of a network_def and whatever it refers to."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    (folder / "configs" / "metadata.json").write_text("{}")
    if yaml:
        (folder / "configs" / "inference.yaml").write_text(yaml)
    else:
        text = json.dumps({"network_def": definition, **config})
        (folder / "configs" / "inference.json").write_text(text)
    torch.save({"a": torch.zeros(1)}, folder / "models" / "model.pt")
    return folder


def plans_folder(folder: Path, **settings: Any) -> Path:
    """Write an nnU-Net model folder with other settings of its architecture."""
    plain = {
        "n_stages": 2,
        "features_per_stage": [4, 8],
        "conv_op": "torch.nn.modules.conv.Conv2d",
        "kernel_sizes": [[3, 3], [3, 3]],
        "strides": [[1, 1], [2, 2]],
        "n_conv_per_stage": [1, 1],
        "n_conv_per_stage_decoder": [1],
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
        "nonlin": "torch.nn.LeakyReLU",
    }
    design = {
        "network_class_name": _PLAIN,
        "arch_kwargs": plain | settings,
        "_kw_requires_import": ["conv_op", "norm_op", "nonlin"],
    }
    (folder / "fold_0").mkdir(parents=True)
    plans = {"configurations": {"2d": {"architecture": design}}}
    (folder / "plans.json").write_text(json.dumps(plans))
    dataset = {"channel_names": {"0": "x"}, "labels": {"background": 0, "a": 1}}
    (folder / "dataset.json").write_text(json.dumps(dataset))
    content = {"network_weights": {"a": torch.zeros(1)}, "init_args": {"configuration": "2d"}}
    torch.save(content, folder / "fold_0" / "checkpoint_final.pth")
    return folder


def frozen_folder(folder: Path, spec: str, args: dict[str, Any]) -> Path:
    """Write what normfix saves of a network, with another factory in its place and its checksum put right."""
    from normfix.records.saved import statement_of

    shutil.copytree(_frozen(folder.parent / "frozen"), folder)
    manifest = json.loads((folder / "normfix.json").read_text())
    manifest["provenance"]["source"] |= {"spec": spec, "args": json.dumps(args)}
    (folder / "normfix.json").write_text(json.dumps(manifest | {"statement": statement_of(manifest)}))
    return folder


@cache
def _frozen(folder: Path) -> Path:
    """Save a converted network."""
    from factories import tiny_unet

    import normfix

    source = normfix.Source(kind="factory", spec="factories:tiny_unet")
    normfix.save(normfix.convert(tiny_unet(), torch.rand(1, 1, 32, 32)), folder, source)
    return folder


def _timm(name: str = "test_resnet", **args: Any) -> dict[str, Any]:
    return {"architecture": name, "num_features": 1, "model_args": {"num_classes": 2, **args}}


_LEVIT = {**RESNET, "architectures": ["LevitModel"], "model_type": "levit", "hidden_sizes": [16, 16, 16]}
_LEVIT |= {"num_attention_heads": [1, 1, 1], "depths": [1, 1, 1], "key_dim": [8, 8, 8]}
_LEVIT |= {"mlp_ratio": [2, 2, 2], "attention_ratio": [2, 2, 2]}

_VIT = {
    "in_channels": 1,
    "patch_size": [1, 1],
    "hidden_size": 8,
    "mlp_dim": 8,
    "num_heads": 1,
    "spatial_dims": 2,
}

CORPUS = {
    # what a module imported, what makes a component, and what computes one
    "bundle of a function that was imported": lambda d: bundle(
        d, {"_target_": "monai.networks.nets.resnet.hf_hub_download", "repo_id": "a/b", "filename": "c"}
    ),
    "bundle of a class that was imported": lambda d: bundle(
        d, {"_target_": "monai.networks.nets.unet.nn.Linear"}
    ),
    "bundle of a function that is defined": lambda d: bundle(
        d, {"_target_": "monai.networks.utils.save_state", "src": {}, "path": "ran"}
    ),
    "bundle whose target is a reference": lambda d: bundle(d, {"_target_": "@t"}, t="os.system"),
    "bundle with a component": lambda d: bundle(
        d, {"_target_": "BasicUNet", "act": {"_target_": "os.system", "command": "touch ran"}}
    ),
    "bundle with a component in a list": lambda d: bundle(
        d, {"_target_": "BasicUNet", "act": ["prelu", [{"_target_": "torch.hub.load"}]]}
    ),
    "bundle in a debugger": lambda d: bundle(d, {"_target_": "BasicUNet", "_mode_": "debug"}),
    "bundle that requires": lambda d: bundle(
        d, {"_target_": "BasicUNet", "_requires_": ["$import antigravity"]}
    ),
    "bundle with a macro of a file": lambda d: bundle(d, {"_target_": "BasicUNet", "act": "%/etc/passwd::x"}),
    "bundle of a tag": lambda d: bundle(
        d, None, yaml="network_def: {_target_: BasicUNet, act: !!python/object/apply:os.system [touch ran]}"
    ),
    "bundle of two definitions": lambda d: bundle(
        d, None, yaml="network_def: {_target_: BasicUNet}\nnetwork_def: {_target_: os.system}"
    ),
    # addresses and paths, under any name
    "bundle with an address": lambda d: bundle(
        d, {"_target_": "HoverNet", "adapt_standard_resnet": True, "pretrained_url": "file:///etc/passwd"}
    ),
    "smp encoder of the hub": lambda d: hub_folder(d, {**_SMP, "encoder_name": "tu-hf-hub:a/b"}),
    "smp encoder of a folder": lambda d: hub_folder(d, {**_SMP, "encoder_name": "tu-LOCAL-DIR:/etc"}),
    "smp checkpoint": lambda d: hub_folder(d, {**_SMP, "checkpoint_path": "weights"}),
    "smp function": lambda d: hub_folder(d, {**_SMP, "_model_class": "from_pretrained"}),
    "smp method": lambda d: hub_folder(d, {**_SMP, "_model_class": "Unet.from_pretrained"}),
    "timm of the hub": lambda d: hub_folder(d, _timm(" hf-hub:a/b")),
    "timm checkpoint": lambda d: hub_folder(d, _timm(checkpoint_path="x")),
    "timm open file": lambda d: hub_folder(d, _timm(checkpoint_path=3)),
    "timm config": lambda d: hub_folder(d, _timm(pretrained_cfg_overlay={"file": "/etc/passwd"})),
    "timm config in a list": lambda d: hub_folder(d, _timm(block_args=[{"cache_dir": "x"}])),
    "timm layer of another place": lambda d: hub_folder(d, _timm(act_layer="torch.hub.load")),
    "transformers of timm's hub": lambda d: hub_folder(
        d,
        {
            **RESNET,
            "architectures": ["TimmWrapperModel"],
            "model_type": "timm_wrapper",
            "architecture": "hf-hub:a/b",
        },
    ),
    "transformers of another config": lambda d: hub_folder(
        d,
        {**RESNET, "configuration_files": ["config.4.0.0.json"]},
        config__4__0__0__json=json.dumps({**RESNET, "auto_map": {"AutoModel": "a/b--c.D"}}),
    ),
    "transformers with an adapter": lambda d: hub_folder(
        d, RESNET, adapter_config__json=json.dumps({"base_model_name_or_path": "a/b", "peft_type": "LORA"})
    ),
    "transformers backbone": lambda d: hub_folder(
        d,
        {
            **RESNET,
            "architectures": ["UperNetForSemanticSegmentation"],
            "model_type": "upernet",
            "backbone_config": {"model_type": "timm_backbone", "backbone": "resnet18"},
        },
    ),
    "transformers code in a part": lambda d: hub_folder(
        d,
        {
            **RESNET,
            "architectures": ["VisionEncoderDecoderModel"],
            "model_type": "vision-encoder-decoder",
            "encoder": {"model_type": "vit", "auto_map": {"AutoModel": "a/b--c.D"}},
            "decoder": {"model_type": "gpt2"},
        },
    ),
    "transformers that changes itself": lambda d: hub_folder(
        d, {**RESNET, "fusion_config": {"patch_embeddings": True}}
    ),
    "diffusers of another kind": lambda d: hub_folder(d, {**_UNET, "_class_name": "AutoModel"}),
    "diffusers in a list": lambda d: hub_folder(d, {**_UNET, "_class_name": ["pipe.Evil", "UNet2DModel"]}),
    "nnunet layer that is a container": lambda d: plans_folder(
        d, conv_op="torch.nn.modules.container.Sequential"
    ),
    "nnunet norm that is a convolution": lambda d: plans_folder(d, norm_op="torch.nn.Conv2d"),
    "nnunet path": lambda d: plans_folder(d, norm_op_kwargs={"eps": "/etc/passwd"}),
    "saved folder of a registered name": lambda d: frozen_folder(
        d, "torchvision.models:get_model", {"name": "resnet18", "weights": "DEFAULT"}
    ),
    "saved folder of a loader's other function": lambda d: frozen_folder(
        d, "normfix.storage.opening.formats.nnunet:prepare", {"name": "os.system"}
    ),
    "saved folder of timm's hub": lambda d: frozen_folder(
        d, "segmentation_models_pytorch:FPN", {"encoder_name": "tu-hf_hub:a/b"}
    ),
    # sizes, counts, depths
    "bundle of many levels": lambda d: bundle(
        d,
        {"_target_": "UNet", "spatial_dims": 2, "in_channels": 1, "out_channels": 1, "channels": [1] * 4000}
        | {"strides": [2] * 3999},
    ),
    "bundle of a large table": lambda d: bundle(
        d, {"_target_": "ViT", **_VIT, "img_size": [BIG, BIG], "num_layers": 1, "pos_embed_type": "sincos"}
    ),
    "bundle of many layers": lambda d: bundle(
        d, {"_target_": "ViT", **_VIT, "img_size": [2, 2], "num_layers": BIG}
    ),
    "bundle of a long text": lambda d: bundle(d, {"_target_": "BasicUNet", "act": "x" * 10_000_000}),
    "bundle of doubled references": lambda d: bundle(
        d,
        {"_target_": "BasicUNet", "features": "@l30"},
        l0=[1, 1],
        **{f"l{i}": [f"@l{i - 1}"] * 2 for i in range(1, 31)},
    ),
    "bundle of an endless text": lambda d: bundle(
        d, {"_target_": "EfficientNet", "blocks_args_str": ["r999999999_k3_s11_e1_i32_o16_se0.25"]}
    ),
    "transformers of many labels": lambda d: hub_folder(d, {**RESNET, "num_labels": 10**9}),
    "transformers of named labels": lambda d: hub_folder(
        d, {**RESNET, "id2label": {str(i): "x" for i in range(600_000)}}
    ),
    "transformers of deep lists": lambda d: hub_folder(
        d, json.dumps(RESNET)[:-1] + ', "a": ' + "[" * 10**6 + "}"
    ),
    "transformers wide": lambda d: hub_folder(d, {**RESNET, "embedding_size": BIG}),
    "transformers deep": lambda d: hub_folder(d, {**RESNET, "depths": [BIG, 1]}),
    "diffusers wide": lambda d: hub_folder(d, {**_UNET, "block_out_channels": [65536]}),
    "diffusers large": lambda d: hub_folder(
        d,
        {
            **_UNET,
            "_class_name": "DiTTransformer2DModel",
            "num_attention_heads": 1,
            "attention_head_dim": 32,
            "num_layers": 0,
            "sample_size": 8192,
            "patch_size": 1,
            "in_channels": 1,
        },
    ),
    "transformers list of all places": lambda d: hub_folder(d, {**_LEVIT, "image_size": 200_000}),
    "bundle of powers of two": lambda d: bundle(
        d,
        {"_target_": "monai.networks.nets.dints.TopologyInstance", "num_blocks": 1, "num_depths": BIG},
    ),
    "timm windows": lambda d: hub_folder(
        d, _timm("swin_tiny_patch4_window7_224", img_size=65536, window_size=16384, embed_dim=8)
    ),
    "smp wide": lambda d: hub_folder(d, {**_SMP, "decoder_channels": [BIG] * 5}),
    "nnunet count": lambda d: plans_folder(d, n_conv_per_stage=2**31 - 1),
    "nnunet kernels": lambda d: plans_folder(d, kernel_sizes=[[BIG, BIG]] * 2),
    "nnunet stages": lambda d: plans_folder(d, n_stages=BIG, features_per_stage=4, kernel_sizes=3, strides=1),
    "nnunet slopes": lambda d: plans_folder(
        d, nonlin="torch.nn.PReLU", nonlin_kwargs={"num_parameters": 10**9}
    ),
}
"""Name -> function (folder) that writes it; opening must be refused, do nothing, and take little."""
