"""Keys and values of an attention that are held: those of all images, or some of them by a stated rule.

Of k images each counts alike. Where N keys are kept, each image gives N // k of its own, drawn without replacement in
the order of a fixed seed: a sum over them, times the share, is an unbiased estimate of the sum over all, and periodic
images do not beat with it. A site draws alike wherever it is, so that layers see the same places.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from normfix.errors import NormfixError
from normfix.layers import FrozenOperand, HeldTokens
from normfix.records.measurements import SiteStatistics
from normfix.records.plans import Plan
from normfix.records.sites import StatisticSpec

__all__ = ["Held", "KeysTarget", "keys_of", "require_room", "with_all_keys"]

_SEED = 0
_MOST = 2 << 30
"""Bytes of keys and values, of all sites together, that are held without being asked to keep some of them."""


@dataclass(frozen=True, slots=True)
class Held:
    """What one call was given of each image: its keys and values, or one of the two."""

    images: tuple[tuple[Tensor, ...], ...]


@dataclass(frozen=True, slots=True)
class KeysTarget:
    """An attention whose keys and values are held, or one of its products."""

    name: str
    module: HeldTokens
    spec: StatisticSpec

    def watch(self, report: Callable[[Any], None]) -> Callable[[], None]:
        """Report the keys and values of every call; see Target."""

        def observe(*tensors: Tensor) -> None:
            with torch._C.DisableTorchFunction():  # outer interceptions count calls
                report(self._see(tensors))

        def end() -> None:
            self.module.observer = None

        self.module.observer = observe
        return end

    @property
    def dims(self) -> None:
        """Return None: keys are taken of whole images; see Target."""

    @property
    def measure(self) -> Callable[[Tensor], Any]:
        """Return what refuses blocks; see Target."""
        return _unblocked

    def join(self, blocks: Sequence[Held]) -> Held:
        """Return the one block that there is; see Target."""
        (whole,) = blocks
        return whole

    def store(self, parts: Sequence[Held]) -> None:
        """Hold the keys and values of all images; see Target."""
        images = [image for part in parts for image in part.images]
        drawn = [self._drawn(image, len(images)) for image in images]
        counts = [self._count(image) for image in drawn]
        bias = _bias(counts)
        if isinstance(self.module, FrozenOperand) and bias.any():
            raise NormfixError(
                "NF230",
                f"images of {min(counts)} to {max(counts)} keys cannot count alike in an attention that is written "
                f"out. Give images of one size, or keep as many of each: --keys {min(counts) * len(counts)} or fewer.",
                where=self.name,
            )
        tensors = [torch.cat(parts, self._tokens) for parts in zip(*drawn, strict=True)]
        _require_finite(self.name, *tensors)
        self.module.hold_(tensors, bias)

    def compare(self, parts: Sequence[Held]) -> SiteStatistics:
        """Compare the keys and values, image by image, and each image's weight with what is held; see Target."""
        images = [image for part in parts for image in part.images]
        expected = [self._drawn(image, len(images)) for image in images]
        counts = [self._count(image) for image in expected]
        shift = self._apart(expected, counts) if sum(counts) == self.module.bias.numel() else math.inf
        return SiteStatistics(
            site=self.name,
            elements=sum(counts),
            spread=self._spread([image[0] for image in expected]),
            mean_shift=shift,
            variance_ratio=(1.0, 1.0),
        )

    def flat(self, parts: Sequence[Held]) -> tuple[int, ...]:
        """Return nothing: nothing is divided by keys; see Target."""
        return ()

    @property
    def _tokens(self) -> int:
        return self.spec.dims[0]

    def _count(self, image: Sequence[Tensor]) -> int:
        return image[0].shape[self._tokens]

    def _see(self, tensors: Sequence[Tensor]) -> Held:
        assert self.spec.batch is not None
        stacked, unit, _ = self.spec.batch
        images = zip(*(torch.split(t.detach(), unit, stacked) for t in tensors), strict=True)
        return Held(tuple(tuple(t.cpu().clone() for t in image) for image in images))

    def _drawn(self, image: Sequence[Tensor], images: int) -> tuple[Tensor, ...]:
        """Return an image's share of the keys that are kept."""
        count, share = self._count(image), max(1, self.spec.kept // images)
        if not self.spec.kept or share >= count:
            return tuple(image)
        order = torch.randperm(count, generator=torch.Generator().manual_seed(_SEED))
        places = order[:share].sort().values
        return tuple(tensor.index_select(self._tokens, places) for tensor in image)

    def _apart(self, expected: Sequence[Sequence[Tensor]], counts: Sequence[int]) -> float:
        """Return how far what is held is from it, in the root mean square, and an image's weight from its share."""
        shares = [
            float(part.double().exp().sum()) for part in torch.split(self.module.bias.cpu(), list(counts))
        ]
        worst = [abs(share * len(shares) / sum(shares) - 1) for share in shares]
        for number, held in enumerate(self.module.values_held()):
            unit = float(held.double().square().mean().sqrt()) or 1.0
            parts = torch.split(held.cpu(), list(counts), self._tokens)
            worst += [
                float((image[number].to(part.dtype).double() - part.double()).abs().max()) / unit
                for image, part in zip(expected, parts, strict=True)
            ]
        return max(worst)

    def _spread(self, keys: Sequence[Tensor]) -> float:
        """Return the largest difference of an image's mean key from that of all, in their root mean square."""
        means = torch.stack([k.double().mean(self._tokens) for k in keys])
        unit = float(torch.stack([k.double().square().mean() for k in keys]).mean().sqrt()) or 1.0
        return float((means - means.mean(0)).abs().max()) / unit


def keys_of(plan: Plan) -> int | None:
    """Return how many keys a plan keeps, 0 for all; None where it holds none."""
    kept = [
        d.site.statistic.kept for d in plan.converted if d.site.statistic and d.site.statistic.law == "keys"
    ]
    return kept[0] if kept else None


def with_all_keys(plan: Plan) -> Plan:
    """Return a plan that holds every key: what it then does to one image is nothing."""
    decisions = [
        replace(d, site=replace(d.site, statistic=replace(d.site.statistic, kept=0)))
        if d.site.statistic is not None
        else d
        for d in plan.decisions
    ]
    return replace(plan, decisions=tuple(decisions))


def require_room(plan: Plan, example: Sequence[int], sizes: Sequence[Sequence[int]], bytes_each: int) -> int:
    """Return how many bytes the keys and values of a plan will take in memory and in the file.

    Args:
        plan: with the shapes of keys on the example.
        example: its extents over space.
        sizes: those of the images.
        bytes_each: of one number.

    Raises:
        NormfixError: NF598 where that is more than is held without being asked.
    """
    forecast = bytes_each * sum(_numbers(spec, example, sizes) for spec in _specs(plan))
    if forecast <= _MOST:
        return forecast
    thousand = (
        1000 * bytes_each * sum(s.outputs * math.prod(s.shape) // s.shape[s.dims[0]] for s in _specs(plan))
    )
    raise NormfixError(
        "NF598",
        f"keys and values of {len(sizes)} images would take {forecast / 2**30:.1f} GiB in memory and in the file, "
        f"over {_MOST >> 30} GiB. Keep some of them: --keys N (normfix.Measured(images, keys=N)) takes "
        f"{thousand / 2**20:.3g} MiB for every thousand, and the report says how far each image moves.",
        where=plan.model,
    )


def _specs(plan: Plan) -> Iterator[StatisticSpec]:
    for decision in plan.converted:
        spec = decision.site.statistic
        if spec is not None and spec.law == "keys":
            yield spec


def _numbers(spec: StatisticSpec, example: Sequence[int], sizes: Sequence[Sequence[int]]) -> int:
    """Return how many numbers keys and values of all images are."""
    here = spec.shape[spec.dims[0]]
    counts = [math.ceil(here * math.prod(size) / math.prod(example)) for size in sizes]
    kept = [min(n, max(1, spec.kept // len(sizes))) if spec.kept else n for n in counts]
    return spec.outputs * sum(kept) * math.prod(spec.shape) // here


def _bias(counts: Sequence[int]) -> Tensor:
    """Return the bias of each key: the logarithm of the mean number of keys over that of its image."""
    mean = sum(counts) / len(counts)
    return torch.cat([torch.full((n,), math.log(mean / n), dtype=torch.float64) for n in counts])


def _require_finite(site: str, *tensors: Tensor) -> None:
    if not all(bool(torch.isfinite(t).all()) for t in tensors):
        raise NormfixError(
            "NF148",
            "its keys or values are not finite on these images, so the network overflows there. Scale the images as it "
            "was trained with (--scale), or compute in a wider dtype (--dtype float64).",
            where=site,
        )


def _unblocked(block: Tensor) -> Any:
    raise AssertionError("keys are taken of whole images")
