"""Records as short text for a terminal."""

from __future__ import annotations

from collections import Counter

from normfix.records import CalibrationSummary, ConversionRecord, Scan, Spans, Verdict

__all__ = ["calibration_text", "conversion_text", "scan_text", "verdict_text"]


def scan_text(scan: Scan) -> str:
    """Return sites, one a line, then the geometry."""
    shape = "x".join(map(str, scan.example))
    lines = [f"{scan.model}, scanned at {shape}", ""]
    for site in scan.sites:
        state = "live" if site.live else "not live"
        how = "convertible" if site.convertible else site.refusal or "left alone"
        lines.append(f"  {site.id}  {site.family}, {state}, reduces {site.reduces}; {how}")
    kinds = Counter(site.family for site in scan.live)
    counted = ", ".join(f"{n} {family}" for family, n in kinds.items())
    lines += ["", f"live sites: {len(scan.live)}" + (f" ({counted})" if counted else "")]
    lines.append(f"tile-invariant: {'yes' if scan.tile_invariant else 'no'}")
    if scan.stride is not None and scan.halo is not None and scan.exact_sizes is not None:
        lines += [
            f"stride: {_by_axis(scan.stride)}",
            f"halo once frozen (before/after): {_spans(scan.halo)}",
            "exact sizes: " + ", ".join("any" if n == 1 else f"multiples of {n}" for n in scan.exact_sizes),
        ]
    lines += [f"{f.code} {f.where}: {f.message}" for f in scan.findings]
    return "\n".join(lines)


def conversion_text(record: ConversionRecord) -> str:
    """Return what was converted and how each step of the proof came out."""
    plan = record.plan
    lines = [f"{plan.model} to {plan.to}: {len(plan.converted)} of {len(plan.decisions)} sites converted"]
    if record.proof.partial:
        lines += _partly(record)
    for step in record.proof.steps:
        value = "" if step.value is None else f" {step.value:.2g}"
        bound = "" if step.bound is None else f" (bound {step.bound:.2g})"
        remark = f"; {step.note}" if step.note and step.status != "passed" else ""
        lines.append(f"  {step.name}: {step.status}{value}{bound}{remark}")
    lines += [
        f"  image {s.image}: prediction moved by {s.mean_sd:.2g} sd on average, {s.max_sd:.2g} at most"
        for s in record.proof.shifts
    ]
    return "\n".join(lines)


def _partly(record: ConversionRecord) -> list[str]:
    """Say first what a partial conversion is not."""
    live, step = record.plan.left_live, record.proof.step("tiles")
    apart = "could not be measured" if step.value is None else f"{step.value:.2g} sd at most"
    return [
        f"Partly converted: {len(live)} sites stay live, so the network is not tile-invariant.",
        *(f"  {d.site.id}: {d.reason}" for d in live),
        f"  Keep the tile size fixed. Difference of tiles from the whole: {apart}.",
    ]


def calibration_text(summary: CalibrationSummary) -> str:
    """Return images, residual and spread."""
    shift = max(site.mean_shift for site in summary.sites)
    spread = max(site.spread for site in summary.sites)
    return (
        f"{len(summary.sites)} sites calibrated on {len(summary.images)} images; largest residual {shift:.1g} sd; "
        f"largest spread between images {spread:.2g} sd"
    )


def verdict_text(verdict: Verdict) -> str:
    """Return the verdict first, then the numbers behind it."""
    lines: list[str] = [verdict.status]
    if verdict.tile:
        lines += [
            f"  largest difference {verdict.max_sd:.2g} sd, mean {verdict.mean_sd:.2g} sd",
            f"  noise floor n {verdict.noise:.2g} sd: up to {verdict.tolerance:.2g} (4 n, at most 1e-3) passes, up to "
            f"{verdict.threshold:.2g} warns, above it fails once float64 confirms",
            f"  tile {_by_axis(verdict.tile)}, halo {_spans(verdict.halo)}, stride {_by_axis(verdict.stride)}, "
            f"{verdict.windows} windows",
            "  beyond the halo, amplified: " + ", ".join(f"{c:.1g}" for c in verdict.interference),
        ]
        if any(verdict.padding):
            lines.append(f"  the image was extended by {_by_axis(verdict.padding)} pixels to an exact size")
    lines += [f"  {f.code} {f.where}: {f.message}" for f in verdict.findings]
    return "\n".join(lines)


def _by_axis(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))


def _spans(halo: Spans) -> str:
    return ", ".join(f"{before}/{after}" for before, after in halo)
