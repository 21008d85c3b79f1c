"""prove: what a network that was trained or measured since its conversion still owes, for no original equals it."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from normfix.conversion.masks import Mask
from normfix.conversion.measurement import measure_
from normfix.conversion.targets import HoldsConstants, LayerGone, planned_targets
from normfix.errors import NormfixError
from normfix.images.collections import Images
from normfix.images.given import GivenImages, images_of
from normfix.networks.calling import Caller, Unreached, home_of
from normfix.networks.copying import twin_of
from normfix.networks.graph.program import require_free
from normfix.networks.numerics import exact_arithmetic
from normfix.networks.provenance import is_current, provenance_of
from normfix.networks.surroundings import undisturbed
from normfix.proof.forms import Form, exported, folded, frozen, portable, reloaded, stock
from normfix.proof.steps import CONSISTENT, FITTED, residual, tile_exactness, unmeasured
from normfix.proof.subject import Subject
from normfix.records.plans import Plan
from normfix.records.progress import Progress, logged
from normfix.records.saved import Provenance
from normfix.records.sites import Scan, Site
from normfix.records.statistics import Statistics
from normfix.records.verdicts import Proof, ProofStep, Verdict
from normfix.scanning.known import ForwardFn, Known, known_of
from normfix.scanning.renewal import renewed
from normfix.storage.saving import sourced
from normfix.tiling.geometry import geometry_of
from normfix.tiling.grid import Geometry
from normfix.tiling.stages.options import Blocks
from normfix.tiling.stitching import padded

__all__ = ["prove"]

_STALE = "NF249"

_FORMS = (reloaded, frozen, folded, stock, portable, exported)


@undisturbed()
def prove(
    model: nn.Module,
    images: GivenImages,
    tile: int | Sequence[int] | None = None,
    *,
    blocks: Blocks | None = None,
    mask: Mask | Sequence[Mask] | None = None,
    source: str | None = None,
    args: Mapping[str, Any] | None = None,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    progress: Progress = logged,
) -> Proof:
    """Prove a converted network that was fine-tuned or calibrated anew, without its original.

    Its statistics are those of the images under the weights of now; tiles equal the whole; every converted site is
    used and none is live; saved, loaded and in every form it is used in, it is the same function.

    Args:
        model: converted by normfix; not modified.
        images: those it was calibrated on: re-iterable of (N, C, *space) tensors, one tensor, or images that are
            read by window (normfix.open_image); also arrays and files, see normfix.convert. Statistics are re-measured
            over all of each; what needs whole forward passes is proved on the first, or on the middle of it where it is
            read by window.
        tile: size of the tiles to compare, one number or one per axis; default: a third of the image, at most 256.
        blocks: how images read by window are measured in stages.
        mask: as it was calibrated with; see normfix.calibrate.
        source: "pkg.mod:factory" or "timm:NAME" that builds the network, if it does not know it: a fresh process has
            to.
        args: keyword arguments of the factory, JSON-ready.
        forward_fn: `forward_fn(model, image)` for another calling convention, importable from a module.
        output: key or index of the output that counts.
        progress: called with (stage, steps done, steps).

    Returns:
        The proof, with the steps residual, tiles, used, reloaded, frozen, folded, stock, portable and exported.
        `.passed` is False if any failed or is inconclusive. A form that this network cannot be given is
        "inapplicable", with the reason.

    Raises:
        NormfixError: NF248 if normfix did not convert it, and codes of `check` and of the images.

    Example:
        >>> import normfix, torch
        >>> try:
        ...     normfix.prove(torch.nn.Conv2d(1, 4, 3), torch.rand(1, 1, 128, 128))
        ... except normfix.NormfixError as error:
        ...     error.code
        'NF248'
    """
    require_free(model)
    provenance = provenance_of(model)
    if provenance is None or not provenance.plan.converted:
        raise NormfixError(
            "NF248",
            "normfix converted nothing in it, so there is no frozen statistic to prove. Convert it, or compare its "
            "tiles with normfix check.",
            where=type(model).__name__,
        )
    model = twin_of(model)
    taken = images_of(images, model, like=provenance.scan.example)
    image = taken.excerpt()[:1]
    known = known_of(model, image, forward_fn, output)
    stale = _outdated(model, provenance, image, known.caller)
    geometry = geometry_of(known.scan)
    first = image if geometry is None else padded(image, geometry)
    surplus = _unplanned(known, provenance.plan)
    subject = Subject(
        model=model,
        caller=known.caller,
        plan=provenance.plan,
        geometry=None if surplus else geometry,
        extents=known.scan.example[2:],
        tile=tuple(tile) if isinstance(tile, Sequence) else tile,
        sizes=known.scan.sizes,
    )
    travels = replace(
        sourced(provenance, source, args),
        scan=known.scan,
        output=None if known.caller.output is None else str(known.caller.output),
    )
    steps: list[ProofStep] = []
    with exact_arithmetic(), tempfile.TemporaryDirectory() as folder:
        verdict = subject.verdict(first)
        inputs = (first, subject.other(first))
        bench = Form(model, known.caller, travels, inputs, Path(folder), trusted=source is not None)
        owed = (
            partial(_residual, subject, taken, geometry, mask, blocks, provenance.statistics),
            partial(
                _tiles, subject, first, verdict, [*surplus, *(f.message for f in known.scan.findings)], stale
            ),
            partial(subject.used, first, partial(_judged, known.scan, provenance.plan)),
            *(partial(form, bench) for form in _FORMS),
        )
        for step in owed:
            steps.append(step())
            progress("prove", len(steps), len(owed))
    return Proof(steps=tuple(steps), shifts=(), verdict=verdict)


def _outdated(model: nn.Module, known: Provenance, image: Tensor, caller: Caller) -> str:
    """Say how the geometry that travels with the network is not the one of its statistics and weights of now."""
    if not is_current(model):  # it was scanned anew
        return ""
    now = renewed(model, known, image, caller)
    mine, theirs = geometry_of(known.scan), geometry_of(now)
    if now is known.scan or (mine is not None and theirs is not None and mine.covers(theirs)):
        return ""
    return next(f"{f.code}: {f.message}" for f in now.findings if f.code == "NF262")


def _unplanned(known: Known, plan: Plan) -> list[str]:
    """Return what is live although the plan does not leave it so: modules came in after the conversion."""
    planned = {d.site.id for d in plan.left_live}
    return [
        f"{site} is live and not in the plan; convert the network as it is now"
        for site in known.live
        if site not in planned
    ]


def _judged(scan: Scan, plan: Plan, image: Tensor, sites: Sequence[Site]) -> list[Site]:
    """Return what the census calls live and the scan, seeing more, does not.

    A norm with running statistics is never one of them: it is live where it does not obey eval.
    """
    converted = {d.site.id for d in plan.converted}
    quiet = {
        site.id
        for site in scan.sites
        if not site.live and site.id not in converted and not (site.layer and site.layer.carries)
    }
    return [site for site in sites if site.live and site.id in quiet]


def _residual(
    subject: Subject,
    images: Images,
    geometry: Geometry | None,
    mask: Mask | Sequence[Mask] | None,
    blocks: Blocks | None,
    statistics: Statistics,
) -> ProofStep:
    """Re-measure every converted site, also those whose statistics the original had: weights may have changed."""
    if statistics.needs_original:
        return unmeasured("residual", CONSISTENT, "inapplicable", FITTED)
    try:
        targets = planned_targets(subject.model, subject.plan)
        summary = measure_(
            subject.model,
            targets,
            images,
            subject.caller,
            blocks,
            geometry=geometry,
            mask=mask,
            stored=True,
            statistics=statistics,
        )
    except HoldsConstants as error:
        return unmeasured("residual", CONSISTENT, "inconclusive", str(error))
    except (Unreached, LayerGone) as error:
        return unmeasured("residual", CONSISTENT, "failed", str(error))
    step = residual(summary, home_of(subject.model)[1])
    if step.status == "passed":
        return step
    note = (
        f"{step.note}; {_STALE}: the stored statistics are not those of these images under the weights of now. "
        "Next: normfix calibrate, or give the images it was calibrated on"
    )
    return replace(step, note=note)


def _tiles(
    subject: Subject, image: Tensor, verdict: Verdict | None, reasons: Sequence[str], stale: str
) -> ProofStep:
    """Compare tiles with the whole; a geometry that does not hold any more fails, whatever this image shows."""
    mismatch = None
    if subject.plan.left_live:
        mismatch = subject.mismatch(image, subject.caller(subject.model, image))
    step = tile_exactness(verdict, subject.plan, reasons, mismatch)
    if not stale:
        return step
    note = f"{stale} Next: normfix calibrate, which measures the geometry anew"
    return replace(step, status="failed", note="; ".join(filter(None, (step.note, note))))
