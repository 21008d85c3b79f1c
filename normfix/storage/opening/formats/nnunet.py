"""nnU-Net: a trained model folder (plans.json, dataset.json, fold_X/checkpoint_*.pth) or one of its checkpoints.

The plans name the network's class and its parts; only classes of nnU-Net's own package of architectures and
layers of torch.nn are looked up, whatever the plans say.
"""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from normfix.errors import NormfixError
from normfix.networks.provenance import declare_window_
from normfix.storage.opening.configs import read_mapping
from normfix.storage.opening.pickles import read_torch
from normfix.storage.opening.request import Loaded, Request, factory
from normfix.storage.opening.state_dicts import filled

__all__ = [
    "checkpoint_of",
    "checkpoints_of",
    "folder_of",
    "network",
    "open_network",
    "prepare",
    "recognises",
    "resolved",
]

_CLASSES = ("PlainConvUNet", "ResidualEncoderUNet", "ResidualUNet")
_HOME = "dynamic_network_architectures.architectures.unet"
_PACKAGE = "dynamic_network_architectures."
_STANDARD = "nnUNetTrainer"
_LOADED = "checkpoint_final.pth"
_MOST = 32
"""The most configurations that one inherits from, and the most stages of one of old."""
_LAYERS: Mapping[str, tuple[str, ...]] = {
    "conv_op": ("conv",),
    "norm_op": ("batchnorm", "instancenorm", "normalization"),
    "dropout_op": ("dropout",),
    "nonlin": ("activation",),
}
"""The settings that name layers, and the modules of torch.nn.modules that define such layers."""


def recognises(path: Path) -> bool:
    """Recognise a folder with plans.json, or a checkpoint in a fold of such a folder."""
    return folder_of(path) is not None


def open_network(path: Path, request: Request) -> Loaded:
    """Build the network that the plans describe and fill it with the fold's weights, deep supervision off."""
    folder = folder_of(path)
    assert folder is not None
    checkpoint = checkpoint_of(path)
    content = read_torch(checkpoint, request)
    if request.named is not None:
        return filled(content, checkpoint, request.named, request)
    try:
        name = str(content["init_args"]["configuration"])
        args, patch = _arguments(folder, name), _patch(folder, name)
    except (KeyError, TypeError, ValueError) as error:
        raise NormfixError(
            "NF120",
            f"its plans lack what builds the network ({type(error).__name__}: {error}). "
            "nnUNetv2_plan_experiment writes them anew; or name the network with --arch.",
            where=str(folder / "plans.json"),
        ) from error
    loaded = filled(
        {"network_weights": content["network_weights"]},
        checkpoint,
        factory(f"{__name__}:network", args),
        request,
    )
    declare_window_(loaded.model, patch)
    notes = [
        *loaded.notes,
        f"{checkpoint}: nnU-Net scales its images before the network; state it with --scale.",
    ]
    trainer = str(content.get("trainer_name", _STANDARD))
    if trainer != _STANDARD:
        notes.append(
            f"{checkpoint}: trained by {trainer}; it was taken to build the network as {_STANDARD} does."
        )
    return Loaded(loaded.model, loaded.source, tuple(notes))


def network(
    name: str, inputs: int, outputs: int, settings: Mapping[str, Any], imported: list[str]
) -> nn.Module:
    """Build an architecture of nnU-Net's.

    Args:
        name: its class, with or without modules.
        inputs: channels of the image.
        outputs: channels of the prediction.
        settings: what the plans call arch_kwargs.
        imported: those of the settings that name a layer of torch.nn.
    """
    kind = _class(name)
    parts = {key: _layer(key, value) if key in imported else value for key, value in settings.items()}
    model = kind(input_channels=inputs, num_classes=outputs, **{**parts, "deep_supervision": False})
    assert isinstance(model, nn.Module)
    return model


def prepare(name: str, **settings: Any) -> None:
    """Import what building the network needs."""
    _class(name)


def _class(name: str) -> Any:
    home, _, short = name.rpartition(".")
    # nnU-Net imports the module that is named, and so would the tool that a network is given back to
    if short not in _CLASSES or (home and not f"{home}.".startswith(_PACKAGE)):
        raise ValueError(f"{name} is none of nnU-Net's architectures {', '.join(_CLASSES)}")
    return getattr(importlib.import_module(_HOME), short)


def _layer(setting: str, name: str | None) -> type[nn.Module] | None:
    """Return the layer of torch.nn that a setting names, if it is one for that setting."""
    if name is None:
        return None
    kind = getattr(nn, str(name).rpartition(".")[2], None)
    homes = tuple(f"torch.nn.modules.{home}" for home in _LAYERS.get(setting, ()))
    if not str(name).startswith("torch.nn.") or not isinstance(kind, type) or kind.__module__ not in homes:
        raise ValueError(f"{name} is no layer of torch.nn for {setting}")
    return kind


def _arguments(folder: Path, configuration: str) -> dict[str, Any]:
    plans, dataset = read_mapping(folder / "plans.json"), read_mapping(folder / "dataset.json")
    chosen = resolved(plans["configurations"], configuration)
    channels = len(dataset["modality"] if "modality" in dataset else dataset["channel_names"])
    labels = _labels(dataset)
    if chosen.get("previous_stage"):  # a cascade gets the coarse segmentation's foreground too
        channels += len(labels) - 1
    design = chosen["architecture"] if "architecture" in chosen else _of_old(chosen)
    return {
        "name": str(design["network_class_name"]),
        "inputs": channels,
        "outputs": _regions(dataset) or len(labels),
        "settings": dict(design["arch_kwargs"]),
        "imported": list(design["_kw_requires_import"]),
    }


def _patch(folder: Path, configuration: str) -> object:
    """Return the extents of the windows in training, as the plans state them."""
    return resolved(read_mapping(folder / "plans.json")["configurations"], configuration).get("patch_size")


def _of_old(chosen: Mapping[str, Any]) -> dict[str, Any]:
    """Return the architecture that nnU-Net makes of plans from before version 2.4, as its plans_handler.py does."""
    dimensions = len(chosen["patch_size"])
    if dimensions not in (2, 3):
        raise ValueError(f"patch_size has {dimensions} axes")
    name, stages = str(chosen["UNet_class_name"]), len(chosen["n_conv_per_stage_encoder"])
    if stages > _MOST:
        raise ValueError(f"it has more than {_MOST} stages")
    depth = "n_conv_per_stage" if name == "PlainConvUNet" else "n_blocks_per_stage"
    base, most = int(chosen["UNet_base_num_features"]), int(chosen["unet_max_num_features"])
    settings = {
        "n_stages": stages,
        "features_per_stage": [min(base * 2**stage, most) for stage in range(stages)],
        "conv_op": f"torch.nn.modules.conv.Conv{dimensions}d",
        "kernel_sizes": chosen["conv_kernel_sizes"],
        "strides": chosen["pool_op_kernel_sizes"],
        depth: chosen["n_conv_per_stage_encoder"],
        "n_conv_per_stage_decoder": chosen["n_conv_per_stage_decoder"],
        "conv_bias": True,
        "norm_op": f"torch.nn.modules.instancenorm.InstanceNorm{dimensions}d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    }
    return {"network_class_name": name, "arch_kwargs": settings, "_kw_requires_import": list(_LAYERS)}


def resolved(configurations: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Return a configuration with what it inherits, each ancestor once."""
    chain = [name]
    while (parent := configurations[chain[-1]].get("inherits_from")) is not None:
        if parent in chain or len(chain) > _MOST:
            raise ValueError(f"configuration {parent} inherits from itself, or from more than {_MOST}")
        chain.append(parent)
    merged: dict[str, Any] = {}
    for ancestor in reversed(chain):
        merged.update(configurations[ancestor])
    return merged


def _labels(dataset: Mapping[str, Any]) -> set[int]:
    found: set[int] = set()
    for label, value in dataset["labels"].items():
        if label != "ignore":
            found.update(map(int, value) if isinstance(value, list) else [int(value)])
    return found


def _regions(dataset: Mapping[str, Any]) -> int:
    """Return how many regions are predicted, or 0 if classes are."""
    values = {label: v for label, v in dataset["labels"].items() if label != "ignore"}
    if not any(isinstance(v, list) and len(v) > 1 for v in values.values()):
        return 0
    return sum(v not in (0, [0]) for v in values.values())


def folder_of(path: Path) -> Path | None:
    """Return the folder of plans that a path is, or that a fold's checkpoint belongs to."""
    places = [path] if path.is_dir() else [path.parent, path.parent.parent]
    return next((p for p in places if (p / "plans.json").is_file() and (p / "dataset.json").is_file()), None)


def checkpoints_of(folder: Path, name: str = "*") -> tuple[Path, ...]:
    """Return the checkpoint itself, or those of all folds in a folder, of each first what nnU-Net loads."""
    if folder.is_file():
        return (folder,)
    found = sorted(
        folder.glob(f"fold_*/checkpoint_{name}.pth"),
        key=lambda path: (path.parent, path.name != _LOADED, path.name),
    )
    # opening a pipe waits for ever
    return tuple(path for path in found if path.is_file())


def checkpoint_of(folder: Path) -> Path:
    """Return the checkpoint itself, or the only one in a folder.

    Raises:
        NormfixError: NF119 if the folder holds several, or none.
    """
    found = checkpoints_of(folder, "final") or checkpoints_of(folder)
    if len(found) != 1:
        names = ", ".join(str(p.relative_to(folder)) for p in found) or "none"
        raise NormfixError(
            "NF119",
            f"the folder holds these checkpoints: {names}. Give one of them as MODEL.",
            where=str(folder),
        )
    return found[0]
