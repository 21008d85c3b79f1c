"""hf-hub:ORG/NAME[@REVISION]: fetch a repository's networks and configs through huggingface_hub, nothing else."""

from __future__ import annotations

import sys
from pathlib import Path

from normfix.errors import NormfixError
from normfix.storage.spec import HUB, require_repository

__all__ = ["fetched"]

_WANTED = (
    *("*.json", "*.yml", "*.yaml", "*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.pytorch", "*.pt2"),
    "README.md",
)


def fetched(spec: str, revision: str | None = None) -> tuple[Path, str]:
    """Return the folder of a repository at one commit, and its name with that commit.

    Args:
        spec: "hf-hub:ORG/NAME" or "hf-hub:ORG/NAME@REVISION".
        revision: a branch, tag or commit; the name's own counts first. Default: the main branch.

    Raises:
        NormfixError: NF125 if there is no such repository or revision, or the hub cannot be reached.
    """
    repository, wanted = require_repository(spec, revision)
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    try:
        folder = Path(snapshot_download(repository, revision=wanted, allow_patterns=list(_WANTED)))
    except Exception as error:  # its own kinds, and those of whatever carries the requests
        reason = " ".join(str(error).split())[:200]
        raise NormfixError(
            "NF125",
            f"cannot fetch it: {type(error).__name__}: {reason}. Check the name, --revision, and for private "
            "repositories HF_TOKEN.",
            where=spec,
        ) from error
    return folder, f"{HUB}{repository}@{folder.name}"
