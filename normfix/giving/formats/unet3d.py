"""pytorch-3dunet, and panseg's folders of its models: g and i become b in `layer_order`, whatever the order."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from normfix.giving.configs import set_in
from normfix.giving.formats.described import builder
from normfix.giving.gift import (
    Gift,
    changed,
    config_changes,
    copied,
    key_changes,
    other_weights,
    write_tensors,
)
from normfix.records.returns import Change
from normfix.records.saved import Source
from normfix.records.sites import Scan
from normfix.storage.opening.formats.unet3d import checkpoint_of, configs_of
from normfix.storage.opening.formats.unet3d import recognises as is_run

__all__ = ["LOADER", "NAME", "advice", "builder", "candidates", "place", "recognises", "weights", "write"]

NAME = "pytorch-3dunet run"
_ORDER, _DEFAULT = "layer_order", "gcr"

LOADER = """
import os, yaml
from pytorch3dunet.unet3d.model import get_model
from pytorch3dunet.unet3d.utils import load_checkpoint
names = [f"{s}.{e}" for s in ("config", "train_config", "config_train") for e in ("yml", "yaml")]
places = [os.path.join(folder, "logs", name) for name in names]
config = next(p for p in [*(os.path.join(folder, n) for n in names), *places] if os.path.isfile(p))
with open(config, encoding="utf-8") as settings:
    network = get_model(yaml.safe_load(settings)["model"])
load_checkpoint(os.path.join(folder, file), network)
"""


def recognises(original: Path | None) -> bool:
    """Recognise a run."""
    return original is not None and is_run(original)


def weights(original: Path) -> tuple[Path, ...]:
    """Return the checkpoint."""
    return (checkpoint_of(original),)


def place(weights: Path | None) -> str:
    """Return the name of the checkpoint."""
    assert weights is not None
    return weights.name


def candidates(source: Source) -> Iterator[Mapping[str, Any]]:
    """Return the arguments with the one order of layers that has BatchNorms where the norms are."""
    args = json.loads(source.args)
    yield {**args, _ORDER: re.sub("[gi]", "b", args.get(_ORDER, _DEFAULT))}


def write(draft: Path, gifts: Sequence[Gift]) -> tuple[Change, ...]:
    """Copy the run, switch the order of layers in its configuration, and swap the weights."""
    (gift,) = gifts
    assert gift.original is not None
    checkpoint = checkpoint_of(gift.original)
    folder, config = checkpoint.parent, configs_of(checkpoint.parent)[0]
    left_out = other_weights([checkpoint], "it holds other weights, of the original network")
    changes = copied(folder, draft, left_out)
    if not config.is_relative_to(folder):
        (draft / config.name).write_bytes(config.read_bytes())
    target = draft / (config.relative_to(folder) if config.is_relative_to(folder) else config.name)
    new = changed(gift.before, gift.args)
    set_in(target, "model", new)
    changes += config_changes(str(target.relative_to(draft)), "model.", gift.before, new)
    write_tensors({**gift.checkpoint, "model_state_dict": dict(gift.state)}, draft / gift.file)
    return (*changes, *key_changes(gift.file, gift.names_before, gift.state))


def advice(scan: Scan) -> str:
    """Say what predict3dunet does with patches."""
    assert scan.halo_rounded is not None
    assert scan.stride is not None
    flat = len(scan.stride) == 2
    sides = [max(pair) for pair in scan.halo_rounded]
    halo = [0, *sides] if flat else sides
    steps = [1, *scan.stride] if flat else [*scan.stride]
    return (
        "In the configuration of `predict3dunet`, set `model.layer_order` as in this folder's, and in "
        f"`loaders.test.slice_builder` `halo_shape: {halo}` with `stride_shape` equal to `patch_shape`, both "
        f"multiples of {steps}: it crops the halo, so its result is that of the whole image. Only within the halo of "
        "the image's own border it is another, because predict3dunet mirrors the image there, where the network pads "
        "zeros."
    )
