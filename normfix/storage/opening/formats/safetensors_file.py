"""A .safetensors file: tensors and their names, which need an architecture."""

from __future__ import annotations

from pathlib import Path

from normfix.storage.opening.candidates import require_named
from normfix.storage.opening.request import Loaded, Request
from normfix.storage.opening.state_dicts import filled
from normfix.storage.opening.tensors import read_weights

__all__ = ["open_network", "recognises"]


def recognises(path: Path) -> bool:
    """Recognise a file of that ending."""
    return path.is_file() and path.suffix == ".safetensors"


def open_network(path: Path, request: Request) -> Loaded:
    """Build the network that the caller names and fill it."""
    weights = read_weights(path)
    return filled(weights, path, require_named(weights, path, request), request)
