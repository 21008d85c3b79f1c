"""What releases of torch since 2.6 lack or call otherwise; told by what is there, not by their number."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch.compiler
import torch.export

__all__ = ["is_exporting", "values_of", "writes_archives"]


def is_exporting() -> bool:
    """Tell whether torch.export traces; before torch 2.7, whether anything does."""
    told = getattr(torch.compiler, "is_exporting", torch.compiler.is_compiling)
    return bool(told())


def writes_archives() -> bool:
    """Tell whether torch.export.save writes the layout that normfix reads, without pickles: torch 2.8 and newer."""
    return "package_pt2" in torch.export.save.__code__.co_names


def values_of(environment: Any) -> Mapping[Any, Any]:
    """Return the value at which each free size of a captured graph was captured."""
    renamed = getattr(environment, "backed_var_to_val", None)
    values: Mapping[Any, Any] = environment.var_to_val if renamed is None else renamed
    return values
