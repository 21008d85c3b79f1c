"""Guess from the names of weights which library's network they belong to, as a hint and never as a decision."""

from __future__ import annotations

import re
from collections.abc import Collection
from itertools import islice
from pathlib import Path
from typing import Any

from normfix.errors import NormfixError, printable
from normfix.records.saved import Source
from normfix.storage.opening.request import Request, factory
from normfix.storage.opening.state_dicts import entries, weights_in

__all__ = ["candidates", "require_named"]

_SIGNS: tuple[tuple[tuple[str, ...], str], ...] = (
    (
        ("segmentation_head.0.weight", "decoder."),
        "segmentation_models_pytorch:Unet (or another of its classes)",
    ),
    (("backbone.", "classifier."), "torchvision.models.segmentation:deeplabv3_resnet50 (or fcn_resnet50)"),
    (("conv_0.conv_0.", "upcat_"), "monai.networks.nets:BasicUNet"),
    (("model.0.conv.", "model.1.submodule."), "monai.networks.nets:UNet"),
    (("convInit.", "down_layers."), "monai.networks.nets:SegResNet"),
    (("input_block.conv1.", "skip_layers."), "monai.networks.nets:DynUNet"),
    (
        ("encoder.stages.", "decoder.stages.", "decoder.seg_layers."),
        "nnU-Net (give the folder with plans.json)",
    ),
    (
        ("encoders.0.basic_module.", "final_conv."),
        "pytorch3dunet.unet3d.model:UNet3D (give the folder of its config)",
    ),
    (("time_embedding.", "down_blocks."), "diffusers:UNet2DConditionModel (or UNet2DModel)"),
    (("encoder.down_blocks.", "decoder.up_blocks."), "diffusers:AutoencoderKL"),
    (("decode_head.", ".encoder."), "transformers:SegformerForSemanticSegmentation"),
    (("conv1.weight", "bn1.weight", "layer4."), "torchvision.models:resnet50 or timm:resnet50"),
    (("stem.", "stages.", "head."), "timm:convnext_tiny (or another of its networks)"),
    (("conv_stem.", "blocks."), "timm:efficientnet_b0 (or another of its networks)"),
)
"""Words in names that stand together in one library's networks, and what builds these."""

_NAMES, _CHARACTERS = 10_000, 500_000
"""How much of the names is looked through for words; it is a hint, and a file may hold megabytes of names."""


def require_named(content: Any, path: Path, request: Request, args: dict[str, Any] | None = None) -> Source:
    """Return the architecture that the caller names.

    Args:
        content: what the file holds, for a guess at what may build it.
        path: the file.
        request: what the caller names.
        args: arguments that the file gives, where the caller gives none.

    Raises:
        NormfixError: NF112 if the caller names none, with candidates; NF101 if there are no weights to fill.
    """
    if request.named is not None:
        given = request.arch_args is not None or not args or request.network is not None
        return request.named if given else factory(str(request.arch), args or {})
    weights = weights_in(content, path, request)
    names = [name for group in weights.values() for name in group]
    found = candidates(names)
    guess = (
        f" The names look like {' or '.join(found[:3])}."
        if found
        else f" Its names begin with {_first(names)}."
    )
    sets = f" Sets of weights in it: {', '.join(entries(content))}." if len(weights) > 1 else ""
    raise NormfixError(
        "NF112",
        f"the file holds {len(names)} tensors but not the network. Name it: --arch pkg.module:factory or --arch "
        f"timm:NAME, with --arch-args '{{\"...\": ...}}'.{guess}{sets}",
        where=str(path),
    )


def candidates(names: Collection[str]) -> tuple[str, ...]:
    """Return what may build a network with weights of these names, most telling first.

    >>> candidates(["conv_0.conv_0.conv.weight", "upcat_4.convs.conv_0.conv.weight"])
    ('monai.networks.nets:BasicUNet',)
    """
    text = "\n".join(islice(names, _NAMES))[:_CHARACTERS]
    return tuple(
        answer
        for signs, answer in _SIGNS
        if all(re.search(rf"(^|\.|\b){re.escape(s)}", text, re.M) for s in signs)
    )


def _first(names: list[str]) -> str:
    return ", ".join(printable(name[:100]) for name in sorted(names)[:3])
