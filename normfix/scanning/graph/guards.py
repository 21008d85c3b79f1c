"""The guards that a stored program keeps, as conditions, and what each of them is held for.

torch.export stores guards as text, `L['image'].size()[2] // 2 != 1`, without the line that asked. So a guard is judged
by what it says alone: it must be stated among the sizes that a scan speaks for, or exclude no image that counts.
"""

from __future__ import annotations

import ast
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from torch.export import ExportedProgram

from normfix.errors import NormfixError
from normfix.networks.graph.capture import image_of
from normfix.records.certificates import Guard
from normfix.records.sizes import Condition, ProvedSizes
from normfix.scanning.graph.bounds import AXES, KERNELS, read_sizes, varied

__all__ = ["guards_of"]

_MIDDLE = 64
_FUNCTIONS = {"sym_max": "max", "sym_min": "min", "sym_float": "", "sym_int": "", "trunc": "trunc"}
"""What torch's functions of sizes are called in conditions; "" does nothing to a size."""


def guards_of(
    program: ExportedProgram, sizes: ProvedSizes, smallest: Sequence[int] | None
) -> tuple[Guard, ...]:
    """Return the guards of a program with the role of each, and then the conditions that it has no guard for.

    Args:
        program: of one image (N, C, *space), as read from a file.
        sizes: what the scan says of sizes.
        smallest: extents of the smallest image that counts.
    """
    rank = image_of(program).meta["val"].dim()
    letters = ("N", "C", *AXES[rank])
    images = tuple(_images(letters[2:], smallest or (1,) * (rank - 2)))
    texts = dict.fromkeys(text for guard in _stored(program) for text in _conditions(guard, letters))
    texts.update(
        dict.fromkeys((*_limits(program, letters), *(c.text for c in read_sizes(program).conditions)))
    )
    roles = {text: _role(text, sizes, images) for text in texts}
    said = {_shape_of(text) for text in texts}
    stated = [(c.text, "condition") for c in sizes.conditions] + [(c.text, "crossed") for c in sizes.crossed]
    roles.update({text: role for text, role in stated if _shape_of(text) not in said})
    return tuple(Guard.from_json({"text": text, "role": role}) for text, role in roles.items())


def _stored(program: ExportedProgram) -> Sequence[str]:
    """Return the guards as torch stores them; before it did, there are none."""
    found: Sequence[str] = getattr(program, "_guards_code", None) or ()
    return found


def _limits(program: ExportedProgram, letters: Sequence[str]) -> Iterator[str]:
    """Yield the largest extents of images that a program takes, where it has any."""
    for letter, extent in zip(letters[2:], image_of(program).meta["val"].shape[2:], strict=True):
        known = None if isinstance(extent, int) else program.range_constraints.get(extent.node.expr)
        if known is not None and getattr(known.upper, "is_Integer", False):
            yield f"{letter} <= {int(known.upper)}"


def _role(text: str, sizes: ProvedSizes, images: Sequence[Mapping[str, int]]) -> str:
    shape = _shape_of(text)
    for role, stated in (("condition", sizes.conditions), ("crossed", sizes.crossed)):
        if any(_shape_of(condition.text) == shape for condition in stated):
            return role
    try:
        return _judged(Condition(text=text, line=""), sizes, images)
    except NormfixError:  # no arithmetic on extents that conditions know
        return "open"


def _judged(condition: Condition, sizes: ProvedSizes, images: Sequence[Mapping[str, int]]) -> str:
    """Return what a guard is that no scan states, by what it says alone."""
    tree = ast.parse(condition.text, mode="eval").body
    numbers = [n.value for n in ast.walk(tree) if isinstance(n, ast.Constant)]
    if any(isinstance(n, int) and abs(n) >= KERNELS - 1 for n in numbers):
        return "harmless"
    if condition.repeats(images[0]):
        return "repeats"
    match tree:
        case ast.Compare(ops=[ast.NotEq()], comparators=[ast.Constant(value=0 | 1)]):
            return "single"
        case ast.Compare(ops=[ast.Eq()], comparators=[ast.Constant()]):
            return "built" if sizes.unknown else "open"
    excluded = [image for image in images if condition.excludes(image)]
    stated = (*sizes.conditions, *sizes.crossed)
    if all(any(not other.holds(image) for other in stated) for image in excluded):
        return "implied" if excluded else "harmless"
    return "open"


def _images(letters: Sequence[str], smallest: Sequence[int]) -> Iterator[dict[str, int]]:
    """Yield extents of images: those in the middle, then long or short along one axis, all, or all but one."""
    least = dict(zip(letters, smallest, strict=True))
    for size in ({}, *varied(letters)):
        yield {"N": 1, "C": 1} | {name: max(size.get(name, _MIDDLE), most) for name, most in least.items()}


def _conditions(guard: str, letters: Sequence[str]) -> Iterator[str]:
    """Yield the conditions that a guard joins by `and`, in the letters of the extents."""
    tree = _Letters(letters).visit(ast.parse(guard, mode="eval").body)
    parts = tree.values if isinstance(tree, ast.BoolOp) and isinstance(tree.op, ast.And) else [tree]
    yield from map(ast.unparse, parts)


class _Letters(ast.NodeTransformer):
    """Writes `L['image'].size()[2]` as `H`, and torch's functions as conditions have them."""

    def __init__(self, letters: Sequence[str]) -> None:
        self._letters = letters

    def visit_Subscript(self, node: ast.Subscript) -> ast.AST:
        match node:
            case ast.Subscript(
                value=ast.Call(func=ast.Attribute(attr="size")), slice=ast.Constant(value=int() as dim)
            ):
                return ast.Name(self._letters[dim])
        return node

    def visit_Call(self, node: ast.Call) -> ast.AST:
        given = [self.visit(argument) for argument in node.args]
        if not isinstance(node.func, ast.Attribute):
            return ast.Call(node.func, given, [])
        name = _FUNCTIONS.get(node.func.attr, node.func.attr)
        return ast.Call(ast.Name(name), given, []) if name else given[0]


def _shape_of(text: str) -> Any:
    """Return a condition in one form, whichever way round sums, products and comparisons are written."""
    return _form(ast.parse(text, mode="eval").body)


def _form(tree: ast.AST) -> Any:
    match tree:
        case ast.Constant(value=number):
            return repr(number)
        case ast.Name(id=name):
            return name
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as number)):
            return repr(-number)
        case ast.UnaryOp(op=ast.USub(), operand=operand):
            return _joined("*", ["-1", _form(operand)])
        case ast.BinOp(left=left, op=ast.Add(), right=right):
            return _joined("+", [_form(left), _form(right)])
        case ast.BinOp(left=left, op=ast.Sub(), right=right):
            return _joined("+", [_form(left), _joined("*", ["-1", _form(right)])])
        case ast.BinOp(left=left, op=ast.Mult(), right=right):
            return _joined("*", [_form(left), _form(right)])
        case ast.Compare(left=left, ops=[op], comparators=[right]):
            return _compared(type(op).__name__, _form(left), _form(right))
        case ast.Call(func=ast.Name(id="min" | "max" as name), args=args):
            return _joined(name, [_form(argument) for argument in args])
    return type(tree).__name__, *map(_form, ast.iter_child_nodes(tree))


def _joined(name: str, parts: Sequence[Any]) -> Any:
    """Return a sum, product or extreme whose order and brackets do not matter."""
    flat = [
        inner
        for part in parts
        for inner in (part[1:] if isinstance(part, tuple) and part[0] == name else [part])
    ]
    return name, *sorted(flat, key=repr)


def _compared(name: str, left: Any, right: Any) -> Any:
    turned = {"Gt": "Lt", "GtE": "LtE"}
    if name in turned:
        return turned[name], right, left
    return (name, *sorted((left, right), key=repr)) if name in ("Eq", "NotEq") else (name, left, right)
