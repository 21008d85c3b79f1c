"""Name the calls by which a network depends on absolute size or position: no dye and no statistic shows them.

They are read from the arguments of the eager calls, at two image sizes where the network runs at two: an
`interpolate` to 64x64 at both is of fixed size, an `arange` that grows with the image makes coordinates.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._pytree import tree_leaves

from normfix.records.sites import Finding
from normfix.scanning.census import Recorder, source_line

__all__ = ["Note", "Positions"]

_COORDINATES = frozenset({"arange", "linspace", "meshgrid"})
_SAMPLED = frozenset({"grid_sample", "affine_grid", "grid_sampler"})
_RESIZES = frozenset({"interpolate", "upsample", "upsample_bilinear"})
_POOLS = frozenset({"adaptive_avg_pool1d", "adaptive_avg_pool2d", "adaptive_avg_pool3d"}) | frozenset(
    {"adaptive_max_pool1d", "adaptive_max_pool2d", "adaptive_max_pool3d"}
)
_RESHAPES = frozenset({"view", "reshape", "flatten"})
_ADDS = frozenset({"add", "add_", "__add__", "__radd__", "__iadd__"})


@dataclass(frozen=True, slots=True)
class Note:
    """One call worth a second look: `what` it may be, and the extents that tell by not changing or changing."""

    what: str
    function: str
    owner: str
    line: str
    extents: tuple[int, ...]


class Positions:
    """Notes calls during the census; give `follow` to it, then ask for `findings`.

    Notes of a run that failed, at a size the network does not take, are kept for the reason alone.
    """

    def __init__(self) -> None:
        self._runs: list[list[Note]] = []
        self._stopped: list[Note] = []

    @contextmanager
    def follow(self, recorder: Recorder) -> Iterator[None]:
        """Note calls while the census runs."""
        notes: list[Note] = []
        mode = _Notes(recorder, notes)
        try:
            with mode:
                yield
        except BaseException:
            self._stopped += [mode.last] if mode.last else []
            raise
        self._runs.append(notes)

    def may_wrap(self) -> bool:
        """Tell whether a call shifts a map around its border."""
        return any(note.what == "rolled" for notes in self._runs for note in notes)

    def findings(self, *, two_sizes: bool) -> tuple[Finding, ...]:
        """Return one finding per kind of call and source line.

        Args:
            two_sizes: the last run was at another size than the first, with the same calls.
        """
        return self._found(two_sizes, _judge)

    def shifts(self) -> tuple[Finding, ...]:
        """Return what `findings` says of shifts around the border."""
        notes = [note for note in self._runs[0] if note.what == "rolled"]
        return _grouped([(note, text) for note in notes if (text := _judge(note, None))])

    def causes(self, *, two_sizes: bool) -> tuple[Finding, ...]:
        """Return findings about calls that are harmless in most networks, for one that has no geometry."""
        return self._found(two_sizes, _cause) if two_sizes else ()

    def _found(self, two_sizes: bool, judge: Callable[[Note, Note | None], str]) -> tuple[Finding, ...]:
        first, other = self._runs[0], self._runs[-1] if two_sizes else None
        pairs = [(note, None) for note in first] if other is None else _paired(first, other)
        told = [(note, text) for note, again in pairs if (text := judge(note, again))]
        if other is None:
            told += [
                (note, "stops here at every other size that was tried; the size is built in")
                for note in self._stopped[-1:]
            ]
        return _grouped(told)


def _paired(first: Sequence[Note], other: Sequence[Note]) -> list[tuple[Note, Note | None]]:
    if [(n.what, n.owner) for n in first] != [(n.what, n.owner) for n in other]:
        return [(note, None) for note in first]
    return list(zip(first, other, strict=True))


def _judge(note: Note, again: Note | None) -> str:
    """Return what a note means, or nothing if the other size shows it to be harmless."""
    changed = again is not None and again.extents != note.extents
    fixed = again is not None and not changed
    size = "x".join(map(str, note.extents))
    match note.what:
        case "aligned":
            return "align_corners=True weighs pixels by their place in the whole extent"
        case "sampled":
            return "samples at absolute coordinates"
        case "circular":
            return "pads with the opposite border of whatever it is given"
        case "rolled":
            return "rolls around the border of whatever it is given" if not fixed else ""
        case "resized":
            return f"resizes to {size} whatever the input's size" if fixed else ""
        case "pooled":
            return f"pools to {size} cells, which grow with the input" if fixed or again is None else ""
        case "coordinates":
            return "makes coordinates of the image's extent" if changed else ""
        case "embedded":
            unknown = "adds a stored map of fixed extent" if again is None else ""
            return "adds a map stretched to the image's extent" if changed else unknown
        case "flattened":
            return "makes features of all of space, so the next layer has one size" if again is None else ""
    return ""


def _cause(note: Note, again: Note | None) -> str:
    if note.what != "stretched" or again is None:
        return ""
    half = len(note.extents) // 2
    factors = [
        [Fraction(out, given) for given, out in zip(n.extents[:half], n.extents[half:], strict=True)]
        for n in (note, again)
    ]
    if factors[0] == factors[1]:
        return ""
    given, out = ("x".join(map(str, part)) for part in (note.extents[:half], note.extents[half:]))
    return f"resizes by a factor that is another at every size (here from {given} to {out})"


def _grouped(told: Sequence[tuple[Note, str]]) -> tuple[Finding, ...]:
    counts = Counter((note.function, note.line, text) for note, text in told)
    firsts = {(note.function, note.line, text): note for note, text in reversed(told)}
    found = []
    for (function, line, text), count in counts.items():
        more = f" ({count} calls)" if count > 1 else ""
        owner = firsts[function, line, text].owner or "(root)"
        found.append(
            Finding(
                code="NF244", where=owner, message=f"{function} at {line or 'an unknown line'} {text}{more}."
            )
        )
    return tuple(found)


class _Notes(TorchFunctionMode):
    """Notes listed calls; stands inside the census' mode, whose recorder knows who is running."""

    def __init__(self, recorder: Recorder, notes: list[Note]) -> None:
        super().__init__()
        self.last: Note | None = None
        self._recorder = recorder
        self._notes = notes

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        try:
            result = func(*args, **kwargs)
        except Exception:
            self.last = self._note("stopped", name, ())
            raise
        for what, extents in _read(name, args, kwargs, result, self._depends):
            self._notes.append(self._note(what, name, extents))
        return result

    def _depends(self, tensor: Tensor) -> bool:
        """Tell whether the census holds the tensor for one that depends on the input."""
        return self._recorder.depends(tensor)

    def _note(self, what: str, name: str, extents: tuple[int, ...]) -> Note:
        frames = self._recorder.frames
        return Note(what, name, frames[-1].path if frames else "", source_line(), extents)


def _read(
    name: str, args: Any, kwargs: Mapping[str, Any], result: Any, depends: Callable[[Tensor], bool]
) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Yield what a call may be, with the extents that decide it."""
    out = tuple(result.shape) if isinstance(result, Tensor) else ()
    if name in _RESIZES and out:
        # interpolate(input, size, scale_factor, mode, align_corners)
        aligned = kwargs.get("align_corners", args[4] if len(args) > 4 else None)
        if aligned:
            yield "aligned", ()
        elif depends(given := args[0] if args else kwargs["input"]):
            yield "resized", out[2:]
            yield "stretched", (*given.shape[2:], *out[2:])
    elif name in _SAMPLED:
        yield "sampled", ()
    elif name == "pad" and "circular" in (*args, *kwargs.values()):
        yield "circular", ()
    elif name == "roll" and out and depends(result):
        yield "rolled", out
    elif name in _POOLS and out and any(n > 1 for n in out[2:]):
        yield "pooled", out[2:]
    elif name in _COORDINATES:
        yield "coordinates", tuple(n for t in tree_leaves(result) if isinstance(t, Tensor) for n in t.shape)
    elif name in _ADDS and out:
        maps = [t for t in args if isinstance(t, Tensor) and not depends(t) and _is_map(t)]
        if len(args) == 2 and len(maps) == 1 and depends(result):
            yield "embedded", tuple(maps[0].shape)
    elif name in _RESHAPES and out and isinstance(args[0], Tensor) and depends(args[0]):
        given = tuple(args[0].shape)
        if len(given) > 3 and len(out) == 2 and out[0] == given[0] and any(n > 1 for n in given[2:]):
            yield "flattened", out


def _is_map(tensor: Tensor) -> bool:
    """Tell whether a tensor varies along several dimensions: a bias that was expanded does not."""
    long = [dim for dim, n in enumerate(tensor.shape) if n > 1]
    if len(long) < 2 or tensor.dtype is torch.bool:
        return False
    return sum(bool((tensor != tensor.narrow(dim, 0, 1)).any()) for dim in long) > 1
