"""Calibrate without the pixels that a mask ignores: masks are brought to their images, statistics checked for sense.

In stages a block knows which of its positions count (normfix.tiling.stages.blocks). In passes over whole images it is
the targets that are told, with the maps' scales found as stages find them: by comparing two sizes of input.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normfix.conversion.measuring import measure_sites_
from normfix.conversion.targets import StatisticTarget, Target, TargetAround
from normfix.errors import NormfixError
from normfix.images.files import open_windows as open_file
from normfix.images.opening import Wholes
from normfix.images.sources import Image, TensorImage
from normfix.images.windows import ScaledImage
from normfix.networks.calling import Caller, evaluating, home_of
from normfix.networks.examples import fitting_example
from normfix.records.measurements import CalibrationSummary
from normfix.records.progress import Progress
from normfix.records.spans import round_up
from normfix.tiling.stages.maps import Map, map_of
from normfix.tiling.stages.masks import Masked, counted, mask_of, selected

__all__ = ["Mask", "ignored_pixels", "masked", "measure_in_passes_", "open_mask", "require_maskable"]

Mask = Tensor | np.ndarray[Any, Any] | Path | str | Image
"""Nonzero where a pixel is ignored; of the image's extents, with or without leading axes of extent 1."""

_LAWS = frozenset({"mean", "variance", "deviation", "variance_mean", "deviation_mean"}) | {
    "maximum",
    "minimum",
    "extremes",
}
"""Laws of values that do not grow with the number of pixels."""


def masked(images: Sequence[Image], mask: Mask | Sequence[Mask], opened: ExitStack) -> list[Masked]:
    """Give each image its mask; files are closed with `opened`.

    Raises:
        NormfixError: NF137 for another number of masks or other extents than the images', NF138 for an image that
            is ignored altogether, NF101 for a file that cannot be read.
    """
    single = isinstance(mask, Tensor | np.ndarray | Path | str) or hasattr(mask, "padded")
    masks: Sequence[Any] = [mask] if single else list(mask)  # type: ignore[arg-type]
    if len(masks) != len(images):
        raise NormfixError(
            "NF137",
            f"{len(masks)} masks were given for {len(images)} images. Give one for each, in their order.",
            where="mask",
        )
    found = []
    for number, (image, one) in enumerate(zip(images, masks, strict=True)):
        where = str(one) if isinstance(one, Path | str) else f"mask {number}"
        source = _source(one, len(image.shape) - 2, opened)
        if source.shape != (1, 1, *image.shape[2:]) or image.shape[0] != 1:
            raise NormfixError(
                "NF137",
                f"the mask is {source.shape[2:]} and its image {image.shape} (N, C, *space). A mask has the extents of "
                "one image, without channels.",
                where=where,
            )
        both = Masked(image, source)
        if ignored_pixels(both) == math.prod(image.shape[2:]):
            raise NormfixError(
                "NF138",
                "it ignores every pixel of its image. Nonzero means ignored: leave the image out, or invert the mask.",
                where=where,
            )
        found.append(both)
    return found


def open_mask(path: Path, ndim: int, axes: str | None = None) -> ScaledImage:
    """Open a mask file to be read by window; `axes` names its axes, without channels.

    Raises:
        NormfixError: NF101 and NF106 of the file.
    """
    return ScaledImage(open_file(path, ndim=ndim, channels=1, axes=axes), dtype=torch.float64)


def ignored_pixels(image: Image) -> int:
    """Return how many pixels of an image its mask ignores, read in slabs."""
    mask = mask_of(image)
    if mask is None:
        return 0
    first, *rest = mask.shape[2:]
    step = max(1, (1 << 22) // math.prod(rest))
    return sum(
        int((mask.read([(start, min(first, start + step)), *((0, n) for n in rest)]) != 0).sum())
        for start in range(0, first, step)
    )


def require_maskable(targets: Sequence[Target], images: Sequence[Image]) -> None:
    """Refuse statistics that have no meaning for a part of the image.

    Raises:
        NormfixError: NF139 with the site.
    """
    if not any(mask_of(image) is not None for image in images):
        return
    for target in targets:
        if isinstance(target, StatisticTarget) and (target.dims is None or target.spec.law not in _LAWS):
            law = "quotient" if target.spec.quotient else target.spec.law
            raise _unmaskable(
                target.name, f"its value ({law}) depends on how many pixels there are, or has no law"
            )


def measure_in_passes_(
    model: nn.Module,
    targets: Sequence[Target],
    images: Sequence[Image],
    caller: Caller,
    stride: Sequence[int] | None,
    progress: Progress,
) -> CalibrationSummary:
    """Calibrate the targets in place in passes over whole images, without the pixels that masks ignore.

    Raises:
        NormfixError: NF139 for a statistic of what is no map over the image; codes of `measure_sites_`.
    """
    if not any(mask_of(image) is not None for image in images):
        return measure_sites_(model, targets, Wholes(images), caller, progress)
    stride = stride or (64,) * (len(images[0].shape) - 2)
    maps = _maps(model, targets, images[0], caller, stride)
    turn = _Turn(images)
    counting = [_Counting(target, maps[target.name], turn) for target in targets]
    return measure_sites_(model, counting, turn, caller, progress)


@dataclass(slots=True)
class _Turn:
    """Images as whole tensors, one after another, and the mask of the one whose turn it is."""

    images: Sequence[Image]
    mask: Image | None = None

    def __iter__(self) -> Iterator[Tensor]:
        for image in self.images:
            self.mask = mask_of(image)
            yield from Wholes([image])


@dataclass(frozen=True, slots=True)
class _Counting(TargetAround):
    """A target that measures the positions that count of the image whose turn it is."""

    map: Map
    turn: _Turn

    def watch(
        self, report: Callable[[Any], None], counting: Callable[[Tensor], Tensor] | None = None
    ) -> Callable[[], None]:
        return self.target.watch(report, self._counting)

    def _counting(self, operand: Tensor) -> Tensor:
        if self.turn.mask is None:
            return operand
        spans = [(0, operand.shape[d]) for d in self.map.dims]
        return selected(operand, self.map.dims, counted(self.turn.mask, self.map, spans))


@dataclass(slots=True)
class _Shapes:
    """The shapes of the targets' operands in one forward pass."""

    found: dict[str, tuple[int, ...]] = field(default_factory=dict)

    def recorder(self, name: str) -> Callable[[Tensor], Tensor]:
        def record(operand: Tensor) -> Tensor:
            self.found[name] = tuple(operand.shape)
            return operand

        return record


def _maps(
    model: nn.Module, targets: Sequence[Target], image: Image, caller: Caller, stride: Sequence[int]
) -> dict[str, Map]:
    """Compare the operands' shapes at sizes that differ along one axis; see normfix.tiling.stages.maps."""
    corner = image.read([(0, min(n, 1024)) for n in image.shape[2:]])
    base = tuple(fitting_example(model, corner, caller).shape)
    here = _shapes(model, targets, base, caller)
    grown: dict[str, list[dict[int, Fraction]]] = {target.name: [] for target in targets}
    for axis, step in enumerate(stride):
        step = round_up(32, step)
        size = [n + step * (d == axis + 2) for d, n in enumerate(base)]
        there = _shapes(model, targets, size, caller)
        for name, shape in here.items():
            pairs = enumerate(zip(shape, there[name], strict=True))
            grown[name].append({d: Fraction(b - a, step) for d, (a, b) in pairs if a != b})
    maps = {}
    for target in targets:
        found = map_of(grown[target.name])
        if found is None or not set(found.dims) <= set(target.dims or ()):
            raise _unmaskable(target.name, "what it runs over is no map of the image")
        maps[target.name] = found
    return maps


def _shapes(
    model: nn.Module, targets: Sequence[Target], size: Sequence[int], caller: Caller
) -> dict[str, tuple[int, ...]]:
    device, dtype = home_of(model)
    noise = torch.randn(tuple(size), generator=torch.Generator().manual_seed(0)).to(device, dtype)
    shapes = _Shapes()
    with evaluating(model), torch.no_grad():
        ends = [target.watch(lambda part: None, shapes.recorder(target.name)) for target in targets]
        try:
            caller(model, noise)
        finally:
            for end in ends:
                end()
    return shapes.found


def _source(mask: Mask, ndim: int, opened: ExitStack) -> Image:
    """Return a mask as (1, 1, *space) to be read by window."""
    if isinstance(mask, Path | str):
        return opened.enter_context(open_mask(Path(mask), ndim))
    if isinstance(mask, Tensor | np.ndarray):
        ignored = torch.as_tensor(np.asarray(mask) != 0) if isinstance(mask, np.ndarray) else mask != 0
        space = ignored.shape[max(0, ignored.dim() - ndim) :]
        fits = len(space) == ndim and math.prod(space) == ignored.numel()
        return TensorImage(ignored.reshape(1, 1, *space) if fits else ignored)
    return mask


def _unmaskable(site: str, reason: str) -> NormfixError:
    return NormfixError(
        "NF139",
        f"a mask cannot be brought to it: {reason}. Calibrate without a mask, or crop the images instead.",
        where=site,
    )
