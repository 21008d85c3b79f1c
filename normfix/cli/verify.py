"""normfix verify."""

from __future__ import annotations

import click

from normfix.cli.showing import format_option, show
from normfix.cli.texts import verification_text
from normfix.storage.spec import require_folder

__all__ = ["verify_command"]


@click.command("verify")
@click.argument("folder", metavar="FOLDER")
@format_option
def verify_command(folder: str, format_: str) -> int:
    """Derive the halo, stride and sizes of a FOLDER that normfix saved again, from the program in it alone.

    Needs neither the network's source nor an image, and takes seconds. Every constant, every output's reach and every
    condition on the size must be what the certificate in normfix.json says, and the tiling must follow from them.
    Whether the constants are those of your images, `normfix prove` tells. Exits 0 if all passed, 1 if anything was
    changed or could not be decided, as in a folder that holds no program.

    \b
    Example:
      normfix verify fixed
    """
    require_folder(folder)
    from normfix.proof.verification import verify

    found = verify(folder)
    show(found, verification_text(found), format_)
    return 0 if found.passed else 1
