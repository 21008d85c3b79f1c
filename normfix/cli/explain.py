"""normfix explain."""

from __future__ import annotations

import textwrap
from difflib import get_close_matches

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
    name = f"NF{code}" if code.isdecimal() else code.upper()
    known = CODES.get(name)
    if known is None:
        near = ", ".join(get_close_matches(name, CODES, 3))
        hint = f"Did you mean {near}?" if near else "A code is NF and three digits, such as NF203."
        raise click.UsageError(f"no such code: {code}. {hint}")
    text = f"{name}\n\n{textwrap.fill(known, 88)}"
    show(Explained(code=name, text=known), text, format_)
