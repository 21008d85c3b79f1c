"""normfix diagnose."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfix.cli.extents import Extents, HaloExtents, context_option, per_axis
from normfix.cli.failures import each
from normfix.cli.labels import KINDS, metric_named, read_labels
from normfix.cli.options import Arguments, image_options, model_options
from normfix.cli.reports import known_of, reports_of, wants_pictures
from normfix.cli.showing import (
    format_option,
    note,
    report_option,
    require_reports,
    show,
    steps,
    verbose_option,
    write_reports,
)
from normfix.cli.texts import cost_text, diagnosis_text
from normfix.records.scalings import parse_scaling
from normfix.storage.spec import require_spec

if TYPE_CHECKING:
    from torch import nn

    from normfix.images.collections import ImageFiles
    from normfix.records.diagnoses import DiagnosisRecord, Tiling

__all__ = ["diagnose_command"]


@click.command("diagnose")
@model_options
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--tile",
    type=Extents(1),
    help="Tile size in pixels; one number, or one per axis. Default: 256, and smaller where it would not divide the "
    "image.",
)
@context_option("Context your pipeline reads")
@click.option(
    "--last", type=click.Choice(["grid", "pushed back"]), default="grid", help="Where the last window starts."
)
@click.option(
    "--context",
    type=click.Choice(["image", "mirrored border", "mirrored tile"]),
    default="image",
    help="What your pipeline reads beyond the image's border.",
)
@click.option("--scale-tiles", help="Your pipeline scales every tile by itself, such as zscore or unit.")
@click.option("--train", is_flag=True, help="Your pipeline leaves the network in train mode.")
@click.option("--kind", type=click.Choice(KINDS), help="What the output means. Default: told by its values.")
@click.option("--labels", help="File with true classes or masks, for accuracy; one image only.")
@click.option("--metric", help="pkg.mod:function(prediction, labels) beside Dice, with --labels.")
@click.option("--converted", help="Folder of the converted network, for accuracy.")
@click.option(
    "--halo-curve",
    is_flag=True,
    help="Measure the error for halos from 0 to the exact one too, with every other cause fixed, and what each costs.",
)
@click.option("--sites", is_flag=True, help="Run the experiments for every site by itself too.")
@image_options
@report_option
@verbose_option
@format_option
def diagnose_command(
    images: tuple[str, ...],
    tile: int | tuple[int, ...] | None,
    halo: HaloExtents,
    kind: Any,
    labels: str | None,
    metric: str | None,
    converted: str | None,
    sites: bool,
    halo_curve: bool,
    reports: tuple[str, ...],
    verbose: bool,
    format_: str,
    **options: Any,
) -> int:
    """Measure the seams that tiles of MODEL make in IMAGES, and name their causes.

    States what it will cost before it starts. Exits 0 if no cause is found, 1 if one is or nothing could be
    compared.

    \b
    Example:
      normfix diagnose normfix.demo.network:nuclei_unet nuclei.png --scale percentile:1,99.8 --report seams.html
    """
    require_reports(reports)
    pipeline = {name: options.pop(name) for name in ("last", "context", "scale_tiles", "train")}
    arguments = Arguments.take(options, [*images, *filter(None, [labels])])
    if converted is not None:
        require_spec(converted)
    if pipeline["scale_tiles"] is not None:
        parse_scaling(pipeline["scale_tiles"])
    judge = metric_named(metric)
    opened = arguments.open()
    files = arguments.images(images, opened.model)
    if len(files) > 1 and labels is not None:
        raise click.UsageError("--labels are of one image; give one")
    settings = {
        "kind": kind,
        "labels": None if labels is None else read_labels(labels, opened.model),
        "metric": judge,
        "converted": None if converted is None else arguments.open_converted(converted),
        "per_site": sites,
        "halo_curve": halo_curve,
        "output": arguments.output,
        "announce": lambda cost: note(cost_text(cost)),
    }
    show_ = partial(_shown, verbose=verbose, format_=format_)
    opened.model.train(pipeline["train"])
    run = _Run(opened.model, files, tile, halo, pipeline, settings, reports, show_)
    if len(files) == 1:
        return 0 if run.diagnose(0, files.paths[0]) else 1
    outcomes: list[bool] = []
    failed = each(files.paths, lambda number, path: outcomes.append(run.diagnose(number, path)))
    if failed:
        note(f"Not diagnosed: {', '.join(map(str, failed))}.")
        return 2
    return 0 if all(outcomes) else 1


@dataclass(frozen=True, slots=True)
class _Run:
    """Diagnoses one image after another with one network."""

    model: nn.Module
    files: ImageFiles
    tile: int | tuple[int, ...] | None
    halo: HaloExtents
    pipeline: dict[str, Any]
    settings: dict[str, Any]
    reports: tuple[str, ...]
    show: Callable[[str, DiagnosisRecord], None]

    def diagnose(self, number: int, path: Path) -> bool:
        """Write and show the diagnosis of an image, of a stack that of each plane; tell whether all passed."""
        from normfix.diagnosis.network import diagnose

        image = self.files.read(number, path)
        drawn = self.files.unscaled().read(number, path) if wants_pictures(self.reports) else image
        passed = []
        for plane, (pixels, own) in enumerate(zip(image, drawn, strict=True)):
            with steps() as progress:
                tiling = _tiling(image, self.tile, self.halo, self.pipeline)
                found = diagnose(
                    self.model, pixels[None], self.tile, tiling=tiling, progress=progress, **self.settings
                )
            record = replace(found.record, settings=(*known_of(path), *found.record.settings))
            try:
                maps = replace(found.maps, image=own.float().numpy())
                write_reports(self._reports(number, plane, len(image)), record, maps)
            finally:
                self.show(self._title(path, plane, len(image)), record)
            passed.append(found.status == "passed")
        return all(passed)

    def _reports(self, number: int, plane: int, planes: int) -> tuple[str, ...]:
        own = reports_of(self.reports, self.files.paths)[number]
        return reports_of(own, [Path(str(n)) for n in range(planes)])[plane]

    def _title(self, path: Path, plane: int, planes: int) -> str:
        if planes > 1:
            return f"{path}, plane {plane}: "
        return f"{path}: " if len(self.files) > 1 else ""


def _shown(title: str, record: DiagnosisRecord, *, verbose: bool, format_: str) -> None:
    show(record, f"{title}{diagnosis_text(record, verbose=verbose)}", format_)


def _tiling(
    image: Any, tile: int | tuple[int, ...] | None, halo: HaloExtents, pipeline: dict[str, Any]
) -> Tiling:
    """Return the tiling that the options describe; an empty tile or halo is what suits image and network."""
    from normfix.records.diagnoses import Tiling

    ndim, scaling = image.dim() - 2, pipeline["scale_tiles"]
    return Tiling(
        tile=() if tile is None else per_axis(tile, ndim),
        halo=() if halo == "auto" else tuple((n, n) for n in per_axis(halo, ndim)),
        last=pipeline["last"],
        context=pipeline["context"],
        scaling=None if scaling is None else parse_scaling(scaling),
        train=pipeline["train"],
    )
