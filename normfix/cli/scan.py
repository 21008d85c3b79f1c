"""normfix scan and normfix plan."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from normfix.cli.options import Arguments, halo_option, model_options
from normfix.cli.showing import format_option, show, telling
from normfix.cli.texts import scan_text
from normfix.records.extents import are_extents

if TYPE_CHECKING:
    from normfix.records.sites import Scan

__all__ = ["plan_command", "scan_command"]

_INPUT = click.option("--input", "input_", metavar="NxCxHxW", help="Shape to scan with, such as 1x3x512x512.")
_AS_TRAINED = click.option(
    "--as-trained",
    is_flag=True,
    help="The network is used in train mode: its batch and instance norms are live.",
)
_FAST = click.option("--fast", is_flag=True, help="Skip the dye's confirmation; the output says so.")


@click.command("scan")
@model_options
@_INPUT
@_AS_TRAINED
@_FAST
@halo_option
@click.option("-v", "--verbose", is_flag=True, help="Name every site, and how it was seen.")
@format_option
def scan_command(
    input_: str | None, as_trained: bool, fast: bool, halo: Any, verbose: bool, format_: str, **options: Any
) -> None:
    """Find every statistic of the tile in MODEL, and its stride and halo once they are frozen.

    Says first whether the network is tile-invariant, and what to do. Exits 0 though live sites exist.

    \b
    Example:
      normfix scan normfix.demo.network:nuclei_unet
    """
    found = _scan(Arguments.take(options), input_, as_trained, fast=fast, halo=halo)
    show(found, scan_text(found, verbose=verbose), format_)


@click.command("plan")
@model_options
@click.option(
    "--to",
    type=click.Choice(["frozen", "batchrenorm"]),
    default="frozen",
    show_default=True,
    help="What norms become.",
)
@click.option("--keep", multiple=True, help="Pattern of module paths to leave alone; may be repeated.")
@_INPUT
@_AS_TRAINED
@click.option(
    "--format", "format_", type=click.Choice(["json"]), default="json", help="A plan is JSON always."
)
def plan_command(
    to: Any, keep: tuple[str, ...], input_: str | None, as_trained: bool, format_: str, **options: Any
) -> None:
    """Print what would happen to each site of MODEL, as JSON to review, edit and replay with convert --plan.

    \b
    Example:
      normfix plan normfix.demo.network:nuclei_unet --to frozen > plan.json
    """
    found = _scan(Arguments.take(options), input_, as_trained)

    from normfix.scanning.scan import plan

    decided = plan(found, to=to, keep=keep)
    show(decided, "", format_)  # a plan is JSON always: it is there to be edited


def _scan(
    arguments: Arguments, input_: str | None, as_trained: bool, *, fast: bool = False, halo: Any = "graph"
) -> Scan:
    shape = None if input_ is None else _shape(input_)

    import torch

    from normfix.networks.calling import OutOfMemory
    from normfix.scanning.scan import scan

    example = None
    if shape is not None:
        try:
            example = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        except RuntimeError as error:
            # an image of noise fails for want of memory alone
            reason = "there is no memory for an image of this shape. Give a smaller one."
            raise OutOfMemory("NF250", reason, where=f"--input {input_}") from error
    model = arguments.open().model
    with telling():
        return scan(model, example, output=arguments.output, as_trained=as_trained, fast=fast, halo=halo)


def _shape(text: str) -> tuple[int, ...]:
    try:
        shape = tuple(int(n) for n in text.lower().split("x"))
    except ValueError:
        shape = ()
    if len(shape) < 3 or not are_extents(shape):
        raise click.BadParameter(f"{text!r} is no shape like 1x3x512x512", param_hint="--input")
    return shape
