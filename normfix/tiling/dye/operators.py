"""A dye: operators run on the clean tensors and again on twins in which some places are NaN.

The operator sees no module and no call: what it did with the dye is an event, which `spreading` attributes.
After an event the dye is put back to where it was, so that the pass goes on. After convolutions and pools it
shrinks to one pixel, or small deep maps would fill up and look global.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from normfix.networks import operators
from normfix.tiling.dye.twins import Dye, Shadows, holds_nan

__all__ = ["Event", "Kind", "Stain", "tensors_in", "written_in"]

Kind = Literal["global", "lost", "unknown"]

_Lost = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]
_FAULTS = (RuntimeError, ValueError, IndexError, TypeError)


@dataclass(slots=True)
class Event:
    """What the dispatch saw, before it is known to which call it belongs."""

    kind: Kind
    op: str
    over: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    given: tuple[tuple[int, ...], ...] = ()
    lost: tuple[tuple[int, int], ...] = ()


class Stain(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operator that meets dye a second time, on the twins."""

    def __init__(self, rank: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._shadows = Shadows()
        self.events: list[Event] = []
        self.swallowed = self.compared = False
        self._rank = rank

    def seed(self, x: Tensor) -> None:
        """Dye the pixel in the middle of a twin of x, (N, C, *space)."""
        self._shadows.put(x, _centred(x, x.dim()))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = tensors_in((args, kwargs))
        touched = [t for t in operands if self._shadows.of(t) is not None]
        plain = not isinstance(func, OpOverload) or operators.is_view(func) or operators.is_blank(func)
        # what is compared may be far from the dye, as a corner is
        self.compared |= operators.compares(func) and any(map(holds_nan, operands))
        if not touched or plain:
            return func(*args, **kwargs)
        before = [self._shadows.dye(t) for t in touched]
        writes = written_in(func, args, kwargs)
        if not writes and not any(dye.count for dye in before):
            return func(*args, **kwargs)
        risky = tensors_in((operators.at_risk(func, args), kwargs if operators.is_foreign(func) else ()))
        if any(self._shadows.dye(t).count for t in risky):
            return self._probed(func, args, kwargs, touched, before, writes)
        if operators.is_convolution_like(func) and not writes and touched[0] is args[0] and len(touched) == 1:
            result = func(*args, **kwargs)
            self._shrink(tensors_in(result))
            return result
        return self._twice(func, args, kwargs, touched, before, writes)

    def _twice(
        self,
        func: OpOverload,
        args: Any,
        kwargs: Any,
        touched: list[Tensor],
        before: list[Dye],
        writes: list[Tensor],
    ) -> Any:
        masks = [self._mask(t) for t in touched] if operators.is_pointwise(func) else []
        unsaid = [t for t in tensors_in((args, kwargs)) if operators.writes_unsaid(func)]
        twin_args, twin_kwargs = self._twins((args, kwargs), writes, unsaid)
        result = func(*args, **kwargs)
        outputs = [*tensors_in(result)] or writes
        try:
            with _same_numbers(func, args, kwargs):
                twins = tensors_in(func(*twin_args, **twin_kwargs)) or [*map(self._twin, writes)]
        except _FAULTS:
            twins = []
        if [t.shape for t in twins] != [t.shape for t in outputs]:
            self._unseen(func, outputs, touched, writes)
            return result
        own = {id(t) for t in writes}
        for clean, twin in zip(outputs, twins, strict=True):
            if id(clean) not in own and holds_nan(clean):
                self._shadows.put(clean, twin)
        for clean in writes:
            self._shadows.touched(clean)
        if masks:
            self._carry(outputs, masks)
        elif not operators.is_move(func):
            self._judge(func, outputs, touched, before)
        return result

    def _judge(
        self, func: OpOverload, outputs: list[Tensor], touched: list[Tensor], before: list[Dye]
    ) -> None:
        floats = [t for t in outputs if holds_nan(t) and t.numel()]
        after = [self._shadows.dye(t) for t in floats]
        if not any(dye.count for dye in before):
            return
        if not any(dye.count for dye in after):
            self._note("lost", func, outputs)
            self._reseed(floats, touched)
            return
        pool, resizes = operators.is_pool(func), operators.is_resizing_pool(func)
        inside = max(len(dye.inside) for dye in before)
        still = max(len(dye.open if pool else dye.inside) for dye in after)
        filled = any(dye.full for dye in after) and any(dye.partial for dye in before)
        if filled or still < inside or (resizes and inside and floats[0].shape != touched[0].shape):
            self._note("global", func, floats, touched, _lost(touched, before, floats, after))
            self._reseed(floats, touched, before, centre=False)
        elif pool:
            self._shrink(floats)
        else:
            self._hold_back(floats, touched, before)

    def _hold_back(self, outputs: list[Tensor], touched: list[Tensor], before: list[Dye]) -> None:
        """Keep local mixing (attention in windows) from adding up to the whole extent, as _shrink does for maps."""
        for clean in outputs:
            spots = [
                d.count for t, d in zip(touched, before, strict=True) if t.shape == clean.shape and d.partial
            ]
            if spots and self._shadows.dye(clean).count > min(spots):
                self._reseed([clean], touched, before, centre=False)

    def _probed(
        self,
        func: OpOverload,
        args: Any,
        kwargs: Any,
        touched: list[Tensor],
        before: list[Dye],
        writes: list[Tensor],
    ) -> Any:
        """Run on slightly changed numbers instead of NaN; only a change everywhere says something."""
        nudged_args, nudged_kwargs = tree_map(self._nudged, (args, kwargs))
        result = func(*args, **kwargs)
        outputs = [t for t in (*tensors_in(result), *writes) if holds_nan(t) and t.numel()]
        changed: list[bool] = []
        if not writes and outputs:
            try:
                with _same_numbers(func, args, kwargs):
                    others = tensors_in(func(*nudged_args, **nudged_kwargs))
                pairs = zip(outputs, others, strict=False)
                changed = [a.shape == b.shape and bool((a != b).all()) for a, b in pairs]
            except _FAULTS:
                changed = []
        if any(changed) and any(dye.partial for dye in before):
            self._note("global", func, outputs, touched, _lost(touched, before, outputs, []))
            self._reseed(outputs, touched, before, centre=False)
        else:
            self._unseen(func, outputs, touched, writes)
        return result

    def _unseen(
        self, func: OpOverload, outputs: list[Tensor], touched: list[Tensor], writes: list[Tensor]
    ) -> None:
        self._note("unknown", func, outputs)
        self._reseed([t for t in (*outputs, *writes) if holds_nan(t) and t.numel()], touched)

    def _note(
        self,
        kind: Kind,
        func: OpOverload,
        outputs: Sequence[Tensor],
        touched: Sequence[Tensor] = (),
        lost: _Lost = ((), ()),
    ) -> None:
        shape = tuple(outputs[0].shape) if outputs else ()
        given = tuple(tuple(t.shape) for t in touched)
        self.events.append(Event(kind, operators.name_of(func), lost[0], shape, given, lost[1]))

    def _carry(self, outputs: list[Tensor], masks: list[Tensor]) -> None:
        """Dye, behind a pointwise operator, what stands in the place of dyed input, whatever swallowed it."""
        reached = torch.stack(torch.broadcast_tensors(*masks)).any(0) if len(masks) > 1 else masks[0]  # type: ignore[no-untyped-call]
        for clean in outputs:
            if clean.numel() == 0 or torch.broadcast_shapes(reached.shape, clean.shape) != clean.shape:  # type: ignore[no-untyped-call]
                continue
            if not holds_nan(clean):
                self.swallowed = True
                self._shadows.put(clean, reached.expand(clean.shape))
            elif self._shadows.dye(clean).count < int(reached.expand(clean.shape).count_nonzero()):
                self.swallowed = True
                self._shadows.written(clean).masked_fill_(reached, torch.nan)
                self._shadows.touched(clean)

    def _shrink(self, outputs: Sequence[Tensor]) -> None:
        for clean in outputs:
            if holds_nan(clean):
                self._shadows.put(clean, _centred(clean, self._rank))

    def _reseed(
        self,
        outputs: Sequence[Tensor],
        touched: Sequence[Tensor],
        before: Sequence[Dye] = (),
        *,
        centre: bool = True,
    ) -> None:
        """Give outputs their clean values back, dyed where an input of the same shape is dyed."""
        given = before or [self._shadows.dye(t) for t in touched]
        own = {t.untyped_storage()._cdata for t in outputs}
        for clean in outputs:
            like = [
                t
                for t, dye in zip(touched, given, strict=True)
                if t.shape == clean.shape and dye.partial and t.untyped_storage()._cdata not in own
            ]
            if like:
                least = min(like, key=lambda t: self._shadows.dye(t).count)
                self._shadows.put(clean, clean.masked_fill(self._mask(least), torch.nan))
            elif centre and clean.dim() == self._rank:
                self._shadows.put(clean, _centred(clean, self._rank))
            elif self._shadows.of(clean) is not None:
                self._shadows.put(clean, clean)

    def _mask(self, clean: Tensor) -> Tensor:
        twin = self._shadows.of(clean)
        if twin is None:
            return torch.zeros(clean.shape, dtype=torch.bool)
        return twin.isnan() if holds_nan(clean) else twin.clone()

    def _twin(self, value: Any) -> Any:
        if isinstance(value, Tensor) and holds_nan(value):
            twin = self._shadows.of(value)
            return value if twin is None else twin
        return value

    def _twins(self, values: Any, writes: list[Tensor], unsaid: list[Tensor]) -> Any:
        """Return arguments for the second run; what it writes to, said or unsaid, is never a clean tensor."""
        own = {id(t): self._shadows.written(t) if holds_nan(t) else t.clone() for t in writes}
        own |= {id(t): t.clone() for t in unsaid if self._shadows.of(t) is None}
        return tree_map(lambda value: own[id(value)] if id(value) in own else self._twin(value), values)

    def _nudged(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not holds_nan(value) or self._shadows.of(value) is None:
            return value
        return torch.where(self._mask(value), value + 0.5 * (1 + value.abs()), value)


def tensors_in(values: Any) -> list[Tensor]:
    """Return the tensors in nested arguments."""
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def written_in(func: OpOverload, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    """Return the tensors among an operator's arguments that it writes to."""
    names = operators.written(func)
    if not names:
        return []
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    return tensors_in([value for name, value in {**given, **kwargs}.items() if name in names])


def _centred(clean: Tensor, rank: int) -> Tensor:
    """Return a copy whose middle pixel is dyed, in all channels if it is a map (N, C, *space)."""
    dyed = clean.clone()
    first = 2 if clean.dim() == rank else 1
    middle = tuple(n // 2 for n in clean.shape[first:])
    if middle:
        dyed[(slice(None),) * first + middle] = torch.nan
    return dyed


def _lost(
    touched: Sequence[Tensor], before: Sequence[Dye], outputs: Sequence[Tensor], after: Sequence[Dye]
) -> _Lost:
    """Return the extents along which the dye was inside and no longer is, and the dimensions they may be of."""
    which = max(range(len(touched)), key=lambda i: (len(before[i].inside), len(before[i].open)))
    dye, shape = before[which], touched[which].shape
    dims = dye.inside or dye.open
    extents = Counter(shape[d] for d in dims)
    partial = [(t, d) for t, d in zip(outputs, after, strict=False) if d.partial]
    if partial:
        extents -= Counter(partial[0][0].shape[d] for d in partial[0][1].inside)
    over = tuple(sorted(extents.elements(), reverse=True))
    return over, tuple((which, d) for d in dims if shape[d] in extents)


def _same_numbers(func: OpOverload, args: Any, kwargs: Mapping[str, Any]) -> AbstractContextManager[None]:
    """Keep the second run from using up random numbers of the first.

    A network draws from a generator of ours, and torch's own is other threads' too: it is put back only for the few
    operators that take no generator.
    """
    if torch.Tag.nondeterministic_seeded not in func.tags:
        return nullcontext()
    own = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Generator)]
    return _kept(own[0]) if own else torch.random.fork_rng(devices=[])


@contextmanager
def _kept(generator: torch.Generator) -> Iterator[None]:
    state = generator.get_state()
    try:
        yield
    finally:
        generator.set_state(state)
