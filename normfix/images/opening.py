"""Open images to be read by window, scaled for a network."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from torch import nn

from normfix.errors import NormfixError
from normfix.images.files import open_windows, require_walkable
from normfix.images.formats.opened import ArrayLike, Choice
from normfix.images.scaling import scaling_numbers
from normfix.images.spread import Spread
from normfix.images.views import Part, part_of
from normfix.images.windows import ScaledImage, Unread, windowed
from normfix.networks.calling import home_of
from normfix.networks.intake import Intake
from normfix.networks.provenance import declared_scaling, provenance_of
from normfix.records.saved import Scaling
from normfix.records.scalings import parse_scaling

__all__ = ["Opener", "open_image", "scaling_of"]


def open_image(
    image: PathLike[str] | str | ArrayLike,
    model: nn.Module,
    *,
    axes: str | None = None,
    level: int = 0,
    series: str | None = None,
    scaling: Scaling | str | None = None,
    channels: Sequence[int] = (),
) -> ScaledImage:
    """Open an image to be read by window, scaled over all of it, for a model.

    Args:
        image: .npy, .tif, .zarr (also OME-Zarr), .nii, or an object with shape, dtype and slicing (h5py, dask, zarr).
        model: says how many channels and axes, which dtype and device.
        axes: one letter per array axis, C for channels, Z Y X for space.
        level: of a pyramid, 0 is the finest.
        series: name or number of the image, where a file holds several.
        scaling: such as "unit", "zscore" or "percentile:1,99.8"; default: what travels with the model.
        channels: numbers of those to take, in this order; default: all.

    Raises:
        NormfixError: NF101, NF104, NF106 and NF107 of the image, NF532 for channels that it has not.

    Example:
        >>> import normfix, numpy, torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 4, 3, padding=1), torch.nn.InstanceNorm2d(4))
        >>> normfix.open_image(numpy.zeros((300, 200), "float32"), net).shape
        (1, 1, 300, 200)
    """
    part = Part(channels=tuple(channels))
    stated = parse_scaling(scaling) if isinstance(scaling, str) else scaling
    return Opener(model, axes=axes, level=level, series=series, scaling=stated, part=part).open(image)


def scaling_of(model: nn.Module) -> Scaling | None:
    """Return how a model's images were scaled when it was converted, or its file says; None where that is not known.

    Raises:
        NormfixError: NF113 if a function prepared them: a file does not decide what runs.
    """
    known = provenance_of(model)
    if known is None:
        return declared_scaling(model)
    if known.scaling.kind == "none":  # unscaled tensors say nothing of integers
        return None
    if known.scaling.kind == "preprocess":
        name = known.scaling.function
        raise NormfixError(
            "NF113",
            "the images of this network are prepared by a function that its folder names, and a file does "
            f"not decide what runs here. If you trust it, repeat it: --preprocess {name}; in Python call it and give "
            "a tensor.",
            where=name,
        )
    return known.scaling


class Opener:
    """Opens one image after another for a model, of which it is learned once what it takes; see `open_image`."""

    def __init__(
        self,
        model: nn.Module,
        *,
        axes: str | None = None,
        level: int = 0,
        series: str | None = None,
        scaling: Scaling | None = None,
        part: Part | None = None,
    ) -> None:
        self._intake = Intake(model)
        self._axes, self._level, self._series = axes, level, series
        self._part = part or Part()
        self._scaling = scaling if scaling is not None else scaling_of(model)
        self._device, self._dtype = home_of(model)

    def open(self, image: PathLike[str] | str | ArrayLike, plane: int = 0) -> ScaledImage:
        """Open an image, or a plane of a stack, to be read by window, scaled over all of it."""
        window = self._window(image, plane)
        try:
            if isinstance(image, str | PathLike) and self._is_measured:
                require_walkable(Path(image), window)
            offset, divisor = scaling_numbers(Spread(window), self._scaling)
        except BaseException:
            window.close()
            raise
        return ScaledImage(window, offset=offset, divisor=divisor, dtype=self._dtype, device=self._device)

    @property
    def _is_measured(self) -> bool:
        return self._scaling is not None and self._scaling.kind in ("zscore", "percentile")

    def _window(self, image: PathLike[str] | str | ArrayLike, plane: int) -> Unread:
        ndim, axes, part = self._intake.ndim, self._axes, replace(self._part, plane=plane)
        if not isinstance(image, str | PathLike):
            Choice(self._series, self._level).require_single("image")
            array, said, planes = part_of(image, axes, part, ndim=ndim, where="image")
            window = windowed(array, ndim=ndim, channels=self._intake, axes=said)
            return replace(window, planes=planes)
        return open_windows(
            Path(image),
            ndim=ndim,
            channels=self._intake,
            axes=axes,
            level=self._level,
            series=self._series,
            part=part,
        )
