"""What travels with a network: where it comes from, what was decided, measured and proved."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

from normfix.errors import NormfixError
from normfix.records.certificates import Certificate
from normfix.records.encoding import Record
from normfix.records.extents import are_extents, inconsistency
from normfix.records.measurements import CalibrationSummary
from normfix.records.plans import Plan
from normfix.records.sites import Scan
from normfix.records.statistics import WHOLE, Statistics
from normfix.records.verdicts import Proof, ProofStep

__all__ = ["ConversionRecord", "Probe", "Provenance", "Saved", "Scaling", "Source", "statement_of"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Scaling(Record):
    """How an image's values become the network's input; statistics run over the whole image.

    kind: "none", "unit" (integer range to 0..1), "zscore", "percentile" (low, high to 0..1, not clipped),
    "fixed" (mean, standard deviation) or "preprocess" (a function "pkg.mod:fn" of the whole array).
    """

    kind: Literal["none", "unit", "zscore", "percentile", "fixed", "preprocess"] = "none"
    values: tuple[float, ...] = ()
    function: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Source(Record):
    """Where the architecture comes from.

    kind "factory": call `spec` ("pkg.mod:name" or "timm:NAME") with `args`; "object": an object whose class
    is `spec`, so loading needs it again from the caller. `origin` names the repository it was fetched from.
    """

    kind: Literal["factory", "object"]
    spec: str
    args: str = "{}"
    origin: str = ""


@dataclass(frozen=True, slots=True, kw_only=True)
class Provenance(Record):
    """What travels with a converted model: enough to save, reload, predict with and recalibrate it.

    `output` is the key or index of the output that counts, for networks that return several. `statistics` says what the
    constants are measured on. `unproved` are the steps of its proof that did not pass when it was converted.
    """

    plan: Plan
    scan: Scan
    scaling: Scaling
    source: Source
    output: str | None
    statistics: Statistics = WHOLE
    unproved: tuple[ProofStep, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class ConversionRecord(Record):
    """A conversion without its model: what `--format json` prints.

    `certificate` is there once it was saved as a folder: in a report.
    """

    plan: Plan
    scan: Scan
    calibration: CalibrationSummary | None
    proof: Proof
    certificate: Certificate | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Probe(Record):
    """What the saved model gives for a seeded normal input: a reload must give the same.

    `values` are the flattened output at even distances; `sd` is the standard deviation of the output.
    """

    shape: tuple[int, ...]
    seed: int
    dtype: str
    output: tuple[int, ...]
    sd: float
    values: tuple[float, ...]

    @property
    def problem(self) -> str:
        """Say which numbers of it no probe has, or nothing."""
        if not are_extents(self.shape):
            return f"a probe of {str(self.shape)[:80]}"
        if not 0 <= self.seed < 1 << 63:
            return "a probe whose seed has more than 63 bits"
        return "" if self.dtype in _REAL else f"a probe of {self.dtype[:80]}"


_REAL = ("float64", "float32", "float16", "bfloat16")


@dataclass(frozen=True, slots=True, kw_only=True)
class Saved(Record):
    """The content of normfix.json.

    `aliases` are pairs (name, stored name) of tensors that share storage; `sha256` is of model.safetensors, or of the
    tensors of a .pt2; `program` is of program.pt2 where the folder has one. `certificate` is what `normfix verify`
    derives anew. `statement` is of all of that and of all below, so plan, geometry, scaling and proof belong to these
    weights; files of before have neither.
    """

    schema: int
    provenance: Provenance
    aliases: tuple[tuple[str, str], ...]
    sha256: str
    program: str = ""
    calibration: CalibrationSummary | None
    proof: Proof | None
    probe: Probe | None
    certificate: Certificate | None = None
    statement: str = ""

    def sealed(self) -> Saved:
        """Return it with its statement's checksum."""
        return replace(self, statement=statement_of(self.to_json()))

    @classmethod
    def opened(cls, data: object, where: str) -> Saved:
        """Build it from parsed JSON, if that is what was written.

        Raises:
            NormfixError: NF108 as from_json, and if no network has its geometry; NF115 if the statement was edited.
        """
        saved = cls._decoded(data, where)
        if saved.edited(data):
            raise NormfixError(
                "NF115",
                "it is not what was saved with these weights: its plan, stride, halo, scaling or proof was edited, and "
                "what normfix computes with it may be wrong without a sign. Fetch it again, or convert the network "
                "again with the options that you want.",
                where=where,
            )
        return saved._possible(where)

    @classmethod
    def read(cls, data: object, where: str) -> Saved:
        """Build it from parsed JSON, edited or not.

        Raises:
            NormfixError: NF108 as from_json, and if no network has its geometry.
        """
        return cls._decoded(data, where)._possible(where)

    def _possible(self, where: str) -> Saved:
        """Return it, unless it states what no network has."""
        problem = inconsistency(self.provenance.scan) or ("" if self.probe is None else self.probe.problem)
        if problem:
            raise NormfixError(
                "NF108",
                f"it says that the network has {problem}, which none has. The file was edited; make it again.",
                where=where,
            )
        return self

    @classmethod
    def _decoded(cls, data: object, where: str) -> Saved:
        """Decode it, also where a version wrote it before there were checksums and certificates."""
        if isinstance(data, Mapping):
            data = {"statement": "", "certificate": None, **data}
            calibration = data.get("calibration")
            if isinstance(calibration, Mapping):
                data["calibration"] = {"distilled": None, **calibration}
            provenance = data.get("provenance")
            if isinstance(provenance, Mapping):
                before = provenance.get("statistics", {})
                known = {**WHOLE.to_json(), **before} if isinstance(before, Mapping) else before
                data["provenance"] = {**provenance, "statistics": known}
        return cls.from_json(data, where)

    def edited(self, data: Any) -> bool:
        """Tell whether the JSON that it was read from is another than was sealed."""
        return bool(self.statement) and self.statement != statement_of(data)

    def doubt(self, where: str) -> tuple[str, ...]:
        """Return what to say of a file that has no checksum of its statement."""
        if self.statement:
            return ()
        return (
            f"{where}: it has no checksum of its plan, stride, halo and scaling (a version of before wrote it, or it "
            "was taken out), so an edit of these is not noticed. Convert the network again to have one.",
        )


def statement_of(saved: Any) -> str:
    """Return the checksum of a statement: of its JSON but for this checksum, however that is laid out.

    >>> statement_of({"a": 1, "b": 2}) == statement_of({"b": 2, "statement": "", "a": 1})
    True
    """
    content = {key: value for key, value in saved.items() if key != "statement"}
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()
