"""pytorch-3dunet: a checkpoint (best_checkpoint.pytorch) beside the config.yml it was trained with."""

from __future__ import annotations

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from normfix.errors import NormfixError
from normfix.networks.provenance import declare_window_
from normfix.storage.opening.configs import read_mapping
from normfix.storage.opening.pickles import is_torch_file, read_torch
from normfix.storage.opening.request import Loaded, Request, factory
from normfix.storage.opening.state_dicts import filled

__all__ = ["CLASSES", "checkpoint_of", "configs_of", "network", "open_network", "prepare", "recognises"]

CLASSES = ("UNet3D", "ResidualUNet3D", "ResidualUNetSE3D", "UNet2D", "ResidualUNet2D")
_CHECKPOINTS = ("best_checkpoint.pytorch", "last_checkpoint.pytorch")


def recognises(path: Path) -> bool:
    """Recognise a *.pytorch file with a config beside or above it, or a folder with both."""
    if path.is_dir():
        return any((path / name).is_file() for name in _CHECKPOINTS) and bool(configs_of(path))
    return path.suffix == ".pytorch" and bool(configs_of(path.parent)) and is_torch_file(path)


def open_network(path: Path, request: Request) -> Loaded:
    """Build the network that the config's `model` section describes and fill it with the checkpoint."""
    path = checkpoint_of(path)
    content = read_torch(path, request)
    if request.named is not None:
        return filled(content, path, request.named, request)
    config = configs_of(path.parent)[0]
    said = read_mapping(config)
    model = said.get("model")
    if not isinstance(model, dict) or model.get("name") not in CLASSES:
        raise NormfixError(
            "NF120",
            f"its section model names none of {', '.join(CLASSES)}. Name the network with --arch.",
            where=str(config),
        )
    loaded = filled(content, path, factory(f"{__name__}:network", model), request)
    declare_window_(loaded.model, _patch(said, "2D" in model["name"]))
    return loaded


def checkpoint_of(path: Path) -> Path:
    """Return the checkpoint of a run: the file itself, or the best in a folder."""
    if path.is_file():
        return path
    return next(path / name for name in _CHECKPOINTS if (path / name).is_file())


def network(name: str, **settings: Any) -> nn.Module:
    """Build a network of pytorch-3dunet from the section `model` of its config."""
    model = _class(name)(**settings)
    assert isinstance(model, nn.Module)
    return model


def _patch(config: Mapping[str, Any], flat: bool) -> object:
    """Return the extents of the windows in training; of a network in 2D the config states a depth of 1 before them."""
    found: Any = config
    for name in ("loaders", "train", "slice_builder", "patch_shape"):
        found = found.get(name) if isinstance(found, Mapping) else None
    return found[-2:] if flat and isinstance(found, list) else found


def prepare(name: str, **settings: Any) -> None:
    """Import what building the network needs."""
    _class(name)


def _class(name: str) -> Any:
    if name not in CLASSES:
        raise ValueError(f"{name} is none of {', '.join(CLASSES)}")
    return getattr(importlib.import_module("pytorch3dunet.unet3d.model"), name)


def configs_of(folder: Path) -> list[Path]:
    """Return config files with a section `model`, those beside the checkpoint first."""
    stems = ("config", "train_config", "config_train")  # the last is panseg's
    names = [f"{stem}.{ending}" for stem in stems for ending in ("yml", "yaml")]
    places = (folder, folder / "logs", folder.parent)
    return [place / name for place in places for name in names if (place / name).is_file()]
