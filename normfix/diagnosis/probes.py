"""Test a pipeline from inside: run it with probe networks in place of its own and watch what they are given.

The image of a probe run is random bits, so that any patch of it is found again wherever a window was cut,
also scaled: a scaled bit is still one of two values. What the probes answer is a digit of their window's
number, so that the stitched result says for every pixel which window it came from, and a value that is no
digit says that windows were mixed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from normfix.diagnosis.crops import predicted

__all__ = ["Seen", "probe"]

_PATCH = 16
_SAME = 1e-3
Pipeline = Callable[[Any, nn.Module], Any]


@dataclass(frozen=True, slots=True)
class Seen:
    """What the probes saw: where windows start, their extents, and what was done to them.

    `starts` may be negative: such a window reads beyond the image. `scaled` tells whether windows were scaled
    differently, `blended` whether outputs were mixed, `context` the least distance (before, after) per axis of
    a pixel from a cut of the window it was taken from; None where outputs were mixed.
    """

    starts: tuple[tuple[int, ...], ...]
    extents: tuple[int, ...]
    size: tuple[int, ...]
    scaled: bool
    blended: bool
    context: tuple[tuple[int, int], ...] | None


class _Probe(nn.Module):
    """Keeps the windows it is given and answers a constant for each, like the network's own output."""

    def __init__(self, network: nn.Module, answer: Callable[[int], float]) -> None:
        super().__init__()
        self.windows: list[Tensor] = []
        self._like: dict[tuple[int, ...], Tensor] = {}
        self._network = [network]
        self._answer = answer
        self.anchor = nn.Parameter(torch.zeros(1), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        """Return one constant per window."""
        one = x[:1]
        key = tuple(one.shape)
        if key not in self._like:
            with torch.no_grad():
                self._like[key] = torch.zeros_like(self._network[0](one))
        answers = []
        for window in x:
            answers.append(self._like[key] + self._answer(len(self.windows)))
            self.windows.append(window.detach().clone())
        return torch.cat(answers)


def probe(pipeline: Pipeline, network: nn.Module, shape: Sequence[int], space: int) -> Seen | None:
    """Run a pipeline with probes; None if their windows are not found in the image or not one per call.

    Args:
        pipeline: `pipeline(image, network)`, image a tensor of `shape`.
        network: the real one, run once per window size to learn what its output looks like.
        shape: of the image, its last `space` axes spatial.
        space: number of spatial axes.
    """
    bits = _bits(shape, space)
    first = _Probe(network, lambda number: float(number % 2))
    answer = predicted(lambda image: pipeline(image, first), bits, space)
    plane = bits.reshape(-1, *shape[-space:])[0]
    windows = [w.reshape(-1, *w.shape[-space:])[0] for w in first.windows]
    starts = [_found(w, plane) for w in windows]
    if not windows or None in starts or len({w.shape for w in windows}) != 1:
        return None
    places = tuple(s for s in starts if s is not None)
    size, extents = tuple(shape[-space:]), tuple(windows[0].shape)
    levels = set(answer[0, 0].flatten().tolist())
    blended = len(levels) > min(2, len(windows))
    context = None
    if not blended and len(windows) > 1:
        owners = _owners(pipeline, network, bits, space, len(windows))
        context = _context(owners, places, extents, size)
    return Seen(places, extents, size, _differently_scaled(windows), blended, context)


def _bits(shape: Sequence[int], space: int) -> Tensor:
    """Return random bits, more of them ones towards the end of each axis, so that windows differ in scale."""
    generator = torch.Generator().manual_seed(0)
    density = torch.full(tuple(shape[-space:]), 0.2)
    for axis, n in enumerate(shape[-space:]):
        ramp = torch.linspace(0, 0.6 / space, n)
        density = density + ramp.view(-1, *(1,) * (space - axis - 1))
    plane = (torch.rand(density.shape, generator=generator) < density).float()
    return plane.expand(tuple(shape)).clone()


def _found(window: Tensor, plane: Tensor) -> tuple[int, ...] | None:
    """Find where a window was cut by the bits of its middle; the rest may be mirrored or padded."""
    low, high = window.min(), window.max()
    if not float(high) > float(low):
        return None
    patch_size = [min(_PATCH, n) for n in window.shape]
    offset = [(n - p) // 2 for n, p in zip(window.shape, patch_size, strict=True)]
    patch = (window > (low + high) / 2).float()
    for axis, (start, length) in enumerate(zip(offset, patch_size, strict=True)):
        patch = patch.narrow(axis, start, length)
    signs, kernel = 2 * plane - 1, 2 * patch - 1
    convolve = (torch.conv1d, torch.conv2d, torch.conv3d)[plane.dim() - 1]
    scores = convolve(signs[None, None], kernel[None, None])[0, 0]
    best = int(scores.argmax())
    if float(scores.flatten()[best]) < kernel.numel() - 0.5:
        return None
    position = torch.unravel_index(torch.tensor(best), scores.shape)
    return tuple(int(p) - o for p, o in zip(position, offset, strict=True))


def _differently_scaled(windows: Sequence[Tensor]) -> bool:
    """Tell whether the two values of the bits differ from window to window."""
    levels = torch.tensor([[float(w.min()), float(w.max())] for w in windows])
    width = float((levels[:, 1] - levels[:, 0]).abs().mean())
    return bool((levels.amax(0) - levels.amin(0)).max() > _SAME * width)


def _owners(pipeline: Pipeline, network: nn.Module, bits: Tensor, space: int, count: int) -> Tensor:
    """Return for each pixel the number of the window it came from, read digit by digit."""
    owners = torch.zeros(bits.shape[-space:], dtype=torch.long)
    for digit in range((count - 1).bit_length()):
        spy = _Probe(network, lambda number, digit=digit: float(number >> digit & 1))  # type: ignore[misc]
        answer = predicted(lambda image, spy=spy: pipeline(image, spy), bits, space)[0, 0]  # type: ignore[misc]
        middle = (answer.min() + answer.max()) / 2
        owners += (answer > middle).long() << digit
    return owners


def _context(
    owners: Tensor, starts: Sequence[tuple[int, ...]], extents: Sequence[int], size: Sequence[int]
) -> tuple[tuple[int, int], ...]:
    """Return the least context (before, after) a pixel was predicted with, at cuts inside the image."""
    least = [[n, n] for n in size]
    for number, start in enumerate(starts):
        mine = (owners == number).nonzero()
        if not len(mine):
            continue
        for axis, (first, extent, n) in enumerate(zip(start, extents, size, strict=True)):
            low, high = int(mine[:, axis].min()), int(mine[:, axis].max())
            if first > 0:
                least[axis][0] = min(least[axis][0], low - first)
            if first + extent < n:
                least[axis][1] = min(least[axis][1], first + extent - 1 - high)
    return tuple((before, after) for before, after in least)
