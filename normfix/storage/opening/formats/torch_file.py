"""What torch.save wrote: a state dict, bare or in a checkpoint, or a whole pickled network."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import nn

from normfix.storage.opening.candidates import require_named
from normfix.storage.opening.pickles import is_torch_file, read_torch
from normfix.storage.opening.request import Loaded, Request, object_source
from normfix.storage.opening.state_dicts import filled

__all__ = ["open_network", "recognises"]


def recognises(path: Path) -> bool:
    """Recognise a file that torch.save wrote, whatever its ending."""
    return path.is_file() and is_torch_file(path)


def open_network(path: Path, request: Request) -> Loaded:
    """Return the pickled network, or build the one the caller names and fill it."""
    content = read_torch(path, request)
    network = content if isinstance(content, nn.Module) else _network_in(content)
    if network is not None:
        return Loaded(network, request.named or object_source(network))
    return filled(content, path, require_named(content, path, request), request)


def _network_in(content: Any) -> nn.Module | None:
    """Return the one network in a checkpoint that pickles it whole, as {"model": network, ...}."""
    values = content.values() if isinstance(content, dict) else ()
    found = [value for value in values if isinstance(value, nn.Module)]
    return found[0] if len(found) == 1 else None
