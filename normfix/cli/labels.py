"""Labels and metrics that are named on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from normfix.errors import NormfixError

if TYPE_CHECKING:
    from torch import nn

__all__ = ["KINDS", "metric_named", "read_labels"]

KINDS = ("probability", "logits", "softmax", "scores", "labels", "regression")
"""What an output may mean; see normfix.records.diagnoses."""


def read_labels(path: str, model: nn.Module) -> Any:
    """Return what a file holds of classes or masks, (*space)."""
    from normfix.images.files import read_image
    from normfix.networks.intake import Intake

    return read_image(Path(path), ndim=Intake(model).ndim, channels=1)[0]


def metric_named(name: str | None) -> Any:
    """Return the function that `pkg.mod:function` names, if any."""
    from normfix.networks.naming import named

    if name is None:
        return None
    try:
        return named(name)
    except NormfixError as error:
        raise click.UsageError(f"--metric {name}: {error.message}") from error
