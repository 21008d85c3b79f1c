"""The JSON of an exported program, checked field by field against torch's schema and written anew.

torch resolves names in it by attribute, puts others into source text that it executes, evaluates expressions and
imports the types of outputs. So each text has a kind here: a name, a path to a tensor, an operation of the list, an
expression, the structure of inputs and outputs. What has another form is refused; what torch does not need is left
out, and what it needs of strange types (named tuples, outputs of libraries) becomes a tuple or a dict.
"""

from __future__ import annotations

import dataclasses
import json
import keyword
import re
import typing
from collections.abc import Mapping, Sequence
from enum import IntEnum
from functools import cache
from typing import Annotated, Any

from torch._export.serde import schema
from torch._export.serde.union import _Union

from normfix.storage.opening.expressions import guard, size_expression
from normfix.storage.opening.operations import (
    ARITHMETIC,
    BLOCKS,
    MESSAGES,
    WORDS,
    is_allowed,
    is_equation,
    misplaced,
)

__all__ = ["HarmfulProgramError", "parsed", "payloads", "program"]

_NAME = re.compile(r"[A-Za-z_]\w{0,250}", re.ASCII)
_PATH = re.compile(r"[\w.\- /:+]{1,1000}")
# torch counts up to the number of a symbol, one by one
_SYMBOL = re.compile(r"[a-z]{1,8}\d{1,6}", re.ASCII)
_VERSION = re.compile(r"[\w.+<=-]{1,60}", re.ASCII)
_PAYLOAD = re.compile(r"(weight|tensor)_\d{1,9}", re.ASCII)
_STACK = re.compile(r"[\w.\- /:+@'\"\[\]()<>,=;|*&#%!?~^$]{0,100000}")
_DEVICES = frozenset({"cpu", "cuda", "mps", "xpu", "hpu"})
_DIALECTS = frozenset({"ATEN", "TRAINING", "EDGE", ""})
_UNUSED = frozenset(
    {
        *("as_custom_obj", "as_operator", "as_nested_tensors", "as_int_lists", "as_float_lists"),
        *(
            "as_string_to_argument",
            "custom_obj",
            "token",
            "gradient_to_parameter",
            "gradient_to_user_input",
            "loss_output",
        ),
    }
)
"""Kinds of values that no network in eval mode has: objects, functions, other graphs, tokens of effects."""
_DROPPED = frozenset({("GraphModule", "metadata"), ("GraphModule", "treespec_namedtuple_fields")})
_KEPT = ("stack_trace", "nn_module_stack", "torch_fn")
"""What normfix reads of a node's notes; torch would resolve names in others."""
_MOST_NODES, _MOST_EXPRESSIONS, _MOST_GUARDS = 20_000, 60_000, 5000
_FEW, _SPARSE = 20_000, 16
"""Lists and objects that its JSON may always hold, and bytes for each one more; torch writes one in 33 bytes."""
_EXPRESSIONS, _DIFFERENT, _GUARDS = 2_000_000, 200_000, 250_000
"""Characters of all size expressions, of those that differ, and of guards. Sympy takes a second for 400,000, and more
for what it has not seen; a network of fifty convolutions has 130,000, 5,000 and 1,000.
"""
_LARGEST = 2**63
_MOST_BITS = 2048
_DEEPEST = 20
_INFINITE = frozenset({"Infinity", "-Infinity", "NaN"})
_CONTAINERS: Mapping[str, str] = {
    "builtins.tuple": "builtins.tuple",
    "builtins.list": "builtins.list",
    "builtins.dict": "builtins.dict",
    "collections.OrderedDict": "collections.OrderedDict",
    "collections.namedtuple": "builtins.tuple",
    "torch.fx.immutable_collections.immutable_list": "builtins.list",
    "torch.fx.immutable_collections.immutable_dict": "builtins.dict",
}


class HarmfulProgramError(ValueError):
    """Something that torch.export does not write, or that opening may not do."""


def parsed(text: bytes) -> Any:
    """Return JSON as torch reads it, if every program reads it so.

    Raises:
        HarmfulProgramError: two values of one key, numbers that are none, or countless lists.
        ValueError: malformed.
        RecursionError: nested without end.
    """
    if text.count(b"[") + text.count(b"{") > _FEW + len(text) // _SPARSE:
        raise HarmfulProgramError("it holds more lists and objects than a program of its length does")
    return json.loads(text.decode(), object_pairs_hook=_unique, parse_constant=_no_number)


def program(content: Any) -> Any:
    """Return a program's content, checked and made anew.

    Raises:
        HarmfulProgramError: with what no program of torch.export's has.
    """
    guards = content.get("guards_code") if isinstance(content, dict) else None
    length = sum(len(text) for text in guards or () if isinstance(text, str))
    _require(length <= _GUARDS, f"guards of more than {_GUARDS} characters")
    return _Program().of(schema.ExportedProgram, content, "ExportedProgram")


def payloads(content: Any) -> dict[str, Any]:
    """Return where the tensors of a program are stored, checked and made anew.

    Raises:
        HarmfulProgramError: as `program`; also for tensors that are stored as pickles.
    """
    return dict(_Program().of(schema.PayloadConfig, content, "PayloadConfig"))


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise HarmfulProgramError("its JSON says two things under one key")
    return found


def _no_number(text: str) -> float:
    raise HarmfulProgramError(f"its JSON holds {text}, which is no number")


@cache
def _fields(kind: type) -> dict[str, Any]:
    return typing.get_type_hints(kind, globalns=vars(schema))


@cache
def _required(kind: type) -> frozenset[str]:
    missing = dataclasses.MISSING
    return frozenset(
        f.name for f in dataclasses.fields(kind) if f.default is missing and f.default_factory is missing
    )


class _Program:
    """One walk through a program's JSON; sizes that grow without bound are followed on the way."""

    def __init__(self) -> None:
        self._expressions = self._characters = self._different_characters = 0
        self._different: set[str] = set()
        self._bits: dict[str, int] = {}
        self._target = ""
        self._depth = 0

    def of(self, kind: Any, value: Any, place: str) -> Any:
        """Return a value of the schema's type, made anew."""
        if typing.get_origin(kind) is Annotated:
            return self.of(typing.get_args(kind)[0], value, place)
        inner = typing.get_args(kind)
        if type(None) in inner:
            return None if value is None else self.of(inner[0], value, place)
        if isinstance(kind, str):
            return self.of(getattr(schema, kind), value, place)
        if isinstance(kind, type) and dataclasses.is_dataclass(kind):
            _require(isinstance(value, dict), place)
            return self._union(kind, value) if _is_union(kind) else self._record(kind, value)
        if typing.get_origin(kind) is list:
            _require(isinstance(value, list), place)
            return [self.of(inner[0], item, place) for item in value]
        if typing.get_origin(kind) is dict:
            _require(isinstance(value, dict), place)
            return {_key(place, key): self.of(inner[1], item, place) for key, item in value.items()}
        return _plain(kind, value, place)

    def _union(self, kind: type, value: dict[str, Any]) -> dict[str, Any]:
        _require(len(value) == 1, kind.__name__)
        ((tag, inner),) = value.items()
        fields = _fields(kind)
        _require(tag in fields and tag not in _UNUSED, f"{kind.__name__} {tag[:40]}")
        if tag != "as_graph":
            return {tag: self.of(fields[tag], inner, f"{kind.__name__}.{tag}")}
        _require(self._target in BLOCKS and self._depth < _DEEPEST, f"a graph given to {self._target[:80]!r}")
        target, self._depth = self._target, self._depth + 1
        made = {tag: self.of(fields[tag], inner, f"{kind.__name__}.{tag}")}
        self._target, self._depth = target, self._depth - 1
        return made

    def _record(self, kind: type, value: dict[str, Any]) -> dict[str, Any]:
        fields = _fields(kind)
        _require(_required(kind) <= value.keys(), kind.__name__)
        if kind is schema.Node:
            self._target = str(value["target"])
        made = {
            name: self.of(field, value[name], f"{kind.__name__}.{name}")
            for name, field in fields.items()
            if name in value and (kind.__name__, name) not in _DROPPED
        }
        special = getattr(self, f"_{kind.__name__.lower()}", None)
        return made if special is None else special(made)

    def _node(self, node: dict[str, Any]) -> dict[str, Any]:
        """Look at an operation: its texts, and how large the numbers grow that it computes."""
        node["metadata"] = {key: text for key, text in node["metadata"].items() if key in _KEPT}
        for given in node["inputs"]:
            _require_text(given, node["target"])
        wrong = misplaced(node["target"], node["inputs"])
        _require(not wrong, f"the argument {wrong} given to {node['target']} as it cannot be")
        self._target = ""
        if node["target"] in ARITHMETIC:
            bits = self._growth(node["target"], [given["arg"] for given in node["inputs"]])
            _require(bits <= _MOST_BITS, f"sizes that grow without bound ({node['target']})")
            for output in node["outputs"]:
                self._bits[str(_named(output))] = bits
        return node

    def _growth(self, target: str, arguments: list[dict[str, Any]]) -> int:
        """Return how many bits a number may have that arithmetic gives."""
        bits = [self._bits.get(str(_named(argument)), 64) for argument in arguments]
        if target == "_operator.mul":
            return sum(bits)
        if target == "_operator.pow":
            exponent = next(iter(_number(argument) for argument in arguments[1:]), None)
            _require(exponent is not None and abs(exponent) <= 8, "a power of a power")
            return bits[0] * 8
        return max(bits, default=0) + (target in ("_operator.add", "_operator.sub"))

    def _graph(self, graph: dict[str, Any]) -> dict[str, Any]:
        _require(len(graph["nodes"]) <= _MOST_NODES, f"more than {_MOST_NODES} operations")
        _require(not graph.pop("custom_obj_values", None), "objects of other code")
        return graph

    def _symexpr(self, expression: dict[str, Any]) -> dict[str, Any]:
        self._expressions += 1
        _require(self._expressions <= _MOST_EXPRESSIONS, f"more than {_MOST_EXPRESSIONS} size expressions")
        text = expression["expr_str"]
        self._characters += len(text)
        if text not in self._different:
            self._different.add(text)
            self._different_characters += len(text)
        few = self._characters <= _EXPRESSIONS and self._different_characters <= _DIFFERENT
        _require(
            few, f"size expressions of more than {_EXPRESSIONS} characters, or {_DIFFERENT} different ones"
        )
        return expression

    def _exportedprogram(self, content: dict[str, Any]) -> dict[str, Any]:
        _require(len(content.get("guards_code", [])) <= _MOST_GUARDS, f"more than {_MOST_GUARDS} guards")
        return content

    def _tensormeta(self, meta: dict[str, Any]) -> dict[str, Any]:
        _require(meta["layout"] == schema.Layout.Strided, "a tensor that is not strided")
        _require(len(meta["sizes"]) == len(meta["strides"]), "a tensor with another number of strides")
        return meta

    def _payloadmeta(self, meta: dict[str, Any]) -> dict[str, Any]:
        _require(not meta["use_pickle"] and meta["tensor_meta"] is not None, "weights stored as pickles")
        return meta

    def _modulecallsignature(self, signature: dict[str, Any]) -> dict[str, Any]:
        signature["in_spec"] = _structure(signature["in_spec"], _is_name)
        signature["out_spec"] = _structure(signature["out_spec"], _is_key)
        return signature

    def _graphmodule(self, module: dict[str, Any]) -> dict[str, Any]:
        """Keep the root's signature; those of other modules serve a purpose that normfix has not."""
        module["module_call_graph"] = [
            entry if not entry["fqn"] else {"fqn": entry["fqn"], "signature": None}
            for entry in module["module_call_graph"]
        ]
        return module


def _is_union(kind: type) -> bool:
    return issubclass(kind, _Union)


def _plain(kind: Any, value: Any, place: str) -> Any:
    """Return a number or a text, if it is what its place holds."""
    if isinstance(kind, type) and issubclass(kind, IntEnum):
        _require(type(value) is int and value in {member.value for member in kind}, place)
    elif kind is bool:
        _require(type(value) is bool, place)
    elif kind is int:
        _require(type(value) is int and abs(value) < _LARGEST, place)
    elif kind is float:
        _require(type(value) in (int, float) or value in _INFINITE, place)
    else:
        _require(kind is str and isinstance(value, str), place)
        return _text(place, value)
    return value


def _text(place: str, text: str) -> str:
    """Return a text, if it is of the kind that its place holds; expressions are written anew."""
    owner, _, field = place.rpartition(".")
    if field == "target":
        _require(
            is_allowed(text), f"a call of {text[:80]!r}, which is no operator of torch on normfix's list"
        )
    elif field == "expr_str":
        return _expression(size_expression(text), text)
    elif field == "guards_code":
        return _expression(guard(text), text)
    elif field in ("in_spec", "out_spec") or place == "Argument.as_string" or owner == "ConstantValue":
        return text  # looked at where what they belong to is known
    elif field in ("parameter_name", "buffer_name", "tensor_constant_name", "fqn"):
        _require(_is_path(text) or (field == "fqn" and not text), f"a tensor called {text[:80]!r}")
    elif place == "Device.type":
        _require(text in _DEVICES, f"a device {text[:40]!r}")
    elif place == "PayloadMeta.path_name":
        _require(bool(_PAYLOAD.fullmatch(text)), f"{text[:80]!r} in place of a tensor of its own")
    elif place == "Node.metadata":
        return "\n".join(line for line in text.splitlines() if _STACK.fullmatch(line))
    elif place == "ExportedProgram.verifiers":
        _require(text in _DIALECTS, place)
    elif place == "ExportedProgram.torch_version":
        _require(bool(_VERSION.fullmatch(text)), place)
    elif not (place == "NamedArgument.name" and not text):
        _require(_is_name(text), f"{place} {text[:80]!r}, which is no name")
    return text


def _expression(anew: str | None, text: str) -> str:
    _require(anew is not None, f"the expression {text[:80]!r}, which is no arithmetic on sizes")
    return str(anew)


def _key(place: str, key: str) -> str:
    """Return a key, if it is of the kind that its place has."""
    if place == "ExportedProgram.range_constraints":
        _require(bool(_SYMBOL.fullmatch(key)), place)
    elif place == "PayloadConfig.config":
        _require(_is_path(key), f"a tensor called {key[:80]!r}")
    elif place != "Node.metadata":
        _require(_is_name(key), f"{place} {key[:80]!r}, which is no name")
    return key


def _require_text(given: dict[str, Any], target: str) -> None:
    """Refuse texts as arguments, but for modes and equations; what people would read is taken out."""
    argument = given["arg"]
    text = argument.get("as_string")
    if text is not None and given["name"] in MESSAGES:
        argument["as_string"] = "a check of the program failed"
    elif text is not None:
        known = text in WORDS or (target == "torch.ops.aten.einsum.default" and is_equation(text))
        known = known or (target in BLOCKS and text in _DEVICES)
        _require(known, f"the text {text[:80]!r} given to {target}")
    _require(not argument.get("as_strings"), f"texts given to {target}")


def _structure(text: str, fits: typing.Callable[[str], bool]) -> str:
    """Return the structure of inputs or outputs, of tuples, lists and dicts only."""
    try:
        version, content = parsed(text.encode())
    except (ValueError, TypeError) as error:
        raise HarmfulProgramError("it has a structure of inputs or outputs that is none") from error
    _require(version == 1, "another version of structures")
    return json.dumps([1, _tree(content, fits, _DEEPEST)])


def _tree(content: Any, fits: typing.Callable[[str], bool], depth: int) -> dict[str, Any]:
    _require(depth > 0 and isinstance(content, dict), "a structure nested too deeply")
    kind, context, children = (content.get(key) for key in ("type", "context", "children_spec"))
    _require(isinstance(children, list), "a structure without parts")
    if kind is None:
        _require(context is None and not children, "a leaf with parts")
        return {"type": None, "context": None, "children_spec": []}
    _require(isinstance(kind, str), "a structure of no type")
    made = [_tree(child, fits, depth - 1) for child in typing.cast("list[Any]", children)]
    known = _CONTAINERS.get(str(kind), "builtins.dict")  # outputs of libraries are dicts with attributes
    if known in ("builtins.tuple", "builtins.list"):
        return {"type": known, "context": "null", "children_spec": made}
    keys = _keys(context, len(made))
    _require(
        all(map(fits, keys)), f"a structure with a part of another name than names are ({str(kind)[:60]})"
    )
    return {"type": known, "context": json.dumps(keys), "children_spec": made}


def _keys(context: Any, count: int) -> list[str]:
    """Return the names of a mapping's parts: a list of texts, or of a data class's names and those that are None."""
    found = parsed(context.encode()) if isinstance(context, str) else context
    if isinstance(found, list) and len(found) == 2 and all(isinstance(part, list) for part in found):
        found = found[0]
    _require(
        isinstance(found, list) and len(found) == count and all(isinstance(key, str) for key in found),
        "a structure of a type of other code",
    )
    return list(found)


def _named(argument: dict[str, Any]) -> str | None:
    """Return the name of the number that an argument or an output is; None if it is a constant or a tensor."""
    for value in argument.values():
        if isinstance(value, dict):
            return typing.cast("str | None", value.get("as_name"))
    return None


def _number(argument: dict[str, Any]) -> float | None:
    """Return the number that an argument is; None if it is computed."""
    for value in argument.values():
        given: Sequence[Any] = list(value.values()) if isinstance(value, dict) else [value]
        for number in given:
            if isinstance(number, int | float):
                return number
    return None


def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and not keyword.iskeyword(text)


def _is_path(text: str) -> bool:
    return bool(_PATH.fullmatch(text)) and not any(part.startswith("__") for part in text.split("."))


def _is_key(text: str) -> bool:
    return bool(_PATH.fullmatch(text))


def _require(holds: bool, what: str) -> None:
    if not holds:
        raise HarmfulProgramError(f"it holds {what}")
