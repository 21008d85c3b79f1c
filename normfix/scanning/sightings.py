"""Find every operation whose output depends on the whole extent, whoever wrote it: one pass with dyed twins.

Each operator runs on the clean tensors and again on their twins, in which one pixel is NaN. It is tile-global

- if an output is dyed everywhere although its input was dyed in places only, or
- if it loses a dimension along which the dye was inside (strip pooling, a cumulative sum, a sort).

`staining` then puts the dye back to where it was and the pass goes on, so that one pass finds all of them,
frozen or not. The network's own computation is not touched: its output is bit for bit that of a plain run.

A dimension of fixed extent (an attention window) is lost in the same way as one of space: `confirmed` keeps
what is found at two image sizes and grows with them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from normfix.networks import operators
from normfix.records.sites import site_id
from normfix.scanning.census import Call, Recorder, census, source_line
from normfix.tiling.dye.operators import Event, Kind, Stain

__all__ = ["Dyed", "Sighting", "confirmed", "dye_look"]

Run = Callable[[nn.Module, Tensor], Any]


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
    """What one dyed pass saw: sightings in order, the census' calls and how often each module ran.

    `swallowed` tells that a pointwise operator made ordinary numbers of NaN, as a comparison does; `compared` that
    numbers are compared, wherever.
    """

    sightings: tuple[Sighting, ...]
    calls: tuple[Call, ...]
    invocations: Mapping[str, int]
    size: tuple[int, ...]
    swallowed: bool = False
    compared: bool = False

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
        swallowed=watch.swallowed,
        compared=watch.compared,
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
        if sorted(sighting.over) == sorted(again.over) or _pools_in_proportion(sighting, again):
            return False
        return _grows(sighting, again) or _grows(again, sighting)

    mine = {s.id for s in dyed.found}
    added = (s for s in other.found if s.id in known and s.id not in mine)
    return replace(dyed, sightings=(*filter(stays, dyed.sightings), *added))


def _pools_in_proportion(sighting: Sighting, again: Sighting) -> bool:
    """Tell whether a pool to a given extent is given one that follows the image's along each axis that does."""
    if sighting.op not in operators.RESIZING_POOLS or not (sighting.given and again.given):
        return False
    pairs = zip(sighting.given[0], again.given[0], sighting.shape, again.shape, strict=True)
    return all(there != then for here, now, there, then in pairs if here != now)


def _grows(sighting: Sighting, again: Sighting) -> bool:
    """Tell whether an operation is global over an extent that is another at the other size.

    It is not where dye on the edge of an attention window fills the window's queries, and in its middle the keys.
    """
    if [len(shape) for shape in sighting.given] != [len(shape) for shape in again.given]:
        return True
    return not sighting.lost or any(
        sighting.given[number][dim] != again.given[number][dim] for number, dim in sighting.lost
    )


class _Watch:
    """Joins what runs (operators) to who asked for it (the census' calls and modules)."""

    def __init__(self, rank: int) -> None:
        self.sightings: list[Sighting] = []
        self._known: set[tuple[str, Kind]] = set()
        self._stain = Stain(rank)
        self._recorder: Recorder | None = None
        self._hidden: Counter[tuple[str, int, str]] = Counter()

    @contextmanager
    def follow(self, recorder: Recorder) -> Iterator[None]:
        """Take the census' recorder, to ask it who is running."""
        self._recorder = recorder
        yield

    def seed(self, x: Tensor) -> None:
        """Dye the pixel in the middle of a twin of the input."""
        self._stain.seed(x)

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

    @property
    def swallowed(self) -> bool:
        """Tell whether a pointwise operator made ordinary numbers of NaN."""
        return self._stain.swallowed

    @property
    def compared(self) -> bool:
        """Tell whether an operator compared numbers, dyed or not."""
        return self._stain.compared

    def calls(self) -> int:
        """Return how many calls the census has recorded."""
        return len(self._recorder.calls) if self._recorder else 0

    def _add(self, event: Event, call: Call, position: int) -> None:
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

    def _add_hidden(self, event: Event, recorder: Recorder, name: str) -> None:
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
