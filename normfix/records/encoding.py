"""Records as JSON and strictly back: the annotations of a record are its whole schema.

Nothing is guessed, and nothing converted but an integer where a float belongs: a field that is missing,
unknown or of another type is NF108, with the path that leads to it from the file on.
"""

from __future__ import annotations

import json
import math
import types
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields, is_dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from typing_extensions import Self

from normfix.errors import NormfixError
from normfix.records.choices import StrEnum

__all__ = ["SCHEMA", "Record", "once", "parsed", "read_text", "require_different"]

SCHEMA = 1
"""Version of the JSON of plans and saved folders."""

_LARGEST = 32 << 20
"""Bytes: what is known of ten thousand sites takes 20 MB."""
_FEW, _SPARSE = 100_000, 16
"""Lists and objects that a text may always hold, and characters for each one more; each takes a hundred bytes and more
in memory, and what normfix writes is indented.
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Record:
    """Base of all records: JSON out and strict JSON in."""

    def to_json(self) -> dict[str, Any]:
        """Return the record as JSON-ready dicts, lists, strings and numbers."""
        return {f.name: _encode(getattr(self, f.name)) for f in fields(self)}

    @classmethod
    def from_json(cls, data: object, where: str = "") -> Self:
        """Build the record from parsed JSON.

        Raises:
            NormfixError: NF108 if a field is missing, unknown or of the wrong type, or the schema is another.
        """
        decoded = _decode(cls, data, where or cls.__name__)
        assert isinstance(decoded, cls)
        return decoded

    @classmethod
    def loads(cls, text: str, where: str = "") -> Self:
        """Build the record from JSON text.

        Raises:
            NormfixError: NF101 if it is no JSON, or nested without end; see `from_json` for the rest.
        """
        return cls.from_json(parsed(text, where or cls.__name__), where)

    def dumps(self) -> str:
        """Return the record as indented JSON text, the same bytes for equal records; each line is printable.

        What would steer a terminal, marks of direction and halves of characters (names that are not UTF-8) included, is
        written by its number, which is the same text to whoever reads the JSON.
        """
        text = json.dumps(self.to_json(), indent=2, ensure_ascii=False, allow_nan=False)
        return "\n".join(map(_escaped, text.split("\n"))) + "\n"


def parsed(text: str, where: str) -> Any:
    """Return what JSON text holds.

    Raises:
        NormfixError: NF101 if it is no JSON, nested too deep to be read, holds far more lists and objects than such
            text does, or two values under one name.
    """
    if text.count("[") + text.count("{") > _FEW + len(text) // _SPARSE:
        raise NormfixError(
            "NF101",
            "cannot read it as JSON: it holds more lists and objects than any such file.",
            where=where,
        )
    try:
        return json.loads(text, object_pairs_hook=once)
    except (ValueError, RecursionError) as error:
        raise NormfixError("NF101", f"cannot read it as JSON: {error}.", where=where) from error


def read_text(path: Path) -> str:
    """Return the text of a JSON file of normfix's.

    Raises:
        NormfixError: NF101 if it cannot be read, is no regular file, or is longer than such files are.
    """
    where = str(path)
    try:
        special = path.exists() and not path.is_file()
        data = b""
        if not special:
            with path.open("rb") as file:
                data = file.read(_LARGEST + 1)
        text = data.decode("utf-8")
    except (OSError, ValueError) as error:
        raise NormfixError("NF101", f"cannot read it as JSON: {error}.", where=where) from error
    if special:
        # A pipe waits for ever, and a device never ends.
        raise NormfixError("NF101", "cannot read it as JSON: it is no file.", where=where)
    if len(data) > _LARGEST:
        raise NormfixError(
            "NF101", f"it is longer than {_LARGEST >> 20} MB, which no such file is.", where=where
        )
    return text


def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Return a JSON object, if no name stands twice in it: programs disagree about which one counts.

    Raises:
        ValueError: if one does.
    """
    found = dict(pairs)
    if len(found) != len(pairs):
        require_different(name for name, _ in pairs)
    return found


def require_different(names: Iterable[Any]) -> None:
    """Refuse names of one object of which one stands twice.

    Raises:
        ValueError: with the name.
    """
    seen: set[Any] = set()
    for name in names:
        if name in seen:
            raise ValueError(f"the name {str(name)[:40]!r} stands twice in one object")
        seen.add(name)


def _escaped(line: str) -> str:
    """Return a line of JSON whose unprintable characters, which stand in texts only, are written by their numbers."""
    if line.isprintable():
        return line
    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)


def _encode(value: object) -> Any:
    if isinstance(value, Record):
        return value.to_json()
    if isinstance(value, StrEnum):
        return value.value
    if isinstance(value, tuple):
        return [_encode(item) for item in value]
    return value


def _decode(kind: Any, data: object, where: str) -> Any:
    """Read `data` as `kind`; the annotations of the records are the whole schema."""
    origin = get_origin(kind)
    if origin is Union or origin is types.UnionType:
        if data is None and type(None) in get_args(kind):
            return None
        (kind,) = (option for option in get_args(kind) if option is not type(None))
        return _decode(kind, data, where)
    if origin is tuple:
        return _decode_tuple(get_args(kind), data, where)
    if origin is Literal:
        return _require(data in get_args(kind), data, where, f"one of {get_args(kind)}")
    if is_dataclass(kind):
        return _decode_record(kind, data, where)
    if issubclass(kind, StrEnum):
        _require(data in [str(member) for member in kind], data, where, f"one of {[str(m) for m in kind]}")
        return kind(data)
    if kind is float:
        return float(_require(_is_number(data), data, where, "a finite number"))
    if kind is str:
        return _require(isinstance(data, str) and _is_text(data), data, where, "text")
    right = isinstance(data, kind) and isinstance(data, bool) == (kind is bool)
    return _require(right, data, where, f"{kind.__name__}")


def _decode_tuple(items: tuple[Any, ...], data: object, where: str) -> tuple[Any, ...]:
    if not isinstance(data, list | tuple):
        raise _malformed(data, where, "a list")
    if items[-1] is Ellipsis:
        return tuple(_decode(items[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    _require(len(data) == len(items), data, where, f"a list of {len(items)}")
    return tuple(
        _decode(kind, item, f"{where}[{i}]") for i, (kind, item) in enumerate(zip(items, data, strict=True))
    )


def _decode_record(kind: Any, data: object, where: str) -> Any:
    if not isinstance(data, Mapping):
        raise _malformed(data, where, "an object")
    hints = _hints(kind)
    schema = data.get("schema")
    if "schema" in hints and isinstance(schema, int) and schema != SCHEMA:
        raise _of_another_version(schema, where)
    unknown = sorted(set(data) - set(hints))
    _require(not unknown, unknown, where, f"no fields but {', '.join(hints)}")
    missing = sorted(set(hints) - set(data))
    _require(not missing, missing, where, f"the missing fields {', '.join(missing)}")
    return kind(**{name: _decode(hints[name], data[name], f"{where}.{name}") for name in hints})


@cache
def _hints(kind: type) -> dict[str, Any]:
    hints = get_type_hints(kind)
    return {f.name: hints[f.name] for f in fields(kind)}


def _is_text(data: str) -> bool:
    """Tell whether it is of characters alone: JSON may name halves of some, which no file holds."""
    try:
        data.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_number(data: object) -> bool:
    if not isinstance(data, int | float) or isinstance(data, bool):
        return False
    try:
        return math.isfinite(data)
    except OverflowError:  # an integer that no float holds
        return False


def _require(right: bool, data: Any, where: str, expected: str) -> Any:
    if not right:
        raise _malformed(data, where, expected)
    return data


def _of_another_version(schema: int, where: str) -> NormfixError:
    """Return the error for JSON of a newer or an older normfix, which is never guessed at."""
    todo = (
        "Update normfix"
        if schema > SCHEMA
        else "Make it again with this version from the original network, or install the version that wrote it"
    )
    return NormfixError(
        "NF108", f"it has schema {schema}, and this normfix reads schema {SCHEMA}. {todo}.", where=where
    )


def _shown(data: object) -> str:
    try:
        return str(data)[:80]
    except RecursionError:
        return f"a {type(data).__name__} that is nested too deep"


def _malformed(data: object, where: str, expected: str) -> NormfixError:
    return NormfixError(
        "NF108",
        f"expected {expected}, found {_shown(data)!r}. The file was edited or written by another version; "
        "make it again with this version of normfix.",
        where=where,
    )
