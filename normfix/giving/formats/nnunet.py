"""nnU-Net v2 folders: `norm_op` in the plans of the configuration, and the folds' checkpoints under all their names.

Plans from before nnU-Net 2.4 name no norm: there nnU-Net's own trainer with BatchNorms, nnUNetTrainerBN, is named in
the checkpoint instead, and the plans stay as they are.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from normfix.errors import NormfixError
from normfix.giving.configs import laid_out
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
from normfix.giving.switches import switched
from normfix.records.returns import Change
from normfix.records.saved import Source
from normfix.records.sites import Scan
from normfix.records.spans import round_up
from normfix.storage.opening.configs import read_mapping
from normfix.storage.opening.formats.nnunet import checkpoints_of, folder_of, resolved
from normfix.storage.opening.formats.nnunet import recognises as is_model

__all__ = ["LOADER", "NAME", "advice", "builder", "candidates", "place", "recognises", "weights", "write"]

NAME = "nnU-Net model folder"
_BATCH_TRAINER = "nnUNetTrainerBN"

LOADER = """
import os
fold, name = os.path.split(file)
from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
predictor = nnUNetPredictor(device=torch.device("cpu"), perform_everything_on_device=False)
predictor.initialize_from_trained_model_folder(folder, (fold.removeprefix("fold_"),), name)
network = predictor.network
"""


def recognises(original: Path | None) -> bool:
    """Recognise a model folder, or a checkpoint in it."""
    return original is not None and is_model(original)


def weights(original: Path) -> tuple[Path, ...]:
    """Return the checkpoints of all folds, or the one that is named."""
    return checkpoints_of(original)


def place(weights: Path | None) -> str:
    """Return the name of a fold's checkpoint in its folder."""
    assert weights is not None
    folder = folder_of(weights)
    assert folder is not None
    return weights.relative_to(folder).as_posix()


def candidates(source: Source) -> Iterator[Mapping[str, Any]]:
    """Return the settings of the plans with the norm switched."""
    return switched(dict, json.loads(source.args))


def write(draft: Path, gifts: Sequence[Gift]) -> tuple[Change, ...]:
    """Copy the folder, switch the norm of the checkpoints' configuration, and swap the weights of their folds."""
    assert gifts[0].original is not None
    folder = folder_of(gifts[0].original)
    assert folder is not None
    reason = "it holds another network, which has constants of its own: convert it too, and give all at once"
    changes = copied(folder, draft, other_weights([folder / gift.file for gift in gifts], reason))
    path = draft / "plans.json"
    plans = read_mapping(path)
    for gift in gifts:
        changes += _plans_switched_(plans, gift)
        changes += _saved(draft, gift)
    if plans != read_mapping(path):
        path.write_text(laid_out(path.read_text("utf-8"), plans), "utf-8")
    return tuple(changes)


def advice(scan: Scan) -> str:
    """Say what nnU-Net's predictor does with windows."""
    assert scan.stride is not None
    assert scan.halo_rounded is not None
    large = [round_up(4 * max(pair), step) for pair, step in zip(scan.halo_rounded, scan.stride, strict=True)]
    return (
        "`nnUNetv2_predict_from_modelfolder -m THIS_FOLDER -f FOLDS` runs it unchanged, and normalises images as "
        "before. nnU-Net blends overlapping windows and crops nothing, so pixels nearer to a window's border than "
        "the halo are mixed with what lacks context. Leave `-step_size` at 0.5: there each of them is in the middle of "
        "another window, and the border counts little; at 1 it counts in full. And make `patch_size` in plans.json at "
        f"least four halos, {large}, in multiples of {list(scan.stride)}, which no longer changes the statistics: then "
        "what is left is about the half precision that nnU-Net adds up in. One of the whole image is exact to that."
    )


def _saved(draft: Path, gift: Gift) -> Iterator[Change]:
    """Write a checkpoint with other weights, and with what builds its network now."""
    content = copy.copy(gift.checkpoint)
    content["network_weights"] = dict(gift.state)
    content["init_args"] = copy.deepcopy(content["init_args"])
    plans = content["init_args"].get("plans")
    if not isinstance(plans, dict):
        plans = read_mapping(draft / "plans.json")
    with _as_plans(gift.file):
        named = _names_its_norm(plans, gift)
    if named:
        list(_plans_switched_(plans, gift))  # training goes on from these
    else:
        new = {"trainer_name": _BATCH_TRAINER}
        yield from config_changes(gift.file, "", content, new)
        content.update(new)
    write_tensors(content, draft / gift.file)
    yield from key_changes(gift.file, gift.names_before, gift.state)


def _names_its_norm(plans: Mapping[str, Any], gift: Gift) -> bool:
    return "architecture" in resolved(plans["configurations"], _configuration(gift))


def _configuration(gift: Gift) -> str:
    return str(gift.checkpoint["init_args"]["configuration"])


def _plans_switched_(plans: dict[str, Any], gift: Gift) -> list[Change]:
    """Write the settings into the configuration itself, whichever it inherits from, in place; not into its heirs."""
    with _as_plans(gift.file):
        if not _names_its_norm(plans, gift):
            return []
        return _switched_(plans["configurations"], _configuration(gift), gift.args["settings"])


@contextmanager
def _as_plans(file: str) -> Iterator[None]:
    """Refuse plans of which another configuration, or a checkpoint's own copy, is not as nnU-Net writes them.

    Raises:
        NormfixError: NF120.
    """
    try:
        yield
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise NormfixError(
            "NF120",
            f"its plans, or those in it, are not as nnU-Net writes them ({reason}). nnUNetv2_plan_experiment writes "
            "them anew; or leave out --original.",
            where=file,
        ) from error


def _switched_(configurations: dict[str, Any], name: str, settings: Mapping[str, Any]) -> list[Change]:
    designs = {other: resolved(configurations, other).get("architecture") for other in configurations}
    design = designs[name]
    assert design is not None
    before = design["arch_kwargs"]
    configurations[name]["architecture"] = {
        **copy.deepcopy(design),
        "arch_kwargs": {**before, **settings},
    }
    place = f"configurations.{name}.architecture.arch_kwargs."
    changes = list(config_changes("plans.json", place, before, changed(before, settings)))
    for other, own in designs.items():
        if other != name and resolved(configurations, other).get("architecture") != own:
            configurations[other]["architecture"] = copy.deepcopy(own)
            place = f"configurations.{other}."
            changes += config_changes("plans.json", place, {}, {"architecture": own})
    return changes
