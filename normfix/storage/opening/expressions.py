"""Expressions in a program: arithmetic on sizes, written anew from what was parsed.

torch evaluates them: size expressions by sympy, which evaluates text as Python, and guards as the body of a function.
So nothing is handed on as it stood: an expression is parsed, every node of it is looked at, and what torch gets is
written from the tree.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Callable

__all__ = ["guard", "size_expression"]

_NODES = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Constant, ast.Name, ast.Call),
    *(ast.operator, ast.unaryop, ast.boolop, ast.cmpop, ast.expr_context, ast.keyword, ast.Tuple),
)
_NODES_OF_GUARDS = (*_NODES, ast.Subscript, ast.Attribute)
# fmt: off
_CALLS = frozenset((  # functions on sizes that torch.export writes
    "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "TruncToInt", "FloorToInt",
    "CeilToInt", "ModularIndexing", "IntTrueDiv", "FloatTrueDiv", "ToFloat", "RoundToInt", "Where",
    "PowByNatural", "FloatPow",
    "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Piecewise", "floor", "ceiling", "Float",
    "Identity", "size", "max", "min", "len", "Symbol", "Integer", "Rational", "Add", "Mul", "Pow",
    "sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite", "trunc",
    "Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan",
))
# fmt: on
_POWERS_OF = frozenset({"Pow", "PowByNatural", "FloatPow"})
_LARGEST_POWER = 8
_SLOW = frozenset({"Max", "Min", "Mod", "PythonMod", "ModularIndexing", "Piecewise", "Where"})
"""What sympy simplifies in a time that grows fast with their number."""
_NAMES = re.compile(r"[a-z]{1,4}\d{1,6}|L|torch|math|True|False|oo|int_oo|inf|nan|args", re.ASCII)
_WORD = re.compile(r"[A-Za-z]\w{0,99}|_?\w{0,99}", re.ASCII)
_SYMBOL = re.compile(r"[a-z]{1,8}\d{1,6}|-?\d{1,20}(\.\d{1,30})?(e-?\d{1,2})?", re.ASCII)
"""A symbol, or the digits of a Float."""
_OPTIONS = frozenset(
    {"positive", "negative", "nonnegative", "nonzero", "zero", "integer", "real", "finite", "precision"}
)
_MOST_DIGITS = 64
_LONGEST, _MOST_POWERS, _MOST_SLOW, _DEEPEST = 2000, 4, 16, 60


def size_expression(text: str) -> str | None:
    """Return an expression for sympy, written anew; None if it is more than arithmetic on sizes.

    Example:
        >>> size_expression("Mul(Integer(2), Symbol('s1', positive=True, integer=True))")
        "Mul(Integer(2), Symbol('s1', positive=True, integer=True))"
        >>> size_expression("__import__('os').getcwd()")
    """
    return _rewritten(text, _NODES, _is_symbolic)


def guard(text: str) -> str | None:
    """Return a condition on the sizes of inputs, written anew; None if it is more than that."""
    return _rewritten(text, _NODES_OF_GUARDS, _is_of_inputs)


def _rewritten(text: str, nodes: tuple[type, ...], fits: Callable[[ast.AST], bool]) -> str | None:
    if len(text) > _LONGEST or text.count("(") > _LONGEST // 4:
        return None
    try:
        tree = ast.parse(text.strip(), mode="eval")
        found = list(ast.walk(tree))
        plain = all(isinstance(node, nodes) and _is_harmless(node) and fits(node) for node in found)
        if not plain or _count(found, _POWERS_OF) + _operators(found) > _MOST_POWERS:
            return None
        if _count(found, _SLOW) > _MOST_SLOW or _depth(tree.body) > _DEEPEST:
            return None
        return ast.unparse(tree)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None


def _count(nodes: list[ast.AST], names: frozenset[str]) -> int:
    return sum(isinstance(node, ast.Name) and node.id in names for node in nodes)


def _operators(nodes: list[ast.AST]) -> int:
    return sum(isinstance(node, ast.Pow) for node in nodes)


def _depth(node: ast.AST) -> int:
    return 1 + max((_depth(child) for child in ast.iter_child_nodes(node)), default=0)


def _is_symbolic(node: ast.AST) -> bool:
    """Tell whether a node may stand where sympy reads: texts are the names of symbols, nothing has attributes."""
    match node:
        case ast.Constant(value=str(text)):
            return bool(_SYMBOL.fullmatch(text))
        case ast.BinOp(left=base, op=ast.Pow(), right=power):
            return _is_whole(power) or not _holds_numbers(base)
        case ast.Call(func=ast.Name(id=name), args=[base, power]) if name in _POWERS_OF:
            return _is_whole(power) or not _holds_numbers(base)
        case ast.Call(func=ast.Name()):
            return True
        case ast.Call():
            return False
        case _:
            return True


def _holds_numbers(tree: ast.AST) -> bool:
    """Tell whether an expression is of more than symbols: sympy factors a number to take its root, however long."""
    numbers = (node.value for node in ast.walk(tree) if isinstance(node, ast.Constant))
    return any(not isinstance(number, bool | str) for number in numbers) or any(
        isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "Float"
        for node in ast.walk(tree)
    )


def _is_of_inputs(node: ast.AST) -> bool:
    """Tell whether a node may stand where inputs are meant: texts name inputs, attributes are sizes."""
    match node:
        case ast.Constant(value=str(text)):
            return bool(_WORD.fullmatch(text)) and "__" not in text
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            return name.startswith("sym_") and name in _CALLS
        case ast.Attribute(value=ast.Name(id="math"), attr=name):
            return name == "trunc"
        case ast.Attribute(attr=name):
            return name in ("size", "shape")
        case _:
            return True


def _is_harmless(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id=name), args=[_, power]) if name in _POWERS_OF:
            return _is_small(power)
        case ast.Call(func=ast.Name(id=name)) if name in _POWERS_OF:
            return False
        case ast.Call(func=ast.Name(id="Float"), args=[_, _, *_]):
            return False
        case ast.keyword(arg=name, value=ast.Constant(value=int(value))):
            return name in _OPTIONS and abs(value) <= _MOST_DIGITS
        case ast.keyword():
            return False
        case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
            return name in _CALLS
        case ast.Call():
            return False
        case ast.Name(id=name):
            return name in _CALLS or bool(_NAMES.fullmatch(name))
        case ast.BinOp(op=ast.Pow(), right=power):
            return _is_small(power)
        case ast.BinOp(op=ast.LShift() | ast.RShift() | ast.MatMult()):
            return False
        case ast.Constant(value=str()):
            return True
        case ast.Constant(value=value):
            return isinstance(value, int | float) and abs(value) < 2**63
        case _:
            return True


def _is_small(power: ast.expr) -> bool:
    """Tell whether an exponent is a small number: n, 0.5, p / q, Integer(n), Rational(p, q) or Float('0.5')."""
    match power:
        case ast.Call(func=ast.Name(id="Rational"), args=[above, below], keywords=[]):
            return _is_small_number(above, int) and _is_small_number(below, int)
        case ast.BinOp(left=above, op=ast.Div(), right=below):
            return _is_small_number(above, int) and _is_small_number(below, int)
        case ast.Call(func=ast.Name(id="Float"), args=[ast.Constant(value=str(text))]):
            return bool(_SYMBOL.fullmatch(text)) and text[0].isdigit() and abs(float(text)) <= _LARGEST_POWER
        case _:
            return _is_whole(power) or _is_small_number(power, float)


def _is_whole(power: ast.expr) -> bool:
    """Tell whether an exponent, n or Integer(n), is a small whole number."""
    if isinstance(power, ast.Call) and len(power.args) == 1 and not power.keywords:
        power = power.args[0]
    return _is_small_number(power, int)


def _is_small_number(tree: ast.expr, kind: type[int] | type[float]) -> bool:
    try:
        value = ast.literal_eval(tree)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return isinstance(value, kind) and abs(value) <= _LARGEST_POWER
