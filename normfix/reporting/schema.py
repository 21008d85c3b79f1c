"""JSON Schema of the reports, made from the records' annotations, which are what reads them back too.

The files under `schemas/` are what this makes, shipped so that other languages need no Python; a test keeps
them equal.
"""

from __future__ import annotations

from importlib import resources
from typing import Any

from normfix.records.candidates import ChoiceRecord
from normfix.records.diagnoses import DiagnosisRecord, PipelineRecord
from normfix.records.schema import record_schema
from normfix.records.verdicts import Proof, Verdict

__all__ = ["SCHEMAS", "schema_of", "shipped"]

SCHEMAS = {
    "verdict": Verdict,
    "proof": Proof,
    "diagnosis": DiagnosisRecord,
    "pipeline": PipelineRecord,
    "choice": ChoiceRecord,
}


def schema_of(name: str) -> dict[str, Any]:
    """Return the JSON Schema (2020-12) of one kind of report.

    Example:
        >>> schema_of("verdict")["properties"]["status"]
        {'enum': ['passed', 'failed', 'inconclusive']}
    """
    own, inner = record_schema(SCHEMAS[name])
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": f"normfix {name}",
        **own,
        "$defs": inner,
    }


def shipped(name: str) -> str:
    """Return the text of a schema file of this package."""
    return resources.files("normfix.reporting").joinpath("schemas", f"{name}.schema.json").read_text("utf-8")
