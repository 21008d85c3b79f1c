"""JUnit XML: one test case per question, so that a CI service lists what failed.

An inconclusive verdict is an error, not a failure and never a success: the question was not answered. A step of a
proof that does not apply is skipped.
"""

from __future__ import annotations

import xml.etree.ElementTree as ET

from normfix.records.diagnoses import DiagnosisRecord, PipelineRecord
from normfix.records.encoding import Record
from normfix.records.verdicts import Proof, Verdict
from normfix.reporting.about import about
from normfix.reporting.causes import name_of
from normfix.reporting.sentences import headline

__all__ = ["junit"]


_TAGS = {"failed": "failure", "refused": "failure", "inconclusive": "error", "inapplicable": "skipped"}
"""What a test case holds that did not pass."""


def junit(record: Record) -> str:
    """Return a <testsuites> document with the verdict and one case per named cause, or per step of a proof."""
    suite = ET.Element("testsuite", name="normfix")
    place, compared = _place(record), _compared(record)
    cases = (
        [(step.name + compared, step.status, f"{step.claim}: {step.note}") for step in record.steps]
        if isinstance(record, Proof)
        else [(f"tile-invariant{compared}", _status(record), headline(record))]
    )
    for culprit in record.culprits if isinstance(record, DiagnosisRecord | PipelineRecord) else ():
        evidence = (
            getattr(culprit, "evidence", "") or f"introduces {getattr(culprit, 'introduced', 0):.2g} sd"
        )
        cases.append(
            (f"cause: {name_of(culprit.cause)}{compared}", "failed", f"{evidence}. {culprit.remedy}")
        )
    for name, outcome, message in cases:
        case = ET.SubElement(suite, "testcase", classname=place, name=_clean(name))
        if outcome != "passed":
            tag = _TAGS[outcome]
            ET.SubElement(case, tag, message=_clean(message), type=outcome)
    if isinstance(record, DiagnosisRecord | PipelineRecord) and record.findings:
        ET.SubElement(suite, "system-out").text = _clean("\n".join(f.line for f in record.findings))
    suite.set("tests", str(len(cases)))
    for plural, tag in (("failures", "failure"), ("errors", "error"), ("skipped", "skipped")):
        suite.set(plural, str(sum(_TAGS.get(outcome) == tag for _, outcome, _ in cases)))
    root = ET.Element("testsuites")
    root.append(suite)
    ET.indent(root)
    return '<?xml version="1.0" encoding="utf-8"?>\n' + ET.tostring(root, encoding="unicode") + "\n"


def _place(record: Record) -> str:
    """Return what tells the cases of one network from those of another."""
    return _clean(f"normfix.{about(record).model}")


def _compared(record: Record) -> str:
    """Return what tells two results of one network apart: image and tile."""
    facts = dict(about(record).facts)
    tiles = facts.get("tiles", "").replace(" × ", "x")
    return f"[{', '.join(filter(None, [facts['image'], f'tile {tiles}' if tiles else '']))}]"


def _status(record: Record) -> str:
    if isinstance(record, PipelineRecord):
        return "failed" if record.culprits else record.verdict.status
    assert isinstance(record, Verdict | DiagnosisRecord)
    return record.status


def _clean(text: str) -> str:
    """Drop the control characters that XML cannot hold."""
    return "".join(c for c in text if c >= " " or c in "\t\n")
