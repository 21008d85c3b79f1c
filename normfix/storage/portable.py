"""Give a converted network back to its own ecosystem, where its original class computes the same.

That is so where every converted site was a BatchNorm with running statistics: the original class reads new
statistics and weights under the old names. InstanceNorm and its kin have no such names; their class would load
what it knows and silently stay live, so they are refused by name.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch import nn

from normfix.errors import NormfixError
from normfix.networks.calling import in_eval_mode
from normfix.records.plans import Plan
from normfix.records.saved import Source

__all__ = ["require_returnable", "returned", "write_original"]

STATE = "state_dict.pt"


def require_returnable(plan: Plan) -> None:
    """Refuse a plan whose result the original class would not compute.

    Raises:
        NormfixError: NF411, naming the sites.
    """
    lost = [d.site.id for d in plan.converted if not (d.site.layer is not None and d.site.layer.carries)]
    if lost:
        names = ", ".join(lost[:4]) + (", ..." if len(lost) > 4 else "")
        raise NormfixError(
            "NF411",
            f"{len(lost)} converted sites had no running statistics ({names}), so the original class has no place "
            "for the new ones and would stay live without a word. Save the normfix folder (without --portable); its "
            "library's own BatchNorms may hold the constants: normfix give-back.",
            where=plan.model,
        )


def returned(model: nn.Module, original: nn.Module) -> nn.Module:
    """Return the original network with the converted one's weights and statistics.

    Args:
        model: the converted network.
        original: a fresh network of the original class, filled in place.

    Raises:
        NormfixError: NF412 if the converted network lacks a name that the original needs.
    """
    own, new = original.state_dict().keys(), model.state_dict()
    missing = [name for name in own if name not in new]
    if missing:
        raise NormfixError(
            "NF412",
            f"its state has no {', '.join(missing[:4])}, which its original class needs.",
            where=STATE,
        )
    original.load_state_dict({name: new[name] for name in own}, strict=True)
    return in_eval_mode(original)


def write_original(folder: Path, network: nn.Module, source: Source) -> Path:
    """Write a network as its own library does: save_pretrained, timm's files, or a state dict.

    Returns:
        What `open_model` opens again.
    """
    save_pretrained = getattr(network, "save_pretrained", None)
    if callable(save_pretrained):  # transformers, diffusers, segmentation-models-pytorch
        save_pretrained(str(folder))
        return folder
    if source.spec.startswith("timm:"):
        from timm.models import save_for_hf

        args = json.loads(source.args)
        args = {
            name: value for name, value in args.items() if not name.startswith(("pretrained", "checkpoint"))
        }
        save_for_hf(network, str(folder), model_args=args, safe_serialization=True)
        return folder
    torch.save(network.state_dict(), folder / STATE)
    return folder / STATE
