"""normfix demo."""

from __future__ import annotations

import click

from normfix.cli.answers import Shown
from normfix.cli.showing import format_option, show

__all__ = ["demo_command"]


@click.command("demo")
@click.option(
    "-o", "--out", default="normfix-demo", show_default=True, help="Folder to write; must not exist."
)
@format_option
def demo_command(out: str, format_: str) -> int:
    """Show the seams of a real network on a real image, repair them, prove it, and write a page with pictures.

    \b
    Example:
      normfix demo
    """
    from normfix.cli.showing import note, steps
    from normfix.demo import run_demo

    with steps() as progress:
        result = run_demo(out, progress)
    show(Shown(passed=result.passed, page=str(result.page), text=result.text), result.text, format_)
    note(f"Open {result.page}")
    return 0 if result.passed else 1
