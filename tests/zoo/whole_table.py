"""What docs/zoo.md says of whole images of unconverted networks, from the rows of a run of its own."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

from .columns import live_names
from .wholes import EQUAL, WHOLES

__all__ = ["with_wholes"]

Row = Mapping[str, Any]

_BEGIN, _END = "<!-- wholes -->\n", "<!-- end of wholes -->\n"
_TABLE = "\n## Table\n"


def with_wholes(page: str, rows: Iterable[Row]) -> str:
    """Return a page with the section of a run over whole images, in the place of an earlier one.

    Args:
        page: docs/zoo.md.
        rows: of the run.
    """
    head, _, table = page.partition(_TABLE)
    before, _, rest = head.partition(_BEGIN)
    head = before + rest.partition(_END)[2] if rest else head
    known = {row["name"]: row for row in rows}
    waiting = len(live_names(f"{_TABLE}{table}") - set(known))
    return f"{head}{_section([known[name] for name in sorted(known)], waiting)}{_TABLE}{table}"


def _section(rows: list[Row], waiting: int) -> str:
    counts = Counter(row["category"] for row in rows)
    exact = [row for row in rows if row["category"].startswith("exact")]
    lines = [
        _BEGIN.rstrip(),
        "## Whole images of unconverted networks",
        "",
        "Made by `python -m tests.zoo --wholes wholes.jsonl --page docs/zoo.md`, a run of its own: networks with live "
        'sites, as they are. `predict` with `statistics="per-image"` and `engine="stages"` is held against one '
        "untiled forward pass of the network itself, in float64, on an image twice as long as the example along one "
        "axis and in blocks of half of its shorter extent (tests/zoo/wholes.py).",
        "",
        "| outcome | networks | meaning |",
        "| --- | --- | --- |",
        *(f"| {name} | {counts[name]} | {meaning} |" for name, meaning in WHOLES.items()),
        f"| not run | {waiting} | converted or refused in the table below, without a row here |",
        "",
    ]
    if exact:
        worst = max(exact, key=lambda row: row["apart"])
        lines += [
            f"- largest distance of the {len(exact)} that are exact: {worst['apart']:.1e} sd ({worst['name']}); "
            f"the bound is {EQUAL:.0e}",
            "- seconds are of processor time, on one thread: of the untiled pass, and of `predict` with its scan and "
            "capture, which these small images do not repay; what larger ones cost is in "
            "[streaming.md](streaming.md)",
            "",
        ]
    lines += ["| network | image | sd apart | stages | blocks | untiled, predict in s | outcome |"]
    lines += ["| --- | --- | --- | --- | --- | --- | --- |", *map(_line, rows), "", _END.rstrip()]
    return "\n".join(lines) + "\n"


def _line(row: Row) -> str:
    size = "x".join(map(str, row.get("image", [])[2:]))
    known = "apart" in row
    measured = (f"{row['apart']:.0e}", str(row["stages"]), str(row["blocks"])) if known else ("", "", "")
    seconds = f"{row['pass_s']}, {row['predict_s']}" if known else ""
    note = f"{row['category']}: {_short(row['cause'])}" if row.get("cause") else row["category"]
    return f"| {' | '.join((row['name'], size, *measured, seconds, note))} |"


def _short(text: str) -> str:
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= 200 else f"{line[:197]}..."
