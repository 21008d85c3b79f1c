"""normfix demo."""

from __future__ import annotations

import click

__all__ = ["demo_command"]


@click.command("demo")
@click.option(
    "-o", "--out", default="normfix-demo", show_default=True, help="Folder to write; must not exist."
)
def demo_command(out: str) -> int:
    """Show the seams of a real network on a real image, repair them, prove it, and write a page with pictures.

    \b
    Example:
      normfix demo
    """
    from normfix.cli.options import note, steps
    from normfix.demo import run_demo

    with steps() as progress:
        result = run_demo(out, progress)
    click.echo(result.text)
    note(f"Open {result.page}")
    return 0 if result.passed else 1
