"""diagnose: measure the seams of a network under a tiling, name their causes, say what it will cost first."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, TypedDict, get_args, overload

from numpy.typing import NDArray
from torch import nn
from typing_extensions import Unpack

from normfix.diagnosis.accuracy import Labels
from normfix.diagnosis.examination import Examination
from normfix.diagnosis.pipeline import PipelineDiagnosis, PipelineOptions, diagnose_pipeline
from normfix.diagnosis.setting import bench_of, prepare
from normfix.errors import NormfixError
from normfix.images.given import Given, images_of
from normfix.images.sources import whole
from normfix.networks.calling import Caller
from normfix.networks.numerics import exact_arithmetic
from normfix.networks.provenance import provenance_of
from normfix.networks.surroundings import undisturbed
from normfix.records.diagnoses import (
    Cost,
    Culprit,
    DiagnosisRecord,
    Kind,
    ReceptiveField,
    TileMismatch,
    Tiling,
    TrainEval,
)
from normfix.records.progress import Progress, logged
from normfix.records.sites import Finding
from normfix.reporting.maps import Maps
from normfix.reporting.sentences import headline
from normfix.scanning.known import ForwardFn

__all__ = ["DiagnoseOptions", "Diagnosis", "Maps", "diagnose", "diagnose_network"]

Metric = Callable[[NDArray[Any], NDArray[Any]], float]


class DiagnoseOptions(TypedDict, total=False):
    """Options of `diagnose_network`."""

    halo: int | Sequence[int] | Literal["auto"]
    tiling: Tiling | None
    kind: Kind | None
    labels: Any
    metric: Metric | None
    converted: nn.Module | None
    batches: Sequence[int]
    per_site: bool
    halo_curve: bool
    forward_fn: ForwardFn | None
    output: str | int | None
    announce: Callable[[Cost], None]
    progress: Progress


@dataclass(frozen=True, slots=True, repr=False)
class Diagnosis:
    """A diagnosis and the maps behind it."""

    record: DiagnosisRecord
    maps: Maps

    @property
    def status(self) -> Literal["passed", "failed", "inconclusive"]:
        """Return failed if any cause is named, inconclusive if nothing could be compared."""
        return self.record.status

    def __bool__(self) -> bool:
        """Be true only where no cause was found and something was compared."""
        return self.status == "passed"

    @property
    def tile_mismatch(self) -> TileMismatch:
        """Return tile against tile and stitched tiles against the whole."""
        return self.record.tile_mismatch

    @property
    def train_eval(self) -> tuple[TrainEval, ...]:
        """Return eval mode against batch statistics in use, one entry per batch size."""
        return self.record.train_eval

    @property
    def culprits(self) -> tuple[Culprit, ...]:
        """Return the causes, the largest first."""
        return self.record.culprits

    @property
    def receptive_field(self) -> ReceptiveField | None:
        """Return how far an output can look, and does."""
        return self.record.receptive_field

    def __repr__(self) -> str:
        return f"<Diagnosis: {headline(self.record)}>"

    def _repr_html_(self) -> str:
        """Show the verdict and the pictures in a notebook."""
        from normfix.reporting.report import fragment

        return fragment(self.record, self.maps)


@overload
def diagnose(
    model: nn.Module,
    image: Given,
    tile: int | Sequence[int] | None = None,
    **options: Unpack[DiagnoseOptions],
) -> Diagnosis: ...
@overload
def diagnose(
    model: Callable[..., Any],
    image: Any,
    tile: int | Sequence[int] | None = None,
    **options: Unpack[PipelineOptions],
) -> PipelineDiagnosis: ...
@undisturbed()
def diagnose(
    model: Any, image: Any, tile: int | Sequence[int] | None = None, **options: Any
) -> Diagnosis | PipelineDiagnosis:
    """Measure how tiles disagree and why, of a network or of a whole pipeline.

    Args:
        model: an nn.Module (options: those of `diagnose_network`), or a pipeline, `predict(image)` or, with
            `network=`, `predict(image, network)` (options: those of `diagnose_pipeline`).
        image: (1, C, *space); for a pipeline what it takes.
        tile: pixels per axis; default: at most 256, and smaller where windows would cover the image.
        **options: see there.

    Raises:
        NormfixError: codes of the two.

    Example:
        >>> import normfix, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4))
        >>> found = normfix.diagnose(net.eval(), torch.rand(1, 1, 96, 96), tile=32)
        >>> [culprit.cause for culprit in found.culprits]
        ['instance']
    """
    if isinstance(model, nn.Module):
        return diagnose_network(model, image, tile, **options)
    return diagnose_pipeline(model, image, tile or 256, **options)


def diagnose_network(
    model: nn.Module,
    image: Given,
    tile: int | Sequence[int] | None = None,
    *,
    halo: int | Sequence[int] | Literal["auto"] = "auto",
    tiling: Tiling | None = None,
    kind: Kind | None = None,
    labels: Any = None,
    metric: Metric | None = None,
    converted: nn.Module | None = None,
    batches: Sequence[int] = (1, 4),
    per_site: bool = False,
    halo_curve: bool = False,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    announce: Callable[[Cost], None] = lambda cost: None,
    progress: Progress = logged,
) -> Diagnosis:
    """Measure how tiles of a network disagree and why.

    Args:
        model: in the mode it is used in (train mode is a cause of its own); not modified.
        image: (1, C, *space); also an array or a file, see normfix.convert.
        tile: pixels per axis; default: at most 256, and smaller where windows would cover the image.
        halo: pixels of context on every side; "auto" is what the network needs; one number, or one per axis.
        tiling: how the user's pipeline cuts, where it differs from normfix's own way; instead of tile and halo.
        kind: what the output means; default: recognised from its values.
        labels: true classes or masks of the image's space, for accuracy.
        metric: `metric(prediction, labels)` on arrays (C, *space), beside Dice.
        converted: the converted network, for accuracy.
        batches: sizes for the train/eval disparity.
        per_site: run the experiments for every site by itself too.
        halo_curve: measure the error for halos from 0 to the exact one too, with every other cause fixed.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        announce: called once with the cost, before the experiments start.
        progress: called with (stage, done, total); default: logged as normfix.progress, at level INFO.

    Raises:
        NormfixError: NF580 for another kind, NF601 where no geometry can be measured,
            NF602 for a tiling that does not fit, NF604 for
            labels that do not, and codes of `scan` and of the image.
    """
    if kind not in (None, *get_args(Kind)):
        raise NormfixError("NF580", f"give {', '.join(get_args(Kind))}.", where=f"kind={kind!r}")
    known = provenance_of(model)
    caller = Caller.of(known, forward_fn, output)
    item = whole(images_of(image, model, caller=caller).only())
    progress("scan", 0, 1)
    with exact_arithmetic():
        setting = prepare(model, item[:1], tiling, tile=tile, halo=halo, kind=kind, caller=caller)
        progress("scan", 1, 1)
        truth = None
        if labels is not None:
            truth = Labels.of(labels, item.shape[2:], setting.kind, metric, channels=setting.channels)
        bench = bench_of(setting, progress)
        work = Examination(setting, bench, truth, tuple(batches), per_site, halo_curve, progress)
        cost = work.cost()
        announce(cost)
        record, maps = work.measured(cost, converted, setting.tiling.tile if tile is None else tile)
    if labels is None:
        unused = _without_labels(metric=metric, converted=converted)
        record = replace(record, findings=(*record.findings, *unused))
    return Diagnosis(record, maps)


def _without_labels(**judged: object) -> Iterator[Finding]:
    """Say what is used for accuracy alone, and was given without labels."""
    for name, value in judged.items():
        if value is not None:
            message = (
                f"accuracy is judged by labels, and without them --{name} is used for nothing. Give --labels."
            )
            yield Finding(code="NF557", where=name, message=message)
