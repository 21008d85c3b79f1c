"""Let plan, geometry, scaling and source travel with a converted model, as one plain attribute of it."""

from __future__ import annotations

from torch import nn

from normfix.records import Provenance

__all__ = ["attach_", "provenance_of"]

_NAME = "_normfix_provenance"


def attach_(model: nn.Module, provenance: Provenance) -> None:
    """Attach provenance in place; deep copies and pickles of the model carry it on."""
    model.__dict__[_NAME] = provenance


def provenance_of(model: nn.Module) -> Provenance | None:
    """Return what travels with the model, or None if normfix did not convert it."""
    found = model.__dict__.get(_NAME)
    return found if isinstance(found, Provenance) else None
