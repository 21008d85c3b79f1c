"""What may stand in the source of a TorchScript archive, since torch runs and reuses parts of it while it reads it.

Defaults of arguments, constants of classes and defaults of fields are expressions that torch evaluates as it reads
them, with any operator; names of attributes are written into Python source by torch.fx, as they are. So the source is
parsed first, without running it: it is of Python's grammar. Both parsers see the same, since only printable characters
of ASCII are taken, as torch writes them.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator

__all__ = ["objection"]

_PRINTABLE = re.compile(rb"[ -~\n]*")
_NAME = re.compile(r"[\w -]+", re.ASCII)
_MAKERS = frozenset({"annotate", "float", "torch.device"})
"""What torch writes a literal by: an empty list with its kind, an infinite number, a device."""
_PLAIN = (
    *(ast.Constant, ast.List, ast.Tuple, ast.Dict, ast.Name, ast.Attribute, ast.Subscript),
    *(ast.UnaryOp, ast.USub, ast.Load),
)


def objection(source: bytes) -> str:
    """Return what of a source would run or be reused while torch reads it; nothing if there is no such thing.

    Example:
        >>> objection(b"def f(x: Tensor, n: int=3) -> Tensor:\\n  return x\\n")
        ''
        >>> objection(b"def f(x: Tensor=torch.from_file('a', True, 1)) -> Tensor:\\n  return x\\n")
        "an expression at line 1 that torch runs as it reads it (torch.from_file('a', True, 1))"
    """
    if not _PRINTABLE.fullmatch(source):
        return "characters that torch does not write"
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError):
        return "source that is not of Python's grammar"
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef):
            name = next((n for n in _texts(node) if not _NAME.fullmatch(n)), None)
            if name is not None:
                return f"an attribute called {name[:80]!r}"
        for value in _evaluated(node):
            if not _is_literal(value):
                met = ast.unparse(value)[:80]
                return f"an expression at line {value.lineno} that torch runs as it reads it ({met})"
    return ""


def _evaluated(node: ast.AST) -> Iterator[ast.expr]:
    """Yield the expressions of a node that torch evaluates when it reads it."""
    if isinstance(node, ast.arguments):
        yield from (default for default in (*node.defaults, *node.kw_defaults) if default is not None)
    elif isinstance(node, ast.ClassDef):
        for statement in node.body:
            if isinstance(statement, ast.Assign | ast.AnnAssign) and statement.value is not None:
                yield statement.value


def _texts(node: ast.ClassDef) -> Iterator[str]:
    """Yield the names of attributes that a class writes as texts, since they are none of Python's."""
    for statement in node.body:
        if isinstance(statement, ast.Assign):
            for target in statement.targets:
                yield from (
                    n.value
                    for n in ast.walk(target)
                    if isinstance(n, ast.Constant) and isinstance(n.value, str)
                )


def _is_literal(value: ast.expr) -> bool:
    """Tell whether an expression only writes a value down."""
    for node in ast.walk(value):
        if isinstance(node, ast.Call):
            if ast.unparse(node.func) not in _MAKERS:
                return False
        elif not isinstance(node, _PLAIN):
            return False
    return True
