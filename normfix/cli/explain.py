"""normfix explain."""

from __future__ import annotations

import textwrap

import click

from normfix.errors import CODES

__all__ = ["explain_command"]


@click.command("explain")
@click.argument("code")
def explain_command(code: str) -> None:
    """Explain an error or finding by its CODE.

    \b
    Example:
      normfix explain NF203
    """
    known = CODES.get(code.upper())
    if known is None:
        raise click.UsageError(f"no such code: {code}. Codes are: {', '.join(CODES)}")
    click.echo(f"{code.upper()}\n\n{textwrap.fill(known, 88)}")
