"""normfix convert."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from normfix.cli.extents import Extents
from normfix.cli.options import Arguments, halo_option, image_options, model_options
from normfix.cli.outputs import is_given, is_saved, output, tell
from normfix.cli.showing import note, require_report, show, steps, telling, verbose_option, write_report
from normfix.cli.stages import blocks_of, engine_option, require_workers_used, stage_options, watching
from normfix.cli.texts import conversion_text
from normfix.errors import NormfixError
from normfix.images.drafts import require_unnamed, sweep
from normfix.records.progress import Progress, silent
from normfix.records.statistics import WHOLE, parse_statistics
from normfix.tiling.stages.cluster import require_cluster

if TYPE_CHECKING:
    from torch import nn

    from normfix.conversion.results import Conversion
    from normfix.records.certificates import Certificate
    from normfix.records.plans import Plan
    from normfix.records.saved import Scaling, Source
    from normfix.records.statistics import Statistics

__all__ = ["convert_command"]


@click.command("convert")
@model_options
@click.argument("images", nargs=-1)
@click.option(
    "--to",
    type=click.Choice(["frozen", "batchrenorm"]),
    help="What norms become; frozen where neither it nor --plan is given.",
)
@click.option(
    "-o", "--out", required=True, help="Folder, program FILE.pt2, FILE.onnx or FILE.ts. Never over anything."
)
@click.option("--plan", "plan_file", help="Replay this reviewed plan instead of --to and --keep.")
@click.option("--keep", multiple=True, help="Pattern of module paths to leave alone; may be repeated.")
@click.option("--as-trained", is_flag=True, help="The network is used in train mode: its norms are live.")
@click.option(
    "--strict",
    is_flag=True,
    help="Write nothing and exit 1 if a live site had to be refused (attention, sorting).",
)
@click.option(
    "--partial",
    is_flag=True,
    help="Write the result although sites were kept live or a proof failed; exits 1.",
)
@click.option(
    "--portable",
    is_flag=True,
    help="Write the original class as its own library does; only where every norm was a BatchNorm.",
)
@click.option(
    "--give-back",
    metavar="FOLDER",
    help="Write it for its own tool as well, as normfix give-back does, with MODEL as the original.",
)
@click.option(
    "--allow-flat",
    is_flag=True,
    help="Keep statistics that are divided by and vanish on every image; they are named in the result.",
)
@click.option(
    "--statistics",
    default="whole",
    show_default=True,
    metavar="WHAT",
    help="What constants are measured on: whole images, windows:SIZE[:LAW] of the size the network was trained on, "
    "images[:LAW], per-image, blend:WEIGHT; distilled:SIZE fits them to MODEL in such windows, choose:SIZE compares "
    "them as normfix choose does. SIZE may be left out where MODEL's file states it.",
)
@click.option(
    "--labels", multiple=True, metavar="FILE", help="With --statistics choose: true classes or masks."
)
@click.option(
    "--keys",
    metavar="all|N",
    help="Hold keys and values of attention over all positions as constants: those of IMAGES, or N of them in all. "
    "They are as large as the images, in memory and in the result; without, such attention stays live.",
)
@halo_option
@image_options
@click.option(
    "--tile",
    type=Extents(1),
    help="Size of the blocks to measure in, and of the tiles to prove with; one number, or one per axis.",
)
@engine_option
@stage_options
@verbose_option
@click.option("--report", help="Write the record to this .json file, also when the proof fails.")
@click.option(
    "--format",
    "format_",
    type=click.Choice(["text", "json", "pt2"]),
    default="text",
    show_default=True,
    help="What stdout carries; pt2: text, and -o must name a program.",
)
def convert_command(
    images: tuple[str, ...],
    to: Any,
    out: str,
    plan_file: str | None,
    keep: tuple[str, ...],
    as_trained: bool,
    strict: bool,
    partial: bool,
    portable: bool,
    give_back: str | None,
    allow_flat: bool,
    statistics: str,
    labels: tuple[str, ...],
    keys: str | None,
    halo: Any,
    report: str | None,
    verbose: bool,
    format_: str,
    tile: int | tuple[int, ...] | None,
    engine: Literal["local", "dask"],
    **options: Any,
) -> int:
    """Convert MODEL so that tiles of it agree, measuring statistics on whole IMAGES, and prove the result.

    With --budget, --store or --engine dask images are read by window, also .zarr, and may be larger than memory.

    The result is a folder, or with -o FILE.pt2 an exported program that needs neither normfix nor the network's
    source; FILE.onnx and FILE.ts are for ONNX runtimes and TorchScript. MODEL may be a .pt2 itself.
    Exits 1 and writes nothing if a proof fails or is inconclusive.

    \b
    Example:
      normfix convert normfix.demo.network:nuclei_unet nuclei.tif --scale percentile:1,99.8 --to frozen -o fixed
    """
    if to is not None and plan_file is not None:
        raise click.UsageError("--plan says what norms become: leave --to out")
    if plan_file is not None and keep:
        raise click.UsageError("--keep belongs to --to; a plan already says what to keep")
    if keys is not None and plan_file is not None:
        raise click.UsageError("--keys belongs to --to; a plan already says which keys are held")
    if keys is not None and not images:
        raise click.UsageError("--keys are those of IMAGES: give them")
    held = _keys(keys)
    if format_ == "pt2" and Path(out).suffix != ".pt2":
        raise NormfixError("NF227", "--format pt2 writes one file: give -o FILE.pt2.", where=out)
    require_report(report)
    choice = _Choice.of(statistics, labels)
    measured = WHOLE if choice is not None else parse_statistics(statistics)
    plan = _read_plan(plan_file)
    arguments = Arguments.take(options, [*images, *labels])
    require_cluster(engine, options["scheduler"], options["store"])
    require_workers_used(
        engine == "local" and bool(images) and (options["budget"], options["store"]) != (None, None)
    )
    if give_back is not None and not is_given(Path(give_back)):
        sweep(Path(give_back).parent)
        require_unnamed(Path(give_back))
    with ExitStack() as stack:
        place = stack.enter_context(output(out, is_saved))

        from normfix.api.conversion import convert
        from normfix.conversion.keys import keys_of
        from normfix.images.parts import Measured
        from normfix.storage.exports import is_export_name, require_exporter
        from normfix.storage.instructions import commands
        from normfix.storage.programs import require_program_name
        from normfix.storage.saving import require_unconverted, save
        from normfix.tiling.stages.resuming import resumable

        blocks = blocks_of(options, engine)
        opened = arguments.open()
        require_unconverted(opened.model)
        exports = is_export_name(out)
        if exports:
            require_exporter(out)
        else:
            require_program_name(out, opened.model)
        stack.enter_context(resumable(blocks.store))  # until it is saved
        stack.enter_context(telling())
        given: Any
        progress: Progress = silent
        if blocks.asked:
            given = arguments.windows(images, opened.model) if images else None
            blocks = replace(blocks, watch=stack.enter_context(watching()))
        else:
            given = arguments.images(images, opened.model) if images else None
            progress = stack.enter_context(steps())
        scaling = arguments.scaling()
        if choice is not None:
            measured = choice.made(opened.model, given, arguments, keep, as_trained, progress)
        if given is not None and (measured != WHOLE or held is not None):
            given = Measured(given, measured.words, held)
        done = convert(
            opened.model,
            given,
            to=plan or to or "frozen",
            keep=keep,
            output=arguments.output,
            as_trained=as_trained,
            allow_flat=allow_flat,
            halo=halo,
            tile=tile,
            blocks=blocks,
            progress=progress,
        )
        record = done.record
        # also when it is not saved
        stack.callback(lambda: write_report(report, record))
        stack.callback(lambda: show(record, conversion_text(record, verbose=verbose), format_))
        if measured.kind not in ("whole", "per-image"):
            note(
                f"Constants are of {measured.words}: tiles agree exactly, and give another prediction than the "
                "original does for the whole image. Each image's line says how far it moved."
            )
        if held is not None and keys_of(done.plan) is None:
            note(
                "No keys are held: no attention over all positions was converted, so --keys is used for nothing."
            )
        proof = done.proof
        sound = proof.passed or (proof.partial and not strict)
        if not (sound or partial):
            why = "live sites were refused" if proof.partial else "the proof did not pass"
            note(f"Nothing was written to {out}, because {why}.")
            return 1
        progress("save", 0, 1)
        export = save(done, place.path, opened.source, scaling=scaling, partial=partial, portable=portable)
        record = replace(record, certificate=_certificate(place.path))
        progress("save", 1, 1)
    if export is not None:
        use = export.words
    else:
        use = "Load it with its own library." if portable else commands(Path(out), opened.source)
    tell(place, f" {use}")
    if give_back is not None:
        _give_back(done, give_back, arguments, opened.source, scaling)
    return 0 if sound else 1


def _keys(text: str | None) -> int | Literal["all"] | None:
    """Read how many keys are held."""
    if text is None or text == "all":
        return text  # type: ignore[return-value]
    if not text.isdecimal() or len(text) > 18 or not int(text):
        raise click.UsageError(f"--keys {text}: give all, or how many keys are kept of all images together")
    return int(text)


def _certificate(saved: Path) -> Certificate | None:
    """Return the certificate of what was saved, if that is a folder of normfix's."""
    from normfix.storage.folder import MANIFEST, manifest_of

    return manifest_of(saved).certificate if (saved / MANIFEST).is_file() else None


def _give_back(
    done: Conversion, folder: str, arguments: Arguments, source: Source, scaling: Scaling | None
) -> None:
    """Write it for its own tool; MODEL is the original where its format is one that is given back."""
    from normfix.giving.folder import give_back
    from normfix.giving.originals import is_original

    with output(folder, is_given) as place:
        give_back(
            done,
            place.path,
            source,
            original=arguments.model if is_original(arguments.model) else None,
            scaling=scaling,
            allow_classes=arguments.allow_classes,
            trust_pickle=arguments.trust_pickle,
            allow_code=arguments.allow_code,
        )
    tell(place, " It is for the network's own tool; its README.md says what that must be told.")


@dataclass(frozen=True, slots=True)
class _Choice:
    """What `--statistics choose` compares: windows of a size, where it is given, by labels, where there are any."""

    window: tuple[int, ...] | None
    labels: tuple[str, ...]

    @classmethod
    def of(cls, text: str, labels: tuple[str, ...]) -> _Choice | None:
        """Return it, or None where something else is measured."""
        kind, _, size = text.partition(":")
        if kind != "choose":
            if labels:
                raise click.UsageError("--labels belong to --statistics choose")
            return None
        return cls(parse_statistics(f"windows:{size}").size if size else None, labels)

    def made(
        self,
        model: nn.Module,
        images: Any,
        arguments: Arguments,
        keep: tuple[str, ...],
        as_trained: bool,
        progress: Progress,
    ) -> Statistics:
        """Return the recommended statistics, and say why."""
        from normfix.cli.choose import chosen

        if images is None:
            raise click.UsageError("--statistics choose compares constants on IMAGES; give some")
        found = chosen(
            model,
            images,
            self.labels,
            window=self.window,
            keep=keep,
            output=arguments.output,
            as_trained=as_trained,
            progress=progress,
        )
        note(found.headline)
        if found.record.best.to == "batchrenorm":
            note(
                f"That takes two commands, which normfix choose prints; this one takes {found.statistics.words}."
            )
        return found.statistics


def _read_plan(path: str | None) -> Plan | None:
    from normfix.records.encoding import read_text
    from normfix.records.plans import Plan

    if path is None:
        return None
    return Plan.loads(read_text(Path(path)), where=path)
