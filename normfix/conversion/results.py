"""What converting and calibrating return."""

from __future__ import annotations

from dataclasses import dataclass

from torch import nn

from normfix.networks.calling import Caller
from normfix.records.measurements import CalibrationSummary
from normfix.records.plans import Plan
from normfix.records.saved import ConversionRecord
from normfix.records.sites import Scan
from normfix.records.tables import Shown, Table
from normfix.records.verdicts import Proof, Verdict

__all__ = ["Calibration", "Conversion"]


@dataclass(frozen=True, slots=True, repr=False)
class Calibration(Shown):
    """A recalibrated copy of a model and the record of what was measured."""

    model: nn.Module
    summary: CalibrationSummary

    @property
    def record(self) -> CalibrationSummary:
        """Return the record, under the name all results use."""
        return self.summary

    @property
    def headline(self) -> str:
        """Return what was measured."""
        return f"{type(self.model).__name__}, {self.summary.headline}"

    def table(self) -> Table:
        """Return the sites."""
        return self.summary.table()


@dataclass(frozen=True, slots=True, repr=False)
class Conversion(Shown):
    """A converted network and everything that was decided, measured and proved on the way.

    `original` is the copy of the caller's network that the conversion was proved against.
    """

    model: nn.Module
    plan: Plan
    scan: Scan
    calibration: Calibration | None
    proof: Proof
    caller: Caller
    original: nn.Module

    @property
    def verdict(self) -> Verdict | None:
        """Return the comparison of stitched tiles with the whole image."""
        return self.proof.verdict

    @property
    def record(self) -> ConversionRecord:
        """Return the conversion without its models."""
        summary = self.calibration.summary if self.calibration else None
        return ConversionRecord(plan=self.plan, scan=self.scan, calibration=summary, proof=self.proof)

    @property
    def headline(self) -> str:
        """Return what was converted, and whether it is proved."""
        return f"{self.plan.headline}; proof {self.proof.headline}"

    def table(self) -> Table:
        """Return the steps of the proof."""
        return self.proof.table()
