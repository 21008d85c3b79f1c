"""Change values of one section of a JSON or YAML file and leave every other line as it is.

A line is changed or put in, and the result read again; only where that is not what was meant is the file laid out anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from itertools import islice
from pathlib import Path
from typing import Any

from normfix.storage.opening.configs import read_mapping

__all__ = ["laid_out", "set_in"]

_MOST = 4
"""Lines that are tried: each is a reading of the whole file."""


def set_in(path: Path, section: str, new: Mapping[str, Any]) -> None:
    """Give values in a section of a file another value, or add them to it."""
    wanted = read_mapping(path)
    wanted[section] = {**wanted[section], **new}
    text = path.read_text(encoding="utf-8")
    path.write_text(
        laid_out(text, wanted) if path.suffix == ".json" else _yaml(text, section, new, wanted), "utf-8"
    )


def laid_out(text: str, wanted: Mapping[str, Any]) -> str:
    """Return JSON indented as a text is."""
    indent = re.search(r"^([ \t]+)\S", text, re.MULTILINE)
    return json.dumps(wanted, indent=indent[1] if indent else 4, ensure_ascii=False) + "\n"


def _yaml(text: str, section: str, new: Mapping[str, Any], wanted: Mapping[str, Any]) -> str:
    import yaml

    for name, value in new.items():
        goal = {**yaml.safe_load(text)}
        goal[section] = {**goal[section], name: value}
        for candidate in islice(_lines(text, section, name, value), _MOST):
            try:
                fits = yaml.safe_load(candidate) == goal
            except yaml.YAMLError:
                continue
            if fits:
                text = candidate
                break
    # comments are lost, which no loader reads
    return text if yaml.safe_load(text) == wanted else yaml.safe_dump(dict(wanted), sort_keys=False)


def _lines(text: str, section: str, name: str, value: Any) -> Iterator[str]:
    """Return the text with one line changed, or one put in behind the section's head, each way that there is."""
    # as people write it, where that means the same
    plain = (
        isinstance(value, str)
        and value.isalpha()
        and value.lower() not in ("true", "false", "yes", "no", "null")
    )
    written = str(value) if plain else json.dumps(value)
    lines = text.split("\n")
    inside = False
    for number, line in enumerate(lines):
        if line[:1].strip() and not line.startswith("#"):
            inside = _is_head(line, section)
        if not inside:
            continue
        key, colon, rest = line.partition(":")
        if key[:1].isspace() and key.strip() == name and colon:
            value_text, sign, comment = rest.partition("#")
            old = value_text.strip()
            before, after = value_text.split(old, 1) if old else (" ", "")
            new = f"{key}:{before or ' '}{written}{after}{sign}{comment}"
            yield "\n".join([*lines[:number], new, *lines[number + 1 :]])
    for number, line in enumerate(lines[:-1]):
        first = lines[number + 1]
        indent = first[: len(first) - len(first.lstrip())]
        if _is_head(line, section) and indent:
            yield "\n".join([*lines[: number + 1], f"{indent}{name}: {written}", *lines[number + 1 :]])


def _is_head(line: str, section: str) -> bool:
    """Tell whether a section begins with a line."""
    key, colon, _ = line.partition(":")
    return bool(colon) and key.rstrip() == section
