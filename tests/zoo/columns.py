"""The columns of docs/zoo.md that come from a run of the geometry alone, and what it says of all networks together.

They are put into a page that is there, whoever made it: a network without a row of that run has empty cells, and the
page says how many these are.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from fractions import Fraction
from statistics import median
from typing import Any

from normfix.records.spans import in_strides

from .geometry import GEOMETRIES

__all__ = ["live_names", "local_names", "with_geometry"]

Row = Mapping[str, Any]

_COLUMNS = ("bound", "measured", "brute force")
_BEGIN, _END = "<!-- geometry -->\n", "<!-- end of geometry -->\n"
_TABLE = "\n## Table\n"


def local_names(page: str) -> set[str]:
    """Return the networks that a page calls converted or local."""
    return {name for name, cells in _rows(page) if {"converted", "local"} & set(cells)}


def live_names(page: str) -> set[str]:
    """Return the networks that a page calls converted or refused: those with a live site whose output is a map."""
    return {name for name, cells in _rows(page) if {"converted", "refused"} & set(cells)}


def with_geometry(page: str, rows: Mapping[str, Row]) -> str:
    """Return a page with the columns and the section of a run of the geometry, in the place of earlier ones.

    Args:
        page: docs/zoo.md.
        rows: of the run, by the networks' names.
    """
    head, _, table = page.partition(_TABLE)
    before, _, rest = head.partition(_BEGIN)
    head = before + rest.partition(_END)[2] if rest else head
    asked = local_names(page)
    lines = table.splitlines()
    title = next(i for i, line in enumerate(lines) if line.startswith("| network |"))
    names = _cells(lines[title])
    dropped = {names.index(name) for name in _COLUMNS if name in names}
    place = names.index("halo") + 1
    for i, line in enumerate(lines[title:], start=title):
        if line.startswith("|"):
            lines[i] = _widened(line, rows, dropped, place, first=i - title)
    return f"{head}{_section(rows, asked)}{_TABLE}" + "\n".join(lines) + "\n"


def _widened(line: str, rows: Mapping[str, Row], dropped: set[int], place: int, *, first: int) -> str:
    cells = [cell for i, cell in enumerate(_cells(line)) if i not in dropped]
    match first:
        case 0:
            added = list(_COLUMNS)
        case 1:
            added = ["---"] * len(_COLUMNS)
        case _:
            row = rows.get(cells[0], {})
            added = [_spans(row.get(key)) for key in ("bound", "measured", "brute")]
    return f"| {' | '.join([*cells[:place], *added, *cells[place:]])} |"


def _section(rows: Mapping[str, Row], asked: set[str]) -> str:
    ran = {name: row for name, row in rows.items() if name in asked}
    counts = Counter(row["category"] for row in ran.values())
    table = [f"| {name} | {counts[name]} | {meaning} |" for name, meaning in GEOMETRIES.items()]
    known = [row for row in ran.values() if row["category"] in ("bounded", "unbounded", "broken")]
    bounded = [row for row in known if row["bound"]]
    convolutional = [row for row in known if not row.get("attends")]
    outside = [name for name, row in ran.items() if row["category"] == "broken"]
    lines = [
        "## Geometry",
        "",
        "Made by `python -m tests.zoo --geometry geometry.jsonl --page docs/zoo.md`, a run of its own: of each network "
        "that is called converted or local here, with all that is live frozen, the halo that the graph bounds, the one "
        "that the dye shows, and brute force (tests/zoo/geometry.py): on a strip as thin as the example, the "
        "derivative of tiles by every pixel, and columns of pixels that are changed one by one. The columns bound, "
        "measured and brute force of the table below are from it, in pixels (before+after where they differ); the "
        "others are not. The bound is that of a tile that starts on the grid, the dye shows whichever pixel ends the "
        "clean run, up to a stride more or less: the halo that tiles read is the bound in whole strides.",
        "",
        "| outcome | networks | meaning |",
        "| --- | --- | --- |",
        *table,
        f"| not run | {len(asked) - len(ran)} | converted or local, without a row of this run: their cells are empty |",
        "",
        f"- halos of convolutional networks bounded by the graph: {_share(convolutional)} (target 98 %). Convolutional "
        "is what attends nowhere: in a forward pass nothing calls torch's attention, nor a softmax along a last "
        "dimension (windows, linear attention, global context).",
        f"- halos of networks in which positions attend, by statistics that are frozen or inside windows: "
        f"{_share([row for row in known if row.get('attends')])} bounded; all together {_share(known)}",
        f"- bound >= measured >= brute force, in whole strides, and bound >= brute force to the pixel: fails for "
        f"{len(outside)} (target 0) {', '.join(outside)}",
        *_excess(bounded),
        *(
            f"- no bound: {name}. {_short(row['cause'])}"
            for name, row in ran.items()
            if row["category"] == "unbounded"
        ),
        *(
            f"- {row['category']}: {name}. {_short(row['cause'])}"
            for name, row in ran.items()
            if row["category"] in ("no geometry", "broken", "failed", "timeout")
        ),
        "",
    ]
    return _BEGIN + "\n".join(lines) + _END


def _share(rows: Sequence[Row]) -> str:
    bounded = sum(row["bound"] is not None for row in rows)
    return f"{bounded} of {len(rows)} ({100 * bounded / len(rows):.1f} %)" if rows else "none"


def _excess(bounded: Sequence[Row]) -> Iterator[str]:
    """Yield by how much bounds exceed what brute force and the dye show."""
    for key, name in (("brute", "brute force"), ("measured", "the dye, in whole strides")):
        pairs = [(row, *_totals(row, key)) for row in bounded if row.get(key)]
        if not pairs:
            continue
        more = [total - shown for _, total, shown in pairs]
        ratios = [(Fraction(total, shown), row["name"]) for row, total, shown in pairs if shown]
        worst, at = max(ratios, default=(Fraction(1), ""))
        exact = sum(not n for n in more)
        yield (
            f"- bound over {name}, before and after together, along the axis where they differ most: equal for {exact} "
            f"of {len(pairs)}; {median(more):g} pixels more in the median, {max(more)} at worst; ratio "
            f"{float(median(r for r, _ in ratios)):.3g} in the median, {float(worst):.3g} at worst ({at})"
        )


def _totals(row: Row, key: str) -> tuple[int, int]:
    """Return the bound and what was shown along the axis where they differ most."""
    bound, shown = row["bound"], row[key]
    if key == "measured":
        bound, shown = (in_strides(spans, row["stride"]) for spans in (bound, shown))
    pairs = [(sum(b), sum(s)) for b, s in zip(bound, shown, strict=True)]
    return max(pairs, key=lambda pair: pair[0] - pair[1])


def _rows(page: str) -> Iterator[tuple[str, list[str]]]:
    for line in page.partition(_TABLE)[2].splitlines():
        cells = _cells(line)
        if line.startswith("| ") and cells[0] not in ("network", "---"):
            yield cells[0], cells[1:]


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip().strip("|").split("|")]


def _spans(spans: Sequence[Sequence[int]] | None) -> str:
    sides = [f"{a}+{b}" if a != b else str(a) for a, b in spans or ()]
    return sides[0] if len(set(sides)) == 1 else " x ".join(sides)


def _short(text: str) -> str:
    line = " ".join(text.replace("|", "/").split())
    return line if len(line) <= 160 else line[:157] + "..."
