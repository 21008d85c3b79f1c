"""The one sentence that comes first: what was found, in numbers a reader can act on."""

from __future__ import annotations

from collections import Counter

from normfix.records.diagnoses import DiagnosisRecord, PipelineRecord
from normfix.records.encoding import Record
from normfix.records.verdicts import Proof, Verdict
from normfix.reporting.causes import name_of

__all__ = ["duration_text", "explanation", "headline"]

_MOST_LINES, _WIDTH = 7, 200


def headline(record: Record) -> str:
    """Say the verdict in one or two sentences."""
    if isinstance(record, DiagnosisRecord):
        return _diagnosis(record)
    if isinstance(record, PipelineRecord):
        return _pipeline(record)
    if isinstance(record, Proof):
        return _proof(record)
    assert isinstance(record, Verdict)
    return _verdict(record)


def explanation(verdict: Verdict) -> str:
    """Say in at most ten lines why a verdict is no pass: cause and remedy, what was compared, what else was found."""
    named = dict(verdict.settings)
    what = f"{named.get('network', 'The pipeline')} on an image of {named.get('image', 'one size')}"
    tile = "x".join(map(str, verdict.tile)) or "no size"
    size = f"up to {verdict.max_sd:.2g} sd from the whole image, where {verdict.threshold:.1g} passes"
    first = f"{_cause(verdict)}{_fix(verdict)}"
    if verdict.findings and not _live(verdict):
        first = verdict.findings[0].line
    lines = [f"{verdict.status}: {first}", f"{what}, tiles of {tile}: {size}."]
    others = [f for f in verdict.findings if f.code != "NF401"] if _live(verdict) else verdict.findings[1:]
    lines += [f.line[:_WIDTH] for f in others[:_MOST_LINES]]
    if len(others) > _MOST_LINES:
        lines.append(f"and {len(others) - _MOST_LINES} more findings")
    return "\n".join(lines)


def _live(verdict: Verdict) -> list[str]:
    return [f.where for f in verdict.findings if f.code == "NF401"]


def _kind(site: str) -> str:
    """Return what a site is, by the function in its name, as people call it.

    >>> _kind("encoder.1/0/instance_norm/0"), _kind("pool/0/mean/0")
    ('InstanceNorm', 'mean')
    """
    function = site.split("/")[-2] if site.count("/") > 1 else site
    return (
        "".join(part.capitalize() for part in function.split("_")) if function.endswith("_norm") else function
    )


def _cause(verdict: Verdict) -> str:
    """Say what makes tiles differ and what to do about it; live statistics before what follows from them."""
    live = _live(verdict)
    if not live:
        first = verdict.findings[:1]
        return first[0].message if first else "tiles differ from the whole image."
    kinds = Counter(map(_kind, live))
    counted = ", ".join(f"{n} {kind}" for kind, n in kinds.most_common(4))
    one = len(live) == 1
    return (
        f"{len(live)} statistic{'' if one else 's'} {'is' if one else 'are'} computed from the tile ({counted}; "
        f"first {live[0]})."
    )


def _fix(verdict: Verdict) -> str:
    """Say what takes the cause away, where it is a live statistic."""
    if not _live(verdict):
        return ""
    fix = dict(verdict.settings).get("fix", "normfix convert MODEL IMAGE --to frozen -o FIXED")
    return f" To freeze {'it' if len(_live(verdict)) == 1 else 'them'}: {fix}"


def _diagnosis(record: DiagnosisRecord) -> str:
    if record.status == "inconclusive":
        return "Inconclusive: " + (record.findings[0].message if record.findings else "nothing was compared.")
    whole = record.tile_mismatch.whole
    if record.status == "passed":
        largest = "" if whole is None else f", which differ by {whole.max_sd:.1g} sd at most: rounding"
        return f"Tiles agree with the whole image{largest}."
    names = [name_of(c.cause) for c in record.culprits]
    causes = names[0] if len(names) == 1 else ", ".join(names[:-1]) + " and " + names[-1]
    size = "" if whole is None else f" by {whole.mean_sd:.2g} sd on average and up to {whole.max_sd:.2g} sd"
    return f"Tiles disagree with the whole image{size}. The cause{'s' * (len(names) > 1)}: {causes}."


def _proof(record: Proof) -> str:
    counts = Counter(step.status for step in record.steps)
    without = counts["inapplicable"]
    missing = f"; {without} {'does' if without == 1 else 'do'} not apply" if without else ""
    if record.passed:
        return f"Passed: {counts['passed']} steps of the proof{missing}."
    open_steps = [s for s in record.steps if s.status not in ("passed", "inapplicable")]
    reasons = "; ".join(f"{s.name} {s.status}" + (f" ({s.note})" if s.note else "") for s in open_steps)
    outcome = "Failed" if record.status == "failed" else "Inconclusive, which is not a pass"
    return f"{outcome}: {reasons}."


def _pipeline(record: PipelineRecord) -> str:
    if not record.culprits:
        return _verdict(record.verdict)
    return (
        "The pipeline's result depends on where its tiles fall: "
        + ", ".join(name_of(c.cause) for c in record.culprits)
        + "."
    )


def _verdict(verdict: Verdict) -> str:
    reasons = _cause(verdict)
    limit = f" (threshold {verdict.threshold:.1g})"
    match verdict.status:
        case "passed":
            return f"Passed: tiles are within {verdict.max_sd:.1g} sd of the reference{limit}."
        case "failed":
            return f"Failed: tiles are up to {verdict.max_sd:.2g} sd away{limit}. {reasons}"
        case _:
            return f"Inconclusive, which is not a pass. {reasons}"


def duration_text(seconds: float) -> str:
    """Return a duration in the unit that suits it.

    >>> duration_text(4.2), duration_text(600), duration_text(90_000)
    ('5 seconds', '10 minutes', '25.0 hours')
    """
    if seconds < 100:
        return f"{max(1, -int(-seconds // 1))} seconds"
    return f"{seconds / 60:.0f} minutes" if seconds < 6000 else f"{seconds / 3600:.1f} hours"
