"""Find every operation whose output depends on the whole extent, whoever wrote it: one pass with dyed twins.

Each operator runs on the clean tensors and again on their twins, in which one pixel is NaN. It is tile-global

- if an output is dyed everywhere although its input was dyed in places only, or
- if it loses a dimension along which the dye was inside (strip pooling, a cumulative sum, a sort).

The dye is then put back to where it was and the pass goes on, so that one pass finds all of them, frozen or
not. After convolutions and pools the dye shrinks to one pixel, or small deep maps would fill up and look
global. The network's own computation is not touched: its output is bit for bit that of a plain run.

A dimension of fixed extent (an attention window) is lost in the same way as one of space: `confirmed` keeps
what is found at two image sizes and grows with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from normfix import operators
from normfix.census import Call, Recorder, census, source_line
from normfix.records import site_id
from normfix.shadows import Dye, Shadows, holds_nan

__all__ = ["Dyed", "Sighting", "confirmed", "dye_look"]

Run = Callable[[nn.Module, Tensor], Any]
Kind = Literal["global", "lost", "unknown"]

_Lost = tuple[tuple[int, ...], tuple[tuple[int, int], ...]]
_FAULTS = (RuntimeError, ValueError, IndexError, TypeError)


@dataclass(frozen=True, slots=True, kw_only=True)
class Sighting:
    """One operation that the dye has something to say about.

    kind: "global" (its output depends on the whole extent), "lost" (it swallows the dye, so nothing is known
    of what follows), "unknown" (it must not or could not run on dyed input). `function` and `index` name the
    call as the census does where it recorded one (`recorded`). `over` holds the extents over which it is global,
    `shape` that of its first output, `position` how many calls the census had recorded by then. `given` are the
    shapes of its dyed operands, `lost` the dimensions that the extents may be of: (operand, dimension).
    """

    kind: Kind
    op: str
    owner: str
    invocation: int
    function: str
    index: int
    owner_class: str
    within: tuple[str, ...]
    line: str
    recorded: bool
    position: int
    over: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    given: tuple[tuple[int, ...], ...] = ()
    lost: tuple[tuple[int, int], ...] = ()

    @property
    def id(self) -> str:
        """Name the call as Site.id does."""
        return site_id(self.owner, self.invocation, self.function, self.index)


@dataclass(frozen=True, slots=True, kw_only=True)
class Dyed:
    """What one dyed pass saw: sightings in order, the census' calls and how often each module ran."""

    sightings: tuple[Sighting, ...]
    calls: tuple[Call, ...]
    invocations: Mapping[str, int]
    size: tuple[int, ...]

    @property
    def found(self) -> tuple[Sighting, ...]:
        """Return the tile-global operations."""
        return tuple(s for s in self.sightings if s.kind == "global")

    @property
    def lost(self) -> tuple[Sighting, ...]:
        """Return where the dye was swallowed, but for calls that were found global all the same."""
        found = {s.id for s in self.found}
        return tuple(s for s in self.sightings if s.kind == "lost" and s.id not in found)

    @property
    def unknown(self) -> tuple[Sighting, ...]:
        """Return what could not be judged."""
        return tuple(s for s in self.sightings if s.kind == "unknown")


def dye_look(model: nn.Module, run: Run, example: Tensor) -> Dyed:
    """Run the network once with one dyed pixel in the middle of a twin of its input.

    Args:
        model: on CPU, not modified; statistics may be live.
        run: calls the model on one input.
        example: (N, C, *space).

    Example:
        >>> import torch
        >>> net = torch.nn.Sequential(torch.nn.Conv2d(1, 2, 3), torch.nn.Softmax(2))
        >>> [s.id for s in dye_look(net, lambda model, x: model(x), torch.rand(1, 1, 16, 16)).found]
        ['1/0/softmax/0']
    """
    watch = _Watch(example.dim())

    def stained(model: nn.Module, x: Tensor) -> Any:
        watch.seed(x)
        with watch.running():
            return run(model, x)

    calls, invocations, _ = census(model, stained, example, follow=watch.follow)
    return Dyed(
        sightings=tuple(watch.sightings),
        calls=tuple(calls),
        invocations=dict(invocations),
        size=tuple(example.shape),
    )


def confirmed(dyed: Dyed, other: Dyed, known: frozenset[str]) -> Dyed:
    """Return a look without what another image size shows to be local, and with what only that one shows.

    Args:
        dyed: a look.
        other: a look at the same network at another image size.
        known: ids that need no confirmation; a small map may be too full of dye for one of them to show.
    """
    elsewhere = {(s.id, s.op): s for s in other.found}

    def stays(sighting: Sighting) -> bool:
        if sighting.kind != "global" or sighting.id in known:
            return True
        again = elsewhere.get((sighting.id, sighting.op))
        if again is None:
            return False
        pools = sighting.op in ("aten::_adaptive_avg_pool2d", "aten::_adaptive_avg_pool3d")
        if sorted(sighting.over) == sorted(again.over) or (pools and sighting.shape != again.shape):
            return False
        return _grows(sighting, again) or _grows(again, sighting)

    mine = {s.id for s in dyed.found}
    added = (s for s in other.found if s.id in known and s.id not in mine)
    return replace(dyed, sightings=(*filter(stays, dyed.sightings), *added))


def _grows(sighting: Sighting, again: Sighting) -> bool:
    """Tell whether an operation is global over an extent that is another at the other size.

    It is not where dye on the edge of an attention window fills the window's queries, and in its middle the keys.
    """
    if [len(shape) for shape in sighting.given] != [len(shape) for shape in again.given]:
        return True
    return not sighting.lost or any(
        sighting.given[number][dim] != again.given[number][dim] for number, dim in sighting.lost
    )


@dataclass(slots=True)
class _Event:
    """What the dispatch saw, before it is known to which call it belongs."""

    kind: Kind
    op: str
    over: tuple[int, ...] = ()
    shape: tuple[int, ...] = ()
    given: tuple[tuple[int, ...], ...] = ()
    lost: tuple[tuple[int, int], ...] = ()


class _Watch:
    """Joins what runs (operators) to who asked for it (the census' calls and modules)."""

    def __init__(self, rank: int) -> None:
        self.sightings: list[Sighting] = []
        self._known: set[tuple[str, Kind]] = set()
        self._stain = _Stain(rank)
        self._recorder: Recorder | None = None
        self._hidden: Counter[tuple[str, int, str]] = Counter()

    @contextmanager
    def follow(self, recorder: Recorder) -> Iterator[None]:
        """Take the census' recorder, to ask it who is running."""
        self._recorder = recorder
        yield

    def seed(self, x: Tensor) -> None:
        """Dye the pixel in the middle of a twin of the input."""
        self._stain.shadows.put(x, _centred(x, x.dim()))

    @contextmanager
    def running(self) -> Iterator[None]:
        with _Functions(self), self._stain:
            yield
            self.settle("")

    def settle(self, name: str, *, before: int | None = None) -> None:
        """Attribute what was seen since the last time to the call that has just been recorded, if any."""
        events, self._stain.events = self._stain.events, []
        recorder = self._recorder
        if not events or recorder is None or not recorder.frames:
            return
        recorded = before is not None and len(recorder.calls) > before
        for event in events:
            if recorded:
                self._add(event, recorder.calls[-1], len(recorder.calls) - 1)
            else:
                self._add_hidden(event, recorder, name or event.op.partition("::")[2])

    def calls(self) -> int:
        """Return how many calls the census has recorded."""
        return len(self._recorder.calls) if self._recorder else 0

    def _add(self, event: _Event, call: Call, position: int) -> None:
        sighting = Sighting(
            kind=event.kind,
            op=event.op,
            owner=call.owner,
            invocation=call.invocation,
            function=call.function,
            index=call.index,
            owner_class=call.owner_class,
            within=call.within,
            line=call.line,
            recorded=True,
            position=position,
            over=event.over,
            shape=event.shape,
            given=event.given,
            lost=event.lost,
        )
        if (sighting.id, sighting.kind) not in self._known:
            self._known.add((sighting.id, sighting.kind))
            self.sightings.append(sighting)

    def _add_hidden(self, event: _Event, recorder: Recorder, name: str) -> None:
        """Name a call that the census did not record: it believes that no operand depends on the input."""
        frame = recorder.frames[-1]
        key = (frame.path, frame.invocation, name)
        self.sightings.append(
            Sighting(
                kind=event.kind,
                op=event.op,
                owner=frame.path,
                invocation=frame.invocation,
                function=f"hidden.{name}",
                index=self._hidden[key],
                owner_class=frame.kind,
                within=tuple(f.path for f in recorder.frames),
                line=source_line(),
                recorded=False,
                position=self.calls(),
                over=event.over,
                shape=event.shape,
                given=event.given,
                lost=event.lost,
            )
        )
        self._hidden[key] += 1


class _Functions(TorchFunctionMode):
    """Tells the watch when a call begins and ends. It stands inside the census' own mode."""

    def __init__(self, watch: _Watch) -> None:
        super().__init__()
        self._watch = watch

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        self._watch.settle("")
        before = self._watch.calls()
        result = func(*args, **(kwargs or {}))
        self._watch.settle(getattr(func, "__name__", ""), before=before)
        return result


class _Stain(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs every operator that meets dye a second time, on the twins."""

    def __init__(self, rank: int) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.shadows = Shadows()
        self.events: list[_Event] = []
        self._rank = rank

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        operands = _tensors((args, kwargs))
        touched = [t for t in operands if self.shadows.of(t) is not None]
        plain = not isinstance(func, OpOverload) or operators.is_view(func) or operators.is_blank(func)
        if not touched or plain:
            return func(*args, **kwargs)
        before = [self.shadows.dye(t) for t in touched]
        writes = _written(func, args, kwargs)
        if not writes and not any(dye.count for dye in before):
            return func(*args, **kwargs)
        risky = _tensors((operators.at_risk(func, args), kwargs if operators.is_foreign(func) else ()))
        if any(self.shadows.dye(t).count for t in risky):
            return self._probed(func, args, kwargs, touched, before, writes)
        if operators.is_convolution_like(func) and not writes and touched[0] is args[0] and len(touched) == 1:
            result = func(*args, **kwargs)
            self._shrink(_tensors(result))
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
        unsaid = [t for t in _tensors((args, kwargs)) if operators.writes_unsaid(func)]
        twin_args, twin_kwargs = self._twins((args, kwargs), writes, unsaid)
        result = func(*args, **kwargs)
        outputs = [*_tensors(result)] or writes
        try:
            with _same_numbers(func):
                twins = _tensors(func(*twin_args, **twin_kwargs)) or [*map(self._twin, writes)]
        except _FAULTS:
            twins = []
        if [t.shape for t in twins] != [t.shape for t in outputs]:
            self._unseen(func, outputs, touched, writes)
            return result
        own = {id(t) for t in writes}
        for clean, twin in zip(outputs, twins, strict=True):
            if id(clean) not in own and holds_nan(clean):
                self.shadows.put(clean, twin)
        for clean in writes:
            self.shadows.touched(clean)
        if masks:
            self._carry(outputs, masks)
        elif not operators.is_move(func):
            self._judge(func, outputs, touched, before)
        return result

    def _judge(
        self, func: OpOverload, outputs: list[Tensor], touched: list[Tensor], before: list[Dye]
    ) -> None:
        floats = [t for t in outputs if holds_nan(t) and t.numel()]
        after = [self.shadows.dye(t) for t in floats]
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
            if spots and self.shadows.dye(clean).count > min(spots):
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
        outputs = [t for t in (*_tensors(result), *writes) if holds_nan(t) and t.numel()]
        changed: list[bool] = []
        if not writes and outputs:
            try:
                with _same_numbers(func):
                    others = _tensors(func(*nudged_args, **nudged_kwargs))
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
        self.events.append(_Event(kind, operators.name_of(func), lost[0], shape, given, lost[1]))

    def _carry(self, outputs: list[Tensor], masks: list[Tensor]) -> None:
        """Dye, behind a pointwise operator, what stands in the place of dyed input, whatever swallowed it."""
        reached = torch.stack(torch.broadcast_tensors(*masks)).any(0) if len(masks) > 1 else masks[0]  # type: ignore[no-untyped-call]
        for clean in outputs:
            if clean.numel() == 0 or torch.broadcast_shapes(reached.shape, clean.shape) != clean.shape:  # type: ignore[no-untyped-call]
                continue
            if not holds_nan(clean):
                self.shadows.put(clean, reached.expand(clean.shape))
            elif self.shadows.dye(clean).count < int(reached.expand(clean.shape).count_nonzero()):
                self.shadows.written(clean).masked_fill_(reached, torch.nan)
                self.shadows.touched(clean)

    def _shrink(self, outputs: Sequence[Tensor]) -> None:
        for clean in outputs:
            if holds_nan(clean):
                self.shadows.put(clean, _centred(clean, self._rank))

    def _reseed(
        self,
        outputs: Sequence[Tensor],
        touched: Sequence[Tensor],
        before: Sequence[Dye] = (),
        *,
        centre: bool = True,
    ) -> None:
        """Give outputs their clean values back, dyed where an input of the same shape is dyed."""
        given = before or [self.shadows.dye(t) for t in touched]
        own = {t.untyped_storage()._cdata for t in outputs}
        for clean in outputs:
            like = [
                t
                for t, dye in zip(touched, given, strict=True)
                if t.shape == clean.shape and dye.partial and t.untyped_storage()._cdata not in own
            ]
            if like:
                least = min(like, key=lambda t: self.shadows.dye(t).count)
                self.shadows.put(clean, clean.masked_fill(self._mask(least), torch.nan))
            elif centre and clean.dim() == self._rank:
                self.shadows.put(clean, _centred(clean, self._rank))
            elif self.shadows.of(clean) is not None:
                self.shadows.put(clean, clean)

    def _mask(self, clean: Tensor) -> Tensor:
        twin = self.shadows.of(clean)
        if twin is None:
            return torch.zeros(clean.shape, dtype=torch.bool)
        return twin.isnan() if holds_nan(clean) else twin.clone()

    def _twin(self, value: Any) -> Any:
        if isinstance(value, Tensor) and holds_nan(value):
            twin = self.shadows.of(value)
            return value if twin is None else twin
        return value

    def _twins(self, values: Any, writes: list[Tensor], unsaid: list[Tensor]) -> Any:
        """Return arguments for the second run; what it writes to, said or unsaid, is never a clean tensor."""
        own = {id(t): self.shadows.written(t) if holds_nan(t) else t.clone() for t in writes}
        own |= {id(t): t.clone() for t in unsaid if self.shadows.of(t) is None}
        return tree_map(lambda value: own[id(value)] if id(value) in own else self._twin(value), values)

    def _nudged(self, value: Any) -> Any:
        if not isinstance(value, Tensor) or not holds_nan(value) or self.shadows.of(value) is None:
            return value
        return torch.where(self._mask(value), value + 0.5 * (1 + value.abs()), value)


def _tensors(values: Any) -> list[Tensor]:
    return [leaf for leaf in tree_leaves(values) if isinstance(leaf, Tensor)]


def _written(func: OpOverload, args: Any, kwargs: Mapping[str, Any]) -> list[Tensor]:
    names = operators.written(func)
    if not names:
        return []
    given = dict(zip((a.name for a in func._schema.arguments), args, strict=False))
    return _tensors([value for name, value in {**given, **kwargs}.items() if name in names])


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


def _same_numbers(func: OpOverload) -> Any:
    """Keep the second run from using up random numbers of the first."""
    drawn = torch.Tag.nondeterministic_seeded in func.tags
    return torch.random.fork_rng(devices=[]) if drawn else nullcontext()
