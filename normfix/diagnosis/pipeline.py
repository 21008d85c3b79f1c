"""diagnose for pipelines: functions that a user tiles with, tested from outside and from inside."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import product
from typing import Any, TypedDict

from torch import nn

from normfix.api.conversion import convert
from normfix.diagnosis.probes import Probed, probe
from normfix.networks.calling import NotTaken
from normfix.proof.cropping import check_pipeline, space_of
from normfix.records.diagnoses import Observation, PipelineRecord
from normfix.records.sites import Finding, Scan, Site
from normfix.records.spans import round_up
from normfix.records.tables import Shown, Table
from normfix.records.verdicts import Verdict
from normfix.reporting.about import halo_words
from normfix.reporting.sentences import headline
from normfix.scanning.scan import scan
from normfix.tiling.geometry import geometry_of
from normfix.tiling.grid import Geometry

__all__ = ["PipelineDiagnosis", "PipelineOptions", "diagnose_pipeline"]


class PipelineOptions(TypedDict, total=False):
    """Options of `diagnose_pipeline`."""

    network: nn.Module | None
    stride: int | None
    margin: int | None
    output: str | int | None


Pipeline = Callable[..., Any]


@dataclass(frozen=True, slots=True, repr=False)
class PipelineDiagnosis(Shown):
    """A pipeline's diagnosis; `.record` is the plain data."""

    record: PipelineRecord

    @property
    def status(self) -> str:
        """Return the verdict's status, failed also where a probe saw a cause."""
        return "failed" if self.culprits else self.record.verdict.status

    def __bool__(self) -> bool:
        """Be true only where no cause was seen and the comparison passed."""
        return self.status == "passed"

    @property
    def culprits(self) -> tuple[Observation, ...]:
        """Return the causes that were seen."""
        return self.record.culprits

    @property
    def headline(self) -> str:
        """Return what was seen, in a sentence."""
        return headline(self.record)

    def table(self) -> Table:
        """Return the causes."""
        rows = [(c.cause, c.evidence, c.remedy) for c in self.culprits]
        return Table(("cause", "evidence", "remedy"), rows)


def diagnose_pipeline(
    predict: Pipeline,
    image: Any,
    tile: int | Sequence[int],
    *,
    network: nn.Module | None = None,
    stride: int | None = None,
    margin: int | None = None,
    output: str | int | None = None,
) -> PipelineDiagnosis:
    """Test a pipeline from outside, and with `network` from inside too.

    Args:
        predict: `predict(image)`, or, with a network, `predict(image, network)`.
        image: what it takes; a tensor (N, C, *space) where a network is given.
        tile: about how large its tiles are.
        network: the network it runs, which probes replace. One that takes windows of one size alone is scanned on one
            window of the tile's extents.
        stride: of the network; default: measured where it is given, else 32.
        margin: as for check.
        output: key or index of the network's output that counts, where it returns several.

    Example:
        >>> import normfix, torch
        >>> net = torch.nn.Conv2d(1, 1, 3, padding=1)
        >>> def halves(image, network):  # without context, joined in the middle
        ...     return torch.cat([network(half) for half in image.chunk(2, 3)], 3)
        >>> seen = normfix.diagnose(halves, torch.rand(1, 1, 96, 192), 96, network=net)
        >>> [culprit.cause for culprit in seen.culprits]
        ['halo']
    """
    if network is None:
        verdict = check_pipeline(predict, image, tile, stride=stride or 32, margin=margin)
        return PipelineDiagnosis(_record(verdict, None, (), None, ()))
    known, parts = _known(network, image, tile, output)
    geometry = geometry_of(known)
    step = stride or (max(geometry.stride) if geometry else 32)
    verdict = check_pipeline(lambda x: predict(x, network), image, tile, stride=step, margin=margin)
    seen = probe(predict, network, image, space_of(image))
    held = _held(predict, network, known, parts, image, tile, step, margin, output)
    culprits = (*_of_network(known), *(() if seen is None else _of_steps(seen, geometry)))
    findings = _unseen(seen) or _unnamed(verdict, culprits)
    return PipelineDiagnosis(_record(verdict, seen, culprits, held, findings))


def _known(
    network: nn.Module, image: Any, tile: int | Sequence[int], output: str | int | None
) -> tuple[Scan, Any]:
    """Scan the network; return what its statistics are held at too: the image, or windows where it takes no other."""
    try:
        return scan(network, image[..., :256, :256] if space_of(image) == 2 else None, output=output), image
    except NotTaken:
        windows = _windows(image, tile)
        return scan(network, windows[0], output=output), windows


def _windows(image: Any, tile: int | Sequence[int]) -> list[Any]:
    """Cut an image into windows side by side, the last ones pushed back so that all are whole."""
    space = image.shape[2:]
    extents = tuple(tile) if isinstance(tile, Sequence) else (tile,) * len(space)
    starts = [sorted({*range(0, n - t + 1, t), max(0, n - t)}) for n, t in zip(space, extents, strict=True)]
    places = ([slice(s, s + t) for s, t in zip(at, extents, strict=True)] for at in product(*starts))
    return [image[(..., *place)] for place in places]


def _held(
    predict: Pipeline,
    network: nn.Module,
    known: Scan,
    parts: Any,
    image: Any,
    tile: int | Sequence[int],
    stride: int,
    margin: int | None,
    output: str | int | None,
) -> Verdict | None:
    """Check the pipeline with the network's live statistics frozen on this image, where that can be done.

    Of a network that takes windows of one size alone those that can be are frozen: what is left is what it stays with.
    """
    able = any if parts is not image else all
    if not known.live or not able(site.convertible for site in known.live):
        return None
    frozen = convert(network, parts, output=output).model
    return check_pipeline(lambda x: predict(x, frozen), image, tile, stride=stride, margin=margin)


def _of_network(known: Scan) -> tuple[Observation, ...]:
    families = dict.fromkeys(str(site.family) for site in known.live)
    return tuple(
        Observation(
            cause=family,
            evidence=", ".join(site.id for site in known.live if site.family == family)[:300],
            remedy=_remedy([site for site in known.live if site.family == family]),
        )
        for family in families
    )


def _remedy(sites: Sequence[Site]) -> str:
    left = next((site.refusal for site in sites if not site.convertible), "")
    return f"none by constants ({left})" if left else "freeze its statistic: normfix convert"


def _of_steps(seen: Probed, geometry: Geometry | None) -> tuple[Observation, ...]:
    """Name what the probes saw that makes tiles differ."""
    found = []
    if seen.scaled:
        evidence = (
            "the same pixels, or pixels of one value, reached the network as other values in other windows"
        )
        found.append(("tile scaling", evidence, "scale the whole image once, before it is cut"))
    if seen.rescaled:
        evidence = "windows whose output was multiplied and shifted came out the same"
        found.append(("output scaling", evidence, "scale the prediction once, after it is stitched"))
    if seen.blended:
        evidence = "constant outputs of windows came out mixed"
        found.append(("blending", evidence, "crop the halo instead; mixing hides seams and repairs none"))
    if any(
        s < 0 or s + n > size
        for window in seen.windows
        for s, n, size in zip(window.start, window.extents, seen.size, strict=True)
    ):
        evidence = "windows read beyond the border of the image"
        found.append(("border padding", evidence, "end windows where the image ends"))
    if geometry is not None:
        found += _misplaced(seen, geometry) + _short(seen, geometry)
    return tuple(Observation(cause=c, evidence=e, remedy=r) for c, e, r in found)


def _misplaced(seen: Probed, geometry: Geometry) -> list[tuple[str, str, str]]:
    """Return phase, and the last tile where only windows that touch the end are off the grid."""
    off: set[tuple[int, int, bool]] = set()
    for window in seen.windows:
        for axis, (s, n, size, stride) in enumerate(
            zip(window.start, window.extents, seen.size, geometry.stride, strict=True)
        ):
            if s % stride:
                off.add((axis, s, s + n >= size))
    if not off:
        return []
    places = ", ".join(f"{s} on axis {axis}" for axis, s, _ in sorted(off)[:4])
    evidence = f"windows start at {places}; the stride is {'x'.join(map(str, geometry.stride))}"
    if all(last for _, _, last in off):
        return [("last tile", evidence, "start the last tile on the grid as well")]
    return [("phase", evidence, "start windows on multiples of the stride")]


def _short(seen: Probed, geometry: Geometry) -> list[tuple[str, str, str]]:
    if seen.context is None:
        return []
    pairs = zip(seen.context, geometry.halo, geometry.stride, strict=True)
    if not any(
        h < round_up(e, stride) and h < e
        for given, need, stride in pairs
        for h, e in zip(given, need, strict=True)
    ):
        return []
    evidence = (
        f"pixels were predicted with {halo_words(seen.context)} of context, the network reaches "
        f"{halo_words(geometry.halo)}"
    )
    return [("halo", evidence, "read tiles with at least the exact halo, and crop it")]


def _unseen(seen: Probed | None) -> tuple[Finding, ...]:
    """Say what the probes could not see, so that no cause named is not taken for no cause."""
    if seen is None:
        message = (
            "no window was found in the probe image (resampled, turned or augmented), so only the outside of the "
            "pipeline was tested: its scaling, starts, context and mixing are not known."
        )
        return (Finding(code="NF609", where="probes", message=message),)
    return tuple(Finding(code="NF609", where="probes", message=what) for what in seen.unseen)


def _unnamed(verdict: Verdict, culprits: Sequence[Observation]) -> tuple[Finding, ...]:
    """Say that a pipeline fails for a reason that no probe looks for."""
    if verdict.status != "failed" or culprits:
        return ()
    message = (
        "the prediction moves, and no step that the probes look for does it. What they cannot see: scaling of the "
        "whole image by its own statistics, which a crop changes too; windows that are skipped or treated by their "
        "values; and answers that are put back in another place."
    )
    return (Finding(code="NF609", where="probes", message=message),)


def _record(
    verdict: Verdict,
    seen: Probed | None,
    culprits: tuple[Observation, ...],
    held: Verdict | None,
    findings: tuple[Finding, ...],
) -> PipelineRecord:
    starts = extents = None
    if seen is not None:
        axes = zip(*(window.start for window in seen.windows), strict=True)
        starts = tuple(tuple(sorted(set(axis))) for axis in axes)
        extents = tuple(map(max, zip(*(window.extents for window in seen.windows), strict=True)))
    return PipelineRecord(
        verdict=verdict,
        windows=len(seen.windows) if seen else None,
        extents=extents,
        starts=starts,
        context=seen.context if seen else None,
        culprits=culprits,
        held=held,
        findings=findings,
    )
