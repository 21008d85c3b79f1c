"""Change values of one section of a JSON or YAML file and leave every other line as it is.

A line is changed or put in, and the result read again; only where that is not what was meant is the file laid out anew.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from normfix.storage.opening.configs import read_mapping

__all__ = ["laid_out", "set_in"]


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
        for candidate in _lines(text, section, name, value):
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
    for line in re.finditer(rf"^(\s+{re.escape(name)}\s*:\s*)([^#\n]*?)(\s*(?:#.*)?)$", text, re.MULTILINE):
        yield f"{text[: line.start()]}{line[1]}{written}{line[3]}{text[line.end() :]}"
    for head in re.finditer(rf"^{re.escape(section)}\s*:[^\n]*\n([ \t]+)", text, re.MULTILINE):
        yield f"{text[: head.start(1)]}{head[1]}{name}: {written}\n{text[head.start(1) :]}"
