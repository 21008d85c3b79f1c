"""One small module per format: `recognises(path)` looks, `open_network(path, request)` loads.

To add a format, write such a module, and name it in FORMATS: the first that recognises a file or folder opens
it. Where a file says how to build its network, the module also has `network(...)`, which builds it from plain
values that it checks itself, so that a saved folder may name it (`normfix.storage.opening.formats.unet3d:network`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Protocol

from normfix.storage.opening.formats import (
    bioimageio,
    diffusers_folder,
    exported,
    lightning,
    monai_bundle,
    nnunet,
    onnx,
    safetensors_file,
    smp_folder,
    timm_folder,
    torch_file,
    torchscript,
    transformers_folder,
    unet3d,
)
from normfix.storage.opening.request import Loaded, Request

__all__ = ["FORMATS", "Format"]


class Format(Protocol):
    """What each module of this package offers."""

    def recognises(self, path: Path) -> bool:
        """Tell whether a file or folder is of this format, reading little and running nothing."""
        ...

    def open_network(self, path: Path, request: Request) -> Loaded:
        """Load it as the caller wants it."""
        ...


FORMATS: tuple[Format, ...] = (
    bioimageio,
    nnunet,
    unet3d,
    monai_bundle,
    smp_folder,
    timm_folder,
    diffusers_folder,
    transformers_folder,
    safetensors_file,
    torchscript,
    onnx,
    exported,
    lightning,
    torch_file,
)
"""The formats, most particular first."""
