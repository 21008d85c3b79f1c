"""normfix push."""

from __future__ import annotations

import click

from normfix.cli.answers import Pushed
from normfix.cli.showing import format_option, note, show
from normfix.storage.spec import require_folder

__all__ = ["push_command"]


@click.command("push")
@click.argument("out")
@click.argument("name", metavar="ORG/NAME")
@click.option("--private", is_flag=True, help="Make the repository private, if it is new.")
@click.option("--partial", is_flag=True, help="Push although the folder states no passed proof.")
@format_option
def push_command(out: str, name: str, private: bool, partial: bool, format_: str) -> None:
    """Put the folder OUT that normfix saved into a repository of the Hugging Face hub.

    \b
    Example:
      normfix push fixed my-group/nuclei-frozen
    """
    require_folder(out)
    from normfix.storage.hub import push

    address = push(out, name, private=private, partial=partial)
    show(Pushed(repository=name, address=address), address, format_)
    note(f"Load it with normfix.load('hf-hub:{name}').")
