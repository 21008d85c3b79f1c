"""The steps of a proof, before anything is written or again later; each can fail, and none passes by default."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn

from normfix.networks.numerics import BOUNDLESS, IDENTITY, deviation
from normfix.records.measurements import CalibrationSummary, SiteStatistics
from normfix.records.plans import Action, Means, Plan
from normfix.records.sites import Site
from normfix.records.verdicts import ImageShift, ProofStep, Verdict

__all__ = [
    "CONSISTENT",
    "FITTED",
    "RESIDUAL",
    "TILES",
    "distilled",
    "identity",
    "residual",
    "same",
    "shift",
    "tile_exactness",
    "unmeasured",
    "untouched",
    "used",
]

TILES = "tiles"
"""The name of the step that compares tiles with the whole."""

RESIDUAL: dict[torch.dtype, float] = {
    torch.float64: 1e-9,
    torch.float32: 1e-6,
    torch.bfloat16: 1e-2,
    torch.float16: 1e-3,
}
"""The largest self-consistency residual: mean shift in sd, and |variance ratio - 1|."""

CONSISTENT = "re-measured under the stored statistics, every site has mean shift 0 and variance ratio 1"

FITTED = (
    "constants were fitted to the original or blended with what it has stored, so they are no statistic of the "
    "converted network that could be measured again"
)

Status = Literal["passed", "failed", "inconclusive", "refused", "inapplicable"]


def identity(converted: Tensor, original: Tensor) -> ProofStep:
    """Prove T1: calibrated on one image alone, the converted network gives what the original gives."""
    claim = "calibrated on one image alone, the converted network equals the original on that image"
    return same("identity", claim, [(converted, original)], IDENTITY.get(original.dtype, 0.0))


def same(
    name: str, claim: str, pairs: Sequence[tuple[Tensor, Tensor]], bound: float, note: str = ""
) -> ProofStep:
    """Prove that what two networks give for each of some inputs differs by at most `bound` sd of the second's."""
    worst = 0.0
    for actual, expected in pairs:
        if not expected.is_floating_point():
            kind = str(expected.dtype).removeprefix("torch.")
            reason = f"the output counts in {kind}; choose one before that step"
            return unmeasured(name, claim, "inconclusive", reason)
        if actual.shape != expected.shape:
            return _step(name, claim, "failed", None, bound, "shapes differ")
        spread = float(expected.double().std())
        if not spread > 0:
            return _step(name, claim, "inconclusive", None, bound, "the output to compare with is constant")
        worst = max(worst, deviation(actual, expected, spread)[0])
    if not pairs:
        return unmeasured(name, claim, "inconclusive", "nothing was compared")
    return _step(name, claim, "passed" if worst <= bound else "failed", worst, bound, note)


def unmeasured(
    name: str, claim: str, status: Literal["failed", "inconclusive", "inapplicable"], reason: str
) -> ProofStep:
    """Say what became of a claim for which there is no number, and why."""
    return _step(name, claim, status, None, None, reason)


def residual(summary: CalibrationSummary | None, dtype: torch.dtype) -> ProofStep:
    """Prove that the stored statistics are those the frozen network has at every site."""
    claim = CONSISTENT
    bound = RESIDUAL[dtype]
    if summary is None or not summary.sites:
        return _step(
            "residual",
            claim,
            "passed",
            0.0,
            bound,
            "no site was calibrated: all statistics were carried over",
        )
    worst = max(summary.sites, key=_residual_of)
    value = _residual_of(worst)
    return _step(
        "residual", claim, "passed" if value <= bound else "failed", value, bound, f"largest at {worst.site}"
    )


def distilled(summary: CalibrationSummary, again: float) -> ProofStep:
    """Prove that fitted constants are no worse on held-out windows than those that they were fitted from.

    Args:
        summary: of the calibration, with what came of the fit.
        again: the loss of the constants that are stored, measured once more.
    """
    assert summary.distilled is not None
    claim = (
        "in windows held out from the fit, it agrees with the original no worse than with the first constants"
    )
    start = summary.distilled.start
    note = f"{summary.distilled.held_out} windows held out, {summary.distilled.steps} steps; loss and that of the start"
    bound = start * (1 + 1e-4) + 1e-9
    return _step("distilled", claim, "passed" if again <= bound else "failed", again, start, note)


def tile_exactness(
    verdict: Verdict | None,
    plan: Plan,
    findings: Sequence[str],
    mismatch: tuple[float, str] | None = None,
) -> ProofStep:
    """Prove T2: stitched tiles equal the whole image; not claimed where refused sites stay live.

    Args:
        verdict: of the comparison, where there was one.
        plan: says what stays live; refusing all of it and converting nothing is no conversion.
        findings: why there is no geometry.
        mismatch: where sites stay live, how far tiles are from the whole in sd, and of which size they are.
    """
    claim = "stitched tiles of the converted network equal its output on the whole image"
    left = plan.left_live
    live = ", ".join(f"{d.site.id} ({d.reason})" for d in left[:4])
    if left and plan.converted and all(d.action is Action.REFUSE for d in left):
        value, tiles = mismatch if mismatch is not None else (None, "no mismatch could be measured")
        return _step(TILES, claim, "refused", value, None, f"{tiles}; live: {live}")
    if verdict is None:
        reasons = "; ".join(findings) or "its geometry could not be measured"
        return _step(TILES, claim, "failed", None, None, f"live: {live}" if live else reasons)
    note = "; ".join(f"{f.where}: {f.message}" for f in verdict.findings)
    return _step(
        TILES, claim, verdict.status, verdict.max_sd, verdict.threshold, f"live: {live}" if live else note
    )


def untouched(original: nn.Module, converted: nn.Module, plan: Plan) -> ProofStep:
    """Prove that parameters and buffers outside the converted sites are bit-equal."""
    claim = "parameters and buffers outside the converted sites are unchanged to the bit"
    modules = dict(original.named_modules(remove_duplicate=False))
    replaced = {modules.get(d.site.owner) for d in plan.converted if d.means is Means.SWAP}
    after = dict(_tensors(converted))
    changed = [
        name
        for name, value in _tensors(original)
        if modules.get(name.rpartition(".")[0]) not in replaced
        and (name not in after or not torch.equal(value, after[name]))
    ]
    note = ", ".join(changed[:4])
    return _step("untouched", claim, "failed" if changed else "passed", float(len(changed)), 0.0, note)


def used(
    calls: Mapping[str, int],
    sites: Iterable[Site],
    plan: Plan,
    judged: Iterable[Site] = (),
    values: Sequence[str] = (),
) -> ProofStep:
    """Prove on another input that every planned layer runs once, no planned call is live and values are right.

    On the calibration image itself a lost interception is invisible, since there live equals frozen.

    Args:
        calls: how often each planned layer ran.
        sites: what the census finds in the converted network.
        plan: says what was converted, and what stays live.
        judged: sites that it calls live in the original too and that the scan has found not to be.
        values: what the network gives there that differs from its statistics' own formula, computed apart.
    """
    claim = "on another input, every converted site runs once, none is live, and each gives what its statistics say"
    lost = [d.site.id for d in plan.converted if calls.get(d.target, 0) != 1]
    expected = Counter((d.site.owner, d.site.function) for d in plan.left_live)
    expected += Counter((site.owner, site.function) for site in judged)
    surplus = Counter((site.owner, site.function) for site in sites if site.live) - expected
    live = (f"{owner or '(root)'}/{function} is live" for owner, function in surplus)
    wrong = [*lost, *live, *values]
    note = ", ".join(wrong[:4])
    return _step("used", claim, "failed" if wrong else "passed", float(len(wrong)), 0.0, note)


def shift(number: int, converted: Tensor, original: Tensor) -> ImageShift:
    """Say how far one image's prediction moved, in sd of the original's."""
    largest, mean = deviation(converted, original, float(original.double().std()) or 1.0)
    return ImageShift(image=number, mean_sd=mean, max_sd=largest)


def _residual_of(site: SiteStatistics) -> float:
    low, high = site.variance_ratio
    values = (site.mean_shift, abs(low - 1), abs(high - 1))
    return min(max(values), BOUNDLESS) if all(v == v for v in values) else BOUNDLESS  # NaN is below nothing


def _tensors(model: nn.Module) -> Iterable[tuple[str, Tensor]]:
    return (
        (k, v) for k, v in model.state_dict().items() if isinstance(v, Tensor)
    )  # not every extra state is


def _step(
    name: str, claim: str, status: Status, value: float | None, bound: float | None, note: str = ""
) -> ProofStep:
    return ProofStep(name=name, claim=claim, status=status, value=value, bound=bound, note=note)
