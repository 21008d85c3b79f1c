"""Let plan, geometry, scaling and source travel with a converted model, as one plain attribute of it.

What travels describes the model as it was converted. If its modules were changed since, a new head for
instance, or an attribute that its forward reads, `provenance_of` still returns it but `is_current` says that its
geometry no longer counts.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from torch import nn

from normfix.networks.behaviour import SAID, digest_of_values, structure_of
from normfix.records.saved import Provenance, Scaling

__all__ = [
    "attach_",
    "declare_scaling_",
    "declare_window_",
    "declared_scaling",
    "declared_window",
    "has_known_values",
    "is_current",
    "keep_in_",
    "kept_in",
    "outdate_",
    "provenance_of",
    "rescale_",
]

_NAME, _STRUCTURE, _VALUES, _SCALING, _WINDOW, _FOLDER = SAID


def attach_(model: nn.Module, provenance: Provenance) -> None:
    """Attach provenance in place; deep copies and pickles of the model carry it on."""
    model.__dict__[_NAME] = provenance
    model.__dict__[_STRUCTURE] = structure_of(model)
    model.__dict__[_VALUES] = digest_of_values(model)


def is_current(model: nn.Module) -> bool:
    """Tell whether the model has the modules, attributes and hooks it was converted with; weights may have changed."""
    return model.__dict__.get(_STRUCTURE) == structure_of(model)


def has_known_values(model: nn.Module) -> bool:
    """Tell whether the model has the weights and buffers that what travels with it was found under, on any device."""
    return model.__dict__.get(_VALUES) == digest_of_values(model)


def outdate_(model: nn.Module) -> None:
    """Say in place that the network is set otherwise than when it was converted: its geometry no longer counts."""
    if _STRUCTURE in model.__dict__:
        model.__dict__[_STRUCTURE] = None


def provenance_of(model: nn.Module) -> Provenance | None:
    """Return what travels with the model, or None if normfix did not convert it."""
    found = getattr(model, "__dict__", {}).get(_NAME)
    return found if isinstance(found, Provenance) else None


def rescale_(model: nn.Module, scaling: Scaling) -> None:
    """Say in place that the statistics of a converted network are those of images that are scaled so."""
    known = provenance_of(model)
    if known is not None:
        model.__dict__[_NAME] = replace(known, scaling=scaling)


def declare_scaling_(model: nn.Module, scaling: Scaling) -> None:
    """Attach, in place, how the file that a network came from scales its images."""
    model.__dict__[_SCALING] = scaling


def declared_scaling(model: nn.Module) -> Scaling | None:
    """Return how the file that a network came from scales its images; None where none says it."""
    found = getattr(model, "__dict__", {}).get(_SCALING)
    return found if isinstance(found, Scaling) else None


def declare_window_(model: nn.Module, size: object) -> None:
    """Attach, in place, the windows of training that the file of a network states: a list of extents; else nothing."""
    if isinstance(size, list | tuple) and size and all(type(n) is int and n > 0 for n in size):
        model.__dict__[_WINDOW] = tuple(size)


def keep_in_(model: nn.Module, folder: Path) -> None:
    """Attach, in place, the folder that a network was loaded from, beside which stands what was found out of it."""
    model.__dict__[_FOLDER] = str(folder.absolute())


def kept_in(model: nn.Module) -> Path | None:
    """Return the folder that a network was loaded from, while it has the modules that are saved there."""
    found = getattr(model, "__dict__", {}).get(_FOLDER)
    return Path(found) if isinstance(found, str) and is_current(model) else None


def declared_window(model: nn.Module) -> tuple[int, ...] | None:
    """Return the extents of the windows that a network was trained in; None where its file does not state them."""
    found = getattr(model, "__dict__", {}).get(_WINDOW)
    return found if isinstance(found, tuple) else None
