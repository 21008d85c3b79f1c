"""The JSON Schema of a record, read off its annotations as the reader of records does."""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from normfix.records.choices import StrEnum

__all__ = ["record_schema", "schema_of"]

_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}


def schema_of(kind: Any) -> dict[str, Any]:
    """Return the JSON Schema of a record's JSON, with records inside it as definitions."""
    own, inner = record_schema(kind)
    return {"$ref": f"#/$defs/{kind.__name__}", "$defs": {kind.__name__: own, **inner}}


def record_schema(kind: Any) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the schema of a record itself and, by name, those of the records inside it."""
    inner: dict[str, Any] = {}
    _record(kind, inner)
    own = inner.pop(kind.__name__)
    return own, dict(sorted(inner.items()))


def _schema(kind: Any, inner: dict[str, Any]) -> dict[str, Any]:
    origin = get_origin(kind)
    if origin is Union or origin is types.UnionType:
        return {"anyOf": [_schema(option, inner) for option in get_args(kind)]}
    if kind is type(None):
        return {"type": "null"}
    if origin is tuple:
        items = get_args(kind)
        if items[-1] is Ellipsis:
            return {"type": "array", "items": _schema(items[0], inner)}
        return {
            "type": "array",
            "prefixItems": [_schema(i, inner) for i in items],
            "minItems": len(items),
            "items": False,
        }
    if origin is Literal:
        return {"enum": list(get_args(kind))}
    if is_dataclass(kind):
        return _record(kind, inner)
    if issubclass(kind, StrEnum):
        return {"enum": [str(member) for member in kind]}
    return {"type": _PLAIN[kind]}


def _record(kind: Any, inner: dict[str, Any]) -> dict[str, Any]:
    name = kind.__name__
    if name not in inner:
        inner[name] = {}  # a record that holds itself refers to itself
        hints = get_type_hints(kind)
        names = [f.name for f in fields(kind)]
        inner[name] = {
            "type": "object",
            "properties": {n: _schema(hints[n], inner) for n in names},
            "required": names,
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}
