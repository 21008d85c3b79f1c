"""How the calls of a forward pass follow the image: the same calls at another size, and with two images.

A dimension is space if its extent follows the image's, and batch if it follows the number of images. The
exponent of a tensor says how its elements grow: 1 as the image does, 2 as all pairs of pixels, 0 not at all.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, nn

from normfix.networks.calling import affordable, is_affordable, refusals, resized
from normfix.networks.functions import ATTENTION, tokens_of
from normfix.scanning.census import Call, Follow, alone, census

__all__ = ["FIXED", "REDUCED", "SQUARED", "Growth", "Pass", "look_again", "look_at_two", "ran_otherwise"]

Run = Callable[[nn.Module, Tensor], Any]

FIXED, REDUCED, SQUARED = 0.1, 0.75, 1.4
"""Exponents: below the first a tensor does not grow; above the last it compares pixels with pixels."""

_NEAR = 8
"""Pixels by which a smaller image is tried that may run as the example does where no larger one does."""
_FEW, _COARSEST = 3, 4096
"""Pixels of growth that say little; largest common multiple, in pixels, of the factors of maps that is believed."""

_WIDE = {1: 1024, 2: 256, 3: 64}
"""Pixels by which an image grows at least to tell a coarse map from one of a fixed size, per number of axes."""
_MOST, _MOST_PAIRED = 1 << 20, 1 << 13
"""Pixels of the largest image that is run for that; where pixels are compared with pixels."""


@dataclass(frozen=True, slots=True)
class Pass:
    """The calls of one more forward pass, on another example."""

    example: Tensor
    calls: list[Call]
    output: Any


def look_again(
    model: nn.Module,
    run: Run,
    example: Tensor,
    calls: Sequence[Call],
    follow: Follow = alone,
    exact: Sequence[int] = (),
) -> Pass | None:
    """Run at another size; None if the network accepts none of those tried with the same calls.

    Sizes that are multiples of `exact`, per axis, are tried first: below them a network may be another one. A map that
    is coarser than what the image grew by does not grow: where maps stay as they are, a far larger image tells whether
    they are of one size. Where calls may compare pixels with pixels, an image grows by less than would take too much.
    """
    most = max((math.prod(shape) for call in calls for shape in call.outputs), default=0)
    trials = affordable(_trials(example, exact), example.shape[2:], most)
    looks = (_look(model, run, resized(example, trial), calls, follow) for trial in trials)
    near = next((look for look in looks if look is not None), None)
    if near is None or not (still := _unmoved(calls, near.calls, example.dim())):
        return near
    wide = [n + max(n, _WIDE.get(example.dim() - 2, 0)) for n in example.shape[2:]]
    pixels = _MOST_PAIRED if _compares_pixels(calls, near.calls) else _MOST
    if math.prod(wide) > pixels or not is_affordable(wide, example.shape[2:], most):
        return near
    far = _look(model, run, resized(example, wide), calls, follow)
    return near if far is None or _unmoved(calls, far.calls, example.dim()) >= still else far


def _unmoved(here: Sequence[Call], there: Sequence[Call], rank: int) -> int:
    """Count the maps of more than one position that are as large as at the other size."""
    pairs = (
        pair for a, b in zip(here, there, strict=True) for pair in zip(a.outputs, b.outputs, strict=False)
    )
    return sum(a == b and len(a) == rank and math.prod(a[2:]) > 1 and a[0] == 1 for a, b in pairs)


def _compares_pixels(here: Sequence[Call], there: Sequence[Call]) -> bool:
    """Tell whether a call is an attention that has more or fewer tokens at the other size: its work is of all pairs."""

    def tokens(call: Call) -> int:
        shape = call.inputs[0]
        return shape[tokens_of(call.function, len(shape))]

    return any(a.function in ATTENTION and tokens(a) != tokens(b) for a, b in zip(here, there, strict=True))


def ran_otherwise(
    model: nn.Module, run: Run, example: Tensor, exact: Sequence[int] = ()
) -> tuple[int, ...] | None:
    """Return extents at which a network runs that `look_again` found to make other calls there, or None."""
    for trial in _trials(example, exact):
        try:
            census(model, run, resized(example, trial))
        except refusals():
            continue
        return tuple(trial)
    return None


def _trials(example: Tensor, exact: Sequence[int]) -> list[list[int]]:
    space = example.shape[2:]
    trials: list[list[int]] = [[n // 2 for n in space]] if all(n % 32 == 0 and n >= 64 for n in space) else []
    trials += [[n + step for n in space] for step in (32, 64, 128)]
    # a branch above a few pixels makes other calls at all of these
    trials += [[n - _NEAR for n in space]] if min(space) > 2 * _NEAR else []
    return sorted(
        trials, key=lambda trial: any(n % multiple for n, multiple in zip(trial, exact, strict=False))
    )


def look_at_two(model: nn.Module, run: Run, example: Tensor, calls: Sequence[Call]) -> Pass | None:
    """Run on an example and its mirror image; None if the network does not take both with the same calls."""
    return _look(model, run, torch.cat([example, example.flip(-1)]), calls)


def _look(
    model: nn.Module,
    run: Run,
    example: Tensor,
    calls: Sequence[Call],
    follow: Follow = alone,
) -> Pass | None:
    try:
        made, _, output = census(model, run, example, follow=follow)
    except refusals():  # the network does not take it
        return None
    alike = [call.function for call in made] == [call.function for call in calls]
    return Pass(example, made, output) if alike else None


class Growth:
    """How extents follow the image's, from the same calls at two sizes.

    Without a second size, dimensions from 2 on of a tensor of the input's rank count as space. The network runs on two
    images once somebody asks for what they tell, which no norm does.
    """

    def __init__(
        self,
        example: Tensor,
        calls: list[Call],
        other: Pass | None,
        look_at_two: Callable[[], Pass | None] = lambda: None,
    ) -> None:
        self._example = example
        self._calls = calls
        self._other = other
        self._look_at_two = look_at_two
        self._unit = self._log_ratio(tuple(example.shape), tuple(other.example.shape)) if other else 1.0

    @cached_property
    def two(self) -> Pass | None:
        """Return the calls with two images; None if the network does not take them."""
        return self._look_at_two()

    @property
    def _alone(self) -> list[Call]:
        """Return the calls of one image of the size at which there were two."""
        if self._other is None or self.two is None:
            return self._calls
        same = self._other.example.shape[2:] == self.two.example.shape[2:]
        return self._other.calls if same else self._calls

    @property
    def two_sizes(self) -> bool:
        """Tell whether the calls are known at a second size."""
        return self._other is not None

    def space(self, position: int) -> frozenset[int]:
        """Return the dimensions of the call's main operand that are space."""
        operand = _operand_shape(self._calls[position])
        if self._other is None:
            return frozenset(range(2, len(operand)))
        return _differing(operand, _operand_shape(self._other.calls[position]))

    def batch(self, position: int) -> tuple[frozenset[int], frozenset[int]] | None:
        """Return the dimensions of the main operand and of the output along which images are stacked.

        None if the network does not take two images.
        """
        if self.two is None:
            return None
        one, two = self._alone[position], self.two.calls[position]
        return (
            _differing(_operand_shape(one), _operand_shape(two)),
            _differing(one.outputs[0], two.outputs[0]) if one.outputs else frozenset(),
        )

    def space_of(self, position: int, number: int) -> frozenset[int]:
        """Return the dimensions of one input that are space; none where there is no second size."""
        if self._other is None:
            return frozenset()
        return _differing(self._calls[position].inputs[number], self._other.calls[position].inputs[number])

    def batch_of(self, position: int, number: int) -> frozenset[int] | None:
        """Return the dimensions of one input along which images are stacked; None if it takes no two images."""
        if self.two is None:
            return None
        return _differing(self._alone[position].inputs[number], self.two.calls[position].inputs[number])

    def follows_size(self, position: int) -> bool:
        """Tell whether a number that the call is given changes with the image's extent."""
        return self._other is not None and (
            self._calls[position].numbers != self._other.calls[position].numbers
        )

    def input(self, position: int, number: int) -> float:
        """Return the exponent of one input."""
        return self._exponent(position, "inputs", number)

    def inputs(self, position: int) -> float:
        """Return the exponent of the fastest growing input: 1 grows as the image does, 0 not at all."""
        return max(
            (self._exponent(position, "inputs", i) for i in range(len(self._calls[position].inputs))),
            default=0,
        )

    def outputs(self, position: int) -> float:
        """Return the exponent of the fastest growing output."""
        return max(
            (self._exponent(position, "outputs", i) for i in range(len(self._calls[position].outputs))),
            default=0,
        )

    def of_output(self, output: Tensor) -> frozenset[int]:
        """Return the dimensions of the network's output that follow the image's extent."""
        if self._other is None:
            return frozenset(d for d, n in enumerate(output.shape) if d >= 2 and n > 1)
        return _differing(tuple(output.shape), tuple(self._other.output.shape))

    def dilution(self) -> tuple[int, ...]:
        """Return per axis the least common multiple of how much coarser than the image the feature maps are."""
        rank = self._example.dim()
        found = [1] * (rank - 2)
        looks = self._other.calls if self._other else self._calls
        other = self._other.example if self._other else self._example
        known = [
            {(self._example.shape[axis + 2], other.shape[axis + 2]): Fraction(1)} for axis in range(rank - 2)
        ]
        for here, there in zip(self._calls, looks, strict=True):
            for a, b in zip(here.outputs, there.outputs, strict=False):  # unbind gives as many as there are
                if len(a) != rank or len(b) != rank:
                    continue
                for axis, maps in enumerate(known):
                    pair = a[axis + 2], b[axis + 2]
                    if pair not in maps:
                        given = zip(here.inputs, there.inputs, strict=False)
                        inputs = [(i[axis + 2], j[axis + 2]) for i, j in given if len(i) == len(j) == rank]
                        maps[pair] = self._coarseness(axis, pair, inputs, maps, here.numbers)
                    if maps[pair].denominator == 1:
                        common = math.lcm(found[axis], int(maps[pair]))
                        found[axis] = common if common <= _COARSEST else max(found[axis], int(maps[pair]))
        return tuple(found)

    def _coarseness(
        self,
        axis: int,
        pair: tuple[int, int],
        inputs: Sequence[tuple[int, int]],
        known: Mapping[tuple[int, int], Fraction],
        numbers: Sequence[float],
    ) -> Fraction:
        """Return image pixels per pixel of a map, from its extents at both sizes and those of what it was made of.

        Against its own input a map tells its factor at sizes that it does not divide, too: a convolution without
        padding gives floor((n - k) / s) + 1 pixels. Where few pixels leave several factors possible, one that the call
        is given as a number is it, as a stride is.
        """
        (here, there), one = pair, Fraction(1)
        image = self._example.shape[axis + 2]
        if self._other is None:
            return Fraction(image // here) if here > 1 and image % here == 0 else one
        change = there - here
        step = self._other.example.shape[axis + 2] - image
        if not change or step * change < 0:
            return one
        for given in inputs:
            grown = given[1] - given[0]
            if given not in known or grown * change <= 0:
                continue
            # of few pixels the growth tells little, the extent more
            ratios = [grown / change, max(given) / max(pair)]
            if abs(change) <= _FEW:
                ratios.reverse()
            nearest = ratios[0]
            for ratio in (*sorted(numbers, key=lambda n: abs(n - nearest)), *ratios):
                factor = max(1, round(ratio))
                if abs(grown - factor * change) < factor:
                    return known[given] * factor
        return Fraction(step // change) if step % change == 0 else one

    def _exponent(self, position: int, side: str, which: int) -> float:
        shape: tuple[int, ...] = getattr(self._calls[position], side)[which]
        if self._other is None:
            return float(any(n > 1 for n in shape[2:]))
        shapes = getattr(self._other.calls[position], side)
        if which >= len(shapes):
            return 0.0
        return self._log_ratio(shape, shapes[which]) / self._unit

    @staticmethod
    def _log_ratio(a: tuple[int, ...], b: tuple[int, ...]) -> float:
        return math.log(max(1, math.prod(b)) / max(1, math.prod(a)))


def _operand_shape(call: Call) -> tuple[int, ...]:
    given = call.arguments.get("input")
    if given is not None:
        return given.shape  # type: ignore[no-any-return]
    return call.inputs[0] if call.inputs else ()


def _differing(a: tuple[int, ...], b: tuple[int, ...]) -> frozenset[int]:
    if len(a) != len(b):
        return frozenset(range(len(a)))
    return frozenset(i for i, (m, n) in enumerate(zip(a, b, strict=True)) if m != n)
