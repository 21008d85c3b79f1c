"""Zarr 2 and 3 and OME-Zarr: axes, units and scales of a level; outputs in whole chunks and shards."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from normfix.errors import NormfixError
from normfix.images.formats.opened import Choice, Opened, choose
from normfix.images.formats.placement import Placement, unit_named

if TYPE_CHECKING:
    from normfix.images.formats.chunk_store import Chunks

__all__ = ["create", "open_zarr"]

_IMAGES = 256
"""Images in one group; plates have a group for each."""

_EDGE = 128
"""Largest edge of a chunk."""


def open_zarr(path: Path, choice: Choice) -> Opened:
    """Open an array, or an image and level of OME-Zarr; see `normfix.images.formats.open_file`."""
    from normfix.images.formats.chunk_store import open_array
    from normfix.images.formats.zarr_layout import metadata_of, within

    third = metadata_of(path, path, "zarr.json")
    flat = (path / ".zarray").exists() if third is None else third.get("node_type") == "array"
    if flat:
        choice.require_single(str(path))
        array, chunks = open_array(path, path)
        dims = [str(name).upper() for name in (third or {}).get("dimension_names") or ()]
        said = "".join(dims) if dims and all(len(name) == 1 for name in dims) else None
        return _opened(array, chunks, said, Placement(), "")
    told = metadata_of(path, path, ".zattrs") if third is None else third.get("attributes")
    attributes: dict[str, Any] = told or {}
    ome: dict[str, Any] = attributes.get("ome", attributes)
    images = ome.get("multiscales")
    if not images:
        raise NormfixError("NF101", _imageless(ome), where=str(path))
    if len(images) > _IMAGES:
        raise NormfixError(
            "NF121",
            f"it names {len(images):,} images, and each would be opened to list them. Name the array inside it.",
            where=str(path),
        )
    first = [within(path, image["datasets"][0]["path"]) for image in images]
    names = [str(image.get("name") or number) for number, image in enumerate(images)]
    shapes = [_shape_of(folder, path) for folder in first] if len(images) > 1 else [()]
    image = images[choose(names, shapes, choice.series, path)]
    datasets = image["datasets"]
    if not 0 <= choice.level < len(datasets):
        raise NormfixError(
            "NF101", f"it has {len(datasets)} levels, and no level {choice.level}.", where=str(path)
        )
    dataset = datasets[choice.level]
    array, chunks = open_array(within(path, dataset["path"]), path)
    axes = [a if isinstance(a, Mapping) else {"name": a} for a in image.get("axes", "tczyx")]
    letters = _letters(axes, array.ndim, path)
    placement = _placement(image, dataset, axes, letters)
    labels = tuple(str(c.get("label", "")) for c in (ome.get("omero") or {}).get("channels", ()))
    if "C" in letters and len(labels) == array.shape[letters.index("C")] and all(labels):
        placement = replace(placement, channels=labels)
    return _opened(array, chunks, letters, placement, str(dataset["path"]))


def _imageless(ome: Mapping[str, Any]) -> str:
    """Say what a group without an image of its own is, and what to name instead."""
    for kind, inside in {"plate": "A/1/0", "well": "0", "bioformats2raw.layout": "0"}.items():
        if kind in ome:
            return (
                f"it is a group of images ({kind}), and one is taken. Name one inside it, such as {inside}."
            )
    return "it is a Zarr group without OME metadata. Name the array inside it."


def _opened(array: Any, chunks: Chunks, axes: str | None, placement: Placement, part: str) -> Opened:
    missing, files = chunks.missing
    notes = (
        (f"{missing:,} of {files:,} chunks are missing and read as the fill value, {array.fill_value}.",)
        if missing
        else ()
    )
    return Opened(array, axes, placement, part=part, listing=chunks.listing, notes=notes)


def _shape_of(folder: Path, root: Path) -> tuple[int, ...]:
    """Return the extents that the metadata of an array says; its chunks are not looked for."""
    from normfix.images.formats.zarr_layout import layout_of

    return layout_of(folder, root).shape


def _letters(axes: Sequence[Mapping[str, Any]], ndim: int, path: Path) -> str:
    """Return a letter per axis of the array.

    Raises:
        NormfixError: NF106 if the axes do not name those of the array, once each, by a letter.
    """
    letters = [str(axis.get("name", "")).upper() for axis in axes]
    if len(letters) != ndim or len(set(letters)) != ndim or not all(len(one) == 1 for one in letters):
        raise NormfixError(
            "NF106",
            f"its axes are named {', '.join(map(repr, letters))}, and its array has {ndim}. One letter names each: t, "
            "c, z, y, x. Correct its metadata, or give the folder of the array itself, with --axes.",
            where=str(path),
        )
    return "".join(letters)


def create(
    path: Path,
    shape: Sequence[int],
    dtype: np.dtype[Any],
    axes: str,
    placement: Placement,
    blocks: Sequence[int],
) -> Any:
    """Make an OME-Zarr of one level to be written by block; see `tiff.create`.

    A block is a whole number of shards, so that two blocks never write one file, and a shard of chunks.
    """
    import zarr

    group: Any = zarr.create_group(store=str(path), overwrite=True)
    spaces = [letter for letter in axes if letter in "ZYX"]
    order = [letter for letter in "ZYX" if letter in axes]

    def by_axis(values: Sequence[float], other: float) -> list[float]:
        known = dict(zip(order, values, strict=False))
        return [known.get(letter, other) for letter in axes]

    described: list[dict[str, str]] = []
    for letter in axes:
        axis = {"name": letter.lower(), "type": {"C": "channel", "T": "time"}.get(letter, "space")}
        if letter in spaces and placement.unit and placement.spacing:
            axis["unit"] = placement.unit
        described.append(axis)
    transforms: list[dict[str, Any]] = [{"type": "scale", "scale": by_axis(placement.spacing, 1.0)}]
    if placement.origin:
        transforms.append({"type": "translation", "translation": by_axis(placement.origin, 0.0)})
    multiscale = {
        "name": path.stem.removeprefix(".").removesuffix("-draft"),
        "axes": described,
        "datasets": [{"path": "0", "coordinateTransformations": transforms}],
    }
    ome: dict[str, Any] = {"version": "0.5", "multiscales": [multiscale]}
    if "C" in axes and len(placement.channels) == shape[axes.index("C")]:
        ome["omero"] = {"channels": [{"label": name} for name in placement.channels]}
    group.attrs["ome"] = ome
    shards = [min(b, n) if b < n else n for b, n in zip(blocks, shape, strict=True)]
    chunks = [_edge(n) for n in shards]
    whole = [math.ceil(s / c) * c for s, c in zip(shards, chunks, strict=True)]
    return group.create_array(
        "0",
        shape=tuple(shape),
        chunks=tuple(chunks),
        shards=tuple(whole) if whole != chunks else None,
        dtype=dtype,
        dimension_names=[letter.lower() for letter in axes],
    )


def _edge(block: int) -> int:
    """Return the longest edge of a chunk that divides a block, if one of a sensible length does."""
    for parts in range(math.ceil(block / _EDGE), block + 1):
        if block % parts == 0:
            return block // parts if block // parts * 4 >= min(block, _EDGE) else block
    return block


def _per_axis(given: object, kind: str, count: int) -> NDArray[np.float64]:
    """Return the numbers of a transformation; of fewer numpy would make one for every axis."""
    numbers = given if isinstance(given, list) else []
    if len(numbers) != count or not all(type(n) in (int, float) for n in numbers):
        raise ValueError(
            f"the {kind} of its coordinate transformations is not one number for each of its {count} axes"
        )
    return np.array(numbers, np.float64)


def _placement(
    image: Mapping[str, Any], dataset: Mapping[str, Any], axes: Sequence[Mapping[str, Any]], letters: str
) -> Placement:
    """Return what the coordinate transformations say of the axes of space.

    Raises:
        ValueError: for a scale or translation that is not one number for each axis.
    """
    scale, moved = np.ones(len(letters)), np.zeros(len(letters))
    told = False
    for one in (*dataset.get("coordinateTransformations", ()), *image.get("coordinateTransformations", ())):
        kind = one.get("type")
        if kind not in ("scale", "translation") or kind not in one:
            continue
        values = _per_axis(one[kind], kind, len(letters))
        if kind == "scale":
            scale, moved, told = scale * values, moved * values, True
        else:
            moved = moved + values
    order = [letters.index(letter) for letter in "ZYX" if letter in letters]
    units = {unit_named(axes[i].get("unit")) for i in order}
    unit = units.pop() if len(units) == 1 else ""
    last = letters.endswith("C")
    if not told or (not unit and (scale == 1).all()):
        return Placement(channels_last=last)
    return Placement(
        spacing=tuple(float(scale[i]) for i in order),
        unit=unit,
        origin=tuple(float(moved[i]) for i in order) if moved.any() else (),
        channels_last=last,
    )
