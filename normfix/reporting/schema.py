"""JSON Schema of the reports, made from the records' annotations, which are what reads them back too.

The files under `schemas/` are what this makes, shipped so that other languages need no Python; a test keeps
them equal.
"""

from __future__ import annotations

import types
from dataclasses import fields, is_dataclass
from enum import StrEnum
from importlib import resources
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from normfix.diagnosis_record import DiagnosisRecord, PipelineRecord
from normfix.records import Verdict

__all__ = ["SCHEMAS", "schema_of", "shipped"]

SCHEMAS = {"verdict": Verdict, "diagnosis": DiagnosisRecord, "pipeline": PipelineRecord}
_PLAIN = {str: "string", int: "integer", float: "number", bool: "boolean"}


def schema_of(name: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of one kind of report.

    Example:
        >>> schema_of("verdict")["properties"]["status"]
        {'enum': ['passed', 'failed', 'inconclusive']}
    """
    kind, shared = SCHEMAS[name], dict[str, Any]()
    root = _record(kind, shared)
    shared.pop(kind.__name__, None)
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"normfix {name}",
        **root,
        "$defs": dict(sorted(shared.items())),
    }


def shipped(name: str) -> str:
    """Return the text of a schema file of this package."""
    return resources.files("normfix.reporting").joinpath("schemas", f"{name}.schema.json").read_text("utf-8")


def _record(kind: Any, shared: dict[str, Any]) -> dict[str, Any]:
    hints = get_type_hints(kind)
    names = [f.name for f in fields(kind)]
    return {
        "type": "object",
        "properties": {name: _of(hints[name], shared) for name in names},
        "required": names,
        "additionalProperties": False,
    }


def _of(kind: Any, shared: dict[str, Any]) -> dict[str, Any]:
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Union or origin is types.UnionType:
        return {"anyOf": [{"type": "null"} if k is type(None) else _of(k, shared) for k in inner]}
    if origin is Literal:
        return {"enum": list(inner)}
    if origin is tuple:
        if inner[-1] is Ellipsis:
            return {"type": "array", "items": _of(inner[0], shared)}
        return {
            "type": "array",
            "prefixItems": [_of(k, shared) for k in inner],
            "minItems": len(inner),
            "items": False,
        }
    if is_dataclass(kind):
        name = getattr(kind, "__name__", "")
        if name not in shared:
            shared[name] = {}
            shared[name] = _record(kind, shared)
        return {"$ref": f"#/$defs/{name}"}
    if issubclass(kind, StrEnum):
        return {"enum": [str(member) for member in kind]}
    return {"type": _PLAIN[kind]}
