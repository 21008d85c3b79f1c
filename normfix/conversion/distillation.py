r"""Constants by distillation: fitted so that the frozen network agrees with the original in windows, without labels.

In windows of the size that it was trained on, the original does what it was trained to do. With weights theta
untouched and constants c (a mean and a log-variance per channel of each site), Adam (Kingma and Ba 2015) minimises
over windows w

    L(c) = mean_w  D( f_live(w), f_frozen(w; theta, c) )

from constants that are there already. D fits the output: for probabilities and logits the Kullback-Leibler divergence
of each pixel's Bernoulli, for softmax and scores that of its classes, else the squared difference in variances of the
original's channel. Some windows are held out; their loss says when to stop and which constants to take, the first
included, so that the result is never worse there than its start.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from normfix.conversion.targets import NormTarget, StatisticTarget, Target, TargetAround
from normfix.errors import NormfixError
from normfix.images.sources import Image, whole
from normfix.layers import ChannelNorm, FrozenStatistic
from normfix.networks.calling import evaluating
from normfix.networks.numerics import exact_arithmetic
from normfix.records.diagnoses import Kind
from normfix.records.measurements import Distilled
from normfix.records.progress import Progress, silent

__all__ = ["Distillation", "held_out_loss"]

Run = Callable[[Tensor], Tensor]

_RATE = 0.02
"""Adam's step, in sd of a mean and in log-variance: 400 steps reach any constants that windows have."""

_LOOK, _PATIENCE = 20, 6
"""Steps between two looks at the held-out windows, and looks without a better loss until it stops."""

_EVERY = 4
"""One window in so many is held out."""

_MOST = 64
"""Windows that are drawn from images of any size: more teach little, and their outputs are kept."""

_TINY = 1e-6


@dataclass(frozen=True, slots=True)
class Distillation:
    """What is fitted to what: the frozen network `run` with its `targets`, to the `original`, in windows.

    `kind` is what the output means; `seed` of the order in which windows are drawn, from a generator of its own.
    """

    model: nn.Module
    targets: Sequence[Target]
    original: Run
    run: Run
    kind: Kind
    seed: int = 0
    steps: int = 400

    def fit_(self, windows: Sequence[Image], progress: Progress = silent) -> tuple[Distilled, list[Tensor]]:
        """Fit the constants in place, from those that are stored.

        Args:
            windows: of all images, in memory or not; a random part of very many.
            progress: called with ("distil", steps done, steps).

        Returns:
            What came of it, and the windows that were held out.

        Raises:
            NormfixError: NF558 for fewer than two windows, an output of whole numbers, or a network through which no
                gradient passes.
        """
        self._require(
            len(windows) > 1, "one window is nothing to hold out from. Take smaller ones, or more images."
        )
        self._require(self.kind != "labels", "its output is whole numbers, which have no gradient.")
        generator = torch.Generator().manual_seed(self.seed)
        order = torch.randperm(len(windows), generator=generator).tolist()[:_MOST]
        drawn = [whole(windows[number]) for number in order]
        held_out, taught = drawn[::_EVERY], [w for n, w in enumerate(drawn) if n % _EVERY]
        with evaluating(self.model), exact_arithmetic(), _fitting(self.targets) as constants:
            answers = [self._answer(window) for window in taught]
            expected = [self._answer(window) for window in held_out]
            start = best = self._loss_of(constants, held_out, expected)
            kept, steps, looks = constants.values(), 0, 0
            optimiser = torch.optim.Adam(constants.leaves, lr=_RATE)
            while steps < self.steps and looks < _PATIENCE:
                number = int(torch.randint(len(taught), (), generator=generator))
                if not self._step(optimiser, constants, taught[number], answers[number]):
                    break
                steps += 1
                progress("distil", steps, self.steps)
                if steps % _LOOK and steps < self.steps:
                    continue
                loss, looks = self._loss_of(constants, held_out, expected), looks + 1
                if loss < best:
                    best, kept, looks = loss, constants.values(), 0
            constants.keep_(kept)
        record = Distilled(
            windows=len(taught), held_out=len(held_out), steps=steps, start=start, end=best, seed=self.seed
        )
        return record, held_out

    def _step(self, optimiser: torch.optim.Adam, constants: _Constants, x: Tensor, answer: Tensor) -> bool:
        """Go one step, if there is a way on from here."""
        with torch.enable_grad():
            constants.begin()
            loss = divergence(self.run(x), answer, self.kind)
            self._require(loss.requires_grad, "no gradient passes through it.")
            if not torch.isfinite(loss):
                return False
            gradients = torch.autograd.grad(loss, constants.leaves, allow_unused=True)
        for leaf, gradient in zip(constants.leaves, gradients, strict=True):
            leaf.grad = gradient
        optimiser.step()
        return True

    def _answer(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            return self.original(x)

    def _loss_of(self, constants: _Constants, windows: Sequence[Tensor], answers: Sequence[Tensor]) -> float:
        with torch.no_grad():
            constants.begin()
            losses = [
                float(divergence(self.run(x), y, self.kind)) for x, y in zip(windows, answers, strict=True)
            ]
        return sum(losses) / len(losses)

    def _require(self, holds: bool, why: str) -> None:
        if not holds:
            raise NormfixError(
                "NF558", f"constants cannot be distilled here: {why}", where=type(self.model).__name__
            )


def held_out_loss(original: Run, run: Run, kind: Kind, windows: Sequence[Tensor]) -> float:
    """Return the mean loss of a network against the original in windows (1, C, *space)."""
    with torch.no_grad():
        losses = [float(divergence(run(x), original(x), kind)) for x in windows]
    return sum(losses) / len(losses)


def divergence(found: Tensor, answer: Tensor, kind: Kind) -> Tensor:
    """Return how far an output (N, C, *out) is from the original's, 0 where they are the same.

    Example:
        >>> y = torch.tensor([[[0.2, 0.9]]])
        >>> bool(divergence(y, y, "probability").abs() < 1e-6), bool(divergence(y.flip(2), y, "probability") > 0.1)
        (True, True)
    """
    found, answer = found.float(), answer.float()
    match kind:
        case "probability":
            p, t = found.clamp(_TINY, 1 - _TINY), answer.clamp(_TINY, 1 - _TINY)
            return (t * (t / p).log() + (1 - t) * ((1 - t) / (1 - p)).log()).mean()
        case "logits":
            t = answer.sigmoid()
            cross = F.binary_cross_entropy_with_logits
            return cross(found, t) - cross(answer, t)
        case "softmax":
            logs = found.clamp_min(_TINY).log(), answer.clamp_min(_TINY).log()
            return (answer * (logs[1] - logs[0])).sum(1).mean()
        case "scores":
            logs = found.log_softmax(1), answer.log_softmax(1)
            return (logs[1].exp() * (logs[1] - logs[0])).sum(1).mean()
        case _:
            dims = (0, *range(2, answer.dim()))
            scale = answer.var(dims, correction=0, keepdim=True).clamp_min(_TINY**2)
            return ((found - answer).square() / scale).mean()


class _Constant(ABC):
    """The constants of one site as leaves of a graph; `values` and `keep_` are of these leaves."""

    leaves: list[Tensor]

    @abstractmethod
    def begin(self) -> None:
        """Let the network compute with the leaves as they are."""

    @abstractmethod
    def end(self) -> None:
        """Let it compute with what is stored."""

    @abstractmethod
    def keep_(self, values: Sequence[Tensor]) -> None:
        """Store what leaves of these values give."""


class _NormConstant(_Constant):
    """Mean m + s a and variance + eps = (v + eps) e^b of leaves a and b (c,), s the stored deviation."""

    def __init__(self, norm: ChannelNorm) -> None:
        assert norm.running_mean is not None
        assert norm.running_var is not None
        self._norm, self._mean = norm, norm.running_mean.clone()
        self._var = norm.running_var.clone()
        self.leaves = [torch.zeros_like(self._mean).requires_grad_() for _ in range(2)]

    def begin(self) -> None:
        self._norm._normalize_by_constants = self._normalised  # type: ignore[method-assign]

    def end(self) -> None:
        self._norm.__dict__.pop("_normalize_by_constants", None)

    def keep_(self, values: Sequence[Tensor]) -> None:
        mean, var = self._moments(*values)
        self._norm.set_statistics_(mean, (var - self._norm.eps).clamp_min(0))

    def _moments(self, a: Tensor, b: Tensor) -> tuple[Tensor, Tensor]:
        var = self._var + self._norm.eps
        return self._mean + var.sqrt() * a, var * b.exp()

    def _normalised(self, x: Tensor, weight: Tensor | None, bias: Tensor | None) -> Tensor:
        mean, var = (self._per_channel(v, x) for v in self._moments(*self.leaves))
        y = (x - mean) * var.rsqrt()
        y = y if weight is None else y * self._per_channel(weight, x)
        return y if bias is None else y + self._per_channel(bias, x)

    def _per_channel(self, values: Tensor, x: Tensor) -> Tensor:
        return values.to(x.dtype).reshape(1, -1, *[1] * (x.dim() - 2))


class _ValueConstant(_Constant):
    """A statistic that is no norm: v e^a where all of it is positive, else v + rms(v) a."""

    def __init__(self, statistic: FrozenStatistic) -> None:
        self._statistic = statistic
        self._stored = {name: b for name, b in statistic.named_buffers() if b.is_floating_point()}
        self.leaves = [torch.zeros_like(value).requires_grad_() for value in self._stored.values()]

    def begin(self) -> None:
        for (name, stored), leaf in zip(self._stored.items(), self.leaves, strict=True):
            self._statistic._buffers[name] = _moved(stored, leaf)

    def end(self) -> None:
        self._statistic._buffers.update(self._stored)

    def keep_(self, values: Sequence[Tensor]) -> None:
        self.end()
        with torch.no_grad():
            for stored, value in zip(self._stored.values(), values, strict=True):
                stored.copy_(_moved(stored, value))


def _moved(stored: Tensor, by: Tensor) -> Tensor:
    if bool((stored > 0).all()):
        return stored * by.exp()
    return stored + stored.square().mean().sqrt().clamp_min(_TINY) * by


class _Constants:
    """The constants of all sites."""

    def __init__(self, targets: Sequence[Target]) -> None:
        self._all = [_constant_of(target) for target in targets]
        self.leaves = [leaf for constant in self._all for leaf in constant.leaves]

    def begin(self) -> None:
        """Compute with the leaves as they are."""
        for constant in self._all:
            constant.begin()

    def end(self) -> None:
        """Compute with what is stored."""
        for constant in self._all:
            constant.end()

    def values(self) -> list[Tensor]:
        """Return what the leaves are now."""
        return [leaf.detach().clone() for leaf in self.leaves]

    def keep_(self, values: Sequence[Tensor]) -> None:
        """Store what the leaves were."""
        rest = list(values)
        for constant in self._all:
            count = len(constant.leaves)
            constant.keep_(rest[:count])
            rest = rest[count:]


def _constant_of(target: Target) -> _Constant:
    while isinstance(target, TargetAround):
        target = target.target
    if isinstance(target, StatisticTarget):
        return _ValueConstant(target.module)
    assert isinstance(target, NormTarget)
    assert isinstance(target.holder, ChannelNorm)
    return _NormConstant(target.holder)


@contextmanager
def _fitting(targets: Sequence[Target]) -> Iterator[_Constants]:
    """Let the network compute with leaves; afterwards with what is stored, also after an error."""
    constants = _Constants(targets)
    try:
        constants.begin()
        yield constants
    finally:
        constants.end()
