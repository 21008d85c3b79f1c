"""normfix explain."""

from __future__ import annotations

import textwrap

import click

from normfix.cli.answers import Explained
from normfix.cli.showing import format_option, show
from normfix.errors import CODES

__all__ = ["explain_command"]


@click.command("explain")
@click.argument("code")
@format_option
def explain_command(code: str, format_: str) -> None:
    """Explain an error or finding by its CODE.

    \b
    Example:
      normfix explain NF203
    """
    known = CODES.get(code.upper())
    if known is None:
        raise click.UsageError(f"no such code: {code}. Codes are: {', '.join(CODES)}")
    text = f"{code.upper()}\n\n{textwrap.fill(known, 88)}"
    show(Explained(code=code.upper(), text=known), text, format_)
