"""docs/zoo.md from the rows of a run: the summary with its targets, what went wrong, and the table."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import Any

from .examining import CATEGORIES

__all__ = ["page"]

Row = Mapping[str, Any]

LONG = 60
"""Seconds of processor time from which on a row says what took them."""

_HEAD = """# Real architectures

Made by `python -m tests.zoo`; not edited by hand. Every network is built with seeded random weights under which
all its sites matter (tests/zoo/preparing.py), scanned, converted in float64 to constants measured on one image
that is long on one axis, and checked by arithmetic that the package has no part in (tests/zoo/tiling.py): equal to
the original's output of the whole image to 1e-9 standard deviations (casts to float32 inside a network are left out
for that), and tiles equal to the whole, where the original's tiles must differ. Every third one is converted to
BatchRenorm in float32 as well.
"""


def page(rows: Iterable[Row], names: Collection[str]) -> str:
    """Return the page as Markdown; `names` are those of the whole catalogue, of which a run may be a part."""
    rows = sorted(rows, key=lambda row: (row["library"], row["name"]))
    parts = [
        _HEAD,
        _summary(rows, set(names) - {row["name"] for row in rows}),
        _targets(rows),
        _problems(rows),
        _slow(rows),
        _table(rows),
    ]
    return "\n".join(parts)


def _summary(rows: list[Row], absent: Collection[str]) -> str:
    counts = Counter(row["category"] for row in rows)
    lines = [f"| {name} | {counts[name]} | {meaning} |" for name, meaning in CATEGORIES.items()]
    return "\n".join(
        [
            "| outcome | networks | meaning |",
            "| --- | --- | --- |",
            *lines,
            f"| not run | {len(absent)} | in the catalogue, without a row |",
            f"| all | {len(rows) + len(absent)} | |",
            "",
        ]
    )


def _targets(rows: list[Row]) -> str:
    apart = ("size fixed", "not dense")  # nothing to stitch there, whatever could be converted
    able = [r for r in rows if r.get("convertible") and not r.get("left") and r["category"] not in apart]
    proved = sum(row["category"] == "converted" for row in able)
    missed = [r["name"] for r in rows if "missing from the plan" in r.get("cause", "")]
    wrong = [r["name"] for r in rows if r["category"] == "silently wrong"]
    share = f"{100 * proved / len(able):.1f} %" if able else "none"
    return "\n".join(
        (
            "## Targets",
            "",
            f"- all live sites convertible and the output local: {len(able)} networks; converted and proved: {proved} "
            f"({share}; target 98 %)",
            _seen_by_the_dye(rows),
            f"- a global dependence that no site of the plan explains: {len(missed)} (target 0) {', '.join(missed)}",
            f"- passed by the package, refuted by the zoo: {len(wrong)} (target 0) {', '.join(wrong)}",
            "",
        )
    )


def _seen_by_the_dye(rows: list[Row]) -> str:
    """Count what the dye sees, and what of it no decision of the plan names; rows without the look are said."""
    looked = [r for r in rows if r.get("went", {}).get("dye") == "done" and "dye_missing" in r]
    sites = sum(row["dye_live"] for row in looked)
    lost = [f"{row['name']} {site}" for row in looked for site in row["dye_missing"]]
    return (
        f"- sites that the dye sees and the plan misses: {len(lost)} of {sites} live sites in {len(looked)} networks "
        f"(target 0; {len(rows) - len(looked)} without a dye look) {', '.join(lost)}"
    )


def _problems(rows: list[Row]) -> str:
    bad = [r for r in rows if r["category"] in ("inconclusive", "failed", "silently wrong", "timeout")]
    lines = [f"- {r['name']}: {r['category']}. {_cell(r.get('cause', ''))}" for r in bad]
    return "\n".join(["## What went wrong", "", *(lines or ["Nothing."]), ""])


def _slow(rows: list[Row]) -> str:
    """Name what took long, with the steps that did and what one pass costs, of which each step takes a number."""
    steps = {"scan_s": "scan", "frozen_s": "conversion", "batchrenorm_s": "conversion to BatchRenorm"}
    lines = []
    for row in rows:
        if row.get("seconds", 0) <= LONG or row["category"] == "timeout":
            continue
        took = ", ".join(f"{word} {row[key]} s" for key, word in steps.items() if key in row)
        cost = "; a pass of the example {} s in float32, {} s in float64".format(*row.get("pass_s", "??"))
        lines.append(f"- {row['name']}: {row['seconds']} s ({took}{cost})")
    title = f"## What took over {LONG} s of processor time"
    return "\n".join([title, "", *(lines or ["Nothing."]), ""])


def _table(rows: list[Row]) -> str:
    lines = ["## Table", "", "Sites are counted by family; `3/5 instance` means that 3 of 5 are live.", ""]
    lines += ["| network | sites | looks | halo | stride | result | note |", "| --- " * 7 + "|"]
    for row in rows:
        halo = _spans(row.get("halo"))
        stride = _axes(map(str, row.get("stride") or ()))
        note = row.get("cause") or _measured(row)
        cells = (row["name"], _sites(row), _looks(row), halo, stride, row["category"], _cell(note))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join([*lines, ""])


def _sites(row: Row) -> str:
    live = row.get("live", {})
    return ", ".join(f"{live.get(family, 0)}/{n} {family}" for family, n in row.get("sites", {}).items())


def _looks(row: Row) -> str:
    return ", ".join(f"{looks} {n}" for looks, n in row.get("looks", {}).items())


def _spans(spans: Sequence[Sequence[int]] | None) -> str:
    return _axes(f"{a}+{b}" if a != b else str(a) for a, b in spans or ())


def _axes(values: Iterable[str]) -> str:
    found = list(values)
    return found[0] if len(set(found)) == 1 else " x ".join(found)


def _measured(row: Row) -> str:
    if row["category"] == "converted":
        return f"tiles {row['before']:.1g} sd before, {row['frozen_after']:.0e} after"
    return f"tiles {row['before']:.0e} sd" if "before" in row else ""


def _cell(text: str) -> str:
    short = " ".join(text.replace("|", "/").split())
    return short if len(short) <= 160 else short[:157] + "..."
