"""Records as short text for a terminal."""

from __future__ import annotations

import textwrap
from collections import Counter
from collections.abc import Sequence

from normfix.cli.columns import columns
from normfix.records.candidates import ChoiceRecord
from normfix.records.certificates import Verification
from normfix.records.diagnoses import Cost, DiagnosisRecord, Mismatch
from normfix.records.halo_curves import HaloCurve
from normfix.records.measurements import CalibrationSummary
from normfix.records.saved import ConversionRecord
from normfix.records.sites import Scan, Site
from normfix.records.spans import Spans, in_strides
from normfix.records.verdicts import Proof, ProofStep, Verdict
from normfix.reporting.about import about, halo_words
from normfix.reporting.causes import name_of
from normfix.reporting.sentences import duration_text, explanation, headline

__all__ = [
    "calibration_text",
    "choice_text",
    "conversion_text",
    "cost_text",
    "diagnosis_text",
    "proof_text",
    "scan_text",
    "verdict_text",
    "verification_text",
]


def choice_text(record: ChoiceRecord, *, verbose: bool = True) -> str:
    """Return the recommendation, the candidates as a table, with notes if verbose, and what to run."""
    table = record.table()
    heads, rows = list(table.heads), [list(row) for row in table.rows]
    if not verbose:
        heads, rows = heads[:-1], [row[:-1] for row in rows]
    heads[2] = heads[2].partition(" with ")[0]  # the headline says with what
    widths = [max(map(len, column)) for column in zip(heads, *rows, strict=True)]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip()
        for row in (heads, *rows)
    ]
    return "\n".join([*_wrapped(record.headline), "", *lines, "", record.fix])


def scan_text(scan: Scan, *, verbose: bool = True) -> str:
    """Return the answer in a line, the numbers, the sites and how the looks went if verbose, and the findings."""
    shape = "x".join(map(str, scan.example))
    kinds = Counter(site.family for site in scan.live)
    counted = ", ".join(f"{n} {_kind(family)}" for family, n in kinds.items())
    lines = [
        *_wrapped(f"{_answer(scan)}"),
        "",
        f"{scan.model}, scanned at {shape}",
        f"live sites: {len(scan.live)}" + (f" ({counted})" if counted else ""),
        f"dense output: {'yes' if scan.dense else 'no'}",
        f"tile-invariant: {'yes' if scan.tile_invariant else 'no'}",
    ]
    if scan.stride is not None and scan.halo is not None and scan.exact_sizes is not None:
        lines += [
            f"stride: {_by_axis(scan.stride)}",
            f"halo once frozen (before/after): {_rounded(scan.halo, scan.stride, _witness(scan))}",
            *(_wrapped(f"halo from: {scan.reach.words}") if scan.reach else ()),
            f"exact sizes: {_exact_sizes(scan.exact_sizes, scan.padded_inside or ())}",
        ]
        if scan.smallest_tile is not None:
            lines.append(f"smallest tile: {_by_axis(scan.smallest_tile)}")
        lines += [line for limit in _limits(scan) for line in _wrapped(limit)]
    else:
        lines.append("stride, halo and exact sizes: none; the findings say why")
    if not verbose:
        hint = [f"{len(scan.sites)} sites in all; -v names them."] if scan.sites else []
        return "\n".join([*lines, *hint, *(line for f in scan.findings for line in _wrapped(f.line))])
    lines += [""] * bool(scan.sites)
    lines += _site_lines(scan.sites)
    lines += [""] * bool(scan.sites)
    looks = (f"{look.name} {look.status}" + (f" ({look.note})" if look.note else "") for look in scan.looks)
    lines += _wrapped("looks: " + ", ".join(looks))
    for finding in scan.findings:
        lines += _wrapped(finding.line)
    return "\n".join(lines)


def _answer(scan: Scan) -> str:
    """Return in a sentence whether tiles matter, and what to do."""
    if scan.tile_invariant:
        return "Tile-invariant: nothing in this network is computed from the tile."
    if not scan.live:
        return (
            "Not tile-invariant, though no statistic is computed from the tile: the findings below say why."
        )
    kinds = Counter(site.family for site in scan.live)
    counted = ", ".join(f"{n} {_kind(family)}" for family, n in kinds.items())
    what = "1 statistic is" if len(scan.live) == 1 else f"{len(scan.live)} statistics are"
    stuck = sum(not site.convertible for site in scan.live)
    todo = "normfix convert freezes them at the values of whole images."
    if stuck:
        todo = f"No constant can replace {stuck} of them; normfix convert freezes the others."
    return f"Not tile-invariant: {what} computed from the tile ({counted}). {todo}"


def _kind(family: str) -> str:
    """Return what people call a norm, such as InstanceNorm; what is no norm keeps the name of its family."""
    name = name_of(family)
    return name if name.endswith("Norm") else family


def _limits(scan: Scan) -> list[str]:
    """Return the sizes that all of this is said of, where they are not all."""
    return [f"proved for sizes {limit}" for limit in (scan.sizes.limits() if scan.sizes else ())]


def _site_lines(sites: Sequence[Site]) -> list[str]:
    """Return the sites of each kind by their ids, then what they are and what can be done about them."""
    kinds: dict[str, list[str]] = {}
    for site in sites:
        kinds.setdefault(_facts(site), []).append(site.id)
    lines = []
    for facts, ids in kinds.items():
        count = f"{len(ids)} sites: " if len(ids) > 1 else ""
        lines += [f"  {id_}" for id_ in ids] + _wrapped(count + facts, indent="      ")
    return lines


def _facts(site: Site) -> str:
    state = "live" if site.live else "not live"
    if site.convertible:
        how = "convertible by " + ("swapping its module" if site.swappable else "interception")
    else:
        how = f"not convertible: {site.refusal}" if site.refusal else "left alone"
    facts = [
        f"{site.family}, {state}",
        f"reduces {site.reduces}",
        *([site.line] if site.line else []),
        f"seen by {', '.join(site.looks)}",
        how,
    ]
    return "; ".join(facts)


def _wrapped(text: str, indent: str = "") -> list[str]:
    return textwrap.wrap(
        text,
        columns(),
        initial_indent=indent,
        subsequent_indent=indent or "    ",
        break_long_words=False,
        break_on_hyphens=False,
    )


def conversion_text(record: ConversionRecord, *, verbose: bool = False) -> str:
    """Return the answer first: what was converted and whether tiles equal the whole; each step if verbose."""
    proof, scan = record.proof, record.scan
    lines = [_outcome(record)]
    if proof.partial:
        lines += _partly(record)
    lines += _steps(proof, verbose=verbose)
    if verbose or len(proof.shifts) > 1:
        lines += [
            f"  image {s.image}: prediction moved by {s.mean_sd:.2g} sd on average, {s.max_sd:.2g} at most"
            for s in proof.shifts
        ]
    if scan.stride is not None and scan.halo is not None:
        lines.append(f"  tiles: stride {_by_axis(scan.stride)}, halo {_rounded(scan.halo, scan.stride)}")
        lines += [f"  {limit}" for limit in _limits(scan)]
    return "\n".join([*lines, *_findings(record.calibration)])


def _outcome(record: ConversionRecord) -> str:
    plan, proof = record.plan, record.proof
    done = f"{plan.model} to {plan.to}: {len(plan.converted)} of {len(plan.decisions)} sites converted"
    if proof.passed:
        apart = "" if proof.verdict is None else f" within {proof.verdict.max_sd:.2g} sd"
        return f"passed: {done}; tiles of the result equal its whole image{apart}."
    if proof.partial:
        return f"{done}."
    return f"{proof.status}: {done}, and not all was proved."


def proof_text(proof: Proof, *, verbose: bool = False) -> str:
    """Return the outcome first, then the steps that did not pass, or all if verbose."""
    return "\n".join(
        [f"{proof.status}: {headline(proof).partition(': ')[2]}", *_steps(proof, verbose=verbose)]
    )


def _steps(proof: Proof, *, verbose: bool) -> list[str]:
    """Return how each step came out; of those that passed nothing unless verbose."""
    return [_step_line(step) for step in proof.steps if verbose or step.status != "passed"]


def verification_text(verification: Verification) -> str:
    """Return the outcome, how each step came out, what is wrong and what was assumed."""
    lines = [verification.status, *(f"  {step.name}: {step.status}" for step in verification.steps)]
    for finding in verification.findings:
        lines += _wrapped(finding.line, indent="  ")
    for assumed in verification.assumed:
        lines += _wrapped(f"assumed: {assumed}", indent="  ")
    return "\n".join(lines)


def _step_line(step: ProofStep) -> str:
    value = "" if step.value is None else f" {step.value:.2g}"
    bound = "" if step.bound is None else f" (bound {step.bound:.2g})"
    remark = f"; {step.note}" if step.note and step.status != "passed" else ""
    return f"  {step.name}: {step.status}{value}{bound}{remark}"


def _partly(record: ConversionRecord) -> list[str]:
    """Say first what a partial conversion is not."""
    live, step = record.plan.left_live, record.proof.step("tiles")
    apart = "could not be measured" if step.value is None else f"{step.value:.2g} sd at most"
    stay = "1 site stays" if len(live) == 1 else f"{len(live)} sites stay"
    return [
        f"Partly converted: {stay} live, so the network is not tile-invariant.",
        *(f"  {d.site.id}: {d.reason}" for d in live),
        f"  Keep the tile size fixed. Difference of tiles from the whole: {apart}.",
    ]


def calibration_text(summary: CalibrationSummary) -> str:
    """Return images, residual and spread."""
    shift = max(site.mean_shift for site in summary.sites)
    spread = max(site.spread for site in summary.sites)
    text = (
        f"{len(summary.sites)} sites calibrated on {len(summary.images)} images; largest residual {shift:.1g} sd; "
        f"largest spread between images {spread:.2g} sd"
    )
    if summary.ignored:
        text += f"; {sum(summary.ignored)} pixels ignored"
    sample = summary.sample
    if sample is not None:
        kind = "all blocks, exact" if sample.exact else "ESTIMATES from a random sample"
        text += (
            f"\n{kind}: {sample.blocks} of {sample.of} blocks, largest standard error {sample.error:.2g} sd"
        )
        if sample.error > sample.tolerance:
            text += f" (asked for {sample.tolerance:.2g})"
    return "\n".join([text, *_findings(summary)])


def _findings(summary: CalibrationSummary | None) -> list[str]:
    return [f"  {f.line}" for f in summary.findings] if summary is not None else []


def verdict_text(verdict: Verdict, *, verbose: bool = False) -> str:
    """Return the answer first: whether tiles matter, why, and what to do; the numbers behind it if verbose."""
    if not verdict.passed and not verbose:
        return explanation(verdict)
    lines = [_answer_of(verdict)] if verdict.passed else explanation(verdict).splitlines()[:2]
    lines += [f"  {f.line}" for f in verdict.findings]
    return "\n".join([*lines, *(_numbers(verdict) if verbose else ())])


def _answer_of(verdict: Verdict) -> str:
    halo = in_strides(verdict.halo, verdict.stride)
    chosen = ", chosen to divide the image," if "tile" in dict(verdict.settings) else ""
    return (
        f"passed: tile-invariant. Tiles of {_by_axis(verdict.tile)}{chosen} with a halo of {halo_words(halo)} are "
        f"within {verdict.max_sd:.2g} sd of the whole image."
    )


def _numbers(verdict: Verdict) -> list[str]:
    if not verdict.tile:
        return []
    lines = [
        f"  largest difference {verdict.max_sd:.2g} sd, mean {verdict.mean_sd:.2g} sd",
        f"  noise floor n {verdict.noise:.2g} sd: up to {verdict.tolerance:.2g} (4 n, at most 1e-3) passes, up to "
        f"{verdict.threshold:.2g} warns, above it fails once float64 confirms",
        f"  tile {_by_axis(verdict.tile)}, halo {_rounded(verdict.halo, verdict.stride, 'given')}, "
        f"stride {_by_axis(verdict.stride)}, {verdict.windows} windows",
        "  beyond the halo, amplified: " + ", ".join(f"{c:.1g}" for c in verdict.interference),
    ]
    if verdict.reach:
        lines += _wrapped(f"halo from: {verdict.reach}", indent="  ")
    if any(verdict.padding):
        lines.append(f"  the image was extended by {_by_axis(verdict.padding)} pixels to an exact size")
    return lines


def halo_curve_text(curve: HaloCurve) -> str:
    """Return the halo that was asked for first, then one line for each that was measured."""
    lines = []
    if curve.tolerance is not None:
        found = curve.smallest
        within = f"within {curve.tolerance:g} sd"
        if found is None:
            lines.append(f"no halo is {within}")
        else:
            lines.append(f"{within}: halo {_by_side(found.halo)}, {found.cost:.2f} pixels computed for each")
    lines.append(
        f"tiles of {_by_axis(curve.tile)}, exact halo {_by_side(curve.exact)} (before/after per axis)"
    )
    if curve.live:
        lines.append(
            f"{len(curve.live)} sites are computed from the tile, which no halo helps: convert first"
        )
    for point in curve.points:
        alone = "" if point.axis is None else f"  axis {point.axis} alone"
        covered = "" if point.compared else "  (every window is the image: says nothing)"
        lines.append(
            f"  {_by_side(point.halo):>24}  largest {point.max_sd:.1e} sd, mean {point.mean_sd:.1e}, "
            f"{point.cost:.2f} pixels{alone}{covered}"
        )
    return "\n".join(lines)


def _by_side(halo: Spans) -> str:
    return ", ".join(f"{before}/{after}" for before, after in halo)


def cost_text(cost: Cost) -> str:
    """Return what a diagnosis will run, before it does."""
    runs = f"{cost.windows} windows in {cost.experiments} experiments, and {cost.wholes} whole images"
    return f"{runs}: about {duration_text(cost.seconds)}."


def diagnosis_text(record: DiagnosisRecord, *, verbose: bool = False) -> str:
    """Return the answer first, then each cause with its remedy, and accuracy; the indicators if verbose."""
    lines = [f"{record.status}: {headline(record)}"]
    for culprit in record.culprits:
        lines.append(f"  {name_of(culprit.cause)}: {culprit.remedy}")
        if verbose:
            removed = "cannot be tried" if culprit.removed is None else f"{culprit.removed:.2g}"
            alone = f"introduces {culprit.introduced:.2g} sd alone; fixing it alone removes {removed}"
            lines.append(f"    {alone}")
    ready = about(record).ready if "fix" in dict(record.settings) else ""
    lines += [f"  Ready to run: {ready}"] if ready else []
    lines += [f"  accuracy, {a.prediction}: Dice {a.dice:.4f}" for a in record.accuracy if a.dice is not None]
    lines += [f"  {f.line}" for f in record.findings]
    if record.halo_curve is not None:
        lines += ["  error against halo, everything else fixed:"]
        lines += [f"    {line}" for line in halo_curve_text(record.halo_curve).splitlines()]
    return "\n".join([*lines, *(_indicators(record) if verbose else ())])


def _indicators(record: DiagnosisRecord) -> list[str]:
    compared = record.tile_mismatch
    return [
        f"  tiles of {_by_axis(record.tiling.tile)}, halo {halo_words(record.tiling.halo)}",
        _mismatch("tile against tile, all of the overlap", compared.overlap),
        _mismatch("tile against tile, beyond the halo", compared.beyond_halo),
        _mismatch("stitched against the whole", compared.whole),
        _mismatch("the same, causes fixed", record.after),
        *(
            f"  train/eval disparity, {t.composition}: mean {t.mismatch.mean_sd:.2g} sd"
            for t in record.train_eval
        ),
    ]


def _mismatch(name: str, found: Mismatch | None) -> str:
    if found is None:
        return f"  {name}: nothing to compare"
    dice = "" if found.dice is None else f"1 - Dice {found.dice:.2g}, "
    return f"  {name}: {dice}mean {found.mean_sd:.2g}, largest {found.max_sd:.2g} sd"


def _exact_sizes(multiples: Sequence[int], inside: Sequence[bool]) -> str:
    """Say which sizes are exact along each axis; any where the network pads them by itself."""
    by_itself = inside or [False] * len(multiples)
    return ", ".join(
        "any" if n == 1 else f"any (padded inside to {n})" if padded else f"multiples of {n}"
        for n, padded in zip(multiples, by_itself, strict=True)
    )


def _by_axis(numbers: tuple[int, ...]) -> str:
    return "x".join(map(str, numbers))


def _rounded(halo: Spans, stride: tuple[int, ...], what: str = "measured") -> str:
    """Return a halo rounded up to the stride, which any tool can be given, and what it was where that differs."""
    whole = in_strides(halo, stride)
    return _spans(whole) + ("" if whole == halo else f" ({_spans(halo)} {what})")


def _witness(scan: Scan) -> str:
    return "by the graph" if scan.reach is not None and scan.reach.used == "graph" else "measured"


def _spans(halo: Spans) -> str:
    return ", ".join(f"{before}/{after}" for before, after in halo)
