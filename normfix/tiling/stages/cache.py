"""Keep captured programs and their schedules, and use them only while they are what the model computes.

A capture belongs to the networks it was used for and dies with the last of them. Any network that behaves alike finds
it: a copy, a twin, or the same one with other weights.
"""

from __future__ import annotations

import itertools
import math
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx import GraphModule
from torch.utils._pytree import tree_leaves

from normfix.images.sources import Image
from normfix.networks.behaviour import behaviour_of
from normfix.networks.calling import Caller, failures
from normfix.networks.copying import double_of, original_of
from normfix.networks.examples import EXTENT
from normfix.networks.footprints import calls_more
from normfix.networks.graph.multiples import multiples_near, on_multiples
from normfix.networks.provenance import kept_in
from normfix.records.spans import round_up
from normfix.tiling.lengths import LARGEST, strips_along
from normfix.tiling.material import magnitudes
from normfix.tiling.stages.attention import with_attention
from normfix.tiling.stages.canonical import with_canonical_forms
from normfix.tiling.stages.contractions import with_contractions
from normfix.tiling.stages.maps import lattice
from normfix.tiling.stages.overviews import with_overviews
from normfix.tiling.stages.plans import keep, kept
from normfix.tiling.stages.program import (
    Program,
    agree,
    captured_program,
    compared,
    computes,
    marked,
    shows_at_once,
)
from normfix.tiling.stages.reach import in_dtype
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.schedule import Schedule
from normfix.tiling.stages.scheduling import plans_of, recall_, require_images, schedule, told
from normfix.tiling.stages.softmaxes import with_softmaxes

__all__ = ["hand_on", "is_captured", "keep_plans", "program_of", "schedule_of"]


_USUAL, _VOLUMES = 32, 8
"""What is taken for the stride of a network whose stride is not known: a multiple of most networks'; of volumes, where
the lattice of maps is known, which makes it whole. To compare all of 32 voxels along each axis takes minutes."""


@dataclass(frozen=True, slots=True)
class _Capture:
    """A program, what it was captured for, and a lock that its one user at a time holds.

    `held` are the shapes of images at which it computed what the network does.
    """

    key: tuple[object, ...]
    program: Program
    lock: threading.Lock = field(default_factory=threading.Lock)
    held: set[tuple[int, ...]] = field(default_factory=set)

    def still_holds(self, model: nn.Module, caller: Caller, sites: tuple[str, ...], example: Tensor) -> bool:
        """Tell whether the program, with the model's present weights, computes what the model does at every site."""
        self.program.refresh_(model)
        body, run = self.program.body, marked(caller, sites)
        if shows_at_once(body, model, run, example):
            return True
        if not _is_flat(example):
            pairs = compared(body, model, run, example)
            if pairs is None:
                return False
            if all(bool(torch.isfinite(theirs).all()) for _, theirs in pairs):
                return agree(pairs, self.program.dtypes) or _agree_in_double(
                    body, model, caller, sites, example
                )
        return computes(body, model, run, _noise_like(example), dtypes=self.program.dtypes)

    def differs(self, model: nn.Module, caller: Caller, sites: tuple[str, ...], image: Image) -> bool:
        """Tell whether the program computes something else than the model at an image's size, or on strips as long.

        Which network it is at a size may hang on what no graph records. Where the model takes no strip nothing is told.
        """
        shape = tuple(image.shape[1:])
        if shape in self.held:
            return False
        body, run, dtypes = self.program.body, marked(caller, sites), self.program.dtypes
        for part in _parts(image):
            example = image.read([(0, n) for n in part])[:1].clone()
            pairs = compared(body, model, run, example, guarded=False)
            if pairs is not None and not (
                agree(pairs, dtypes) or _agree_in_double(body, model, caller, sites, example)
            ):
                return True
        self.held.add(shape)
        return False

    def agrees(self, model: nn.Module, caller: Caller, sites: tuple[str, ...], example: Tensor) -> bool:
        """Tell whether the program computes what the model does beyond the conditions that it was captured under."""
        self.program.refresh_(model)
        body, run, dtypes = self.program.body, marked(caller, sites), self.program.dtypes
        return computes(body, model, run, example, guarded=False, dtypes=dtypes) or _agree_in_double(
            body, model, caller, sites, example
        )


def _parts(image: Image) -> Sequence[tuple[int, ...]]:
    """Return the extents of what is compared of an image: all of it, or strips that are as long along an axis each."""
    space = tuple(image.shape[2:])
    thin = [min(n, EXTENT[len(space)]) for n in space]
    return [space] if math.prod(space) <= LARGEST else strips_along(space, thin)


def _speaks_for(
    program: Program,
    image: Image,
    agrees: Callable[[Tensor], bool],
    calls_more_at: Callable[[Sequence[int], Sequence[Sequence[int]]], bool | None],
) -> bool:
    """Tell whether a program is the network at an image's size: within its conditions, or where it computes the same.

    Beyond them it is compared on the image, or on strips as long that are beyond them too, in several magnitudes, and
    within them where they do not tell everything. What the network calls at the size of the image alone, such as where
    both extents are large, no strip compares. That holds for the weights and the image of now alone.
    """
    size = (1, *image.shape[1:])
    if program.is_told and program.takes(size):
        return True
    parts = [(*size[:2], *part) for part in _parts(image)]
    beyond = [part for part in parts if not (program.is_told and program.takes(part))]
    examples = (image.read([(0, n) for n in part[2:]])[:1].clone() for part in beyond)
    return (
        bool(beyond)
        and all(agrees(magnified) for example in examples for magnified in magnitudes(example))
        and (len(parts) == 1 or not calls_more_at(size, parts))
    )


_KEPT = 2
"""Captures per network: cut at its statistics, to measure, and at its layers, to predict."""

_LOCK = threading.Lock()
_CAPTURES: weakref.WeakKeyDictionary[nn.Module, list[_Capture]] = weakref.WeakKeyDictionary()
_SCHEDULES: weakref.WeakKeyDictionary[Any, dict[object, tuple[Schedule, str]]] = weakref.WeakKeyDictionary()


@contextmanager
def program_of(
    model: nn.Module,
    caller: Caller,
    sites: tuple[str, ...],
    image: Image,
    stride: Sequence[int] | None,
) -> Iterator[Program]:
    """Capture the model, or lend the capture of last time with the model's present weights, to one user at a time.

    Args:
        model: to capture; the capture of a twin is kept for the network that it was made of.
        caller: calls it.
        sites: paths of modules to cut at.
        image: to capture it on.
        stride: of the network; None if it is not known.

    Raises:
        NotInStages: NF324 for a network that draws random numbers, NF321 for an image of a size that it was not
            captured for, and as captured_program.
    """
    if caller.draws:
        where = type(original_of(model)).__name__
        raise NotInStages(
            "NF324", "it draws random numbers, and blocks draw others than the whole.", where=where
        )
    owner = original_of(model)
    ndim = len(image.shape) - 2
    key = (caller.likeness, sites, *_kind(model), ndim)

    def part(extents: Sequence[int]) -> Tensor:
        # of this image: what an earlier one did not reach (a bound, a branch) it may
        return image.read([(0, extent) for extent in extents])[:1].clone()

    steps = stride or (_USUAL,) * ndim
    small, large = (
        tuple(min(n, round_up(most, m)) for n, m in zip(image.shape[2:], steps, strict=True))
        for most in (EXTENT[ndim] // 2, EXTENT[ndim])
    )
    known = _borrowed(owner, key)
    try:
        if known is not None:
            _require_multiples(known.program, image, owner)
            small, large = (multiples_near(n, known.program.multiple) for n in (small, large))
        # a branch by size the smaller part cannot tell; and it may be none for the program: more of it decides
        if known is not None and not (
            known.program.takes((1, image.shape[1], *large))
            and any(
                known.still_holds(model, caller, sites, part(extents))
                for extents in dict.fromkeys((small, large))
            )
        ):
            _give_back(owner, known, keep=False)
            known = None
        if known is None:
            example = part(large)
            telling = _telling(model, caller, example)
            known = _Capture(key, _captured(model, caller, telling, sites))
            known.lock.acquire()
            _require_multiples(known.program, image, owner)
        if not _speaks_for(
            known.program,
            image,
            lambda x: known.agrees(model, caller, sites, x),
            partial(calls_more, model, caller),
        ):
            raise NotInStages(
                "NF321",
                "it was captured on another side of a branch by size than an image of "
                f"{'x'.join(map(str, image.shape[2:]))} pixels is on, and nothing shows that both compute the same.",
                where=type(owner).__name__,
            )
        if known.differs(model, caller, sites, image):
            raise NotInStages(
                "NF321",
                f"at {'x'.join(map(str, image.shape[2:]))} pixels, or on a strip as long, it gives something else than "
                "its graph: it is another network there, or while it is captured.",
                where=type(owner).__name__,
            )
        yield known.program
    finally:
        if known is not None:
            _give_back(owner, known)


def _require_multiples(program: Program, image: Image, owner: nn.Module) -> None:
    """Refuse an image that a program of multiples is not of.

    Raises:
        NotInStages: NF321.
    """
    least, space = program.multiple, image.shape[2:]
    if least > 1 and any(n % least or n < 2 * least for n in space):
        raise NotInStages(
            "NF321",
            f"its graph holds for images whose extents are multiples of {least} pixels, {2 * least} and more: its "
            f"sizes are too intricate at others. This one has {'x'.join(map(str, space))}.",
            where=type(owner).__name__,
        )


def is_captured(model: nn.Module, caller: Caller, sites: Sequence[str]) -> bool:
    """Tell whether a capture is there that was made of a network that behaves alike; it may be no use any more."""
    key = (caller.likeness, tuple(sites), *_kind(model))
    return any(capture.key[: len(key)] == key for capture in _captures())


def _captures() -> list[_Capture]:
    """Return the captures of all networks."""
    with _LOCK:
        return [*itertools.chain.from_iterable(_CAPTURES.values())]


def _kind(model: nn.Module) -> tuple[object, object]:
    """Return what captures are found by: where a network computes in which dtypes, and its behaviour."""
    homes = tuple((t.dtype, t.device) for t in (*model.parameters(), *model.buffers()))
    return homes, behaviour_of(original_of(model))


def _captured(model: nn.Module, caller: Caller, example: Tensor, sites: tuple[str, ...]) -> Program:
    """Capture a network and make its attention a barrier.

    Raises:
        NotInStages: NF320 if it does not compute the same then, and codes of captured_program.
    """
    program = captured_program(model, caller, example, sites)
    example = on_multiples(example, program.multiple)
    attending = with_canonical_forms(program)
    for found in (with_attention, with_softmaxes, with_contractions):
        attending = found(attending, example.shape)
    if (
        attending is not program
        and not computes(
            attending.body, model, marked(caller, sites), example, guarded=False, dtypes=program.dtypes
        )
        and not _agree_in_double(attending.body, model, caller, sites, example)
    ):
        raise NotInStages(
            "NF320",
            "its attention, softmax over space or product of maps is not what it was taken for.",
            where=type(original_of(model)).__name__,
        )
    barred = with_overviews(attending, example.shape)
    folder = kept_in(original_of(model))
    if folder is not None:
        recall_(barred, kept(folder))
    return barred


def _agree_in_double(
    body: GraphModule, model: nn.Module, caller: Caller, sites: tuple[str, ...], example: Tensor
) -> bool:
    """Tell whether a body computes what a model does in float64, where rounding is as large as what varies."""
    if example.dtype == torch.float64:
        return False
    try:
        wide, double = in_dtype(body, torch.float64, example.device), double_of(model)
        return computes(wide, double, marked(caller.in_double, sites), example.double(), guarded=False)
    except failures():  # a device or a network may have no float64
        return False


def _borrowed(owner: nn.Module, key: tuple[object, ...]) -> _Capture | None:
    """Return a capture of a network that behaves alike and that nobody uses, locked; its own before others'."""
    with _LOCK:
        others = itertools.chain.from_iterable(_CAPTURES.values())
        captures = [*_CAPTURES.get(owner, ()), *others]
    return next((c for c in captures if c.key == key and c.lock.acquire(blocking=False)), None)


def _give_back(owner: nn.Module, used: _Capture, *, keep: bool = True) -> None:
    """Let others use a capture; its last owner keeps it before the others that it has, or not at all."""
    with _LOCK:
        others = [capture for capture in _CAPTURES.get(owner, ()) if capture is not used]
        _CAPTURES[owner] = [*([used] if keep else []), *others][:_KEPT]
    used.lock.release()


def _telling(model: nn.Module, caller: Caller, example: Tensor) -> Tensor:
    """Return an example that a program can be compared on: noise, where the image is flat or the network overflows."""
    if not _is_flat(example):
        with torch.no_grad():
            values = [v for v in tree_leaves(caller(model, example)) if isinstance(v, Tensor)]
        if all(bool(torch.isfinite(value).all()) for value in values):
            return example
    return _noise_like(example)


def _is_flat(example: Tensor) -> bool:
    return not bool((example != example.flatten()[0]).any())


def _noise_like(example: Tensor) -> Tensor:
    noise = torch.randn(example.shape, generator=torch.Generator().manual_seed(0))
    return noise.to(example.device, example.dtype)


def schedule_of(
    program: Program,
    stride: Sequence[int] | None,
    images: Sequence[Image],
    *,
    measured: tuple[str, ...],
    outputs: bool,
    is_known: bool = True,
) -> Schedule:
    """Cut the program into stages, or take the schedule of last time.

    Args:
        program: of a network.
        stride: of the network; None if it is not known.
        images: that it will run over.
        measured: sites whose operands are measured.
        outputs: whether what the network returns is computed.
        is_known: whether the images are of whole strides; if not, or if it is not known, their own sizes are proved.
    """
    is_known = is_known and stride is not None
    found = None if is_known else lattice(program)
    if stride is None:
        ndim = len(images[0].shape) - 2
        stride = (_VOLUMES if found is not None and ndim == 3 else _USUAL,) * ndim
    stride = tuple(math.lcm(s, program.multiple) for s in stride)
    if found is not None:
        stride = tuple(map(math.lcm, stride, found))
    given = {tuple(n % s for n, s in zip(image.shape[2:], stride, strict=True)) for image in images} - {
        (0,) * len(stride)
    }
    rests = frozenset({tuple(s // 2 for s in stride)} if is_known and given else given)
    known = _SCHEDULES.setdefault(program.body, {})
    key = (tuple(stride), rests, measured, outputs)
    if key not in known or known[key][1] != told(known[key][0]):
        planned = schedule(program, stride=stride, rests=rests, measured=measured, outputs=outputs)
        known[key] = planned, told(planned)
    require_images(known[key][0], stride, images)
    return known[key][0]


def hand_on(model: nn.Module, copied: nn.Module) -> None:
    """Let another network keep the captures of one that may live shorter: a copy those of what it was made of."""
    with _LOCK:
        captures = _CAPTURES.get(original_of(model), ())
        if captures:
            own = (c for c in _CAPTURES.get(copied, ()) if all(c is not capture for capture in captures))
            _CAPTURES[copied] = [*captures, *own][:_KEPT]


def keep_plans(model: nn.Module, folder: Path) -> None:
    """Write beside a network what was proved of it in this process, or stands in the folder that it was loaded from."""
    kind, before = _kind(model), kept_in(model)
    plans = [plan for c in _captures() if c.key[2:4] == kind for plan in plans_of(c.program)]
    plans += [] if before is None else kept(before)
    if plans:
        keep(folder, list({plan.cut: plan for plan in plans}.values()))
