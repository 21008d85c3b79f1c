"""Measure each site's statistics over whole images, consistently: every site before it already frozen.

Sites are taken in the order of the calls. For one image a single pass does it: each site is measured and
frozen when the pass reaches it, and the pass goes on with the frozen value. For several images each site
takes one pass over all of them that ends early at the site; the images' moments are merged in float64.
Measuring all sites in one pass with live statistics is not the same thing, however often it is repeated.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from normfix.conversion.targets import Target, apart_targets
from normfix.images.collections import Images
from normfix.images.sources import Image, TensorImage, whole
from normfix.networks.calling import NotTaken, Unreached, evaluating
from normfix.networks.numerics import exact_arithmetic
from normfix.records.measurements import CalibrationSummary
from normfix.records.progress import Progress, silent

__all__ = [
    "freeze_sites_",
    "measure_sites_",
    "observed",
    "remeasure_sites",
    "restoring_on_error",
    "settle_sites_",
]

Run = Callable[[nn.Module, Tensor], Tensor]


def measure_sites_(
    model: nn.Module,
    targets: Sequence[Target],
    images: Images | Sequence[Image],
    run: Run,
    progress: Progress = silent,
) -> CalibrationSummary:
    """Calibrate the targets in place, in order, and re-measure them under the stored statistics.

    Args:
        model: holds the targets' modules; put in eval mode meanwhile, every module's own mode is restored.
        targets: in the order in which a forward pass reaches them.
        images: of any sizes; each is read whole when its turn comes, in every pass.
        run: calls the model on one image.
        progress: called with ("calibrate", passes done, passes in all).

    Raises:
        NormfixError: NF301 if a pass does not reach a site. The old statistics are back in place then, as
            after any other error.
    """
    count = len(images)
    with evaluating(model), exact_arithmetic(), restoring_on_error(targets):
        passes = 2 if count == 1 else len(targets) + 1
        if count == 1:
            _freeze_as_it_goes(model, targets, images, run)
            progress("calibrate", 1, passes)
        else:
            _freeze_in_turn(model, targets, images, run, lambda done: progress("calibrate", done, passes))
        summary = _summary(model, targets, images, run)
        progress("calibrate", passes, passes)
    return summary


def freeze_sites_(model: nn.Module, targets: Sequence[Target], image: Tensor, run: Run) -> Tensor:
    """Freeze the targets at what they measure on one image, in one pass; see measure_sites_.

    Returns:
        What the network gives for the image once they are frozen.
    """
    with evaluating(model), exact_arithmetic(), restoring_on_error(targets):
        outputs: list[Tensor] = _freeze_as_it_goes(model, targets, [TensorImage(image)], run)
    return outputs[0]


def settle_sites_(model: nn.Module, targets: Sequence[Target], images: Sequence[Image], run: Run) -> None:
    """Freeze the targets at what they measure on images, and do not re-measure them; see measure_sites_.

    Images of one size go through the network together, in one pass, if that is not too much at a time.
    """
    apart = None if len(images) == 1 else apart_targets(targets, len(images))
    together = {image.shape[0] for image in images} == {1} and len({image.shape for image in images}) == 1
    together = together and sum(map(_size, images)) <= _TOGETHER
    with evaluating(model), exact_arithmetic(), restoring_on_error(targets):
        if apart is not None and together:
            with suppress(NotTaken):  # some networks take one image at a time
                stack = TensorImage(torch.cat([whole(image) for image in images]))
                _freeze_as_it_goes(model, apart, [stack], run)
                return
        if len(images) == 1:
            _freeze_as_it_goes(model, targets, images, run)
        else:
            _freeze_in_turn(model, targets, images, run)


_TOGETHER = 1 << 22
"""Pixels of images that are run together: as a rule a network keeps a hundred values of each."""


def _size(image: Image) -> int:
    return math.prod((image.shape[0], *image.shape[2:]))


def remeasure_sites(
    model: nn.Module, targets: Sequence[Target], images: Iterable[Image], run: Run
) -> CalibrationSummary:
    """Measure the targets under the statistics they have, and change none; see measure_sites_."""
    with evaluating(model), exact_arithmetic():
        return _summary(model, targets, images, run)


def _freeze_as_it_goes(
    model: nn.Module, targets: Sequence[Target], images: Iterable[Image], run: Run
) -> list[Tensor]:
    """Freeze the targets, and return what the network gives for each image."""
    calls = Counter[str]()

    def observe(target: Target, part: Any) -> None:
        if target.name not in calls:  # statistics come from one call; a second is a fault found below
            target.store(part if isinstance(part, list) else [part])
        calls[target.name] += 1

    with observed(targets, observe):
        outputs = [run(model, whole(image)) for image in images]
    for target in targets:
        if calls[target.name] != 1:
            raise _call_count(target, calls[target.name], 1)
    return outputs


def _freeze_in_turn(
    model: nn.Module,
    targets: Sequence[Target],
    images: Iterable[Image],
    run: Run,
    done: Callable[[int], None] = lambda number: None,
) -> None:
    for number, target in enumerate(targets, start=1):
        target.store(_parts(model, target, images, run))
        done(number)


class _Reached(BaseException):
    """Ends a forward pass early; no `except Exception` in a network's code may swallow it."""


def _parts(model: nn.Module, target: Target, images: Iterable[Image], run: Run) -> list[Any]:
    parts: list[Any] = []

    def observe(target: Target, part: object) -> None:
        parts.append(part)
        raise _Reached

    with observed([target], observe):
        for number, image in enumerate(images, start=1):
            with suppress(_Reached):
                run(model, whole(image))
            if len(parts) != number:
                raise _call_count(target, 0, 1)
    return parts


def _summary(
    model: nn.Module, targets: Sequence[Target], images: Iterable[Image], run: Run
) -> CalibrationSummary:
    """Re-measure every site under the stored statistics."""
    measured: dict[str, list[Any]] = {target.name: [] for target in targets}

    def observe(target: Target, part: object) -> None:
        measured[target.name].append(part)

    shapes = []
    with observed(targets, observe):
        for image in images:
            run(model, whole(image))
            shapes.append(tuple(image.shape))
    for target in targets:
        if len(measured[target.name]) != len(shapes):
            raise _call_count(target, len(measured[target.name]), len(shapes))
    sites = tuple(target.compare(measured[target.name]) for target in targets)
    return CalibrationSummary(images=tuple(shapes), sites=sites)


@contextmanager
def observed(targets: Sequence[Target], observe: Callable[[Target, Any], None]) -> Iterator[None]:
    """Call `observe` with what each target measures before its call is answered; nothing stays behind."""
    ends: list[Callable[[], None]] = []
    try:
        for target in targets:
            ends.append(target.watch(partial(observe, target)))
        yield
    finally:
        for end in ends:
            end()


@contextmanager
def restoring_on_error(targets: Sequence[Target]) -> Iterator[None]:
    """Give the targets their old statistics back after any error."""
    before = [{key: value.clone() for key, value in t.module.state_dict().items()} for t in targets]
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for target, state in zip(targets, before, strict=True):
                target.module.load_state_dict(state)
        raise


def _call_count(target: Target, calls: int, expected: int) -> Unreached:
    return Unreached(
        "NF301",
        f"the plan expects one call per image, but {calls} were made for {expected}. The network takes another "
        "path on this input than when it was scanned; scan it with an input like the images.",
        where=target.name,
    )
