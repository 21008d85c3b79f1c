"""What a network takes, found by running it: how many channels, over how many axes of space.

The convolution that is registered first need not be the one that meets the image: heads are declared before stems,
encoders before the decoder that is used, and a stem may see pixels shuffled into channels. So its channels are only
the first guess of several, and what the network runs on decides.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import tree_leaves

from normfix.errors import NormfixError
from normfix.networks.alone import Entangled, run_alone
from normfix.networks.calling import Caller, class_of, evaluating, home_of, in_eval_mode, refusals
from normfix.networks.copying import copy_of, twin_of
from normfix.networks.graph.program import ProgramNetwork
from normfix.networks.randomness import OwnRandomness

__all__ = ["Intake", "is_lazy"]

_EXTENTS = {1: (256, 1024), 2: (64, 256), 3: (32, 64)}
"""Extents that are tried, the cheaper first, per number of axes."""
_WHOLE = 1 << 22
"""A network that takes one size alone is run on an image of up to this many values."""
_SHUFFLES = (2, 3, 4, 8)
"""Blocks of pixels that stems fold into channels: Real-ESRGAN and FFDNet take 2, transformers' stems up to 8."""
_USUAL = (1, 3, 4, 2)


class Intake:
    """Runs a copy of a network on noise to learn what it takes; what was learned is kept.

    Args:
        model: not modified.
        caller: calls it.
        copied: a copy of it to run, in whatever mode, device and dtype; default: a twin.

    Example:
        >>> from torch import nn
        >>> net = nn.Sequential(nn.PixelUnshuffle(2), nn.Conv2d(12, 8, 3, padding=1), nn.Conv2d(8, 1, 1))
        >>> Intake(net).channels, Intake(net).runs((12, 64, 96))
        (3, False)
    """

    def __init__(
        self, model: nn.Module, caller: Caller | None = None, copied: nn.Module | None = None
    ) -> None:
        self._model, self._caller = model, caller or Caller()
        if self._caller.output is None:
            self._caller = _AnyOutput(self._caller.forward_fn)
        self._copy = copied
        self._known: dict[tuple[int, ...], float | None] = {}
        self._convolutions = _convolutions(model)
        # a lazy copy keeps the first shape that it sees
        self._lazy = is_lazy(model)
        self._settled: tuple[int, int] | None = None

    @property
    def seen(self) -> Mapping[tuple[int, ...], float | None]:
        """Return the shapes (C, *space) that its copy was run on so far, each with its ratio."""
        return self._known

    @property
    def ndim(self) -> int:
        """Return the number of axes of space."""
        ranks = {ndim for _, ndim in self._registered}
        return ranks.pop() if len(ranks) == 1 else self._first()[1]

    @property
    def channels(self) -> int:
        """Return the first number of channels that it runs with; what the first convolution takes if it never runs."""
        return self._first()[0]

    def runs(self, shape: Sequence[int]) -> bool:
        """Tell whether the network runs with as many channels: on such an image, a part of it or another size."""
        channels, *space = shape
        parts = [tuple(_part(n, most) for n in space) for most in _EXTENTS.get(len(space), ())]
        if channels * torch.Size(space).numel() <= _WHOLE:
            parts.append(tuple(space))
        parts += [(most,) * len(space) for most in _EXTENTS.get(len(space), ())]
        return any(self._runs_on((channels, *part)) for part in dict.fromkeys(parts))

    def refusal(self, shape: Sequence[int]) -> str:
        """Return why an image (C, *space) is none for the network, or nothing.

        A network that runs with no number of channels is not refused for its channels: there is another reason, which
        whoever runs it is told.
        """
        if self.runs(shape):
            return ""
        running = next((c for c in self._guesses(len(shape) - 1) if self.runs((c, *shape[1:]))), None)
        if running is None:
            return ""
        return f"the network takes {running} channels, the image has {shape[0]}"

    def ratio(self, shape: Sequence[int]) -> float | None:
        """Return how many times as long as an image (C, *space) the output is along an axis, at most.

        1 if the output is no map; None where the network does not run on such an image.
        """
        key = tuple(shape)
        if key not in self._known:
            self._known[key] = self._measured(key)
        return self._known[key]

    @property
    def _registered(self) -> list[tuple[int, int]]:
        """Return (channels, axes of space) that convolutions take, as they are registered.

        Raises:
            NormfixError: NF109 if there is none to guess from.
        """
        if self._convolutions:
            return self._convolutions
        raise NormfixError(
            "NF109",
            "the network has no convolution to tell its input's shape from. Give one: --input NxCxHxW on the "
            "command line, `example` in Python.",
            where=class_of(self._model),
        )

    def _first(self) -> tuple[int, int]:
        if self._settled is None:
            self._settled = next(self._running(), self._registered[0])
        return self._settled

    def _running(self) -> Iterator[tuple[int, int]]:
        """Yield (channels, axes) that the network runs with."""
        if isinstance(self._model, ProgramNetwork):
            yield self._registered[0]
            return
        for ndim in dict.fromkeys(ndim for _, ndim in self._registered):
            for channels in self._guesses(ndim):
                if self.runs((channels, *(_EXTENTS[ndim][-1],) * ndim)):
                    yield channels, ndim

    def _guesses(self, ndim: int) -> list[int]:
        taken = [channels for channels, rank in self._convolutions if rank == ndim]
        folded = [c // r**ndim for c in taken for r in _SHUFFLES if c % r**ndim == 0]
        return list(dict.fromkeys((*taken, *folded, *_USUAL)))

    def _runs_on(self, shape: tuple[int, ...]) -> bool:
        if isinstance(self._model, ProgramNetwork):
            return self._model.shape[1] in (None, shape[0])
        return self.ratio(shape) is not None

    def _measured(self, shape: tuple[int, ...]) -> float | None:
        if self._copy is None or self._lazy:
            self._copy = in_eval_mode(copy_of(self._model)) if self._lazy else twin_of(self._model)
        image = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
        try:
            with torch.no_grad(), evaluating(self._copy), OwnRandomness():  # lazy modules draw their weights
                output = run_alone(self._copy, self._model, self._caller, image.to(*home_of(self._copy)))
        except Entangled:
            raise
        except refusals():
            return None
        if output.dim() != image.dim():
            return 1.0
        return max(after / before for after, before in zip(output.shape[2:], shape[1:], strict=True))


def is_lazy(model: nn.Module) -> bool:
    """Tell whether a network takes its shapes from the first input that it sees."""
    held = (*model.parameters(), *model.buffers())
    return any(isinstance(module, LazyModuleMixin) for module in model.modules()) or any(
        isinstance(tensor, UninitializedParameter | UninitializedBuffer) for tensor in held
    )


class _AnyOutput(Caller):
    """Takes the first tensor of several: which of them counts decides nothing about what goes in."""

    __slots__ = ()

    def pick(self, result: Any) -> Tensor:
        """Return a tensor of what the model returned; see Caller."""
        tensors = (leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor))
        found = next(tensors, None)
        return Caller.pick(self, result) if found is None else found


def _part(n: int, most: int) -> int:
    """Return an extent that most networks take: of at most `most` pixels, a multiple of 32 where it can be."""
    return min(n, most) // 32 * 32 or min(n, most)


def _convolutions(model: nn.Module) -> list[tuple[int, int]]:
    """Return (channels, axes of space) that convolutions take, as they are registered, each once."""
    if isinstance(model, ProgramNetwork):
        return [(model.shape[1] or 1, len(model.shape) - 2)]
    found: dict[tuple[int, int], None] = {}
    for module in model.modules():
        if isinstance(module, nn.modules.conv._ConvNd) and not module.transposed:
            channels = 1 if isinstance(module, LazyModuleMixin) else module.in_channels
            found[channels, len(module.kernel_size)] = None
    return list(found)
