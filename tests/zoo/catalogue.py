"""The zoo: every architecture, in one list."""

from __future__ import annotations

from .entry import Entry
from .of_diffusers import ENTRIES as DIFFUSERS
from .of_monai import ENTRIES as MONAI
from .of_smp import ENTRIES as SMP
from .of_timm import ENTRIES as TIMM
from .of_torchvision import ENTRIES as TORCHVISION
from .of_transformers import ENTRIES as TRANSFORMERS

__all__ = ["ENTRIES", "by_name"]

ENTRIES: tuple[Entry, ...] = (*MONAI, *TORCHVISION, *DIFFUSERS, *TRANSFORMERS, *SMP, *TIMM)


def by_name(name: str) -> Entry:
    """Return the entry of that name."""
    return next(entry for entry in ENTRIES if entry.name == name)
