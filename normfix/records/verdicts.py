"""What was compared and proved."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from normfix.records.encoding import Record
from normfix.records.sites import Finding
from normfix.records.spans import Spans
from normfix.records.tables import Shown, Table, by_axis, counted, number

__all__ = ["ImageShift", "Proof", "ProofStep", "Verdict"]


@dataclass(frozen=True, slots=True, kw_only=True)
class ImageShift(Record):
    """How far the prediction of one image moved from the original network's, in sd of the original."""

    image: int
    mean_sd: float
    max_sd: float


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Verdict(Shown, Record):
    """The outcome of comparing stitched tiles with the whole image.

    Differences are in sd of the whole-image output over the axes in `axes` (those that at least one window
    does not cover). `noise` is the noise floor n of the tested dtype on the same scale; up to `tolerance` (4 n,
    at most 1e-3) passes, up to `threshold` (100 n, at most 1e-3, unless given) warns and passes, above it fails
    if a repeat in float64 confirms it.
    `interference` is the largest relative change of a tile's output when everything outside its window is
    multiplied by 1e12 in float64, one entry per axis. `settings` name the network, the image, device and precision.
    Tiles read `halo_rounded`, the halo rounded up to the stride.
    `reach` tells in words where the halo is from: the network's graph, or a measurement and how far it looked.
    """

    status: Literal["passed", "failed", "inconclusive"]
    max_sd: float
    mean_sd: float
    tile_mismatch: float | None
    noise: float
    tolerance: float
    threshold: float
    sd: float
    tile: tuple[int, ...]
    halo: Spans
    stride: tuple[int, ...]
    padding: tuple[int, ...]
    axes: tuple[int, ...]
    windows: int
    interference: tuple[float, ...]
    findings: tuple[Finding, ...]
    settings: tuple[tuple[str, str], ...]
    halo_rounded: Spans = ()
    reach: str = ""

    @property
    def passed(self) -> bool:
        """Tell whether the network is tile-invariant on this image."""
        return self.status == "passed"

    def __bool__(self) -> bool:
        """Be true for a pass only, so that `assert normfix.check(...)` fails where it must."""
        return self.passed

    @property
    def inconclusive(self) -> bool:
        """Tell whether nothing could be decided; this is not a pass."""
        return self.status == "inconclusive"

    @property
    def headline(self) -> str:
        """Return the status, the largest difference and what was compared."""
        if not self.tile or self.inconclusive:
            return "; ".join([self.status, *(f.message for f in self.findings[:1])])
        far = "within" if self.passed else "up to"
        compared = f"tiles of {by_axis(self.tile)} are {far} {number(self.max_sd)} sd from the whole image"
        parts = [self.status, f"{compared} (threshold {number(self.threshold)})"]
        return "; ".join([*parts, *([counted(len(self.findings), "finding")] * bool(self.findings))])

    def table(self) -> Table:
        """Return the findings."""
        return Table(("code", "where", "what"), [(f.code, f.where, f.message) for f in self.findings])


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class ProofStep(Shown, Record):
    """One claim about a conversion, the number that supports it and the bound it was held against.

    "refused" is the status of a claim that is not made, because sites that no constant can replace stay live;
    `value` is then what tiles differ by all the same. "inapplicable" is that of a claim about a form that this network
    cannot be given; `note` says why. It is not a pass.
    """

    name: str
    claim: str
    status: Literal["passed", "failed", "inconclusive", "refused", "inapplicable"]
    value: float | None
    bound: float | None
    note: str = ""

    @property
    def headline(self) -> str:
        """Return the status, and the number with its bound."""
        held = "" if self.value is None else f", {number(self.value)}"
        bound = "" if self.bound is None else f" (bound {number(self.bound)})"
        return f"{self.name} {self.status}{held}{bound}"


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Proof(Shown, Record):
    """All steps that a conversion, or a network that was trained or measured since, had to pass."""

    steps: tuple[ProofStep, ...]
    shifts: tuple[ImageShift, ...]
    verdict: Verdict | None

    @property
    def passed(self) -> bool:
        """Tell whether every step that applies passed, and any did."""
        return self._all("passed", "inapplicable")

    def __bool__(self) -> bool:
        """Be true for a pass only."""
        return self.passed

    @property
    def partial(self) -> bool:
        """Tell whether all that could be converted is proved, while refused sites stay live."""
        return not self.passed and self._all("passed", "refused", "inapplicable")

    @property
    def status(self) -> Literal["passed", "failed", "inconclusive"]:
        """Sum the steps up: a refused one is a failure here, an open one leaves all open unless another failed."""
        if self.passed:
            return "passed"
        wrong = any(step.status in ("failed", "refused") for step in self.steps)
        return "failed" if wrong else "inconclusive"

    @property
    def open_steps(self) -> tuple[ProofStep, ...]:
        """Return the steps that failed or decided nothing."""
        return tuple(step for step in self.steps if step.status in ("failed", "inconclusive"))

    @property
    def headline(self) -> str:
        """Return the status and the steps that are no pass, if any."""
        open_ = [step.headline for step in self.steps if step.status != "passed"]
        return "; ".join([f"{self.status}, {counted(len(self.steps), 'step')}", *open_])

    def table(self) -> Table:
        """Return the steps."""
        rows = [(s.name, s.status, number(s.value), number(s.bound), s.note) for s in self.steps]
        return Table(("step", "status", "value", "bound", "note"), rows)

    def step(self, name: str) -> ProofStep:
        """Return the step of that name.

        Raises:
            KeyError: if the proof has no such step.
        """
        for step in self.steps:
            if step.name == name:
                return step
        raise KeyError(name)

    def _all(self, *statuses: str) -> bool:
        """Tell whether the steps have no other status than these, and one passed."""
        found = {step.status for step in self.steps}
        return "passed" in found and found <= set(statuses)
