"""normfix demo."""

from __future__ import annotations

from pathlib import Path

import click

from normfix.cli.answers import Shown
from normfix.cli.outputs import is_image, output, tell
from normfix.cli.showing import format_option, show
from normfix.errors import NormfixError
from normfix.images.drafts import require_unnamed

__all__ = ["demo_command"]

_IMAGE = "Fluorescent nuclei, 512 x 512, uint8."


@click.command("demo")
@click.option(
    "-o", "--out", default="normfix-demo", show_default=True, help="Folder to write; must not exist."
)
@click.option(
    "--image", metavar="FILE.png", help="Write only the image that the documentation's examples use."
)
@format_option
def demo_command(out: str, image: str | None, format_: str) -> int:
    """Show the seams of a real network on a real image, repair them, prove it, and write a page with pictures.

    \b
    Example:
      normfix demo
    """
    from normfix.cli.showing import note, steps

    if image is not None:
        _write_image(image)
        if format_ == "json":
            show(Shown(passed=True, page="", text=f"{image}: {_IMAGE}"), "", format_)
        return 0
    require_unnamed(Path(out))
    from normfix.demo import run_demo

    with steps() as progress:
        result = run_demo(out, progress)
    show(Shown(passed=result.passed, page=str(result.page), text=result.text), result.text, format_)
    note(f"Open {result.page}")
    return 0 if result.passed else 1


def _write_image(image: str) -> None:
    """Write the upper left of mahotas' picture of nuclei as a PNG file.

    Raises:
        NormfixError: NF114 if something has that name or it ends in no .png, NF117 if mahotas is not installed.
    """
    import imageio.v3 as iio
    import numpy as np

    from normfix.demo.data import nuclei_image
    from normfix.images.drafts import drafting

    target = Path(image)
    if target.suffix.lower() != ".png":
        raise NormfixError("NF114", "give a name that ends in .png.", where=str(target))
    try:
        pixels = np.ascontiguousarray(nuclei_image()[:512, :512])
    except ImportError as error:
        raise NormfixError("NF117", str(error), where="normfix demo --image") from error
    with output(image, is_image) as place, drafting(place.path) as draft:
        iio.imwrite(draft, pixels, extension=".png")
    tell(place, f" {_IMAGE}")
