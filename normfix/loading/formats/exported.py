"""Programs that torch.export.save wrote (.pt2): scanned for everything that would run on opening.

`torch.export.load` unpickles members, evaluates size expressions with sympy, compiles guards from text, resolves
operator names by attribute and loads shared libraries. So before it runs, every pickle must need tensors only,
every expression must be arithmetic, every operator one of torch's, and other kinds of members are refused.
"""

from __future__ import annotations

import ast
import io
import json
import logging
import re
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from normfix.errors import NormfixError
from normfix.loading import archives
from normfix.loading.pickles import beyond_tensors, inspect_pickle
from normfix.loading.request import Loaded, Request, unreadable

__all__ = ["open_network", "read_program", "recognises", "require_inert_program"]

_KNOWN = re.compile(
    r"(\.?data/)?(version|serialization_id)|byteorder|archive_format|archive_version|models/[\w.-]+\.json"
    r"|data/(weights/(weight_\d+|[\w.-]+_weights_config\.json)|constants/(tensor_\d+|[\w.-]+_constants_config\.json))"
    r"|data/sample_inputs/[\w.-]+\.pt|extra/[\w./-]*"
)
_OPERATORS = re.compile(
    r"torch\.ops\.(aten|prims|higher_order|torchvision)\.[\w.]+|_operator\.\w+|math\.\w+|torch\.sym_\w+"
    r"|torch\._higher_order_ops\.[\w.]+|\w*"
)
_NODES = (
    *(ast.Expression, ast.BinOp, ast.UnaryOp, ast.BoolOp, ast.Compare, ast.Subscript, ast.Constant, ast.Name),
    *(
        ast.operator,
        ast.unaryop,
        ast.boolop,
        ast.cmpop,
        ast.expr_context,
        ast.Call,
        ast.keyword,
        ast.Attribute,
        ast.Tuple,
    ),
)
# fmt: off
_CALLS = frozenset((  # functions on sizes that torch.export writes
    "Max", "Min", "Mod", "PythonMod", "FloorDiv", "CleanDiv", "CeilDiv", "TruncToInt", "FloorToInt",
    "CeilToInt", "ModularIndexing", "IntTrueDiv", "FloatTrueDiv", "ToFloat", "RoundToInt", "Where",
    "Eq", "Ne", "Lt", "Le", "Gt", "Ge", "And", "Or", "Not", "Piecewise", "floor", "ceiling",
    "Identity", "size", "max", "min", "len", "Symbol", "Integer", "Rational", "Add", "Mul", "Pow",
    "sym_max", "sym_min", "sym_int", "sym_float", "sym_not", "sym_ite",
    "Equality", "Unequality", "LessThan", "StrictLessThan", "GreaterThan", "StrictGreaterThan",
))
# fmt: on
_LONGEST, _POWERS = 2000, 4
_LARGEST = 64 << 20
"""A graph of a thousand operations takes 2 MB of JSON; reading it takes ten times its size in memory."""


def recognises(path: Path) -> bool:
    """Recognise an archive that says it is one of torch.export's."""
    return path.is_file() and "archive_format" in archives.members(path)


def open_network(path: Path, request: Request) -> Loaded:
    """Scan it and say that its conversion is another way in; a program has no modules to swap.

    Raises:
        NormfixError: NF124, after the scan's own errors.
    """
    require_inert_program(path)
    raise NormfixError(
        "NF124",
        "it is an exported program, which holds a graph and no modules. Give the network it was exported from; "
        "normfix.loading.read_program opens the program itself.",
        where=str(path),
    )


def read_program(path: Path, extra: dict[str, str] | None = None) -> torch.export.ExportedProgram:
    """Open a program that torch.export.save wrote, after a scan that nothing in it runs.

    Args:
        path: of the file.
        extra: names of extra files inside, filled with their text.

    Raises:
        NormfixError: NF101 damaged, NF102 a pickle that needs classes, NF121 built to harm.
    """
    require_inert_program(path)
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs the error that is raised below
    try:
        with path.open("rb") as file:
            return torch.export.load(io.BytesIO(file.read()), extra_files=extra)
    except Exception as error:
        raise unreadable(path, error) from error
    finally:
        logger.setLevel(level)


def require_inert_program(path: Path) -> None:
    """Refuse a program in which something would run that is no tensor operation.

    Raises:
        NormfixError: NF101 damaged, NF102 a pickle that needs classes, NF121 built to harm.
    """
    archives.require_sound(path)
    try:
        with zipfile.ZipFile(path) as archive:
            problem = next(_problems(archive, str(path)), "")
    except NormfixError:
        raise
    except Exception as error:  # zipfile, json and pickletools raise half a dozen kinds
        raise unreadable(path, error) from error
    if problem:
        raise NormfixError(
            "NF121", f"{problem}. It is not opened; get the file from its origin.", where=str(path)
        )


def _problems(archive: zipfile.ZipFile, where: str) -> Iterator[str]:
    for full in archive.namelist():
        name = full.partition("/")[2]
        if not _KNOWN.fullmatch(name):
            yield f"it holds {name[:80]!r}, which is no part of a program of tensors"
        elif name.startswith("extra/"):
            continue  # text that is handed over as it is
        elif name.endswith(".json") and archive.getinfo(full).file_size > _LARGEST:
            yield f"its {name[:80]} is longer than {_LARGEST >> 20} MB"
        elif name.endswith(".json"):
            yield from _unsafe_values(json.loads(archive.read(full)))
        elif name.endswith(".pt"):
            needed = _imports(archive.read(full), where)
            if needed:
                raise NormfixError(
                    "NF102",
                    f"its member {name} is a pickle that would import {', '.join(needed[:8])}. It is not opened.",
                    where=where,
                )


def _imports(data: bytes, where: str) -> list[str]:
    """List what a pickle inside the program would import beyond tensors."""
    if not data.startswith(b"PK"):
        return beyond_tensors(inspect_pickle(io.BytesIO(data), where)) if data else []
    with zipfile.ZipFile(io.BytesIO(data)) as inner, archives.opened(inner, "data.pkl") as file:
        return beyond_tensors(inspect_pickle(file, where))


def _unsafe_values(value: Any, key: str = "") -> Iterator[str]:
    """Say what in a program's JSON would run other than as a tensor operation."""
    if isinstance(value, dict):
        for name, inner in value.items():
            yield from _unsafe_values(inner, str(name))
    elif isinstance(value, list):
        for inner in value:
            yield from _unsafe_values(inner, key)
    elif key == "use_pickle" and value:
        yield "it stores weights as pickles"
    elif key == "path_name" and not re.fullmatch(r"(weight|tensor)_\d+", str(value)):
        yield f"it refers to {str(value)[:80]!r}, which is no tensor of its own"
    elif isinstance(value, str) and key == "target" and not _OPERATORS.fullmatch(value):
        yield f"it calls {value[:80]!r}, which is no operator of torch"
    elif isinstance(value, str) and key in ("expr_str", "guards_code") and not _is_arithmetic(value):
        yield f"its {key} {value[:80]!r} is no arithmetic on sizes"


def _is_arithmetic(text: str) -> bool:
    """Tell whether an expression only computes with sizes: no attribute but size, no call but these, no high power."""
    if len(text) > _LONGEST:
        return False
    try:
        nodes = list(ast.walk(ast.parse(text.strip(), mode="eval")))
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    powers = sum(
        (isinstance(node, ast.Name) and node.id == "Pow") or isinstance(node, ast.Pow) for node in nodes
    )
    return powers <= _POWERS and all(isinstance(node, _NODES) and _is_harmless(node) for node in nodes)


def _is_harmless(node: ast.AST) -> bool:
    match node:
        case ast.Call(func=ast.Name(id="Pow"), args=[_, power]):
            return _small(power)
        case ast.Call(func=ast.Name(id=name)) | ast.Call(func=ast.Attribute(attr=name)):
            return name in _CALLS
        case ast.Call():
            return False
        case ast.Attribute(value=ast.Name(id="torch"), attr=name):
            return name.startswith("sym_")
        case ast.Attribute(attr=name):
            return name in ("size", "shape")
        case ast.Name(id=name):
            return not name.startswith("__")
        case ast.BinOp(op=ast.Pow(), right=power):
            return _small(power)
        case ast.BinOp(op=ast.LShift()):
            return False
        case ast.Constant(value=str(text)):  # sympy evaluates text wherever it meets it
            return text.isidentifier() and "__" not in text
        case ast.Constant(value=value):
            return isinstance(value, int | float) and abs(value) < 2**63
        case _:
            return True


def _small(power: ast.expr) -> bool:
    """Tell whether an exponent, n or Integer(n), is a small number."""
    if isinstance(power, ast.Call) and len(power.args) == 1:
        power = power.args[0]
    try:
        value = ast.literal_eval(power)
    except (ValueError, TypeError, SyntaxError, MemoryError, RecursionError):
        return False
    return isinstance(value, int) and abs(value) <= 8
