"""Numbers of pixels on the command line: one for all axes of space, or one for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeAlias

import click

__all__ = ["Extents", "Halo", "HaloExtents", "context_option", "per_axis"]

HaloExtents: TypeAlias = int | tuple[int, ...] | Literal["auto"]


class Extents(click.ParamType):  # type: ignore[type-arg]
    """A number of pixels, or one per axis of space, such as 64 or 32,128,128."""

    name = "n[,n...]"

    def __init__(self, minimum: int | None = None) -> None:
        self.minimum = minimum

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> int | tuple[int, ...]:
        """Parse, or fail with the reason."""
        numbers = value if isinstance(value, list | tuple) else str(value).split(",")
        try:
            extents = tuple(int(str(number)) for number in numbers)
        except ValueError:
            extents = ()
        if not 1 <= len(extents) <= 3:
            self.fail("give a number of pixels, or one per axis of space, such as 64,96", param, ctx)
        if self.minimum is not None and min(extents) < self.minimum:
            self.fail(f"{min(extents)} is not in the range x>={self.minimum}", param, ctx)
        return extents[0] if len(extents) == 1 else extents


class Halo(Extents):
    """Pixels of context, or auto."""

    name = "auto|n[,n...]"

    def __init__(self) -> None:
        super().__init__(minimum=0)

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> Any:  # an extent, or "auto"
        """Parse, or fail with the reason."""
        return value if value == "auto" else super().convert(value, param, ctx)


def context_option(what: str = "Context on every side") -> Callable[[Any], Any]:
    """Return the option --halo."""
    return click.option(
        "--halo",
        type=Halo(),
        default="auto",
        show_default=True,
        help=f"{what}, in pixels; one number, or one per axis.",
    )


def per_axis(extents: int | Sequence[int], ndim: int) -> tuple[int, ...]:
    """Return one number for each axis of space.

    Raises:
        click.UsageError: there are several, and not as many as axes.
    """
    if isinstance(extents, int):
        return (extents,) * ndim
    if len(extents) != ndim:
        raise click.UsageError(f"{','.join(map(str, extents))}: give 1 number of pixels or {ndim}")
    return tuple(extents)
