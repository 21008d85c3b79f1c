"""nnU-Net v2 folders: `norm_op` in the plans of the configuration, and one fold's checkpoint under all its names."""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch

from normfix.giving.configs import laid_out
from normfix.giving.gift import Gift, changed, config_changes, copied, key_changes, other_weights
from normfix.giving.switches import switched
from normfix.records.returns import Change
from normfix.records.saved import Source
from normfix.records.sites import Scan
from normfix.storage.opening.configs import read_mapping
from normfix.storage.opening.formats.nnunet import checkpoint_of, folder_of, resolved
from normfix.storage.opening.formats.nnunet import recognises as is_model

__all__ = ["LOADER", "NAME", "advice", "candidates", "recognises", "weights", "write"]

NAME = "nnU-Net model folder"

LOADER = """
import glob, os
(path,) = glob.glob(os.path.join(folder, "fold_*", "*.pth"))
fold = os.path.basename(os.path.dirname(path)).removeprefix("fold_")
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
predictor.initialize_from_trained_model_folder(folder, (fold,), os.path.basename(path))
network = predictor.network
"""


def recognises(original: Path | None) -> bool:
    """Recognise a model folder, or a checkpoint in it."""
    return original is not None and is_model(original)


def weights(original: Path) -> Path:
    """Return the checkpoint."""
    return checkpoint_of(original)


def candidates(source: Source) -> Iterator[Mapping[str, Any]]:
    """Return the settings of the plans with the norm switched."""
    return switched(dict, json.loads(source.args))


def write(draft: Path, gift: Gift) -> tuple[Change, ...]:
    """Copy the folder, switch the norm of the checkpoint's configuration, and swap the weights of its fold."""
    assert gift.original is not None
    folder, checkpoint = folder_of(gift.original), checkpoint_of(gift.original)
    assert folder is not None
    reason = "it holds another network, which has constants of its own: convert and give it back by itself"
    changes = copied(folder, draft, other_weights(checkpoint, reason))
    configuration = str(gift.checkpoint["init_args"]["configuration"])
    settings = gift.args["settings"]
    path = draft / "plans.json"
    plans = read_mapping(path)
    changes += _switched_(plans, configuration, settings)
    path.write_text(laid_out(path.read_text("utf-8"), plans), "utf-8")
    content = copy.copy(gift.checkpoint)
    content["network_weights"] = dict(gift.state)
    if isinstance(content["init_args"].get("plans"), dict):  # training goes on from these
        content["init_args"] = copy.deepcopy(content["init_args"])
        _switched_(content["init_args"]["plans"], configuration, settings)
    name = checkpoint.relative_to(folder)
    torch.save(content, draft / name)
    return (*changes, *key_changes(name.as_posix(), gift.names_before, gift.state))


def advice(scan: Scan) -> str:
    """Say what nnU-Net's predictor does with windows."""
    return (
        "`nnUNetv2_predict_from_modelfolder -m THIS_FOLDER -f FOLD` runs it unchanged, and normalises images as "
        "before. nnU-Net blends overlapping windows and crops nothing, so pixels nearer to a window's border than "
        "the halo are mixed with what lacks context: no `-step_size` makes that vanish. A larger `patch_size` in "
        "plans.json does, which no longer changes the statistics: make it a multiple of the stride and as large as "
        "memory takes; with one of the whole image the result is exact."
    )


def _switched_(plans: dict[str, Any], configuration: str, settings: Mapping[str, Any]) -> Iterator[Change]:
    """Write the settings into the configuration itself, whichever it inherits from, in place."""
    own = plans["configurations"][configuration]
    design = copy.deepcopy(resolved(plans["configurations"], configuration)["architecture"])
    before = design["arch_kwargs"]
    own["architecture"] = {**design, "arch_kwargs": {**before, **settings}}
    place = f"configurations.{configuration}.architecture.arch_kwargs."
    return config_changes("plans.json", place, before, changed(before, settings))
