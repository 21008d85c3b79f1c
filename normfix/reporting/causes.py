"""Causes of seams in words: what each is called among people who train networks, and what it does."""

from __future__ import annotations

__all__ = ["FROZEN", "name_of", "reason_of"]

_CAUSES = {
    "instance": (
        "InstanceNorm",
        "Every tile is normalised by its own mean and variance, so a pixel gets another value in another tile.",
    ),
    "group": (
        "GroupNorm",
        "Every tile is normalised by the mean and variance of its own channel groups, so a pixel gets another value in "
        "another tile.",
    ),
    "batch": (
        "BatchNorm on batch statistics",
        "The norm uses the mean and variance of the tiles in the batch instead of its running statistics.",
    ),
    "layer": ("LayerNorm over space", "Every tile is normalised over its own channels and pixels."),
    "response": ("response norm", "Responses are divided by their norm over the tile's own pixels."),
    "pool": (
        "global pooling",
        "A mean or maximum over all of the tile, as in squeeze and excitation, steers every pixel.",
    ),
    "reduction": (
        "a mean or sum over the tile",
        "A number that is computed from all of the tile steers every pixel.",
    ),
    "attention": (
        "attention",
        "Every pixel looks at every other pixel of its tile, and at none outside of it.",
    ),
    "other": ("an operation on the whole extent", "It orders or transforms all pixels of a tile together."),
    "halo": (
        "too small a halo",
        "Tiles are read with less context than an output looks at, so their rims are wrong.",
    ),
    "phase": (
        "tiles off the stride",
        "Strides and pooling start at another pixel in the tile than in the whole image.",
    ),
    "last tile": (
        "the last tile pushed back",
        "The last tile starts off the stride, so its pixels are pooled otherwise.",
    ),
    "border padding": (
        "padding at the image's border",
        "Tiles at the border read mirrored pixels where the network pads the whole image by itself.",
    ),
    "tile scaling": (
        "scaling tile by tile",
        "Every tile is scaled by its own values, not by those of the image.",
    ),
    "output scaling": (
        "scaling of predictions tile by tile",
        "Every tile's prediction is scaled by its own values.",
    ),
    "train mode": (
        "train mode",
        "The network computes batch statistics and drops units out, as in training.",
    ),
    "size": (
        "a size that the stride does not divide",
        "The network rounds it, and rounds a tile's size otherwise.",
    ),
    "position": (
        "resizing with align_corners",
        "Where a pixel is resized to depends on the size of the tile.",
    ),
    "blending": (
        "blending",
        "Overlapping tiles are averaged, which mixes pixels that see different context.",
    ),
    "unknown": ("an unknown cause", "Something else than all that was tried makes tiles differ."),
}

FROZEN = frozenset({"instance", "group", "batch", "layer", "response", "pool", "reduction"})
"""Causes that normfix convert takes away."""


def name_of(cause: str) -> str:
    """Return what a cause is called.

    >>> name_of("instance"), name_of("a cause of one's own")
    ('InstanceNorm', "a cause of one's own")
    """
    return _CAUSES.get(cause, (cause, ""))[0]


def reason_of(cause: str) -> str:
    """Return what a cause does, or nothing where that is not known."""
    return _CAUSES.get(cause, ("", ""))[1]
