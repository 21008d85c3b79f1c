"""What was given back: in what its files differ from the original's, and what was shown of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from normfix.records.encoding import Record
from normfix.records.tables import Shown, Table, counted, number
from normfix.records.verdicts import Verdict

__all__ = ["Change", "GivenBack"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change(Record):
    """One thing in which a written file differs from the original's.

    `kind` "config" is a value of a configuration, before and after as JSON; "added" and "removed" are names in the
    weights; "replaced" are weights with other values than the original's, beside the constants; "left out" is a file
    that was not copied. `after` has the reason.
    """

    file: str
    kind: Literal["config", "added", "removed", "replaced", "left out"]
    name: str
    before: str = ""
    after: str = ""

    @property
    def line(self) -> str:
        """Return it as a diff has it."""
        if self.kind == "config":
            was = f"- {self.file}: {self.name} = {self.before}\n" if self.before else ""
            return f"{was}+ {self.file}: {self.name} = {self.after}"
        sign = {"added": "+", "replaced": "~"}.get(self.kind, "-")
        return f"{sign} {self.file}: {self.name}" + (f" ({self.after})" if self.after else "")


@dataclass(frozen=True, slots=True, kw_only=True, repr=False)
class GivenBack(Shown, Record):
    """A network in the format of its own tool, and how far it is from the converted one, in sd of its output.

    `double_sd` is in float64, `single_sd` in the network's own dtype, `alone_sd` what its own library gave in a process
    without normfix, all on one seeded input; `verdict` compares its tiles with the whole.
    """

    folder: str
    format: str
    changes: tuple[Change, ...]
    double_sd: float
    single_sd: float
    alone_sd: float
    verdict: Verdict

    @property
    def headline(self) -> str:
        """Return what was written, and how far its own library is from the converted network."""
        changes = counted(len(self.changes), "change")
        alone = f"its own library gives it within {number(self.alone_sd)} sd"
        return f"{self.format} in {self.folder}: {changes}; {alone}; {self.verdict.headline}"

    def table(self) -> Table:
        """Return the changes."""
        rows = [(c.file, c.kind, c.name, c.before, c.after) for c in self.changes]
        return Table(("file", "kind", "name", "before", "after"), rows)
