"""push: put a saved folder into a repository of the Hugging Face hub."""

from __future__ import annotations

import sys
from pathlib import Path

from normfix.errors import NormfixError
from normfix.records.saved import Saved
from normfix.storage.folder import (
    CARD,
    GRAPH,
    MANIFEST,
    PROGRAM,
    WEIGHTS,
    program_beside,
    read_manifest,
    require_unchanged,
)
from normfix.storage.opening.packages import leads_out

__all__ = ["push"]


def push(folder: str | Path, name: str, *, private: bool = False, partial: bool = False) -> str:
    """Upload a folder that normfix saved; return the address of the commit.

    Args:
        folder: checked before anything is sent.
        name: "ORG/NAME"; made if it does not exist.
        private: make it private.
        partial: push although the folder states no passed proof.

    Raises:
        NormfixError: NF101, NF108, NF115 for a folder that is not whole, NF413 if it is not proved, a file of it is a
            link out of it, or the hub refuses.
    """
    saved = read_manifest(Path(folder))
    sent = _sent(Path(folder), saved)
    if not partial and (saved.proof is None or not saved.proof.passed):
        raise NormfixError(
            "NF413",
            "the folder states no passed proof, so it is not published. Convert the network anew, or push it all "
            "the same with --partial.",
            where=str(folder),
        )
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    if not sys.stderr.isatty():
        disable_progress_bars()
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        done = api.upload_folder(
            repo_id=name,
            folder_path=folder,
            allow_patterns=sent,
            commit_message=f"normfix: {saved.provenance.plan.model.rpartition('.')[2]}, {saved.provenance.plan.to}",
        )
    except Exception as error:  # its own kinds, and those of whatever carries the requests
        reason = " ".join(str(error).split())[:200]
        raise NormfixError(
            "NF413", f"the hub refused it or cannot be reached: {type(error).__name__}: {reason}.", where=name
        ) from error
    return str(done.commit_url)


def _sent(folder: Path, saved: Saved) -> list[str]:
    """Return the names of the files to send: those that were saved together.

    Raises:
        NormfixError: NF115 if a program is another than was saved, NF413 if a file lies elsewhere.
    """
    names = [MANIFEST, WEIGHTS, CARD]
    if program_beside(folder, saved) is not None:
        names.append(PROGRAM)
    certificate = saved.certificate
    if certificate is not None and certificate.program == GRAPH and (folder / GRAPH).is_file():
        require_unchanged(folder / GRAPH, certificate.sha256)
        names.append(GRAPH)
    outside = next((name for name in names if leads_out(folder / name, folder)), None)
    if outside is not None:
        raise NormfixError(
            "NF413",
            f"its {outside} is a link to a file elsewhere, which would be published. Put that file itself into the "
            "folder if you mean it.",
            where=str(folder),
        )
    return names
