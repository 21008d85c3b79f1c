"""normfix diagnose."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfix.cli.extents import Extents, HaloExtents, context_option, per_axis
from normfix.cli.options import Arguments, image_options, model_options
from normfix.cli.showing import (
    format_option,
    note,
    report_option,
    require_reports,
    show,
    steps,
    write_reports,
)
from normfix.cli.texts import cost_text, diagnosis_text
from normfix.errors import NormfixError
from normfix.records.scalings import parse_scaling
from normfix.storage.spec import require_spec

if TYPE_CHECKING:
    from normfix.records.diagnoses import Tiling

__all__ = ["diagnose_command"]

_KINDS = ["probability", "logits", "softmax", "scores", "labels", "regression"]


@click.command("diagnose")
@model_options
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--tile",
    type=Extents(),
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
@click.option("--kind", type=click.Choice(_KINDS), help="What the output means. Default: told by its values.")
@click.option("--labels", help="File with true classes or masks, for accuracy; one image only.")
@click.option("--metric", help="pkg.mod:function(prediction, labels) beside Dice, with --labels.")
@click.option("--converted", help="Folder of the converted network, for accuracy.")
@click.option("--sites", is_flag=True, help="Run the experiments for every site by itself too.")
@image_options
@report_option
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
    reports: tuple[str, ...],
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
    judge = None if metric is None else _function(metric)

    from normfix.diagnosis.network import diagnose

    opened = arguments.open()
    files = [plane[None] for image in arguments.images(images, opened.model) for plane in image.unbind(0)]
    if len(files) > 1 and (labels or reports):
        raise click.UsageError("--labels and --report are of one image; give one")
    worst = 0
    for image in files:
        with steps() as progress:
            found = diagnose(
                opened.model.train(pipeline["train"]),
                image,
                tile,
                tiling=_tiling(image, tile, halo, pipeline),
                kind=kind,
                labels=None if labels is None else _read(labels, image.dim() - 2),
                metric=judge,
                converted=None if converted is None else arguments.open_converted(converted),
                per_site=sites,
                output=arguments.output,
                announce=lambda cost: note(cost_text(cost)),
                progress=progress,
            )
        try:
            write_reports(reports, found.record, found.maps)
        finally:
            show(found.record, diagnosis_text(found.record), format_)
        worst = max(worst, 0 if found.status == "passed" else 1)
    return worst


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


def _read(path: str, ndim: int) -> Any:
    from normfix.images.files import read_image

    return read_image(Path(path), ndim=ndim, channels=1)[0]


def _function(name: str) -> Any:
    from normfix.networks.naming import named

    try:
        return named(name)
    except NormfixError as error:
        raise click.UsageError(f"--metric {name}: {error.message}") from error
