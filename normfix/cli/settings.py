"""Settings of a project: the table [tool.normfix] of the nearest pyproject.toml gives options their defaults.

A file that lies in a folder must not decide what runs there, so options that run code or say where output goes
cannot be set: they are typed by whoever runs the command. One exception: a project says with `trust` whose factories
the folders of its networks may name; it counts for no folder that it lies in.
"""

from __future__ import annotations

import sys
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from normfix.errors import NormfixError
from normfix.images.deadline import within

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

__all__ = ["NEVER", "SETTINGS", "Settings", "read_settings"]

SETTINGS = "normfix.settings"
"""Where the context of a command keeps them."""

NEVER = (
    *("trust_pickle", "allow_classes", "allow_code", "arch", "arch_args", "switches", "preprocess", "metric"),
    *("out", "report", "reports", "give_back", "image", "store", "scheduler"),
    *("partial", "revision", "converted", "labels"),
)
"""Options that no file sets."""


_SECONDS, _GROWTH = 5.0, 1 << 28
"""Processor time and bytes for reading the file; a real one takes milliseconds."""


@dataclass(frozen=True, slots=True)
class Settings:
    """The defaults of each command's options, and the file they come from; None if there is none."""

    path: Path | None
    commands: Mapping[str, Mapping[str, Any]]

    def lines(self) -> list[str]:
        """Return one line per setting: command, option, value."""
        return [
            f"{command} --{name.rstrip('_').replace('_', '-')} {value}"
            for command, options in self.commands.items()
            for name, value in options.items()
        ]


def read_settings(start: Path, options: Mapping[str, Collection[str]]) -> Settings:
    """Read [tool.normfix] of the pyproject.toml in a folder or the nearest above it.

    Args:
        start: the folder.
        options: the names of each command's options.

    Raises:
        NormfixError: NF121 if reading it takes far more than it is worth, NF130 if the file is no TOML, NF131 for a
            name that is no option or may not be set there.
    """
    path = next(
        (p / "pyproject.toml" for p in (start, *start.parents) if (p / "pyproject.toml").is_file()), None
    )
    if path is None:
        return Settings(None, {})
    try:
        text = path.read_text(encoding="utf-8")
        # names of thousands of parts take memory by their square
        content = within(
            _SECONDS, lambda: tomllib.loads(text), str(path), growth=_GROWTH, instead="correct it"
        )
    except (OSError, ValueError, RecursionError) as error:
        raise NormfixError("NF130", f"cannot read it as TOML: {error}.", where=str(path)) from error
    tools = content.get("tool")
    table = tools.get("normfix") if isinstance(tools, dict) else None
    if table is None:
        return Settings(None, {})
    if not isinstance(table, dict):
        raise NormfixError("NF131", "[tool.normfix] is no table of options.", where=str(path))
    trust = table.get("trust", [])
    if not isinstance(trust, list) or not all(isinstance(name, str) for name in trust):
        raise NormfixError(
            "NF131", 'trust is a list of modules, such as ["my_project"].', where=f"{path}: [tool.normfix]"
        )
    return Settings(path, _by_command(table, options, path))


def _by_command(
    table: Mapping[str, Any], options: Mapping[str, Collection[str]], path: Path
) -> dict[str, dict[str, Any]]:
    """Give every command the options of the table that it has, then those of its own table."""
    own = {name: value for name, value in table.items() if isinstance(value, dict)}
    common = {_parameter(name): value for name, value in table.items() if not isinstance(value, dict)}
    for name in own:
        if name not in options:
            raise _unknown(name, options, path)
    found: dict[str, dict[str, Any]] = {}
    for name in common:
        if not any(name in names for names in options.values()) or name in NEVER:
            raise _unknown(name, {n for names in options.values() for n in names}, path)
    for command, names in options.items():
        special = {_parameter(name): value for name, value in own.get(command, {}).items()}
        for name in special:
            if name not in names or name in NEVER:
                raise _unknown(name, names, path)
        chosen = {name: value for name, value in common.items() if name in names} | special
        if chosen:
            found[command] = chosen
    return found


def _parameter(name: str) -> str:
    name = name.replace("-", "_")
    return {"format": "format_", "input": "input_", "plan": "plan_file"}.get(name, name)


def _unknown(name: str, known: Collection[str], path: Path) -> NormfixError:
    if name in NEVER:
        problem = (
            f"{name.replace('_', '-')} runs code or writes, so no file sets it; type it with the command."
        )
    else:
        names = sorted(n.rstrip("_").replace("_", "-") for n in known if n not in NEVER)
        problem = f"there is no option {name!r}. Options: {', '.join(names)}."
    return NormfixError("NF131", problem, where=f"{path}: [tool.normfix]")
