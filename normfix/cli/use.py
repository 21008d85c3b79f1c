"""normfix calibrate and check."""

from __future__ import annotations

import math
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click
from click.core import ParameterSource

from normfix.cli.extents import Extents, HaloExtents, context_option
from normfix.cli.failures import each
from normfix.cli.options import Arguments, image_options, model_options, override_option
from normfix.cli.outputs import is_saved, output, tell
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
from normfix.cli.stages import blocks_of, engine_option, require_workers_used, stage_options, watching
from normfix.cli.texts import calibration_text, halo_curve_text, verdict_text
from normfix.records.progress import Progress, silent
from normfix.tiling.stages.cluster import require_cluster

if TYPE_CHECKING:
    from normfix.images.collections import ImageFiles
    from normfix.reporting.maps import Maps

__all__ = ["calibrate_command", "check_command"]


class Threshold(click.ParamType):  # type: ignore[type-arg]
    """A difference in sd; not a number would pass everything."""

    name = "sd"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> float:
        """Parse, or fail with the reason."""
        try:
            threshold = math.nan if isinstance(value, bool) else float(value)
        except ValueError:
            threshold = math.nan
        if not 0 <= threshold < math.inf:
            self.fail("give a finite number of sd, 0 or more", param, ctx)
        return threshold


@click.command("calibrate")
@model_options
@click.argument("images", nargs=-1, required=True)
@click.option("-o", "--out", required=True, help="Folder to write, never over anything.")
@image_options
@click.option(
    "--tile",
    type=Extents(1),
    help="Read images by window and run in stages over blocks of this size, one number or one per axis.",
)
@click.option(
    "--mask",
    "masks",
    multiple=True,
    metavar="FILE",
    help="Ignore the pixels where it is nonzero; one for each image, in their order. May be repeated.",
)
@click.option(
    "--sample",
    type=Threshold(),
    help="Measure a random sample of blocks, not all, until every standard error is at most this many sd.",
)
@click.option(
    "--seed",
    type=click.IntRange(-(1 << 63), (1 << 63) - 1),
    default=0,
    show_default=True,
    help="Of the sample.",
)
@click.option(
    "--allow-flat",
    is_flag=True,
    help="Keep statistics that are divided by and vanish on every image; they are named in the result.",
)
@engine_option
@stage_options
@format_option
def calibrate_command(
    images: tuple[str, ...],
    out: str,
    format_: str,
    tile: int | tuple[int, ...] | None,
    masks: tuple[str, ...],
    sample: float | None,
    seed: int,
    allow_flat: bool,
    engine: Literal["local", "dask"],
    **options: Any,
) -> None:
    """Measure the statistics of a converted MODEL anew on other IMAGES, whole.

    With --tile images may be larger than memory, also .zarr; the statistics are the same. With --store too, the same
    command goes on where it was stopped.

    \b
    Example:
      normfix calibrate fixed other-images/ -o refitted
    """
    source = click.get_current_context().get_parameter_source("seed")
    if sample is None and source is ParameterSource.COMMANDLINE:
        raise click.UsageError("--seed belongs to --sample")
    arguments = Arguments.take(options, [*images, *masks])
    require_cluster(engine, options["scheduler"], options["store"])
    asked = (tile, sample, options["budget"], options["store"])
    require_workers_used(engine == "local" and any(value is not None for value in asked))
    with ExitStack() as stack:
        place = stack.enter_context(output(out, is_saved))

        from normfix.api.recalibration import calibrate
        from normfix.networks.provenance import rescale_
        from normfix.storage.instructions import commands
        from normfix.storage.saving import save
        from normfix.tiling.stages.resuming import resumable

        blocks = blocks_of(options, engine).sized(tile)
        opened = arguments.open()
        stack.enter_context(resumable(blocks.store))  # until it is saved
        given: Any
        progress: Progress = silent
        if blocks.asked or sample is not None:
            given = arguments.windows(images, opened.model)
            blocks = replace(blocks, watch=stack.enter_context(watching()))
        else:
            given = arguments.images(images, opened.model)
            progress = stack.enter_context(steps())
        done = calibrate(
            opened.model,
            given,
            mask=arguments.masks(masks, opened.model) or None,
            sample=sample,
            seed=seed,
            allow_flat=allow_flat,
            blocks=blocks,
            output=arguments.output,
            progress=progress,
        )
        stated = arguments.scaling()
        if stated is not None:  # the new statistics are of images scaled this way, also by window
            rescale_(done.model, stated)
        progress("save", 0, 1)
        save(done, place.path)
        progress("save", 1, 1)
    show(done.summary, calibration_text(done.summary), format_)
    tell(place, f" {commands(Path(out), opened.source)}")


@click.command("check")
@model_options
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--tile",
    type=Extents(1),
    help="Tile size in pixels; one number, or one per axis, such as 32,128,128. Default: 256, and smaller where it "
    "would not divide the image; the output says which.",
)
@context_option()
@click.option(
    "--threshold",
    type=Threshold(),
    help="Largest difference in sd that passes; 4 noise floors always do. Default: 100 noise floors, at most 1e-3.",
)
@click.option(
    "--halo-curve",
    is_flag=True,
    help="Instead, measure the error for halos from 0 to the exact one, and what each costs.",
)
@click.option(
    "--tolerance",
    type=Threshold(),
    help="With --halo-curve: name the smallest halo within this many sd; exits 1 if there is none.",
)
@image_options
@override_option
@report_option
@verbose_option
@format_option
def check_command(
    images: tuple[str, ...],
    tile: int | tuple[int, ...] | None,
    halo: HaloExtents,
    threshold: float | None,
    halo_curve: bool,
    tolerance: float | None,
    reports: tuple[str, ...],
    verbose: bool,
    format_: str,
    **options: Any,
) -> int:
    """Compare stitched tiles of MODEL with its prediction of each whole image of IMAGES: files, folders, patterns.

    Exits 0 if they agree to rounding on every image, 1 if they do not or nothing could be compared, 2 if an image could
    not be read, which does not hinder the others.

    \b
    Example:
      normfix check fixed nuclei.tif --tile 256 --report check.md --report check.xml
    """
    require_reports(reports)
    if tolerance is not None and not halo_curve:
        raise click.UsageError("--tolerance belongs to --halo-curve")
    arguments = Arguments.take(options, images)
    if halo_curve:
        _require_of_curves("halo", "threshold", "reports")
        return _halo_curve(arguments, images, tile, tolerance, format_)

    from normfix.proof.check import check

    opened = arguments.open()
    files = arguments.images(images, opened.model)
    names = reports_of(reports, files.paths)
    passed: list[bool] = []

    def work(number: int, path: Path) -> None:
        with steps() as progress:
            progress(f"check {path.name}", 0, 1)
            views: list[Maps] = []
            verdict = check(
                opened.model,
                files.read(number, path),
                tile,
                halo=halo,
                threshold=threshold,
                output=arguments.output,
                viewer=views.append if wants_pictures(reports) else None,
            )
        verdict = replace(verdict, settings=(*known_of(path), *verdict.settings))
        try:
            write_reports(names[number], verdict, _in_its_colours(views, files, number, path))
        finally:
            name = f"{path}: " if len(files) > 1 else ""
            show(verdict, f"{name}{verdict_text(verdict, verbose=verbose)}", format_)
        passed.append(verdict.passed)

    if len(files) == 1:
        work(0, files.paths[0])
        return 0 if all(passed) else 1
    failed = each(files.paths, work)
    note(f"{sum(passed)} of {len(files)} images passed.")
    if failed:
        note(f"Not checked: {', '.join(map(str, failed))}.")
        return 2
    return 0 if all(passed) else 1


def _in_its_colours(views: list[Maps], files: ImageFiles, number: int, path: Path) -> Maps | None:
    """Return what a report draws, with the image as it is in its file; None where nothing was compared."""
    if not views:
        return None
    import numpy as np

    pixels = files.unscaled().read(number, path)[0].float().numpy()
    # the network may have been given it extended to an exact size
    more = [(0, n - m) for n, m in zip(views[0].image.shape, pixels.shape, strict=True)]
    return replace(views[0], image=np.pad(pixels, more, mode="edge"))


def _require_of_curves(*others: str) -> None:
    """Refuse options that a halo curve has no use for; what the project states for all checks is let be."""
    context = click.get_current_context()
    for parameter in context.command.params:
        stated = context.get_parameter_source(parameter.name or "")
        if parameter.name in others and stated is ParameterSource.COMMANDLINE:
            raise click.UsageError(f"--halo-curve has no {parameter.opts[-1]}; leave it out")


def _halo_curve(
    arguments: Arguments,
    images: tuple[str, ...],
    tile: int | tuple[int, ...] | None,
    tolerance: float | None,
    format_: str,
) -> int:
    """Show the error against the halo on one image."""
    from normfix.proof.halo_curve import halo_curve

    opened = arguments.open()
    files = arguments.images(images, opened.model)
    if len(files) > 1:
        raise click.UsageError("--halo-curve is of one image; give one")
    with steps() as progress:
        image = files.read(0, files.paths[0])
        curve = halo_curve(
            opened.model, image, tile, tolerance=tolerance, output=arguments.output, progress=progress
        )
    show(curve, halo_curve_text(curve), format_)
    return 0 if curve.met else 1
