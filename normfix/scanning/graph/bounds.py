"""What a captured graph says of sizes: the conditions under which it is the network, and what it leaves open.

A network that asks `if width > 300` is another network above 300 pixels. No statistic and no dye shows that, and
no tile tried here may be large enough; the guards that torch.export keeps with a graph do. Of these the ones that
the network's own code asks for count: those of torch's are about memory layout and kernels, but for where a slice or a
part ends. `min(512, n)` and a slice of fixed length leave no guard: their sizes are minima and maxima, and which
argument is taken is a condition too. A largest extent that the graph holds for is one, whoever asks.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.fx import Node

from normfix.errors import NormfixError
from normfix.networks.frames import OURS, TORCH, innermost, line_name
from normfix.networks.graph.capture import asked_as_text, image_of
from normfix.networks.graph.extents import is_sized, laid, space_of
from normfix.networks.graph.factors import factors, is_tensor, numbers_of
from normfix.networks.graph.operators import name_of, taken_by
from normfix.networks.releases import values_of
from normfix.records.sizes import Condition
from normfix.scanning.graph.formulas import NoText, text_of
from normfix.scanning.graph.shifts import shifts

__all__ = ["AXES", "KERNELS", "SizeLook", "read_sizes", "varied"]

AXES = {3: "L", 4: "HW", 5: "DHW"}
"""Names of the spatial axes, by the image's rank."""

_MEANT = frozenset({"slice_forward", "split", "_tensor_min_max"})
"""Functions of torch's whose questions are about what is computed.

Where a slice ends, into how many parts a map falls, which number is the larger.
"""
_ENDING = "_compute_slice_index"
"""The one that asks where a slice ends in later releases: of one extent alone that is its limit as well."""
_CALLING = frozenset({"_call_impl", "_wrapped_call_impl", "_returned"})
"""Functions of torch's and of ours that call a network's code, and ask for no size themselves.

Torch passes over code without a file, as of `python -c` or exec, to whoever called it.
"""
_CHOOSING = frozenset({"conv"})
"""Functions of torch's that ask for a size to choose one of several kernels, which all compute the same."""
_EXTENTS = (8, 12, 16, 24, 40, 64, 100, 160, 250, 400, 640, 1000, 1600, 2500, 4000, 10_000, 100_000, 1 << 20)
"""Extents at which a condition is asked whether any image breaks it."""
_STEADY = frozenset(
    {
        *("scalar_tensor", "full", "full_like", "fill", "copy", "_to_copy", "to", "detach", "clone", "alias"),
        *("lift_fresh_copy", "view", "_unsafe_view", "reshape", "expand", "unsqueeze", "squeeze", "permute"),
        *("transpose", "select", "slice", "stack", "cat", "add", "sub", "rsub", "mul", "div", "neg", "sum"),
        *("mean", "prod", "cumsum", "pow", "square", "sqrt", "rsqrt", "reciprocal", "exp", "log", "log2"),
        *("log10", "log1p"),
    }
)
"""Operators of numbers that change with the numbers throughout, so that one size shows what another does."""
_KNOWN = frozenset({"aten", "prims", "normfix", "torchvision"})
"""Namespaces of operators that treat all sizes alike."""
KERNELS = 1 << 31
"""Elements from which on kernels count with longer integers: what asks for as many is about them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SizeLook:
    """The conditions of a graph that some image breaks, and why they do not tell everything; () where they do.

    `lattice` are the conditions that only repeat with the size, `built` say what a number was that is computed from the
    size and was built into the graph, `numbers` what one was that the graph computes and that values are made of.
    """

    conditions: tuple[Condition, ...]
    unknown: tuple[str, ...]
    lattice: tuple[Condition, ...] = ()
    built: tuple[Condition, ...] = ()
    numbers: tuple[Condition, ...] = ()


def read_sizes(program: ExportedProgram) -> SizeLook:
    """Read the guards of a captured graph, the minima and maxima among its sizes, and maps laid over the image.

    Args:
        program: of one image (N, C, *space).
    """
    image = image_of(program)
    shape = image.meta["val"].shape
    letters = ("N", "C", *AXES[len(shape)])
    free = {dim: n.node for dim, n in enumerate(shape) if not isinstance(n, int) and n.node.expr.is_Symbol}
    fixed = [letters[dim] for dim in range(2, len(shape)) if dim not in free]
    unknown = [f"the captured graph has one extent along {' and '.join(fixed)}"] if fixed else []
    unknown += [f"the size is asked for as text or as a key at {line}" for line in asked_as_text(program)]
    unknown += [f"what {name} does at other sizes is not known" for name in _foreign(program)]
    found: dict[_Kind, dict[Condition, None]] = {kind: {} for kind in _Kind}
    numbers: dict[Condition | None, None] = {}
    if free:
        reading = _Reading.of(free, letters)
        found[_Kind.BRANCH].update({Condition(text=f"{a} == {b}", line=""): None for a, b in reading.tied})
        for formula, line in (*reading.asked(), *_chosen(program, reading), *_answered(program, reading)):
            try:
                kind, condition = reading.condition(formula, line)
            except _Open as error:
                unknown.append(f"{error}, at {line or 'an unknown line'}")
                continue
            found[kind][condition] = None
        found[_Kind.BRANCH].update(dict.fromkeys(reading.limits(found[_Kind.BRANCH])))
        for formula, line in _numbers(program, image):
            try:
                numbers[reading.number(formula, line)] = None
            except _Open as error:
                unknown.append(f"{error}, at {line or 'an unknown line'}")
                numbers.update(dict.fromkeys(reading.sizes(formula, line)))
        found[_Kind.LATTICE].update(dict.fromkeys(_moved(program, reading)))
        unknown += [f"a number made of the size chooses at {line}" for line in _choices(program, image)]
    built = [f"a number computed from the size is built in: {c.text}" for c in found[_Kind.BUILT]]
    placed = [f"a map is laid over the image at {line}" for line in _placed(program, image)]
    return SizeLook(
        conditions=tuple(found[_Kind.BRANCH]),
        unknown=tuple(dict.fromkeys((*unknown, *built, *placed))),
        lattice=tuple(found[_Kind.LATTICE]),
        built=tuple(found[_Kind.BUILT]),
        numbers=tuple(condition for condition in numbers if condition is not None),
    )


class _Kind(Enum):
    """What a guard is: true whatever the size, a branch, the same again at a multiple, or a number built in."""

    TRIVIAL = auto()
    BRANCH = auto()
    LATTICE = auto()
    BUILT = auto()


class _Open(ValueError):  # noqa: N818 - a finding, not a fault
    """A guard that is no condition: the sizes for which the graph holds are not known from it."""


@dataclass(frozen=True, slots=True)
class _Reading:
    """The symbols of an image's extents, their names, and what they were when the graph was captured."""

    names: Mapping[Any, str]
    extents: Mapping[str, int]
    tied: tuple[tuple[str, str], ...]
    environment: Any

    @classmethod
    def of(cls, free: Mapping[int, Any], letters: Sequence[str]) -> _Reading:
        environment = next(iter(free.values())).shape_env
        names: dict[Any, str] = {}
        tied = []
        for dim, node in free.items():
            if node.expr in names:
                tied.append((names[node.expr], letters[dim]))
            names.setdefault(node.expr, letters[dim])
        known = values_of(environment)
        extents = {name: int(known[symbol]) for symbol, name in names.items()}
        return cls(names, extents, tuple(tied), environment)

    def asked(self) -> Iterator[tuple[Any, str]]:
        """Yield the guards that are about what is computed, with the line that asks where it is not torch's own."""
        for guard in self.environment.guards:
            frame = _frame(guard)
            file, name = str(getattr(frame, "filename", "")), getattr(frame, "name", "")
            if name in _CALLING and file.startswith((TORCH, OURS)):
                yield guard.expr, ""
            elif file.startswith(TORCH):
                ends = name == _ENDING and len(guard.expr.free_symbols) > 1
                if name in _MEANT or ends or _is_of_one_number(guard.expr):
                    yield guard.expr, ""
            elif not file.startswith(OURS):
                yield guard.expr, line_name(file, frame.lineno) if frame else ""
            elif type(guard.expr).__name__ == "Equality":
                # torch's own as well, asked from where we call it; an argument that must be a number is built in
                yield guard.expr, ""

    def limits(self, known: Collection[Condition]) -> Iterator[Condition]:
        """Yield the largest extents that the graph holds for and that no condition known already says."""
        chosen = [g.expr.args for g in self.environment.guards if getattr(_frame(g), "name", "") in _CHOOSING]
        for symbol, name in self.names.items():
            upper = self.environment.var_to_range[symbol].upper
            if name == "N" or not upper.is_Integer or int(upper) >= KERNELS - 1 or (symbol, upper) in chosen:
                continue
            # a condition and its negation may differ by one
            beyond = {**self.extents, name: int(upper) + 2}
            if all(condition.holds(beyond) for condition in known):
                yield Condition(text=f"{name} <= {int(upper)}", line="")

    def condition(self, formula: Any, line: str) -> tuple[_Kind, Condition]:
        """Return the condition that a formula is, and of which kind.

        Raises:
            _Open: it has no text.
        """
        formula = formula.subs(self.environment.replacements)
        symbols = formula.free_symbols
        if not symbols:
            return _Kind.TRIVIAL, Condition(text="0 == 0", line=line)
        if not symbols <= set(self.names):
            raise _Open("a size depends on values")
        try:
            condition = Condition(text=text_of(formula, self.names), line=line)
            extents = {self.names[symbol]: self.extents[self.names[symbol]] for symbol in symbols}
            return self._kind(formula, condition, extents), condition
        except (NoText, NormfixError) as error:
            raise _Open("a size is computed by what has no formula, or a long one") from error

    def number(self, formula: Any, line: str) -> Condition | None:
        """Return the condition that a formula has the value that it had; None for what is the same at every size.

        Raises:
            _Open: it has no text.
        """
        formula = formula.subs(self.environment.replacements)
        if not formula.free_symbols & set(self.names):
            return None
        value = formula.subs({symbol: self.extents[name] for symbol, name in self.names.items()})
        try:
            condition = Condition(text=f"{text_of(formula, self.names)} == {text_of(value, {})}", line=line)
            if condition.holds(self.extents):
                return condition
        except (NoText, NormfixError):
            pass
        raise _Open("a number is computed from the size by what has no formula")

    def sizes(self, formula: Any, line: str) -> Iterator[Condition]:
        """Yield for each of a formula's extents the condition that it is what it was."""
        symbols = formula.subs(self.environment.replacements).free_symbols
        names = (name for symbol, name in self.names.items() if symbol in symbols)
        yield from (Condition(text=f"{name} == {self.extents[name]}", line=line) for name in names)

    def _kind(self, formula: Any, condition: Condition, extents: Mapping[str, int]) -> _Kind:
        if not condition.holds(extents):  # asked on the way to what was asked in the end
            return _Kind.TRIVIAL
        if condition.repeats(extents):
            return _Kind.LATTICE
        if type(formula).__name__ == "Equality" and any(side.is_number for side in formula.args):
            return _Kind.BUILT
        if any(abs(int(number)) >= KERNELS - 1 for number in formula.atoms() if number.is_Integer):
            return _Kind.TRIVIAL
        broken = _differs(condition) or _is_broken(condition, extents)
        return _Kind.BRANCH if broken else _Kind.TRIVIAL


def _is_of_one_number(formula: Any) -> bool:
    """Tell whether it says that an extent is not one number: maps did not fit, which the network may catch."""
    if type(formula).__name__ != "Unequality":
        return False
    return any(side.is_Symbol for side in formula.args) and any(
        side.is_Integer and int(side) > 1 for side in formula.args
    )


def _frame(guard: Any) -> Any:
    """Return where torch was asked a question about a size, None if it does not say."""
    return getattr(getattr(guard, "sloc", None), "framework_loc", None)


def _differs(condition: Condition) -> bool:
    """Tell whether it excludes single sizes, which no list of sizes may hold."""
    return " != " in condition.text


def varied(names: Collection[str]) -> Iterator[dict[str, int]]:
    """Yield extents of images that are long or short along one axis, along all, or along all but one."""
    for n in _EXTENTS:
        yield dict.fromkeys(names, n)
        for name in names:
            yield {name: n}
            yield {**dict.fromkeys(names, n), name: _EXTENTS[0]}


def _is_broken(condition: Condition, extents: Mapping[str, int]) -> bool:
    """Tell whether an image breaks it that is larger along one axis, along all, or along all but one."""
    sizes = [{**extents, **size} for size in varied(extents)]
    return any(condition.excludes({**size, **{k: 1 for k in size if k == "N"}}) for size in sizes)


def _chosen(program: ExportedProgram, reading: _Reading) -> Iterator[tuple[Any, str]]:
    """Yield which argument of each minimum and maximum among the sizes is taken."""
    from torch.utils._sympy.functions import Max, Min  # which imports sympy

    known = {symbol: reading.extents[name] for symbol, name in reading.names.items()}
    seen: set[Any] = set()
    for node in program.graph.nodes:
        for formula in _sizes_of(node.meta.get("val")):
            for choice in formula.atoms(Max, Min) - seen:
                seen.add(choice)
                values = {arg: arg.subs(known) for arg in choice.args}
                if not all(value.is_number for value in values.values()):
                    continue
                taken = (max if isinstance(choice, Max) else min)(values, key=values.__getitem__)
                for other in choice.args:
                    if other is not taken:
                        yield (other <= taken if isinstance(choice, Max) else taken <= other), _line(node)


def _answered(program: ExportedProgram, reading: _Reading) -> Iterator[tuple[Any, str]]:
    """Yield what questions about the size were answered that are part of the arithmetic, such as `y * (w == 50)`."""
    known = {symbol: reading.extents[name] for symbol, name in reading.names.items()}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if not isinstance(value, torch.SymBool) or all(map(_is_question, node.users)):
            continue
        formula = value.node.expr.subs(reading.environment.replacements)
        answer = formula.subs(known)
        if not answer.free_symbols:
            yield (formula if bool(answer) else ~formula), _line(node)


def _foreign(program: ExportedProgram) -> Iterator[str]:
    """Yield the names of the operators that are of another library than torch, whose code no graph shows."""
    targets = (node.target for node in program.graph.nodes if isinstance(node.target, OpOverload))
    yield from dict.fromkeys(str(target) for target in targets if target.namespace not in _KNOWN)


def _numbers(program: ExportedProgram, image: Node) -> Iterator[tuple[Any, str]]:
    """Yield the formulas of the numbers that are computed from the size and that values are made of, with their lines.

    They are arguments such as 1 + w // 64 in `y * (1 + w // 64)`, and what sums and counts make of maps that
    follow the image's extent and not its values, as `torch.ones(w).sum()` does.
    """
    moving, sized, space = _moving(program, image), set[Node](), space_of(image)
    for node in program.graph.nodes:
        if node.op != "call_function" or not is_tensor(node):
            continue
        if node not in moving:
            if is_sized(node, space):
                sized.add(node)
            else:
                counted = (source.meta["val"] for source in taken_by(node) if source in sized)
                yield from ((extent, _line(node)) for value in counted for extent in _sizes_of(value))
        yield from ((formula, _line(node)) for formula in factors(node))


def _choices(program: ExportedProgram, image: Node) -> Iterator[str]:
    """Yield the lines at which tensors of numbers made of the size do what is not even: they compare, round or choose.

    As in `torch.tensor(w) == 50`. Where that jumps no graph says, and what is tried need not be there.
    """
    nodes = [node for node in program.graph.nodes if node.op == "call_function"]
    for node in numbers_of(nodes, _moving(program, image), space_of(image), laid(program.graph, image)):
        if name_of(node).rstrip("_") not in _STEADY:
            yield _line(node)


def _moving(program: ExportedProgram, image: Node) -> set[Node]:
    """Return the nodes whose values depend on pixels."""
    moving = {image}
    for node in program.graph.nodes:
        if node.op == "call_function" and not moving.isdisjoint(taken_by(node)):
            moving.add(node)
    return moving


def _moved(program: ExportedProgram, reading: _Reading) -> Iterator[Condition]:
    """Yield by how much maps are padded, cut or moved where that grows with the size.

    A border may look the same from some width on, so that long strips do not show it. Padding to multiples repeats, and
    is none.
    """
    for node in program.graph.nodes:
        for formula in shifts(node):
            try:
                found = [reading.number(formula, _line(node))]
            except _Open:  # which it is at each size is tried
                found = [*reading.sizes(formula, _line(node))]
            yield from (c for c in found if c is not None and not c.repeats(reading.extents))


def _is_question(node: Node) -> bool:
    """Tell whether a node asks further or asserts, and computes nothing itself."""
    return isinstance(node.meta.get("val"), torch.SymBool) or name_of(node).startswith("_assert")


def _sizes_of(value: Any) -> Iterator[Any]:
    """Yield the formulas of a node's extents, or of the number that it is."""
    for leaf in value if isinstance(value, list | tuple) else (value,):
        for extent in leaf.shape if isinstance(leaf, Tensor) else (leaf,):
            if isinstance(extent, torch.SymInt | torch.SymFloat):
                yield extent.node.expr


def _placed(program: ExportedProgram, image: Node) -> tuple[str, ...]:
    """Return the lines where a map is made that follows the image's extent and not its values, and varies over it."""
    return tuple(dict.fromkeys(line for line in map(_line, laid(program.graph, image)) if line))


def _line(node: Node) -> str:
    return innermost(node.meta.get("stack_trace"))
