"""MONAI bundles: a folder with configs/ and models/model.pt, or its configuration alone.

The bundle's `network_def` names a class and its arguments. References such as "@channels" are followed as far as
they lead to plain values; an expression ("$...") is a program, which MONAI would run and normfix does not.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normfix.errors import NormfixError
from normfix.loading.configs import read_mapping
from normfix.loading.pickles import read_torch
from normfix.loading.request import Loaded, Request, factory, unreadable
from normfix.loading.state_dicts import filled

__all__ = ["open_network", "recognises"]

_CONFIGS = ("inference.json", "inference.yaml", "train.json", "train.yaml", "evaluate.json")
_NETWORKS = ("network_def", "network", "net")
_WEIGHTS = ("model.pt", "model.pth", "model_final.pt")
_DEPTH = 32


def recognises(path: Path) -> bool:
    """Recognise a folder with configs/metadata.json."""
    return (path / "configs" / "metadata.json").is_file()


def open_network(path: Path, request: Request) -> Loaded:
    """Build the network that the configuration describes, or the caller names, and fill it."""
    weights = next((path / "models" / name for name in _WEIGHTS if (path / "models" / name).is_file()), None)
    if weights is None:
        raise unreadable(
            path / "models", f"the bundle has none of {', '.join(_WEIGHTS)} (a .ts is TorchScript)"
        )
    content = read_torch(weights, request)
    source = request.named
    if source is None:
        target, args = _definition(path / "configs")
        source = factory(target, args)
    return filled(content, weights, source, request)


def _definition(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the network's class, as pkg.module:Class, and its arguments."""
    for path in (folder / name for name in _CONFIGS if (folder / name).is_file()):
        config = read_mapping(path)
        found = next((config[key] for key in _NETWORKS if isinstance(config.get(key), Mapping)), None)
        if found is None or "_target_" not in found:
            continue
        definition = _plain(found, config, str(path))
        target = str(definition.pop("_target_"))
        args = {key: value for key, value in definition.items() if not key.startswith("_")}
        module, _, name = target.rpartition(".")
        if module and not module.startswith("monai.networks"):
            break
        return f"{module or 'monai.networks.nets'}:{name}", args
    raise NormfixError(
        "NF120",
        f"its configurations define no network of monai.networks ({' or '.join(_NETWORKS)} with _target_). Name it: "
        "--arch pkg.module:factory --arch-args JSON.",
        where=str(folder),
    )


def _plain(value: Any, config: Mapping[str, Any], where: str, depth: int = 0) -> Any:
    """Return a value with its references followed."""
    if depth > _DEPTH:
        raise NormfixError("NF120", "its references lead in a circle.", where=where)
    if isinstance(value, str) and value.startswith(("$", "%")):
        raise NormfixError(
            "NF120",
            f"its network is computed by an expression, {value[:80]!r}, and a file does not decide what runs here. "
            "Build it yourself: --arch pkg.module:factory --arch-args JSON.",
            where=where,
        )
    if isinstance(value, str) and value.startswith("@"):
        return _plain(_referred(value[1:], config, where), config, where, depth + 1)
    if isinstance(value, Mapping):
        return {str(key): _plain(inner, config, where, depth + 1) for key, inner in value.items()}
    if isinstance(value, list):
        return [_plain(inner, config, where, depth + 1) for inner in value]
    return value


def _referred(name: str, config: Mapping[str, Any], where: str) -> Any:
    found: Any = config
    for part in name.replace("::", "#").split("#"):
        try:
            found = found[int(part)] if isinstance(found, list) else found[part]
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise NormfixError(
                "NF120", f"it refers to @{name[:80]}, which it does not define.", where=where
            ) from error
    return found
