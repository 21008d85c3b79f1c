"""Lightning checkpoints: weights of the whole LightningModule, and the hyperparameters it was made with.

`--arch` may name the LightningModule or the network inside it: the prefix of its attribute is found. With
averaged weights in the file (Lightning's WeightAveraging keeps both), `--weights` says which.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normfix.loading import archives
from normfix.loading.candidates import require_named
from normfix.loading.pickles import read_torch
from normfix.loading.request import Loaded, Request
from normfix.loading.state_dicts import filled

__all__ = ["open_network", "recognises"]

_SIGN = b"pytorch-lightning_version"


def recognises(path: Path) -> bool:
    """Recognise a torch file that says which Lightning wrote it."""
    return path.is_file() and _SIGN in archives.inventory(path).pickle


def open_network(path: Path, request: Request) -> Loaded:
    """Build the network or LightningModule that the caller names, with the file's hyperparameters."""
    content = read_torch(path, request)
    kept = {"state_dict": content.get("state_dict")}
    if "current_model_state" in content:  # then state_dict is the moving average
        kept = {"averaged": content.get("state_dict"), "current": content["current_model_state"]}
    args = _hyperparameters(content, request)
    loaded = filled(kept, path, require_named(kept, path, request, args), request, lent=bool(args))
    used = f"{path.name}: arguments {', '.join(args)} were taken from its hyper_parameters." if args else ""
    return Loaded(loaded.model, loaded.source, loaded.notes + ((used,) if used else ()))


def _hyperparameters(content: Mapping[str, Any], request: Request) -> dict[str, Any]:
    """Return the stored hyperparameters that the named factory takes, unless the caller gives arguments."""
    stored = content.get("hyper_parameters")
    if not isinstance(stored, Mapping) or request.arch is None or request.arch_args is not None:
        return {}
    takes = _parameters(request.arch)
    return {key: value for key, value in stored.items() if key in takes and _is_plain(value)}


def _parameters(spec: str) -> set[str]:
    """Return the names of a factory's parameters; none where it cannot be imported, which building reports."""
    module, _, attribute = spec.partition(":")
    try:
        found: Any = importlib.import_module(module)
        for part in attribute.split("."):
            found = getattr(found, part)
        return set(inspect.signature(found).parameters)
    except Exception:  # noqa: BLE001 - whatever is wrong with the factory, build says it
        return set()


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
