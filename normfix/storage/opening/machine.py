"""The machine that a pickle is a program for, followed without executing anything.

What stands on its stack here is no value but an item: how many leaves the value has, shared ones counted again
(hashing a tuple of tuples that share their parts takes time exponential in the depth, so a hundred bytes can hang a
reader), its text if it is one, and how many values in it could have been chosen for their hash. What may grow after
it was noted, a list or dict, is one item wherever it stands.

A file of 60,000 tensors has two million operations, so what depends on the operation alone is decided once, in
`_OPERATIONS`.
"""

from __future__ import annotations

import pickletools
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Callable
from functools import lru_cache
from itertools import count
from typing import IO, Any, NamedTuple

__all__ = ["Machine", "OutOfProportionError", "followed"]

_SHARING = 1000
_HASHED, _FEW = 100, 1000
"""Leaves of all keys for each operation, and operations that are always granted: keys have few leaves."""
_COMPARED = 16
"""Leaves for which a chosen key counts as one more, since all of them are compared with those of the others."""
_DISTINCT = 2**60
"""Whole numbers below it have hashes of their own."""
_MOST_NOTES = 2**32
_HIDDEN = "a name it computes"
_LOOK_UP = frozenset({"GET", "BINGET", "LONG_BINGET"})
_NOTE = frozenset({"PUT", "BINPUT", "LONG_BINPUT"})
_CALLS = frozenset({"REDUCE", "NEWOBJ", "OBJ", "NEWOBJ_EX"})
_HASHING = frozenset(
    {
        "builtins.set",
        "builtins.frozenset",
        "collections.OrderedDict",
        "collections.Counter",
        "collections.defaultdict",
    }
)
"""What puts the values that it is called with into a table."""
_ENCODING, _BY_TYPE = "_codecs.encode", "torch._tensor._rebuild_from_type_v2"
"""What does as its arguments say: how bytes become texts, and another function."""
_LONGEST_CALL = 4
_TENSORS = ("torch._utils._rebuild", "torch._tensor._rebuild", "torch.nn.parameter.Parameter")
"""What gives tensors, which are told apart by their place in memory."""
_KEY, _ALWAYS = 2, 2
"""Where a reference to data has its key; how many tuples with a number it has (itself, and what a view is of)."""


class OutOfProportionError(ValueError):
    """The program is huge, or makes values out of proportion to its length."""


class _Item(NamedTuple):  # a tuple, since a file makes a million of them
    """A value on the machine's stack: how many leaves it has, shared ones counted again, and its text."""

    weight: int
    text: str | None = None
    number: bool = False
    crafted: int = 0
    """How many values in it could have been chosen for their hash: large numbers, and tuples with a number."""
    parts: tuple[str | None, ...] | None = None
    """Texts of a tuple's parts, if it may be what a function is called with whose arguments matter."""


class _Growing:
    """A list, dict or set: what is put into it later is in it wherever it was noted before."""

    __slots__ = ("crafted", "weight")
    text: str | None = None
    number = False
    parts: tuple[str | None, ...] | None = None

    def __init__(self, weight: int = 1, crafted: int = 0) -> None:
        self.weight = weight
        self.crafted = crafted


_Value = _Item | _Growing


@lru_cache(maxsize=4096)
def _item(weight: int, number: bool, crafted: int) -> _Item:
    """Return an item that has no text: most are alike, and one for all is quicker than a million."""
    return _Item(weight, None, number, crafted)


_PLAIN, _NUMBER, _CHOSEN = _item(1, False, 0), _item(1, True, 0), _item(1, True, 1)
_EMPTY = _Item(1, parts=())


class Machine:
    """What a pickle's program came to: `names` it would import, and `crafted` keys that went into tables.

    `calls` are the functions that it calls, each with "(...)" where what it is called with is not what torch.save
    writes; `data` are the keys of the tensors' data that it refers to, `texts` all texts in it; `hashed` counts the
    leaves of all keys.
    """

    __slots__ = ("calls", "crafted", "data", "hashed", "memo", "names", "outer", "stack", "texts")

    def __init__(self) -> None:
        self.names: set[str] = set()
        self.calls: set[str] = set()
        self.data: set[str | None] = set()
        self.texts: set[str | None] = set()
        self.crafted = self.hashed = 0
        self.memo: dict[int, _Value] = {}
        self.stack: list[_Value] = []
        self.outer: list[list[_Value]] = []
        """The stacks below each mark."""


def followed(file: IO[bytes], longest: int) -> Machine:
    """Follow one pickle up to its STOP.

    Args:
        file: at the pickle's first byte; left behind its last one.
        longest: bytes that it may have.

    Raises:
        OutOfProportionError: if it is longer, or its values or keys share their parts too often.
        ValueError, LookupError: if it is malformed.

    Example:
        >>> import io, pickle
        >>> sorted(followed(io.BytesIO(pickle.dumps(print)), 1000).names)
        ['builtins.print']
    """
    machine = Machine()
    start = file.tell()
    for number in count():
        code = file.read(1)
        if code not in _OPERATIONS:
            raise ValueError("no operation of a pickle, or its end before its STOP")
        argument, act = _OPERATIONS[code]
        arg = None if argument is None else argument(file)
        if act(machine, arg) > _SHARING * (number + 100):
            raise OutOfProportionError("its values share their parts so often that reading it would not end")
        if code == b".":
            break
        if file.tell() - start > longest:
            raise OutOfProportionError(f"its pickle alone is longer than {longest >> 20} MB")
    if machine.hashed > _HASHED * (number + _FEW):
        raise OutOfProportionError("its keys share their parts so often that reading it would not end")
    return machine


# What an operation does with its argument; it returns the weight of what it made.
_Action = Callable[[Machine, Any], int]


def _mark(machine: Machine, _: object) -> int:
    machine.outer.append(machine.stack)
    machine.stack = []
    return 0


def _look_up(machine: Machine, arg: Any) -> int:
    machine.stack.append(machine.memo[arg])
    return 0


def _note(machine: Machine, arg: Any) -> int:
    if not 0 <= arg < _MOST_NOTES:
        raise ValueError("a note under a number that no pickle comes to")
    machine.memo[arg] = machine.stack[-1]
    return 0


def _memoize(machine: Machine, _: object) -> int:
    machine.memo[len(machine.memo)] = machine.stack[-1]
    return 0


def _duplicate(machine: Machine, _: object) -> int:
    machine.stack.append(machine.stack[-1])
    return 0


def _growing(machine: Machine, _: object) -> int:
    machine.stack.append(_Growing())
    return 1


def _empty(machine: Machine, _: object) -> int:
    machine.stack.append(_EMPTY)
    return 1


def _nothing(_: Machine, __: object) -> int:
    return 0


def _global(machine: Machine, arg: Any) -> int:
    name = _modern(*str(arg).split(" ", 1))
    machine.names.add(name)
    machine.stack.append(_Item(1, name))
    return 1


def _extension(machine: Machine, _: object) -> int:
    machine.names.add(_HIDDEN)
    machine.stack.append(_NUMBER)
    return 1


def _leaf(machine: Machine, arg: Any) -> int:
    """Put a value there that is made of no other."""
    if isinstance(arg, str):
        machine.texts.add(arg)
        item = _Item(1, arg)
    elif isinstance(arg, int | float):
        item = _NUMBER if _is_distinct(arg) else _CHOSEN
    else:
        item = _PLAIN
    machine.stack.append(item)
    return 1


def _making(opcode: pickletools.OpcodeInfo) -> _Action:
    """Return how an operation makes a value of others: of those above the mark, and of some below it."""
    before = opcode.stack_before
    marked = pickletools.markobject in before
    below = before.index(pickletools.markobject) if marked else len(before)
    gives = bool(opcode.stack_after)
    made = _made_by(opcode.name)
    keys, always = _KEYS.get(opcode.name), _ALWAYS * (opcode.name == "BINPERSID")

    def make(machine: Machine, arg: Any) -> int:
        if marked:
            above, machine.stack = machine.stack, machine.outer.pop()
        stack = machine.stack
        first = len(stack) - below
        if first < 0:
            raise ValueError("a mark where a value belongs, or nothing")
        taken = stack[first:]
        del stack[first:]
        if marked:
            taken += above
        item = made(machine, arg, taken)
        if keys is not None:
            _count(machine, keys(taken), always)
        if gives:
            stack.append(item)
        return item.weight

    return make


def _count(machine: Machine, keys: list[_Value], always: int) -> None:
    """Count what is put into a table."""
    for key in keys:
        machine.hashed += key.weight
        if key.crafted > always:
            machine.crafted += key.crafted - always + key.weight // _COMPARED


def _made_by(name: str) -> Callable[[Machine, Any, list[_Value]], _Value]:
    if name.startswith("TUPLE"):
        return _tuple
    if name in _CALLS:
        return _called
    if name in _FILLING:
        return _filled
    if name in ("LIST", "DICT"):
        return lambda _, __, taken: _Growing(*_sums(taken))
    return {"STACK_GLOBAL": _global_of_texts, "INST": _instance, "BINPERSID": _data}.get(name, _collection)


def _collection(_: Machine, __: object, taken: list[_Value]) -> _Value:
    weight, crafted = _sums(taken)
    return _item(weight, False, crafted)


def _filled(machine: Machine, arg: object, taken: list[_Value]) -> _Value:
    """Return the first value with the others in it."""
    first = taken[0]
    if not isinstance(first, _Growing):
        return _collection(machine, arg, taken)
    for item in taken[1:]:
        first.weight += item.weight
        first.crafted += item.crafted
    return first


def _sums(taken: list[_Value]) -> tuple[int, int]:
    """Return weight and crafted values of what is made of others."""
    weight, crafted = 1, 0
    for item in taken:
        weight += item.weight
        crafted += item.crafted
    return weight, crafted


def _tuple(machine: Machine, _: object, taken: list[_Value]) -> _Value:
    weight, crafted, numbered = 1, 0, False
    for item in taken:
        weight += item.weight
        crafted += item.crafted
        numbered = numbered or item.number
    if 0 < len(taken) <= _LONGEST_CALL and taken[0].text is not None:
        texts = tuple(item.text for item in taken)
        return _Item(weight, None, numbered, crafted + numbered, texts)
    if len(taken) > _KEY and taken[0].text == "storage":
        # the reference to a tensor's data, looked up by its key
        crafted += 2 * taken[_KEY].crafted
        machine.data.add(taken[_KEY].text)
    return _item(weight, numbered, crafted + numbered)


def _called(machine: Machine, _: object, taken: list[_Value]) -> _Value:
    weight, crafted = _sums(taken)
    function = taken[0].text or _HIDDEN
    _note_call(machine, function, taken[1].parts if len(taken) > 1 else ())
    if function in _HASHING:
        return _Growing(weight, crafted)
    return _item(weight, False, 0 if function.startswith(_TENSORS) else crafted + 1)


def _note_call(machine: Machine, function: str, given: tuple[str | None, ...] | None) -> None:
    """Note what is called, and what is called by it."""
    if function == _BY_TYPE:
        inner = (given and given[0]) or _HIDDEN
        machine.calls.add(inner)
        function += "" if inner.startswith(_TENSORS) else "(...)"
    elif function == _ENCODING:
        # as pickle writes bytes; others multiply what they are given, or take the square of its length
        function += "" if given is not None and given[1:] == ("latin1",) else "(...)"
    elif function.endswith("Tensor"):
        # tensors of before come without extents, and get them with their data
        function += "" if given == () else "(...)"
    machine.calls.add(function)


def _data(_: Machine, __: object, taken: list[_Value]) -> _Item:
    return _item(1 + taken[0].weight, False, 0)


def _global_of_texts(machine: Machine, _: object, taken: list[_Value]) -> _Item:
    parts = [item.text for item in taken]
    text = None if None in parts else ".".join(str(part) for part in parts)
    machine.names.add(text or _HIDDEN)
    return _Item(_sums(taken)[0], text)


def _instance(machine: Machine, arg: Any, taken: list[_Value]) -> _Item:
    weight, crafted = _sums(taken)
    name = _modern(*str(arg).split(" ", 1))
    machine.names.add(name)
    return _Item(weight, name, crafted=crafted)


def _given_to_table(taken: list[_Value]) -> list[_Value]:
    """Return what a function is called with that makes a table of it."""
    return taken[1:] if taken[0].text in _HASHING else []


_KEYS: dict[str, Callable[[list[_Value]], list[_Value]]] = {
    "SETITEM": lambda taken: taken[1::2],
    "SETITEMS": lambda taken: taken[1::2],
    "DICT": lambda taken: taken[::2],
    "ADDITEMS": lambda taken: taken[1:],
    "FROZENSET": lambda taken: taken,
    "BINPERSID": lambda taken: taken,
    **dict.fromkeys(_CALLS, _given_to_table),
}
"""What an operation puts into a table."""
_FILLING = frozenset({"APPEND", "APPENDS", "SETITEM", "SETITEMS", "ADDITEMS", "BUILD"})


def _modern(module: str, name: str = "") -> str:
    """Return the name that Python 3 imports, as pickles of torch's protocol 2 still use Python 2's."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _is_distinct(value: float) -> bool:
    return isinstance(value, int) and abs(value) < _DISTINCT


_SINGLE: dict[str, _Action] = {
    "MARK": _mark,
    "MEMOIZE": _memoize,
    "DUP": _duplicate,
    "GLOBAL": _global,
    "EMPTY_TUPLE": _empty,
    **dict.fromkeys(("EMPTY_LIST", "EMPTY_DICT", "EMPTY_SET"), _growing),
    **dict.fromkeys(_LOOK_UP, _look_up),
    **dict.fromkeys(_NOTE, _note),
    **dict.fromkeys(("EXT1", "EXT2", "EXT4"), _extension),
}


def _action(opcode: pickletools.OpcodeInfo) -> _Action:
    if opcode.name in _SINGLE:
        return _SINGLE[opcode.name]
    if opcode.stack_before:
        return _making(opcode)
    return _leaf if opcode.stack_after else _nothing


_OPERATIONS: dict[bytes, tuple[Callable[[IO[bytes]], Any] | None, _Action]] = {
    opcode.code.encode("latin-1"): (None if opcode.arg is None else opcode.arg.reader, _action(opcode))
    for opcode in pickletools.opcodes
}
