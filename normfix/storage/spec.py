"""What a path or name of a network can mean, told without torch, so that a wrong one is said at once."""

from __future__ import annotations

import os
import re
from pathlib import Path

from normfix.errors import NormfixError
from normfix.networks.naming import file_hint, is_named, require_findable, source_hint

__all__ = [
    "ENDINGS",
    "HUB",
    "is_factory",
    "require_folder",
    "require_no_revision",
    "require_repository",
    "require_spec",
]

HUB = "hf-hub:"

ENDINGS = (".pt", ".pth", ".ckpt", ".safetensors", ".pytorch", ".pt2", ".bin", ".ts")
"""Of files with weights."""

_TIMM = "timm:"
_REPOSITORY = re.compile(r"hf-hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")


def is_factory(spec: str) -> bool:
    """Tell whether it names what builds a network, and no file.

    >>> is_factory("timm:resnet18"), is_factory("nets.py:UNet"), is_factory("net.pt")
    (True, True, False)
    """
    return is_named(spec) and Path(spec).suffix not in ENDINGS


def require_spec(spec: str) -> None:
    """Refuse a name of nothing, before anything is imported or read for it.

    Raises:
        NormfixError: NF101 for what is neither a file nor a name, NF111 for a factory that is nowhere, NF125 for a
            repository without a name.
    """
    if spec.startswith(HUB):
        require_repository(spec, None)
        return
    if os.path.exists(spec):  # noqa: PTH110 - Path.exists raises where a name is too long
        return
    if not is_factory(spec):
        raise NormfixError(
            "NF101",
            "no such file, and no name of the form timm:NAME, hf-hub:ORG/NAME or pkg.module:factory."
            f"{file_hint(Path(spec)) or source_hint(spec)}",
            where=spec[:200],
        )
    if not spec.startswith(_TIMM):
        require_findable(spec)


def require_repository(spec: str, revision: str | None) -> tuple[str, str | None]:
    """Return a repository of a hub and the revision that is wanted of it; the name's own counts first.

    >>> require_repository("hf-hub:my-group/nuclei@v2", None)
    ('my-group/nuclei', 'v2')

    Raises:
        NormfixError: NF125 for another form.
    """
    match = _REPOSITORY.fullmatch(spec)
    if match is None:
        raise NormfixError(
            "NF125", "give it as hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION.", where=spec[:200]
        )
    return match[1], match[2] or revision


def require_no_revision(spec: str, revision: str | None) -> None:
    """Refuse a revision of what has none, rather than open another one than was asked for.

    Raises:
        NormfixError: NF125.
    """
    if revision is not None and not spec.startswith(HUB):
        raise NormfixError(
            "NF125",
            f"it is no repository, so it has no revision {revision!r}. Drop --revision.",
            where=spec[:200],
        )


def require_folder(folder: str) -> None:
    """Refuse a folder that is not there.

    Raises:
        NormfixError: NF101.
    """
    if not Path(folder).is_dir():
        raise NormfixError(
            "NF101", "there is no such folder. Give one that normfix convert wrote.", where=folder[:200]
        )
