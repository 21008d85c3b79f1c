"""The derivation: frames carried forward over a graph, needs carried backward, from one aligned tile to the image.

    forward    each value's layout from those of its operands, by the rules
    backward   for the tile [0, S) of the image's lattice, or one that starts within it, the interval of each value that
               it is computed from; at the image that is the tile and its halo

Nothing is run on numbers, and no value counts: both sides of a `where`, a weight of zero and a dead channel are
followed.
"""

from __future__ import annotations

import operator
from collections.abc import Collection, Container, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from fractions import Fraction

from torch import Tensor
from torch.fx import Node

from normfix.networks.functions import BLANK
from normfix.tiling.reach.calls import Call, call_of, nodes_in, tensor_of
from normfix.tiling.reach.extents import Sizes, Unsized
from normfix.tiling.reach.frames import Frame, Layout, Opaque, Space, frame_of, is_plain
from normfix.tiling.reach.links import Reading, whole
from normfix.tiling.reach.needs import Boundless, Interval, Need, Span, hull, united
from normfix.tiling.reach.rules import rule_of
from normfix.tiling.reach.rules.resizing import is_stretched

__all__ = ["Derived", "Reached", "Step", "Trail", "between", "depends", "derive"]

_SHAPE_ONLY = BLANK | {
    *("sym_size", "sym_numel", "sym_stride", "sym_storage_offset", "size", "numel"),
    *("_assert_tensor_metadata", "is_floating_point", "is_complex"),
}
"""Operators whose result holds nothing of their operand's values."""


@dataclass(frozen=True, slots=True)
class Step:
    """One node on the way from an image's farthest pixel to the output, and the interval needed of its result."""

    node: Node
    interval: Interval


@dataclass(frozen=True, slots=True)
class Reached:
    """What a tile needs of one source along one axis: an interval of positions, or why there is none."""

    fore: Interval | None
    boundless: Boundless | None


@dataclass(frozen=True, slots=True)
class Derived:
    """A graph read once; `reached` asks it for tiles.

    `wraps` are nodes that read the opposite border, `flips` those that turn the image around, `stretches` those that
    resize by a factor that follows the image's size.
    """

    sizes: Sizes
    layouts: Mapping[Node, Layout]
    readings: Mapping[Node, Sequence[Reading]]
    order: tuple[Node, ...]
    wraps: tuple[Node, ...]
    flips: tuple[Node, ...]
    stretches: tuple[Node, ...]

    def scale(self, result: Node) -> tuple[Fraction, ...] | None:
        """Return positions of a value per pixel of the image along each axis, None if it is no map."""
        axes = self._axes(result)
        if axes is None:
            return None
        return tuple(Fraction(f.step, s) for f, s in zip(axes, self.sizes.lattice, strict=True))

    def offset(self, result: Node) -> tuple[int, ...] | None:
        """Return how many positions a value has more than its scale times the image, per axis."""
        axes = self._axes(result)
        growths = None if axes is None else [self.sizes.growth(f.extent) for f in axes]
        if growths is None or None in growths:
            return None
        return tuple(g.rest for g in growths if g is not None)

    def pace(self, node: Node, axis: int) -> Fraction | None:
        """Return positions of a value per pixel along one axis, None where it has none or several."""
        factors = [
            f for frame in self.layouts[node] for f in frame if isinstance(f, Space) and f.axis == axis
        ]
        return Fraction(factors[0].step, self.sizes.lattice[axis]) if len(factors) == 1 else None

    def reached(
        self,
        results: Collection[Node],
        sources: Collection[Node],
        starts: Sequence[int],
        trail: Trail | None = None,
    ) -> tuple[dict[Node, list[Reached]], list[Interval | None]]:
        """Return what one lattice step of the image that begins at `starts` needs of each source, and which pixels.

        The pixels, per axis, are those that a window must have for every map in between to have all positions that are
        needed of it: what was shifted needs others of the image than lie under it, and the map must not end there.

        Args:
            results: maps that are computed.
            sources: nodes where the search ends.
            starts: pixel per axis at which the tile begins, at least 0.
            trail: remembers on whose account each interval was widened.
        """
        needs: dict[Node, Need] = {}
        for result in results:
            _add(needs, result, self._tile(result, starts), None, trail)
        for node in reversed(self.order):
            if node not in needs or node in sources:
                continue
            for reading in self.readings.get(node, ()):
                operand = reading.operand
                if operand not in self.layouts:
                    continue
                call = call_of(node, self.sizes)
                carried = reading.carried(needs[node], self.layouts[node], self.layouts[operand], call)
                if carried is not None:
                    _add(needs, operand, carried, node, trail)
        reached = {source: self._axis_by_axis(source, needs.get(source)) for source in sources}
        return reached, self._extent(needs)

    def _extent(self, needs: Mapping[Node, Need]) -> list[Interval | None]:
        """Return, per axis, the first and last pixel of a window in which all maps have what is needed of them."""
        found: list[Interval | None] = [None] * len(self.sizes.lattice)
        for node, need in needs.items():
            for (dim, number), span in need.items():
                factor = self.layouts[node][dim][number]
                growth = self.sizes.growth(factor.extent) if isinstance(factor, Space) else None
                if growth is None or span.fore is None:
                    continue
                pace = Fraction(growth.step, self.sizes.lattice[growth.axis])
                first, last = span.fore
                pixels = int(first / pace // 1), int((last - growth.rest) / pace // 1)
                found[growth.axis] = hull(found[growth.axis], pixels)
        return found

    def _axes(self, result: Node) -> list[Space] | None:
        """Return the factor of a map along each axis, where each has a dimension of its own."""
        factors = [
            f for frame in self.layouts[result] for f in frame if isinstance(f, Space) and len(frame) == 1
        ]
        by_axis = {f.axis: f for f in factors}
        if len(factors) != len(self.sizes.lattice) or len(by_axis) != len(factors):
            return None
        return [by_axis[axis] for axis in range(len(factors))]

    def _tile(self, result: Node, starts: Sequence[int]) -> Need:
        """Return that one lattice step of a result is needed, from where the tile begins."""
        need: Need = {}
        for dim, frame in enumerate(self.layouts[result]):
            for number, factor in enumerate(frame):
                if isinstance(factor, Space):
                    scale = Fraction(factor.step, self.sizes.lattice[factor.axis])
                    first = int(starts[factor.axis] * scale // 1)
                    last = -int(-(starts[factor.axis] + self.sizes.lattice[factor.axis]) * scale // 1) - 1
                    need[dim, number] = Span((first, last))
                elif isinstance(factor, Opaque):
                    need[dim, number] = Span(boundless=Boundless(result, "its layout is not known"))
        return need

    def _axis_by_axis(self, source: Node, need: Need | None) -> list[Reached]:
        found: list[Reached] = [Reached(None, None) for _ in self.sizes.lattice]
        for (dim, number), span in (need or {}).items():
            factor = self.layouts[source][dim][number]
            if not isinstance(factor, Space):
                continue
            boundless = span.boundless
            if boundless is None and span.back is not None:
                node = self.flips[0] if self.flips else source
                boundless = Boundless(node, "the opposite side is read: what was flipped is not turned back")
            found[factor.axis] = Reached(span.fore, boundless)
        return found


@dataclass(slots=True)
class Trail:
    """Remembers, for each value and axis, which reader made an end of its interval what it is."""

    first: dict[tuple[Node, int], tuple[int, Node | None]] = field(default_factory=dict)
    last: dict[tuple[Node, int], tuple[int, Node | None]] = field(default_factory=dict)
    layouts: Mapping[Node, Layout] = field(default_factory=dict)

    def note(self, node: Node, need: Need, reader: Node | None) -> None:
        """Take over what widens an interval."""
        for (dim, number), span in need.items():
            factor = self.layouts[node][dim][number]
            if not isinstance(factor, Space) or span.fore is None:
                continue
            key = node, factor.axis
            if key not in self.first or span.fore[0] < self.first[key][0]:
                self.first[key] = span.fore[0], reader
            if key not in self.last or span.fore[1] > self.last[key][0]:
                self.last[key] = span.fore[1], reader

    def steps(self, source: Node, axis: int, *, before: bool) -> list[Step]:
        """Return the nodes from a source to a result along which its interval became as wide as it is."""
        ends = self.first if before else self.last
        steps, node = [], source
        while (node, axis) in ends:
            interval = self.first[node, axis][0], self.last[node, axis][0]
            steps.append(Step(node, interval))
            reader = ends[node, axis][1]
            if reader is None:
                break
            node = reader
        return steps


def between(sources: Collection[Node], results: Sequence[Node]) -> list[Node]:
    """Return the nodes that results are computed from, back to the sources, in the order of the graph."""
    found: set[Node] = set()
    pending = list(results)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            pending += [] if node in sources else node.all_input_nodes
    return sorted(found)


def depends(node: Node, known: Container[Node]) -> bool:
    """Tell whether a node's values depend on those of nodes that are known to depend on the image's."""
    if node.op != "call_function":
        return node.op in ("call_module", "call_method") and any(n in known for n in node.all_input_nodes)
    schema = getattr(node.target, "_schema", None)
    if schema is not None and schema.name.partition("::")[2] in _SHAPE_ONLY:
        return False
    if node.target is operator.getitem:
        return node.args[0] in known
    return any(n in known for n in node.all_input_nodes)


def derive(nodes: Sequence[Node], sources: Collection[Node], sizes: Sizes) -> Derived:
    """Read a graph.

    Args:
        nodes: of it, in order, with the tensors that they stand for; nothing is written in place.
        sources: the image, or maps that lie over it.
        sizes: samples on a lattice on which extents are lines.
    """
    layouts: dict[Node, Layout] = {}
    readings: dict[Node, Sequence[Reading]] = {}
    order: list[Node] = []
    wraps: list[Node] = []
    for node in nodes:
        if node in sources:
            layouts[node] = tuple(frame_of(n, sizes) for n in sizes.shape(_tensor(node)))
            continue
        if node.op == "output" or not depends(node, layouts):
            continue
        if isinstance(node.meta.get("val"), list | tuple):
            layouts[node] = ()  # of several: each is read where it is taken out
            continue
        call = call_of(node, sizes)
        order.append(node)
        readings[node] = _read(call, layouts)
        layouts[node] = _layout(call, readings[node], layouts)
        if _is_rolled(call, layouts) or _is_circular(call):
            wraps.append(node)
    flips = tuple(node for node in order if call_of(node, sizes).name == "flip")
    stretches = tuple(node for node in order if _is_stretched(call_of(node, sizes)))
    return Derived(sizes, layouts, readings, tuple(order), tuple(wraps), flips, stretches)


def _is_stretched(call: Call) -> bool:
    try:
        return is_stretched(call)
    except Unsized:  # extents that no rule knows are unbounded, which is said
        return False


def _read(call: Call, layouts: Mapping[Node, Layout]) -> list[Reading]:
    """Return what a call reads; what no rule reads is read whole."""
    rule, readings, why = rule_of(call), [], "no rule knows this operator"
    if rule is not None:
        try:
            readings = [r for r in rule(call) if r.operand in layouts]
            why = "what it reads of this operand is not known"
        except (Unsized, KeyError, IndexError, TypeError, ValueError, StopIteration) as error:
            why = f"its rule does not know this form of it ({error})"
    read = {r.operand for r in readings}
    return [
        *readings,
        *(_Everything(n, why) for n in _operands(call.origin) if n in layouts and n not in read),
    ]


@dataclass(frozen=True, slots=True)
class _Everything:
    """The reading of what is read in a way that nobody knows."""

    operand: Node
    why: str

    def frames(self, layout: Layout, call: Call) -> Mapping[int, Frame]:
        """Return nothing."""
        return {}

    def carried(self, need: Need, result: Layout, layout: Layout, call: Call) -> Need:
        """Return that all of it is needed."""
        boundless = Boundless(call.origin, self.why)
        return {
            (dim, number): span
            for dim, frame in enumerate(layout)
            for number, span in whole(frame, boundless).items()
        }


def _layout(call: Call, readings: Sequence[Reading], layouts: Mapping[Node, Layout]) -> Layout:
    frames: dict[int, Frame] = {}
    for reading in readings:
        for dim, frame in reading.frames(layouts[reading.operand], call).items():
            frames.setdefault(dim, frame)
    return tuple(frames.get(dim) or frame_of(extent, call.sizes) for dim, extent in enumerate(call.shape))


def _operands(node: Node) -> Iterator[Node]:
    yield from dict.fromkeys(nodes_in((node.args, node.kwargs)))


def _is_rolled(call: Call, layouts: Mapping[Node, Layout]) -> bool:
    """Tell whether a call moves a map around its border; channels have none."""
    if call.name != "roll":
        return False
    layout, given = layouts[call.tensor("self")], call.get("dims", ())
    dims = [call.dim(d, len(layout)) for d in (given if isinstance(given, list | tuple) else [given])]
    return any(not is_plain(layout[dim]) for dim in dims or range(len(layout)))


def _is_circular(call: Call) -> bool:
    return call.name == "_pad_circular" or (call.name == "pad" and call.get("mode") == "circular")


def _tensor(node: Node) -> Tensor:
    tensor = tensor_of(node)
    if tensor is None:
        raise Unsized(f"{node} is no tensor")
    return tensor


def _add(needs: dict[Node, Need], node: Node, need: Need, reader: Node | None, trail: Trail | None) -> None:
    mine = needs.setdefault(node, {})
    for place, span in need.items():
        mine[place] = united(mine.get(place), span)
    if trail is not None:
        trail.note(node, need, reader)
