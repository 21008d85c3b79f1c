"""Scan, convert and check one architecture, and put the outcome under exactly one heading.

Every claim of the package is checked by the zoo's own arithmetic: identity against the original's output of
the whole image, in float64 and in float32, and tiles on a pencil that no window covers, before (where the
original must differ, or the check could not have failed) and after. A claim that the package makes and the
zoo refutes is "silently wrong", whatever else went well.
"""

from __future__ import annotations

import copy
import math
import time
import traceback
from collections import Counter
from collections.abc import Callable
from fractions import Fraction
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import normfix
from normfix.records.plans import Plan
from normfix.records.sites import Scan

from .entry import Entry
from .preparing import material, prepared, seed_of
from .tiling import Pencil, distance, in_float64, stitched

__all__ = ["CATEGORIES", "GOOD", "examine"]

CATEGORIES = {
    "converted": "live sites converted; identity and tiles proved, the original's tiles differ",
    "local": "nothing is live; tiles proved as they are",
    "not dense": "the output is no map of the image (a classifier, for example)",
    "refused": "a live site that no constant replaces, named",
    "size fixed": "the output depends on size or position, or one size is taken only",
    "inconclusive": "nothing could be decided",
    "failed": "the package failed on it; the cause is named",
    "silently wrong": "the package passed what the zoo's arithmetic refutes",
    "timeout": "stopped after the time limit",
}
GOOD = ("converted", "local", "not dense", "refused", "size fixed")

EQUAL_64 = 1e-9
"""Largest distance in sd at which two float64 computations count as one function."""

EQUAL_32 = 1e-4
"""The same in float32; ten times the original's own rounding, where that is more."""

SEEN = 1e-7
"""Smallest distance of the original's tiles at which the check is known to see its statistics."""

_SIZE, _GLOBAL, _DYE_AGAINST_CENSUS = {"NF210", "NF213"}, {"NF212"}, {"NF240", "NF241"}


def examine(entry: Entry, report: Callable[[dict[str, Any]], None] = lambda row: None) -> dict[str, Any]:
    """Return one row of the table; `report` is given what is known before each long step."""
    row: dict[str, Any] = {"name": entry.name, "library": entry.library, "shape": list(entry.shape)}
    try:
        _examine(entry, row, report)
    except normfix.NormfixError as error:
        row |= {"category": "failed", "cause": f"{row.get('step')}: {error}"[:600]}
    except Exception as error:  # noqa: BLE001 - a network of the zoo may fail in any way, and the run goes on
        row |= crashed(row.get("step"), error)
    return row


def crashed(step: str | None, error: Exception) -> dict[str, str]:
    """Return what a row says of an exception that is none of normfix's."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    place = f"{Path(frame.filename).name}:{frame.lineno}"
    return {"category": "failed", "cause": f"{step}: {type(error).__name__}: {error} ({place})"[:600]}


def _examine(entry: Entry, row: dict[str, Any], report: Callable[[dict[str, Any]], None]) -> None:
    row["step"] = "build"
    report(row)
    model = prepared(entry)
    example = material(entry.shape, entry.name)
    row["step"] = "scan"
    report(row)
    row["pass_s"] = _costs(entry, model, example)
    report(row)
    start = time.process_time()
    scan = normfix.scan(model, example, forward_fn=entry.call, output=entry.output)
    row["scan_s"] = round(time.process_time() - start, 1)
    _describe(row, scan)
    if scan.dense is not entry.dense:
        row |= {"category": "failed", "cause": f"scan says dense={scan.dense}"}
    elif not scan.dense:
        row["category"] = "not dense"
    elif scan.halo is None:
        row |= _without_geometry(scan)
    else:
        _prove(entry, row, model, scan, report)


def _costs(entry: Entry, model: nn.Module, example: Tensor) -> tuple[float, float]:
    """Return seconds of processor time of one pass of the example, in float32 and in float64: why a row is slow."""
    run, spent = _runner(entry), []
    for network, image in ((model, example), (copy.deepcopy(model).double().eval(), example.double())):
        with torch.no_grad(), in_float64():
            start = time.process_time()
            try:
                run(network, image)
            except Exception:  # noqa: BLE001 - what a network raises is for the scan to say
                return (0.0, 0.0)
            spent.append(round(time.process_time() - start, 2))
    return spent[0], spent[1]


def _describe(row: dict[str, Any], scan: Scan) -> None:
    plan = normfix.plan(scan)
    dyed = {s.id for s in scan.live if "dye" in s.looks}
    disputed = {f.where for f in scan.findings if f.code in _DYE_AGAINST_CENSUS}
    row |= {
        "dye_live": len(dyed),
        "dye_missing": sorted((dyed | disputed) - {d.site.id for d in plan.decisions}),
        "sites": dict(Counter(str(s.family) for s in scan.sites)),
        "live": dict(Counter(str(s.family) for s in scan.live)),
        "convertible": sum(s.convertible for s in scan.live),
        "left": _left(plan),
        "looks": dict(Counter("+".join(s.looks) for s in scan.live)),
        "went": {look.name: look.status for look in scan.looks},
        "uncalled": len(scan.uncalled),
        "stride": scan.stride,
        "halo": scan.halo,
        "exact_sizes": scan.exact_sizes,
        "findings": sorted({f.code for f in scan.findings}),
    }


def _left(plan: Plan) -> list[str]:
    """Name what stays live, one per family and function."""
    found = {(d.site.family, d.site.function): d for d in plan.left_live}
    return [f"{d.site.family} {d.site.id}: {d.reason}" for d in found.values()]


def _without_geometry(scan: Scan) -> dict[str, str]:
    codes = {f.code for f in scan.findings}
    causes = "; ".join(
        f"{f.code} {f.where}: {f.message}" for f in scan.findings if f.code not in ("NF202", "NF215")
    )
    left = _left(normfix.plan(scan))
    if left:
        return {"category": "refused", "cause": "; ".join(left)[:600]}
    if codes & _GLOBAL:
        return {"category": "failed", "cause": f"a site is missing from the plan: {causes}"[:600]}
    return {"category": "size fixed" if codes & _SIZE else "inconclusive", "cause": causes[:600]}


def _prove(
    entry: Entry, row: dict[str, Any], model: nn.Module, scan: Scan, report: Callable[[dict[str, Any]], None]
) -> None:
    pencil = _pencil(entry, scan)
    image = material((*entry.shape[:2], *pencil.size), entry.name)
    row["image"] = list(image.shape)
    run = _runner(entry)
    original = copy.deepcopy(model).double().eval()  # copying a GraphModule forgets eval mode
    row["step"] = "tiles before"
    report(row)
    with in_float64() as mode:
        whole = run(original, image.double())
        before = distance(stitched(lambda x: run(original, x), image.double(), pencil), whole)
        row |= {"before": before, "casts": mode.casts}
    if not float(whole.std()) > 0:
        row |= {"category": "inconclusive", "cause": "the output is constant"}
    elif not scan.live:
        right = before <= EQUAL_64
        claim = "" if right else f"scanned as tile-invariant, tiles are {before:.1e} sd from the whole"
        row |= {"category": "local" if right else "silently wrong", "cause": claim}
    else:
        _prove_converted(entry, row, model, original, image, whole, pencil, scan, report)


def _prove_converted(
    entry: Entry,
    row: dict[str, Any],
    model: nn.Module,
    original: nn.Module,
    image: Tensor,
    whole: Tensor,
    pencil: Pencil,
    scan: Scan,
    report: Callable[[dict[str, Any]], None],
) -> None:
    """Convert in float64 to constants and, for every third name, in float32 to BatchRenorm."""
    run, problems = _runner(entry), []
    for to, given in (
        ("frozen", original),
        *((("batchrenorm", model),) if seed_of(entry.name) % 3 == 0 else ()),
    ):
        row["step"] = f"convert to {to}"
        report(row)
        double = given is original
        start = time.process_time()
        done = normfix.convert(
            given,
            image.double() if double else image,
            to,
            forward_fn=entry.call,
            output=entry.output,
            tile=math.lcm(*(scan.stride or (1,))) * -(-pencil.tile // math.lcm(*(scan.stride or (1,)))),
        )
        row[f"{to}_s"] = round(time.process_time() - start, 1)
        steps = [
            f"{s.name} {s.status}: {s.note} ({s.value})" for s in done.proof.steps if s.status != "passed"
        ]
        undecided = all(s.status != "failed" for s in done.proof.steps)
        mine = _differences(row, to, run, done.model.eval(), given, image, whole, pencil)
        if done.proof.passed and mine:
            row |= {"category": "silently wrong", "cause": f"{to}: {'; '.join(mine)}"[:600]}
            return
        if steps:
            branches = [f"{f.code} {f.where}: {f.message}" for f in scan.findings if f.code == "NF244"]
            row |= {
                "category": "size fixed" if branches else "inconclusive" if undecided else "failed",
                "cause": f"{to}: {'; '.join((*branches[:2], *steps))}"[:600],
            }
            return
        problems += mine
    if row["before"] <= SEEN:
        row |= {
            "category": "inconclusive",
            "cause": f"the original's own tiles are only {row['before']:.1e} sd away",
        }
    else:
        row |= {"category": "converted", "cause": ""}


def _differences(
    row: dict[str, Any],
    to: str,
    run: Callable[[nn.Module, Tensor], Tensor],
    converted: nn.Module,
    original: nn.Module,
    image: Tensor,
    whole: Tensor,
    pencil: Pencil,
) -> list[str]:
    """Compare with the original's whole image and with tiles; return what is not as claimed."""
    wide = copy.deepcopy(converted).double().eval()
    with in_float64():
        mine = run(wide, image.double())
        after = distance(stitched(lambda x: run(wide, x), image.double(), pencil), mine)
    if to == "frozen":
        identity, bound = distance(mine, whole), EQUAL_64
        single, narrow = (copy.deepcopy(net).float().eval() for net in (original, converted))
    else:
        identity, bound, single, narrow = 0.0, 1.0, original, converted
    with torch.no_grad():
        reference = run(single, image)
        rounding = distance(reference, whole)
        identity_32 = distance(run(narrow, image), reference)
    row |= {
        f"{to}_after": after,
        f"{to}_identity_64": identity,
        f"{to}_identity_32": identity_32,
        "rounding": rounding,
    }
    found = []
    if after > EQUAL_64:
        found.append(f"tiles are {after:.1e} sd from the whole in float64")
    if identity > bound:
        found.append(f"{identity:.1e} sd from the original in float64")
    if identity_32 > max(EQUAL_32, 10 * rounding):
        found.append(f"{identity_32:.1e} sd from the original in float32 (its own rounding: {rounding:.1e})")
    return found


def _runner(entry: Entry) -> Callable[[nn.Module, Tensor], Tensor]:
    def run(model: nn.Module, image: Tensor) -> Tensor:
        result = entry.call(model, image.clone()) if entry.call else model(image.clone())
        return result if entry.output is None else result[entry.output]

    return run


def _pencil(entry: Entry, scan: Scan) -> Pencil:
    """Lay the pencil along an axis chosen by the name; elsewhere it has the extent of the example."""
    assert scan.stride is not None
    assert scan.halo is not None
    assert scan.scale is not None
    assert scan.exact_sizes is not None
    axis = seed_of(entry.name) // 3 % entry.ndim
    step = [math.lcm(s, m) for s, m in zip(scan.stride, scan.exact_sizes, strict=True)]
    thin = [-(-n // s) * s for n, s in zip(entry.shape[2:], step, strict=True)]
    return Pencil(thin, axis, step[axis], scan.halo[axis], Fraction(scan.scale[axis]))
