"""What a path or name of a network can mean, told without torch, so that a wrong one is said at once."""

from __future__ import annotations

import os
from pathlib import Path

from normfix.errors import NormfixError
from normfix.networks.naming import is_named, require_findable

__all__ = ["ENDINGS", "HUB", "is_factory", "require_spec"]

HUB = "hf-hub:"

ENDINGS = (".pt", ".pth", ".ckpt", ".safetensors", ".pytorch", ".pt2", ".bin")
"""Of files with weights."""

_TIMM = "timm:"


def is_factory(spec: str) -> bool:
    """Tell whether it names what builds a network, and no file.

    >>> is_factory("timm:resnet18"), is_factory("nets.py:UNet"), is_factory("net.pt")
    (True, True, False)
    """
    return is_named(spec) and Path(spec).suffix not in ENDINGS


def require_spec(spec: str) -> None:
    """Refuse a name of nothing, before anything is imported or read for it.

    Raises:
        NormfixError: NF101 for what is neither a file nor a name, NF111 for a factory that is nowhere.
    """
    if spec.startswith(HUB) or os.path.exists(spec):  # noqa: PTH110 - Path.exists raises where a name is too long
        return
    if not is_factory(spec):
        raise NormfixError(
            "NF101",
            "no such file, and no name of the form timm:NAME, hf-hub:ORG/NAME or pkg.module:factory.",
            where=spec[:200],
        )
    if not spec.startswith(_TIMM):
        require_findable(spec)
