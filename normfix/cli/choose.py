"""normfix choose."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfix.cli.extents import Extents
from normfix.cli.labels import KINDS, metric_named, read_labels
from normfix.cli.options import Arguments, image_options, model_options
from normfix.cli.reports import converting
from normfix.cli.showing import (
    format_option,
    require_reports,
    show,
    steps,
    telling,
    verbose_option,
    write_choices,
)
from normfix.cli.texts import choice_text

if TYPE_CHECKING:
    from torch import nn

    from normfix.choosing.choose import Choice
    from normfix.images.collections import ImageFiles
    from normfix.images.windows import ScaledImage

__all__ = ["choose_command"]

_ENDINGS = (".html", ".json", ".md")


@click.command("choose")
@model_options
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--labels",
    "labels",
    multiple=True,
    metavar="FILE",
    help="True classes or masks; of several images one for each, in the order of their names. May be repeated, and "
    "may be a folder or pattern.",
)
@click.option(
    "--window",
    type=Extents(1),
    help="Size of the windows that the network was trained on; one number, or one per axis. Default: as MODEL's file "
    "states it, as plans of nnU-Net and configs of pytorch-3dunet and MONAI do.",
)
@click.option("--metric", help="pkg.mod:function(prediction, labels) instead of Dice; more is better.")
@click.option("--kind", type=click.Choice(KINDS), help="What the output means. Default: told by its values.")
@click.option("--keep", multiple=True, help="Pattern of module paths to leave alone; may be repeated.")
@click.option("--as-trained", is_flag=True, help="The network is used in train mode: its norms are live.")
@click.option(
    "--distilled",
    is_flag=True,
    help="Try constants fitted to MODEL in windows as well; several times as long.",
)
@image_options
@verbose_option
@click.option(
    "--report",
    "reports",
    multiple=True,
    metavar="FILE",
    help="Write a report too, never over another: .html with pictures, .json or .md. May be repeated.",
)
@format_option
def choose_command(
    images: tuple[str, ...],
    labels: tuple[str, ...],
    window: int | tuple[int, ...] | None,
    metric: str | None,
    kind: Any,
    keep: tuple[str, ...],
    as_trained: bool,
    distilled: bool,
    verbose: bool,
    reports: tuple[str, ...],
    format_: str,
    **options: Any,
) -> int:
    """Compare the constants that MODEL could be frozen at on IMAGES, and recommend some.

    Constants are measured on all images but some and judged on these, in turn (of one image on halves): by labels, or
    by agreement with the original's own prediction in windows of its training size. All are seamless; they are not
    equally good. Prints what to run. `convert --statistics choose:SIZE` takes the recommendation at once.
    Images are read by window and may be larger than memory: of those, parts that are drawn at random are compared.

    \b
    Example:
      normfix choose normfix.demo.network:nuclei_unet nuclei.png --scale percentile:1,99.8 --window 160
    """
    require_reports(reports)
    if any(Path(report).suffix.lower() not in _ENDINGS for report in reports):
        raise click.UsageError(f"--report: a choice has reports that end in {', '.join(_ENDINGS)}")
    arguments = Arguments.take(options, [*images, *labels])
    judge = metric_named(metric)
    opened = arguments.open()
    files = arguments.windows(images, opened.model)
    with telling(), steps() as progress:
        found = chosen(
            opened.model,
            files,
            labels,
            window=window,
            metric=judge,
            kind=kind,
            keep=keep,
            output=arguments.output,
            as_trained=as_trained,
            distilled=distilled,
            progress=progress,
        )
    record = replace(found.record, fix=converting(found.statistics.words, found.record.best.to))
    write_choices(reports, record, found.places)
    show(record, choice_text(record, verbose=verbose), format_)
    return 0


def chosen(
    model: nn.Module, files: ImageFiles | Sequence[ScaledImage], labels: tuple[str, ...], **options: Any
) -> Choice:
    """Choose, with the labels that files hold."""
    from normfix.choosing.choose import choose
    from normfix.images.names import find_images

    read = [read_labels(str(path), model) for path in find_images([*labels])] if labels else None
    return choose(model, files, labels=read, **options)
