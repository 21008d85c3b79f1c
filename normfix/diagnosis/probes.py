"""Test a pipeline from inside: run it with probe networks in place of its own and watch what they are given.

The image of a probe run is noise, so that any patch of it is found again wherever a window was cut, also scaled:
correlation does not see an offset or a factor. The noise is of another range in every part of the image, so whatever
windows are scaled by (mean and deviation, percentiles, extremes, the median) differs between them; and two
values, the marks, are strewn over all of it: where windows are scaled by themselves, a mark reaches the network as
another value in another window. In the middle of what windows share, any pixel tells the same. What the probes
answer is a digit of their window's number, so that the stitched result says for every pixel which window it came from,
and a value that is no digit says that windows were mixed.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from normfix.networks.calling import home_of
from normfix.proof.crops import predicted

__all__ = ["Placed", "Probed", "probe"]

_PATCH = 16
_SAME = 1e-3
"""Of the distance between the marks: how far a mark may move between windows, by rounding."""
_ALIKE = 0.8
"""Correlation of a patch with the place it was cut from: 1 if it was scaled, less where values were clipped or bent
(0.9); noise of 256 pixels elsewhere stays below 0.4."""
_COMPARED = 64
"""Windows that are compared in pairs, where they overlap."""
_MARKS, _SHARE = (0.45, 0.55), 0.15
"""The marks' values on a scale from 0 to 1, and the share of the pixels that have each."""
Pipeline = Callable[[Any, nn.Module], Any]
Answer = Callable[[int, Tensor], Tensor | float]


@dataclass(frozen=True, slots=True)
class Placed:
    """A window: where it starts, which may lie before the image, and its extents."""

    start: tuple[int, ...]
    extents: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Probed:
    """What the probes saw: the windows, and what was done to them.

    `scaled` tells whether windows were scaled differently, `rescaled` whether their outputs were, `blended` whether
    outputs were mixed, `context` the least distance (before, after) per axis of a pixel from a cut of the window it was
    taken from. `unseen` says what could not be told and why; what it concerns is False or None.
    """

    windows: tuple[Placed, ...]
    size: tuple[int, ...]
    scaled: bool
    rescaled: bool
    blended: bool
    context: tuple[tuple[int, int], ...] | None
    unseen: tuple[str, ...] = ()


class _Probe(nn.Module):
    """Keeps the windows it is given and answers a number for each, in the first channel of the network's own shape.

    Where the network returns several tensors, all of them answer. What else a pipeline asks it for is the network's.
    """

    def __init__(self, network: nn.Module, answer: Answer) -> None:
        super().__init__()
        self.windows: list[Tensor] = []
        self._like: dict[tuple[int, ...], Any] = {}
        self._network = [network]
        self._answer = answer
        device, dtype = home_of(network)
        self.anchor = nn.Parameter(torch.zeros(1, device=device, dtype=dtype), requires_grad=False)

    def __getattr__(self, name: str) -> Any:
        """Look up what the probe has not in the network."""
        try:
            return super().__getattr__(name)
        except AttributeError:
            return getattr(self.__dict__["_network"][0], name)

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """Return one constant per window."""
        one = x[:1]
        key = tuple(one.shape)
        if key not in self._like:
            with torch.no_grad():
                self._like[key] = self._network[0](one, *args, **kwargs)
        leaves, structure = tree_flatten(self._like[key])
        answers = []
        for window in x:
            number = len(self.windows)
            answers.append([self._answered(leaf, number, x.dim()) for leaf in leaves])
            self.windows.append(window.detach().clone())
        joined = [
            torch.cat(parts) if isinstance(parts[0], Tensor) and parts[0].dim() else parts[0]
            for parts in zip(*answers, strict=True)
        ]
        return tree_unflatten(joined, structure)

    def _answered(self, leaf: Any, number: int, rank: int) -> Any:
        if not isinstance(leaf, Tensor):
            return leaf
        answer = torch.zeros_like(leaf)
        if answer.dim() == rank:  # one channel: a softmax swallows what all have
            answer[:, :1] += self._answer(number, answer[:, :1])
        return answer


def probe(pipeline: Pipeline, network: nn.Module, image: Tensor, space: int) -> Probed | None:
    """Run a pipeline with probes; None if none of their windows is found in the image.

    Args:
        pipeline: `pipeline(image, network)`.
        network: the real one, run once per window size to learn what its output looks like.
        image: of the shape and the range of values that the pipeline takes; its last `space` axes are spatial.
        space: number of spatial axes.
    """
    field = _Field.like(image, space)
    first = _Probe(network, lambda number, like: float(number % 2))
    answer = predicted(lambda x: pipeline(x, first), field.image, space)
    windows = [w.reshape(-1, *w.shape[-space:])[0] for w in first.windows]
    starts = [_found(window, field.plane) for window in windows]
    placed = {
        number: Placed(start, tuple(windows[number].shape))
        for number, start in enumerate(starts)
        if start is not None
    }
    if not placed:
        return None
    unseen = []
    if lost := len(windows) - len(placed):
        unseen.append(
            f"{lost} of {len(windows)} windows were not found in the probe image (resampled, turned or padding alone); "
            "what was seen is of the others."
        )
    scaled = _differently_scaled(windows, placed, field)
    if not scaled and _differently_filled(windows, placed):
        scaled = True
    if scaled is None:
        reason = "there was one" if len(placed) == 1 else "more was done to their pixels than one scale"
        unseen.append(f"the probes cannot see whether windows are scaled by themselves: {reason}.")
    finite = bool(torch.isfinite(answer).all())
    blended = finite and len(set(answer[0, 0].flatten().tolist())) > min(2, len(windows))
    context, rescaled = None, False
    if not blended and len(windows) > 1:
        context = _context(pipeline, network, field, placed, len(windows)) if finite else None
        rescaled = context is None and _rescaled(pipeline, network, field)
        if context is None:
            unseen.append(
                "the probes cannot see which window a pixel was taken from, nor with how much context: the result does "
                "not follow what the network answers."
            )
    found = tuple(placed[number] for number in sorted(placed))
    return Probed(found, tuple(field.plane.shape), scaled is True, rescaled, blended, context, tuple(unseen))


@dataclass(frozen=True, slots=True)
class _Field:
    """The probe image, its first plane, and where the marks lie in it."""

    image: Tensor
    plane: Tensor
    marks: tuple[Tensor, Tensor]

    @classmethod
    def like(cls, image: Tensor, space: int) -> _Field:
        """Make noise whose middle rises and whose range narrows towards the end of each axis."""
        shape = tuple(image.shape[-space:])
        generator = torch.Generator().manual_seed(0)
        rise = torch.zeros(shape)
        for axis, n in enumerate(shape):
            weight = (axis + 1) / sum(
                range(1, space + 1)
            )  # of each axis another, so that no two windows are alike
            rise = rise + weight * torch.linspace(0, 1, n).view(-1, *(1,) * (space - axis - 1))
        middle, spread = 0.3 + 0.4 * rise, 0.25 - 0.15 * rise
        plane = middle + spread * (2 * torch.rand(shape, generator=generator) - 1)
        lot = torch.rand(shape, generator=generator)
        marks = lot < _SHARE, (lot >= _SHARE) & (lot < 2 * _SHARE)
        for mark, value in zip(marks, _MARKS, strict=True):
            plane = plane.masked_fill(mark, value)
        low, high = float(image.min()), float(image.max())
        plane = low + plane * (high - low if high > low else 1.0)
        return cls(plane.expand(tuple(image.shape)).to(image).clone(), plane, marks)


def _found(window: Tensor, plane: Tensor) -> tuple[int, ...] | None:
    """Find where a window was cut by correlating its middle; the rest may be mirrored or padded."""
    patch_size = [min(_PATCH, n, m) for n, m in zip(window.shape, plane.shape, strict=True)]
    offset = [(n - p) // 2 for n, p in zip(window.shape, patch_size, strict=True)]
    patch = window.double()
    for axis, (start, length) in enumerate(zip(offset, patch_size, strict=True)):
        patch = patch.narrow(axis, start, length)
    patch = patch - patch.mean()
    norm = float(patch.square().sum().sqrt())
    if not norm > 0 or not bool(torch.isfinite(patch).all()):
        return None
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[plane.dim() - 1]
    wide, ones = (plane.double() - plane.double().mean())[None, None], torch.ones_like(patch)[None, None]
    total, square = convolve(wide, ones)[0, 0], convolve(wide.square(), ones)[0, 0]
    spread = (square - total.square() / patch.numel()).clamp_min(1e-12).sqrt()
    scores = (convolve(wide, patch[None, None])[0, 0] / spread / norm).abs()
    best = int(scores.argmax())
    if float(scores.flatten()[best]) < _ALIKE:
        return None
    position = torch.unravel_index(torch.tensor(best), scores.shape)
    return tuple(int(p) - o for p, o in zip(position, offset, strict=True))


def _differently_scaled(windows: Sequence[Tensor], placed: dict[int, Placed], field: _Field) -> bool | None:
    """Tell whether the marks have other values in other windows; None if that cannot be told.

    It cannot where a mark has several values within one window: then more was done than scaling.
    """
    values: list[list[float]] = []
    for number, place in placed.items():
        parts = [_inside(mark, windows[number], place) for mark in field.marks]
        if any(not len(part) for part in parts):
            continue
        width = abs(float(parts[1].median() - parts[0].median()))
        if any(float(part.max() - part.min()) > _SAME * max(width, 1e-30) for part in parts):
            return None
        values.append([float(part.median()) for part in parts])
    if len(values) < 2:
        return None
    levels = torch.tensor(values, dtype=torch.float64)
    width = float((levels[:, 1] - levels[:, 0]).abs().max())
    return bool((levels.amax(0) - levels.amin(0)).max() > _SAME * width)


def _differently_filled(windows: Sequence[Tensor], placed: dict[int, Placed]) -> bool:
    """Tell whether pixels have other values in one window than in another that overlaps it.

    Only the middle of what two windows share is compared: nearer to a cut a filter that the halo is wide enough for may
    differ, and does no harm.
    """
    for a, b in itertools.combinations(sorted(placed)[:_COMPARED], 2):
        spans = _shared(placed[a], placed[b])
        if placed[a] == placed[b] or any(last - first < 2 for first, last in spans):
            continue
        ours, theirs = (
            windows[number][
                tuple(slice(i - s, j - s) for (i, j), s in zip(spans, placed[number].start, strict=True))
            ].double()
            for number in (a, b)
        )
        whole = windows[a].double()
        if float((ours - theirs).abs().max()) > _SAME * max(float(whole.max() - whole.min()), 1e-30):
            return True
    return False


def _shared(a: Placed, b: Placed) -> list[tuple[int, int]]:
    """Return what two windows share: all of an axis that both are cut alike on, else the two pixels in the middle."""
    spans = []
    for s, n, t, m in zip(a.start, a.extents, b.start, b.extents, strict=True):
        first, last = max(0, s, t), min(s + n, t + m)
        middle = (first + last) // 2
        alike = (s, n) == (t, m) or last - first < 2
        spans.append((first, last) if alike else (middle - 1, middle + 1))
    return spans


def _inside(mark: Tensor, window: Tensor, place: Placed) -> Tensor:
    """Return the window's values at the pixels of a mark, as far as the window lies inside the image."""
    for axis, (start, length) in enumerate(zip(place.start, place.extents, strict=True)):
        first, last = max(0, start), min(mark.shape[axis], start + length)
        mark = mark.narrow(axis, first, max(0, last - first))
        window = window.narrow(axis, first - start, max(0, last - first))
    return window[mark].double()


def _context(
    pipeline: Pipeline, network: nn.Module, field: _Field, placed: dict[int, Placed], count: int
) -> tuple[tuple[int, int], ...] | None:
    """Return the least context (before, after) a pixel was predicted with, at cuts inside the image.

    None if pixels are said to come from windows that they do not lie in: then the answer was not read rightly.
    """
    owners = _owners(pipeline, network, field, count)
    space = owners.dim()
    for guess in (owners, _complement(owners, count)):  # a class number may fall where the answer rises
        least = [[n, n] for n in owners.shape]
        for number in torch.unique(guess).tolist():
            mine = (guess == number).nonzero()
            if number not in placed:
                if number >= count:
                    break
                continue
            place, low, high = placed[number], mine.amin(0).tolist(), mine.amax(0).tolist()
            ends = [first + extent for first, extent in zip(place.start, place.extents, strict=True)]
            if any(low[a] < place.start[a] or high[a] >= ends[a] for a in range(space)):
                break
            for axis in range(space):
                if place.start[axis] > 0:
                    least[axis][0] = min(least[axis][0], low[axis] - place.start[axis])
                if ends[axis] < guess.shape[axis]:
                    least[axis][1] = min(least[axis][1], ends[axis] - 1 - high[axis])
        else:
            return tuple((before, after) for before, after in least)
    return None


def _owners(pipeline: Pipeline, network: nn.Module, field: _Field, count: int) -> Tensor:
    """Return for each pixel the number of the window it came from, read digit by digit."""
    owners = torch.zeros(field.plane.shape, dtype=torch.long)
    for digit in range((count - 1).bit_length()):
        spy = _Probe(network, lambda number, like, digit=digit: float(number >> digit & 1))  # type: ignore[misc]
        answer = predicted(
            lambda image, spy=spy: pipeline(image, spy),  # type: ignore[misc]
            field.image,
            owners.dim(),
        )[0, 0]
        middle = (answer.min() + answer.max()) / 2
        owners += (answer > middle).long() << digit
    return owners


def _rescaled(pipeline: Pipeline, network: nn.Module, field: _Field) -> bool:
    """Tell whether each window's output is scaled by itself: then a factor and a shift of it change nothing."""

    def pattern(like: Tensor) -> Tensor:
        return torch.rand(like.shape, generator=torch.Generator().manual_seed(1)).to(like)

    def run(answer: Answer) -> Tensor:
        spy = _Probe(network, answer)
        return predicted(lambda image: pipeline(image, spy), field.image, field.plane.dim())

    plain = run(lambda number, like: pattern(like))
    loud = run(lambda number, like: pattern(like) * (1 + number % 2) + number % 3)
    spread = float(plain.std())
    return spread > 0 and bool((plain - loud).abs().max() <= 1e-3 * spread)


def _complement(owners: Tensor, count: int) -> Tensor:
    """Return the numbers whose digits are all the other ones."""
    return ((1 << (count - 1).bit_length()) - 1) - owners
