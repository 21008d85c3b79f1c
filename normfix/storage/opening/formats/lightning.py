"""Lightning checkpoints: weights of the whole LightningModule, and the hyperparameters it was made with.

`--arch` may name the LightningModule or the network inside it: the prefix of its attribute is found. With
averaged weights in the file (Lightning's WeightAveraging keeps both), `--weights` says which.
"""

from __future__ import annotations

import inspect
import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from normfix.errors import NormfixError, printable
from normfix.networks.naming import named
from normfix.storage.opening import archives
from normfix.storage.opening.candidates import require_named
from normfix.storage.opening.pickles import read_torch
from normfix.storage.opening.request import Loaded, Request
from normfix.storage.opening.state_dicts import filled

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
    args, left = _hyperparameters(content, request)
    network = require_named(kept, path, request, args)
    try:
        loaded = filled(kept, path, network, request, lent=bool(args))
    except NormfixError as error:
        if not left:
            raise
        message = f"{error.message} {_said_of(left)} Give them with --arch-args."
        raise NormfixError(error.code, message, where=error.where) from error
    notes = (
        [f"{path.name}: arguments {', '.join(args)} were taken from its hyper_parameters."] if args else []
    )
    notes += [f"{path.name}: {_said_of(left)}"] if left else []
    return Loaded(loaded.model, loaded.source, (*loaded.notes, *notes))


def _said_of(left: Collection[str]) -> str:
    names = ", ".join(map(printable, left))
    return f"Of its hyper_parameters, {names} were left to their defaults, since they are no plain values."


def _hyperparameters(content: Mapping[str, Any], request: Request) -> tuple[dict[str, Any], list[str]]:
    """Return the stored hyperparameters that the named factory takes, and the names of those that are no JSON.

    None where the caller gives arguments.
    """
    stored = content.get("hyper_parameters")
    if not isinstance(stored, Mapping) or request.arch is None or request.arch_args is not None:
        return {}, []
    taken = {key: value for key, value in stored.items() if key in _parameters(request.arch)}
    plain = {key: value for key, value in taken.items() if _is_plain(value)}
    return plain, [key for key in taken if key not in plain]


def _parameters(spec: str) -> set[str]:
    """Return the names of a factory's parameters; none where it cannot be imported, which building reports."""
    try:
        return set(inspect.signature(named(spec)).parameters)
    except Exception:  # noqa: BLE001 - whatever is wrong with the factory, build says it
        return set()


def _is_plain(value: object) -> bool:
    try:
        json.dumps(value)
    except (TypeError, ValueError):
        return False
    return True
