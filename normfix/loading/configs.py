"""Read the small JSON and YAML files that stand beside weights: bounded, and as plain values only."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from normfix.loading.request import unreadable

__all__ = ["read_json", "read_mapping", "read_yaml"]

_LARGEST = 16 << 20


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the object that a .json, .yml or .yaml file holds.

    Raises:
        NormfixError: NF101 if it is unreadable, too large or no object.
    """
    content = read_json(path) if path.suffix == ".json" else read_yaml(path)
    if not isinstance(content, dict):
        raise unreadable(path, "it holds no object of names and values")
    return content


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; NF101 if it cannot be read."""
    try:
        return json.loads(_text(path))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds, plain values only and no shared parts; NF101 if it cannot be read."""
    import yaml

    try:
        text = _text(path)
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
            raise unreadable(path, "it uses YAML aliases, with which a short file can grow without end")
        return yaml.safe_load(text)
    except (OSError, ValueError, RecursionError, yaml.YAMLError) as error:
        raise unreadable(path, error) from error


def _text(path: Path) -> str:
    if path.stat().st_size > _LARGEST:
        raise ValueError(f"it is longer than {_LARGEST >> 20} MB, which no such file is")
    return path.read_text(encoding="utf-8")
