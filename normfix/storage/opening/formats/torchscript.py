"""TorchScript: a program and no modules, which is opened as one (normfix.storage.scripts) and not as a network."""

from __future__ import annotations

from pathlib import Path

from normfix.errors import NormfixError
from normfix.storage.opening.archives import inventory
from normfix.storage.opening.request import Loaded, Request

__all__ = ["open_network", "recognises"]


def recognises(path: Path) -> bool:
    """Recognise an archive with TorchScript's constants and code."""
    return path.is_file() and {"constants.pkl", "data.pkl"} <= inventory(path).names


def open_network(path: Path, request: Request) -> Loaded:
    """Open it as a program, where the caller can; it has no modules.

    Raises:
        NormfixError: NF123, with what to do; those of the program.
    """
    if request.open_script is not None:
        return request.open_script(path)
    raise NormfixError(
        "NF123",
        "it is a TorchScript program, which holds no modules; normfix.load opens it as a program. Where the network "
        "was traced or scripted, save its weights, torch.save(model.state_dict(), 'weights.pt'), and give them with "
        "--arch.",
        where=str(path),
    )
