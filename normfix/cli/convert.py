"""normfix convert."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfix.cli.options import (
    Arguments,
    format_option,
    image_options,
    model_options,
    note,
    require_report,
    show,
    steps,
    write_report,
)
from normfix.cli.texts import conversion_text
from normfix.errors import NormfixError

if TYPE_CHECKING:
    from normfix.records import Plan

__all__ = ["convert_command"]


@click.command("convert")
@model_options
@click.argument("images", nargs=-1)
@click.option("--to", type=click.Choice(["frozen", "batchrenorm"]), help="What norms become.")
@click.option("-o", "--out", required=True, help="Folder to write; must not exist.")
@click.option("--plan", "plan_file", help="Replay this reviewed plan instead of --to and --keep.")
@click.option("--keep", multiple=True, help="Pattern of module paths to leave alone; may be repeated.")
@click.option("--as-trained", is_flag=True, help="The network is used in train mode: its norms are live.")
@click.option(
    "--partial", is_flag=True, help="Write the result although live statistics remain or a proof failed."
)
@click.option(
    "--portable",
    is_flag=True,
    help="Write the original class as its own library does; only where every norm was a BatchNorm.",
)
@image_options
@click.option("--report", help="Write the record to this .json file, also when the proof fails.")
@format_option
def convert_command(
    images: tuple[str, ...],
    to: Any,
    out: str,
    plan_file: str | None,
    keep: tuple[str, ...],
    as_trained: bool,
    partial: bool,
    portable: bool,
    report: str | None,
    format_: str,
    **options: Any,
) -> int:
    """Convert MODEL so that tiles of it agree, measuring statistics on whole IMAGES, and prove the result.

    Exits 1 and writes no folder if a proof fails or is inconclusive.

    \b
    Example:
      normfix convert normfix.demo.network:nuclei_unet nuclei.tif --scale percentile:1,99.8 --to frozen -o fixed
    """
    from normfix.pipeline import convert, save
    from normfix.pipeline.storage import require_unconverted
    from normfix.saving import require_absent

    if (to is None) == (plan_file is None):
        raise click.UsageError("give either --to frozen|batchrenorm or --plan FILE")
    if plan_file is not None and keep:
        raise click.UsageError("--keep belongs to --to; a plan already says what to keep")
    require_absent(Path(out))
    require_report(report)
    plan = _read_plan(plan_file)
    arguments = Arguments.take(options)
    opened = arguments.open()
    require_unconverted(opened.model)
    with steps() as progress:
        done = convert(
            opened.model,
            arguments.images(images, opened.model) if images else None,
            to=to or "frozen",
            plan=plan,
            keep=keep,
            scaling=arguments.scaling(),
            source=opened.source,
            output=arguments.output,
            as_trained=as_trained,
            progress=progress,
        )
    write_report(report, done.record)
    show(done.record, conversion_text(done.record), format_)
    if not done.proof.passed and not partial:
        note(f"Nothing was written to {out}, because the proof did not pass.")
        return 1
    save(done, out, partial=partial, portable=portable)
    how = "its own library" if portable else f"normfix.load({out!r})"
    note(f"Wrote {out}. Load it with {how}.")
    return 0 if done.proof.passed else 1


def _read_plan(path: str | None) -> Plan | None:
    from normfix.records import Plan

    if path is None:
        return None
    try:
        data = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise NormfixError("NF101", f"cannot read it as JSON: {error}.", where=path) from error
    return Plan.from_json(data, where=path)
