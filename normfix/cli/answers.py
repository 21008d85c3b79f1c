"""Records that only the command line returns: what was written, sent, shown or explained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from normfix.records.candidates import ChoiceRecord
from normfix.records.certificates import Verification
from normfix.records.diagnoses import DiagnosisRecord
from normfix.records.encoding import Record
from normfix.records.measurements import CalibrationSummary
from normfix.records.plans import Plan
from normfix.records.returns import GivenBack
from normfix.records.saved import ConversionRecord
from normfix.records.sites import Scan
from normfix.records.verdicts import Proof, Verdict

__all__ = ["RECORDS", "Explained", "Predicted", "Pushed", "Shown"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Predicted(Record):
    """A prediction that was written: its file, its shape (C, *space), of a stack (planes, C, *space), and its type."""

    path: str
    shape: tuple[int, ...]
    dtype: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Pushed(Record):
    """A folder that was pushed: the repository and the address of the commit."""

    repository: str
    address: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Explained(Record):
    """A code and what it means."""

    code: str
    text: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Shown(Record):
    """The demo: whether everything was proved, the page with pictures, and its text."""

    passed: bool
    page: str
    text: str


RECORDS: Mapping[str, type[Record]] = {
    "scan": Scan,
    "plan": Plan,
    "convert": ConversionRecord,
    "calibrate": CalibrationSummary,
    "check": Verdict,
    "prove": Proof,
    "verify": Verification,
    "predict": Predicted,
    "give-back": GivenBack,
    "push": Pushed,
    "explain": Explained,
    "demo": Shown,
    "diagnose": DiagnosisRecord,
    "choose": ChoiceRecord,
}
"""The record that each command prints with --format json."""
