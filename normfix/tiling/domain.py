"""Whether an image and the windows of its tiles are of sizes that a scan speaks for.

The rule, for `check` and `predict` alike:

    a condition of the captured graph fails for the image or for a window    outside: NF260, refused
    the same, but tiles were found to equal the whole on both sides of it    said: NF261
    no graph tells the sizes, and the image is larger than what was compared said: NF261
    a condition holds here, and would fail for images of other sizes         said by `check`: NF244

An image whose size no tiles are exact at is extended, and that is said as well: NF263.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from normfix.records.sites import Finding
from normfix.records.sizes import Condition, ProvedSizes
from normfix.tiling.grid import Geometry, window_sizes

__all__ = ["SizeVerdict", "extension", "judge_size"]


@dataclass(frozen=True, slots=True)
class SizeVerdict:
    """What is to be said of an image's size: why it is outside of what was proved, and what was not proved of it.

    `elsewhere` are sizes at which the network is another, while it is not at this one.
    """

    outside: tuple[Finding, ...] = ()
    unproved: tuple[Finding, ...] = ()
    elsewhere: tuple[Finding, ...] = ()


def judge_size(
    sizes: ProvedSizes | None,
    size: Sequence[int],
    tile: Sequence[int],
    geometry: Geometry,
    batch: int = 1,
) -> SizeVerdict:
    """Hold an image's size, and those of its windows, against the sizes that a scan speaks for.

    Args:
        sizes: of the scan; None where it has none.
        size: pixels per spatial axis.
        tile: pixels per spatial axis, multiples of the stride.
        geometry: of the network.
        batch: images in one.
    """
    if sizes is None:
        return SizeVerdict()
    whole = tuple(n + pad for n, pad in zip(size, geometry.padding(size), strict=True))
    extents = [whole, *sorted(window_sizes(whole, tile, geometry))]
    broken = _firsts(sizes.broken, extents, batch)
    outside = [
        _finding(
            "NF260",
            f"the network is another where {condition.text} fails{_at(condition)}, which it does for "
            f"{_named(failing, extents)}. Halo, stride and statistics are those of the network that was scanned. Take "
            "the branch out, or scan and convert with an image, and use a tile, on one side of it.",
        )
        for condition, failing in broken.items()
    ]
    elsewhere = [
        _finding(
            "NF244",
            f"the network is another where {condition.text} fails{_at(condition)}. Here it holds, and this says "
            "nothing of images of such sizes.",
        )
        for condition in sizes.conditions
        if condition not in broken
    ]
    unproved = [
        _finding(
            "NF261",
            f"the network branches where {condition.text} fails{_at(condition)}, as it does for "
            f"{_named(failing, extents)}; tiles equalled the whole on both sides at the sizes that were tried.",
        )
        for condition, failing in _firsts(sizes.passed, extents, batch).items()
    ]
    if sizes.exceeded(whole):
        larger = (
            f"{_named(whole, extents)} is larger than what was compared, {_by(sizes.extents)} along the axes and "
            f"{sizes.pixels} pixels at a time, and no graph says that larger images are treated alike: "
            f"{sizes.unknown[0].rstrip('.')}."
        )
        unproved.append(_finding("NF261", larger))
    return SizeVerdict(tuple(outside), tuple(unproved), tuple(elsewhere))


def extension(size: Sequence[int], geometry: Geometry | None) -> tuple[Finding, ...]:
    """Say that an image is extended to a size at which the network is exact; nothing where it is not.

    Args:
        size: pixels per spatial axis.
        geometry: of the network, where it is known.
    """
    padding = () if geometry is None else geometry.padding(size)
    if not any(padding):
        return ()
    exact = _by([n + more for n, more in zip(size, padding, strict=True)])
    message = (
        f"an image of {_by(size)} is extended at its end by its edge pixels to {exact}, the next size that tiles are "
        f"exact at, and the result cut back. That is the whole image here: what the network itself gives for "
        f"{_by(size)}, if it takes that, may be another."
    )
    return (_finding("NF263", message),)


def _firsts(
    failing: Callable[[Sequence[int], int], tuple[Condition, ...]],
    extents: Sequence[tuple[int, ...]],
    batch: int,
) -> dict[Condition, tuple[int, ...]]:
    """Return the conditions that fail for any of the extents, each with the first of them."""
    found: dict[Condition, tuple[int, ...]] = {}
    for size in extents:
        for condition in failing(size, batch):
            found.setdefault(condition, size)
    return found


def _finding(code: str, message: str) -> Finding:
    return Finding(code=code, where="image size", message=message)


def _named(size: tuple[int, ...], extents: Sequence[tuple[int, ...]]) -> str:
    return f"an image of {_by(size)}" if size == extents[0] else f"a window of {_by(size)}"


def _at(condition: Condition) -> str:
    return f" ({condition.line})" if condition.line else ""


def _by(size: Sequence[int]) -> str:
    return "x".join(map(str, size))
