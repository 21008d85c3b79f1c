"""What a saved network's reach was derived from, so that anybody can derive it again from the program alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from normfix.records.derivations import Obstacle, PathStep
from normfix.records.encoding import Record
from normfix.records.sites import Finding
from normfix.records.spans import Spans
from normfix.records.tables import Shown, Table, counted, number
from normfix.records.verdicts import ProofStep

__all__ = ["Certificate", "CertifiedSite", "Constant", "Derivation", "Guard", "Verification"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Constant(Record):
    """One stored tensor that the program holds: its name, torch's type, its shape and the SHA-256 of its bytes.

    The bytes are those of the elements in row-major order, little-endian.
    """

    name: str
    dtype: str
    shape: tuple[int, ...]
    sha256: str


@dataclass(frozen=True, slots=True, kw_only=True)
class CertifiedSite(Record):
    """What became of one site of the plan, and the constants that its new layer holds and the program reads."""

    site: str
    action: str
    constants: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Derivation(Record):
    """How far one output of the program reaches, by its operators and their attributes alone.

    `output` is its number among the tensors that the program returns, `counts` tells that tiles are made of it. `bound`
    is (before, after) per axis, in pixels of the image, for tiles that start on `stride`; None where it is infinite
    along some axis, with `obstacles` that say why. It holds unless something `wraps`. `lattice` are the pixels per axis
    on which sizes are straight lines; the output has scale n + offset pixels there. `paths` holds, per axis, the widest
    ways before and after a tile. `note` says why the output has no derivation.
    """

    output: int
    counts: bool
    stride: tuple[int, ...] = ()
    bound: Spans | None = None
    lattice: tuple[int, ...] = ()
    scale: tuple[str, ...] = ()
    offset: tuple[int, ...] = ()
    obstacles: tuple[Obstacle, ...] = ()
    wraps: tuple[Obstacle, ...] = ()
    shifts: tuple[Obstacle, ...] = ()
    paths: tuple[tuple[tuple[PathStep, ...], tuple[PathStep, ...]], ...] = ()
    note: str = ""

    @property
    def whole(self) -> bool:
        """Tell whether the bound holds for all that is read."""
        return self.bound is not None and not self.wraps


@dataclass(frozen=True, slots=True, kw_only=True)
class Guard(Record):
    """One condition on the image's extents under which the program is the network, and what it is held for.

    "condition" and "crossed" are those that `Scan.sizes` states, and "implied" excludes no image that those do not;
    "built" is a number computed from the size, for which it states that not all is known; "repeats" asks the same again
    at every multiple; "single" only excludes maps of one pixel, and "harmless" no image at all; "open" is one that
    `Scan.sizes` does not state although it excludes images.
    """

    text: str
    role: Literal["condition", "crossed", "implied", "built", "repeats", "single", "harmless", "open"]


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Certificate(Shown, Record):
    """The derivation of a saved network's reach, for each output of its program.

    `program` is the file that holds the graph, `sha256` of it; without one, `reason` says why. `assumed` is what the
    program cannot tell.
    """

    program: str
    sha256: str = ""
    reason: str = ""
    constants: tuple[Constant, ...] = ()
    sites: tuple[CertifiedSite, ...] = ()
    derivations: tuple[Derivation, ...] = ()
    guards: tuple[Guard, ...] = ()
    assumed: tuple[str, ...] = ()

    @property
    def counting(self) -> Derivation | None:
        """Return the derivation of the output that tiles are made of."""
        return next((found for found in self.derivations if found.counts), None)

    @property
    def headline(self) -> str:
        """Return the program, and how much of it is stated."""
        if self.reason:
            return f"no program: {self.reason}"
        sizes = [(self.constants, "constant"), (self.sites, "site"), (self.guards, "condition")]
        return f"{self.program}: " + ", ".join(counted(len(part), what) for part, what in sizes)


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class Verification(Shown, Record):
    """A certificate derived again: each step, and a finding for each that did not pass."""

    steps: tuple[ProofStep, ...]
    findings: tuple[Finding, ...]
    assumed: tuple[str, ...] = ()

    @property
    def status(self) -> Literal["passed", "failed", "inconclusive"]:
        """Sum the steps up: one that failed fails all, one that decided nothing leaves all open."""
        found = {step.status for step in self.steps}
        if "failed" in found:
            return "failed"
        return "passed" if found == {"passed"} else "inconclusive"

    @property
    def passed(self) -> bool:
        """Tell whether every step passed."""
        return self.status == "passed"

    def __bool__(self) -> bool:
        """Be true for a pass only."""
        return self.passed

    @property
    def headline(self) -> str:
        """Return the status and how many steps."""
        findings = [counted(len(self.findings), "finding")] * bool(self.findings)
        return "; ".join([f"{self.status}, {counted(len(self.steps), 'step')}", *findings])

    def table(self) -> Table:
        """Return the steps."""
        rows = [(s.name, s.status, number(s.value), number(s.bound), s.note) for s in self.steps]
        return Table(("step", "status", "value", "bound", "note"), rows)
