"""What a caller asks of a loader, and what a loader gives back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn

from normfix.errors import NormfixError
from normfix.records.saved import Source
from normfix.storage.opening.factories import dumped

__all__ = ["Loaded", "Request", "factory", "object_source", "require_no_choice", "unreadable"]


@dataclass(frozen=True, slots=True)
class Loaded:
    """A network, where it came from, and what the user should know."""

    model: nn.Module
    source: Source
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Request:
    """How the caller wants a file opened.

    `weights` picks one of several sets of weights in a file; `allow_classes` are names or "package.*" patterns
    of classes a pickle may build; `tell` hears what has to be said before something happens. `network` is a network
    to fill, instead of an architecture to build; `trust` are modules whose factories a file may name, `allow_code`
    the sha256 of files of code that may run; `open_script` opens a TorchScript archive as a program.
    """

    arch: str | None = None
    arch_args: Mapping[str, Any] | None = None
    weights: str | None = None
    trust_pickle: bool = False
    allow_classes: tuple[str, ...] = ()
    network: nn.Module | None = None
    allow_code: tuple[str, ...] = ()
    trust: tuple[str, ...] = ()
    tell: Callable[[str], None] = field(default=lambda text: None)
    open_script: Callable[[Path], Loaded] | None = None

    @property
    def named(self) -> Source | None:
        """The architecture the caller names or gives, if any."""
        if self.network is not None:
            return object_source(self.network)
        return None if self.arch is None else factory(self.arch, self.arch_args or {})


def factory(spec: str, args: Mapping[str, Any]) -> Source:
    """Return the source that calls a factory."""
    return Source(kind="factory", spec=spec, args=dumped(args))


def object_source(network: nn.Module) -> Source:
    """Return the source of a network that is there: its class, which loading needs again from the caller."""
    kind = type(network)
    return Source(kind="object", spec=f"{kind.__module__}:{kind.__qualname__}")


def require_no_choice(request: Request, where: str) -> None:
    """Refuse a choice among sets of weights where there is one or none, so that it would count for nothing.

    Raises:
        NormfixError: NF119.
    """
    if request.weights is not None:
        raise NormfixError(
            "NF119",
            f"{request.weights!r} (--weights, weights=) chooses among the sets of weights in a file of weights, and "
            "this is none. Leave it out, or give the file with --arch.",
            where=where,
        )


def unreadable(path: Path, error: Exception | str) -> NormfixError:
    """Return the error for a file that is damaged or of another kind than its name says."""
    reason = " ".join(str(error).split())[:160] or type(error).__name__
    return NormfixError(
        "NF101", f"cannot read this file: {reason}. Check that it exists and is whole.", where=str(path)
    )
