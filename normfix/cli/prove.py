"""normfix prove."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import click

from normfix.cli.extents import Extents
from normfix.cli.options import Arguments, image_options, model_options, override_option
from normfix.cli.reports import known_of
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
from normfix.cli.texts import proof_text

__all__ = ["prove_command"]


@click.command("prove")
@model_options
@click.argument("images", nargs=-1, required=True)
@click.option(
    "--tile",
    type=Extents(1),
    help="Tile size to compare with, one number or one per axis. Default: a third of the image, at most 256.",
)
@click.option(
    "--blocks",
    type=Extents(1),
    help="Read images by window and re-measure in stages over blocks of this size, one number or one per axis; for "
    "images larger than memory.",
)
@click.option(
    "--mask",
    "masks",
    multiple=True,
    metavar="FILE",
    help="As it was calibrated with: ignore the pixels where it is nonzero; one for each image. May be repeated.",
)
@image_options
@override_option
@report_option
@verbose_option
@format_option
def prove_command(
    images: tuple[str, ...],
    tile: int | tuple[int, ...] | None,
    blocks: int | tuple[int, ...] | None,
    masks: tuple[str, ...],
    reports: tuple[str, ...],
    verbose: bool,
    format_: str,
    **options: Any,
) -> int:
    """Prove a converted MODEL that was fine-tuned or calibrated anew, on the IMAGES it was calibrated on.

    Its statistics are consistent, its tiles equal the whole, and saved, reloaded, frozen, folded and exported it gives
    the same output. A form it cannot have is inapplicable, with the reason. Exits 0 if all else passed, 1 if anything
    failed, stayed live or could not be decided.

    \b
    Example:
      normfix prove tuned nuclei.tif --report proof.html
    """
    require_reports(reports)
    arguments = Arguments.take(options, [*images, *masks])

    from normfix.proof.prove import prove
    from normfix.tiling.stages.options import Blocks

    opened = arguments.open()
    given: Any = arguments.images(images, opened.model)
    if blocks is not None:
        given = arguments.windows(images, opened.model)
    with steps() as progress:
        proof = prove(
            opened.model,
            given,
            tile,
            blocks=Blocks(tile=blocks),
            mask=arguments.masks(masks, opened.model) or None,
            source=arguments.arch,
            args=arguments.arch_args,
            output=arguments.output,
            progress=progress,
        )
    if proof.verdict is not None:
        known = known_of(Path(", ".join(images)))
        proof = replace(proof, verdict=replace(proof.verdict, settings=(*known, *proof.verdict.settings)))
    try:
        write_reports(reports, proof)
    finally:
        show(proof, proof_text(proof, verbose=verbose), format_)
    if proof.partial:
        note("Not proved tile-invariant: sites that no constant can replace stay live.")
    return 0 if proof.passed else 1
