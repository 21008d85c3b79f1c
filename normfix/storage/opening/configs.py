"""Read the small JSON and YAML files that stand beside weights: bounded, and as plain values only.

Programs disagree about a name that stands twice in an object, so it is refused: what was looked at here is what counts.
"""

from __future__ import annotations

import json
from collections.abc import Hashable, Mapping
from pathlib import Path
from typing import Any

from normfix.errors import NormfixError
from normfix.images.deadline import within
from normfix.records.encoding import once, require_different
from normfix.storage.opening.request import unreadable

__all__ = ["read_json", "read_mapping", "read_yaml"]

_LARGEST, _LARGEST_YAML = 16 << 20, 1 << 17
"""Bytes: an index of a thousand files of weights takes 10 MB; YAML is read a hundred times slower than JSON."""
_VALUES, _OPEN = 500_000, 100_000
"""Commas, and brackets that open: lists and objects take a hundred bytes and more each."""
_LEVELS = 64
_DIGITS = 308
"""Of a whole number: one of more is no float, and Python writes none of more than 4300."""
_SECONDS = 5.0


def read_mapping(path: Path) -> dict[str, Any]:
    """Return the object that a .json, .yml or .yaml file holds.

    Raises:
        NormfixError: NF101 if it is unreadable, too large or no object, NF121 if reading it takes too long.
    """
    content = read_json(path) if path.suffix == ".json" else read_yaml(path)
    if not isinstance(content, dict):
        raise unreadable(path, "it holds no object of names and values")
    return content


def read_json(path: Path) -> Any:
    """Return what a JSON file holds; NF101 if it cannot be read."""
    try:
        text = _text(path, _LARGEST)
        return within(_SECONDS, lambda: json.loads(text, object_pairs_hook=once, parse_int=_whole), str(path))
    except (OSError, ValueError, RecursionError) as error:
        raise unreadable(path, error) from error


def read_yaml(path: Path) -> Any:
    """Return what a YAML file holds, plain values only and no shared parts; NF101 if it cannot be read."""
    import yaml

    try:
        text = _text(path, _LARGEST_YAML)
        return within(_SECONDS, lambda: _yaml(text), str(path))
    except NormfixError:
        raise
    except (OSError, ValueError, OverflowError, RecursionError, yaml.YAMLError) as error:
        raise unreadable(path, error) from error


def _yaml(text: str) -> Any:
    import yaml

    if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
        raise ValueError("it uses YAML aliases, with which a short file can grow without end")
    _require_once(yaml.compose(text, yaml.SafeLoader))
    found = yaml.safe_load(text)
    _require_short(found)
    return found


def _whole(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise ValueError(f"it holds a number of {len(digits)} digits")
    return int(digits)


def _require_short(found: Any) -> None:
    """Refuse whole numbers of YAML that JSON would not be read with: written in base 16 or 60 no length stops them."""
    pending = [found]
    while pending:
        value = pending.pop()
        if isinstance(value, Mapping):
            pending += [*value, *value.values()]
        elif isinstance(value, list | tuple | set):
            pending += value
        elif isinstance(value, int) and abs(value) >= 10**_DIGITS:
            raise ValueError(f"it holds a number of more than {_DIGITS} digits")


def _require_once(node: Any) -> None:
    """Refuse a name that stands twice in one mapping."""
    import yaml

    if isinstance(node, yaml.MappingNode):
        names = [key.value for key, _ in node.value if isinstance(key.value, Hashable)]
        require_different(names)
        for _, value in node.value:
            _require_once(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _require_once(value)


def _text(path: Path, largest: int) -> str:
    if path.exists() and not path.is_file():
        raise ValueError("it is a pipe, a device or a folder")
    with path.open("rb") as file:
        data = file.read(largest + 1)
    if len(data) > largest:
        raise ValueError(f"it is longer than {largest >> 10} kB, which no such file is")
    text = data.decode("utf-8")
    if text.count(",") > _VALUES or text.count("[") + text.count("{") > _OPEN:
        raise ValueError("it holds more values than any such file does")
    if _levels(text) > _LEVELS:
        raise ValueError(f"its values are more than {_LEVELS} deep")
    return text


def _levels(text: str) -> int:
    """Return how deep brackets are nested at most, those in texts counted too."""
    depth = deepest = 0
    for character in text:
        if character in "[{":
            depth += 1
            deepest = max(deepest, depth)
        elif character in "]}":
            depth = max(0, depth - 1)
    return deepest
