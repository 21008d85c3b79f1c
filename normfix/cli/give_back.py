"""normfix give-back."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfix.cli.options import Arguments, model_options
from normfix.cli.outputs import is_given, output, tell
from normfix.cli.showing import format_option, show
from normfix.errors import NormfixError
from normfix.images.drafts import require_unnamed
from normfix.storage.spec import require_spec

if TYPE_CHECKING:
    from normfix.records.returns import GivenBack

__all__ = ["give_back_command"]


@click.command("give-back")
@model_options
@click.argument("others", nargs=-1)
@click.option("-o", "--out", required=True, help="Folder to write. Never over anything.")
@click.option(
    "--original",
    metavar="PATH",
    help="What was converted (bioimage.io package, MONAI bundle, nnU-Net folder or checkpoint, pytorch-3dunet run, "
    "torch-em, Lightning or other checkpoint): it is copied but for what changes.",
)
@click.option(
    "--switch",
    "switches",
    multiple=True,
    metavar="NAME=VALUE",
    help="Argument with which the factory builds BatchNorms, such as norm=batch; default: it is found.",
)
@format_option
def give_back_command(
    others: tuple[str, ...],
    out: str,
    original: str | None,
    switches: tuple[str, ...],
    format_: str,
    **options: Any,
) -> None:
    """Write the converted MODEL in the format it came from: its own tool runs it, unchanged and without normfix.

    The network's library is asked for the same network with BatchNorms, which hold the constants. Nothing appears
    unless that library, alone in a fresh process, gives the converted network's output.

    OTHERS are the conversions of further networks of the original: the folds of an nnU-Net folder, each converted from
    its own checkpoint (normfix give-back fixed_0 fixed_1 -o FIXED --original MODEL_FOLDER).

    \b
    Example:
      normfix give-back fixed -o for-monai --original my_bundle
    """
    arguments, switch = Arguments.take(options), _switches(switches)
    for other in others:
        require_spec(other)
    if original is not None and not Path(original).exists():
        raise NormfixError("NF101", "there is no such file or folder.", where=f"--original {original}")
    if not is_given(Path(out)):
        require_unnamed(Path(out))
    from normfix.giving.folder import give_back

    with output(out, is_given) as place:
        opened = [replace(arguments, model=model).open() for model in (arguments.model, *others)]
        record = give_back(
            [one.model for one in opened],
            place.path,
            None if others else opened[0].source,
            original=original,
            switch=switch,
            allow_classes=arguments.allow_classes,
            trust_pickle=arguments.trust_pickle,
            allow_code=arguments.allow_code,
        )
    record = replace(record, folder=out)
    show(record, _text(record), format_)
    tell(place, " Its README.md says what the tool must be told.")


def _switches(words: tuple[str, ...]) -> Mapping[str, Any] | None:
    """Return arguments of the form NAME=VALUE, a value as JSON or else as text."""
    if not words:
        return None
    found = {}
    for word in words:
        name, equals, value = word.partition("=")
        if not equals:
            raise click.UsageError(f"--switch {word}: give NAME=VALUE")
        try:
            found[name] = json.loads(value)
        except ValueError:
            found[name] = value
    return found


def _text(record: GivenBack) -> str:
    """Return what was shown, and in what the files differ from the original's."""
    return "\n".join(
        [
            f"{record.format}: {record.folder}",
            f"  equal to the converted network in float64: {record.double_sd:.1g} sd, in its own dtype: "
            f"{record.single_sd:.1g} sd",
            f"  its own library, without normfix: {record.alone_sd:.1g} sd",
            f"  tiles equal the whole: {record.verdict.status}, {record.verdict.max_sd:.1g} sd",
            *(f"  {line}" for change in record.changes for line in change.line.splitlines()),
        ]
    )
