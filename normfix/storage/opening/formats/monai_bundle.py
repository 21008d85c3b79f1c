"""MONAI bundles: a folder with configs/ and models/model.pt, or its configuration alone.

The bundle's `network_def` names a class and its arguments. References such as "@channels" are followed as far as
they lead to plain values; an expression ("$...") is a program, which MONAI would run and normfix does not. A component
within the network ("_target_" again) or a network that is made otherwise ("_mode_", "_requires_") is not built either.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normfix.errors import NormfixError
from normfix.networks.provenance import declare_window_
from normfix.storage.opening.configs import read_mapping
from normfix.storage.opening.gate import is_allowed
from normfix.storage.opening.pickles import read_torch
from normfix.storage.opening.request import Loaded, Request, factory, unreadable
from normfix.storage.opening.state_dicts import filled

__all__ = ["described", "open_network", "recognises", "weights_file"]

_CONFIGS = ("inference.json", "inference.yaml", "train.json", "train.yaml", "evaluate.json")
_NETWORKS = ("network_def", "network", "net")
_WEIGHTS = ("model.pt", "model.pth", "model_final.pt")
_DEPTH, _VALUES = 32, 20_000
_META = {"_target_": None, "_desc_": None, "_disabled_": False, "_mode_": "default"}
"""MONAI's own words in a definition, and the values with which they change nothing."""


def recognises(path: Path) -> bool:
    """Recognise a folder with configs/metadata.json."""
    return (path / "configs" / "metadata.json").is_file()


def open_network(path: Path, request: Request) -> Loaded:
    """Build the network that the configuration describes, or the caller names, and fill it."""
    weights = weights_file(path)
    content = read_torch(weights, request)
    source = request.named
    if source is None:
        target, args = _definition(path / "configs")
        source = factory(target, args)
    loaded = filled(content, weights, source, request)
    declare_window_(loaded.model, _window(path / "configs"))
    return loaded


def weights_file(path: Path) -> Path:
    """Return a bundle's file of weights.

    Raises:
        NormfixError: NF101 if it has none.
    """
    for name in _WEIGHTS:
        if (path / "models" / name).is_file():
            return path / "models" / name
    raise unreadable(path / "models", f"the bundle has none of {', '.join(_WEIGHTS)} (a .ts is TorchScript)")


def described(path: Path) -> tuple[str, str, dict[str, Any]] | None:
    """Return what a configuration calls its network, the class, as pkg.module:Class, and its arguments.

    None where it describes none.

    Raises:
        NormfixError: NF120 if it is more than a class and plain values.
    """
    config = read_mapping(path)
    key = next((key for key in _NETWORKS if isinstance(config.get(key), Mapping)), None)
    if key is None or "_target_" not in config[key]:
        return None
    definition = _Resolved(config, str(path)).plain(config[key])
    _require_ordinary(definition, str(path))
    args = {name: value for name, value in definition.items() if name not in _META}
    module, _, name = str(definition["_target_"]).rpartition(".")
    return key, f"{module or 'monai.networks.nets'}:{name}", args


def _definition(folder: Path) -> tuple[str, dict[str, Any]]:
    """Return the network's class, as pkg.module:Class, and its arguments."""
    for path in (folder / name for name in _CONFIGS if (folder / name).is_file()):
        found = described(path)
        if found is None:
            continue
        _, spec, args = found
        if not spec.startswith("monai.networks.") or not is_allowed(spec):
            break
        return spec, args
    raise NormfixError(
        "NF120",
        f"its configurations define no network of monai.networks ({' or '.join(_NETWORKS)} with _target_). Name it: "
        "--arch pkg.module:factory --arch-args JSON.",
        where=str(folder),
    )


def _window(folder: Path) -> object:
    """Return the windows in which the bundle's own inferer predicts, where a configuration states them as numbers."""
    for path in (folder / name for name in _CONFIGS if (folder / name).is_file()):
        inferer = read_mapping(path).get("inferer")
        if isinstance(inferer, Mapping) and "roi_size" in inferer:
            return inferer["roi_size"]
    return None


def _require_ordinary(definition: Mapping[str, Any], where: str) -> None:
    """Refuse a network that is not simply its class called with plain values.

    Raises:
        NormfixError: NF120.
    """
    words = [key for key in definition if key.startswith("_")]
    odd = [key for key in words if key not in _META or (_META[key] and definition[key] != _META[key])]
    odd += ["_disabled_"] if definition.get("_disabled_") not in (None, False) else []
    if odd or _has_components({key: value for key, value in definition.items() if key not in _META}):
        raise NormfixError(
            "NF120",
            f"its network is not made of plain values alone ({', '.join(odd)[:80] or 'a component has a _target_'}). "
            "Build it yourself: --arch pkg.module:factory --arch-args JSON.",
            where=where,
        )


def _has_components(value: Any) -> bool:
    if isinstance(value, Mapping):
        return "_target_" in value or any(map(_has_components, value.values()))
    return isinstance(value, list) and any(map(_has_components, value))


class _Resolved:
    """A configuration whose references are followed, as far as they lead to plain values and to not too many."""

    def __init__(self, config: Mapping[str, Any], where: str) -> None:
        self._config = config
        self._where = where
        self._left = _VALUES

    def plain(self, value: Any, depth: int = 0) -> Any:
        """Return a value with its references followed."""
        self._left -= 1
        if depth > _DEPTH or self._left < 0:
            raise self._refused("its references lead in a circle, or to more values than a network has.")
        if isinstance(value, str) and value.startswith(("$", "%")):
            raise self._refused(
                f"its network is computed by an expression, {value[:80]!r}, and a file does not decide what runs here. "
                "Build it yourself: --arch pkg.module:factory --arch-args JSON."
            )
        if isinstance(value, str) and value.startswith("@"):
            return self.plain(self._referred(value[1:]), depth + 1)
        if isinstance(value, Mapping):
            return {str(key): self.plain(inner, depth + 1) for key, inner in value.items()}
        if isinstance(value, list):
            return [self.plain(inner, depth + 1) for inner in value]
        return value

    def _referred(self, name: str) -> Any:
        found: Any = self._config
        for part in name.replace("::", "#").split("#"):
            try:
                found = found[int(part)] if isinstance(found, list) else found[part]
            except (KeyError, IndexError, TypeError, ValueError) as error:
                raise self._refused(f"it refers to @{name[:80]}, which it does not define.") from error
        return found

    def _refused(self, message: str) -> NormfixError:
        return NormfixError("NF120", message, where=self._where)
