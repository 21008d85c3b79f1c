"""hf-hub:ORG/NAME[@REVISION]: fetch a repository's networks and configs through huggingface_hub, nothing else."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from normfix.errors import NormfixError
from normfix.storage.spec import HUB

__all__ = ["fetched", "require_repository"]

_NAME = re.compile(r"hf-hub:([\w.-]+/[\w.-]+)(?:@([\w./-]+))?")
_WANTED = (
    *("*.json", "*.yml", "*.yaml", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pytorch", "*.pt2"),
    "README.md",
)


def require_repository(spec: str, revision: str | None) -> None:
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


def fetched(spec: str, revision: str | None = None) -> tuple[Path, str]:
    """Return the folder of a repository at one commit, and its name with that commit.

    Args:
        spec: "hf-hub:ORG/NAME" or "hf-hub:ORG/NAME@REVISION".
        revision: a branch, tag or commit; the name's own counts first. Default: the main branch.

    Raises:
        NormfixError: NF125 if there is no such repository or revision, or the hub cannot be reached.
    """
    match = _NAME.fullmatch(spec)
    if match is None:
        raise NormfixError(
            "NF125", "give it as hf-hub:ORG/NAME or hf-hub:ORG/NAME@REVISION.", where=spec[:200]
        )
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    name, wanted = match.group(1), match.group(2) or revision
    try:
        folder = Path(snapshot_download(name, revision=wanted, allow_patterns=list(_WANTED)))
    except Exception as error:  # its own kinds, and those of whatever carries the requests
        reason = " ".join(str(error).split())[:200]
        raise NormfixError(
            "NF125",
            f"cannot fetch it: {type(error).__name__}: {reason}. Check the name, --revision, and for private "
            "repositories HF_TOKEN.",
            where=spec,
        ) from error
    return folder, f"{HUB}{name}@{folder.name}"
