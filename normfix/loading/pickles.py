"""Read what torch.save wrote, running nothing unless asked.

A pickle is a program for a small machine. `inspect_pickle` follows that program without executing it: which
classes and functions it would import, and how large the tuples grow that it builds (hashing a tuple of tuples
that share their parts takes time exponential in the depth, so a hundred bytes can hang a reader).
"""

from __future__ import annotations

import io
import pickle  # noqa: TID251 - for its exception
import pickletools
import re
import tarfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any, NamedTuple

import torch
from torch import _weights_only_unpickler

from normfix.deadline import within
from normfix.errors import NormfixError
from normfix.factories import classes_named
from normfix.loading import archives
from normfix.loading.request import Request, unreadable
from normfix.loading.unfolding import is_out_of_proportion

__all__ = ["inspect_pickle", "is_torch_file", "read_torch", "unsafe_imports"]

_LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # how torch.save before 1.6 began its files
_LEGACY_PICKLES = 5
_STORAGE = re.compile(r"data/[0-9A-Za-z_]{1,18}")
"""Members that hold tensors: torch.save numbers them, and before 1.10 named them by their place in memory."""
_LARGEST = 64 * archives.CHUNK  # the pickle alone, without tensors; ten thousand layers take 3 MB
_SECONDS, _BYTES_A_SECOND = 8.0, 16 << 20
"""Processor time that following one pickle may take, and bytes of the file for a second more."""
_INSTEAD = "get the file from its origin"
_SHARING = 1000
_COLLIDING = 2000
"""Keys of one hash cost the square of their number; weights are named by texts, whose hashes nobody can choose."""
_DISTINCT = 2**60
"""Whole numbers below it have hashes of their own."""
_MOST_NOTES = 2**32
_HIDDEN = "a name it computes"
_ALLOCATING = frozenset({"builtins.bytearray", "torch._utils._rebuild_meta_tensor_no_storage"})
"""What torch's safe mode lets a pickle call although state dicts have no use for it and it can take all memory."""


def is_torch_file(path: Path) -> bool:
    """Tell whether torch.save wrote a file, in the format of today or in that before 1.6."""
    start = archives.start_of(path)
    return "data.pkl" in archives.members(path) if start.startswith(b"PK") else _LEGACY in start


def read_torch(path: Path, request: Request) -> Any:
    """Return the content of a file that torch.save wrote.

    Raises:
        NormfixError: NF101 damaged, NF102 a pickle that needs more than tensors and is not trusted, NF121 built
            to harm, NF122 an allowed class that is none.
    """
    with _inspected(path) as content:
        needed = beyond_tensors(content.names)
        allowed = [name for name in needed if _is_allowed(name, request.allow_classes)]
        if set(needed) <= set(allowed):
            loaded = _loaded(path, content.file, classes_named(allowed))
            if is_out_of_proportion(loaded):
                raise _harmful(str(path), "its values hold themselves, or share their parts without end")
            return loaded
        if not request.trust_pickle:
            raise _untrusted(path, needed)
        request.tell(f"{path}: running a pickle that imports {_listed(needed)}.")
        try:
            return torch.load(content.file, map_location="cpu", weights_only=False)  # noqa: TID251
        except Exception as error:
            raise unreadable(path, error) from error


def unsafe_imports(path: Path) -> list[str]:
    """List what a file of torch.save would import beyond tensors and plain values, without executing it.

    Raises:
        NormfixError: NF101 if it is no such file, NF121 if its pickle is built to harm.
    """
    with _inspected(path) as content:
        return beyond_tensors(content.names)


@dataclass(frozen=True, slots=True)
class _Content:
    """What torch may read of a file, and what its pickles would import."""

    file: IO[bytes]
    names: set[str]


@contextmanager
def _inspected(path: Path) -> Iterator[_Content]:
    """Give what torch may read of a file: its pickle and tensors, in an archive written anew, or the old format."""
    if archives.is_archive(path):
        with archives.Archive(path) as archive:
            if "data.pkl" not in archive.names:
                raise unreadable(path, "it holds no data.pkl, so torch.save did not write it")
            data = archive.read("data.pkl", _LARGEST)
            names = _names(path, io.BytesIO(data), 1)
            order = archive.read("byteorder", 16) if "byteorder" in archive.names else b"little"
            storages = [name for name in archive.names if _STORAGE.fullmatch(name)]
            around = {"data.pkl": data, "byteorder": order, "version": b"3\n"}
            yield _Content(archive.rewritten(storages, around), names)
        return
    if _is_tar(path):  # torch would unpack what tar says, which nobody looked at
        raise _harmful(str(path), "it is an archive of tar, the format of torch before 0.1.10")
    with path.open("rb") as file:
        names = _names(path, file, _LEGACY_PICKLES)
        yield _Content(archives.without_descriptor(file, path.stat().st_size), names)


def _is_tar(path: Path) -> bool:
    """Tell whether a file begins with a header of tar.

    Only that is looked at: `tarfile.is_tarfile` unpacks a compressed archive, and reads a header as long as it says.
    """
    try:
        tarfile.TarInfo.frombuf(archives.start_of(path, tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _names(path: Path, file: IO[bytes], pickles: int) -> set[str]:
    """Return what a number of pickles, one behind the other, would import."""
    names: set[str] = set()
    seconds = _SECONDS + path.stat().st_size / _BYTES_A_SECOND
    try:
        for _ in range(pickles):
            names |= within(seconds, lambda: inspect_pickle(file, str(path)), str(path), instead=_INSTEAD)
    except NormfixError:
        raise
    except Exception as error:  # pickletools raises half a dozen kinds
        raise unreadable(path, error) from error
    return names


def beyond_tensors(names: Iterable[str]) -> list[str]:
    """Return those of the names that torch's safe mode would not import, sorted."""
    return sorted(set(names) - (_weights_only_unpickler._get_allowed_globals().keys() - _ALLOCATING))


class _Item(NamedTuple):  # a tuple, since a file makes a million of them
    """A value on the machine's stack: how many leaves it has, shared ones counted again, and its text."""

    weight: int
    text: str | None = None
    number: bool = False
    crafted: int = 0
    """How many values in it could have been chosen for their hash: large numbers, and tuples with a number."""


_MARK = _Item(-1)
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
_LOOK_UP = frozenset({"GET", "BINGET", "LONG_BINGET"})
_NOTE = frozenset({"PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"})
_CALLS = frozenset({"REDUCE", "NEWOBJ", "OBJ", "NEWOBJ_EX"})
_TENSORS = ("torch._utils._rebuild", "torch._tensor._rebuild", "torch.nn.parameter.Parameter")
"""What gives tensors, which are told apart by their place in memory."""
_KEY, _ALWAYS = 2, 2
"""Where a reference to data has its key; how many tuples with a number it has (itself, and what a view is of)."""


def inspect_pickle(file: IO[bytes], where: str) -> set[str]:
    """Follow one pickle up to its STOP without executing it; return the names it would import.

    Raises:
        NormfixError: NF121 if it is huge or its values grow out of proportion to its length.
        ValueError: if it is malformed.
    """
    names: set[str] = set()
    stack: list[_Item] = []
    memo: dict[int, _Item] = {}
    crafted = 0
    start = file.tell()
    for count, (opcode, arg, place) in enumerate(pickletools.genops(file)):
        if (place or 0) - start > _LARGEST:
            raise _harmful(where, f"its pickle alone is longer than {_LARGEST >> 20} MB")
        item, keys = _step(opcode, arg, stack, memo)
        crafted += keys
        if opcode.name in ("GLOBAL", "INST"):
            names.add(str(item.text))
        elif opcode.name == "STACK_GLOBAL":
            names.add(item.text or _HIDDEN)
        elif opcode.name.startswith("EXT"):
            names.add(_HIDDEN)
        if item.weight > _SHARING * (count + 100):
            raise _harmful(where, "its values share their parts so often that reading it would not end")
    if crafted > _COLLIDING and not beyond_tensors(names):
        raise _harmful(
            where, f"{crafted} of its keys are numbers or tuples, chosen so that reading it would not end"
        )
    return names


def _modern(module: str, name: str = "") -> str:
    """Return the name that Python 3 imports, as pickles of torch's protocol 2 still use Python 2's."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _step(opcode: Any, arg: Any, stack: list[_Item], memo: dict[int, _Item]) -> tuple[_Item, int]:
    """Carry one operation out; return what it leaves on top and how many crafted keys went into a table."""
    name = opcode.name
    if name == "MARK":
        stack.append(_MARK)
        return _MARK, 0
    if name in _LOOK_UP:
        stack.append(memo[int(arg)])
        return stack[-1], 0
    if name in _NOTE:
        number = len(memo) if arg is None else int(arg)
        if not 0 <= number < _MOST_NOTES:
            raise ValueError("a note under a number that no pickle comes to")
        memo[number] = stack[-1]
        return stack[-1], 0
    if name == "DUP":
        stack.append(stack[-1])
        return stack[-1], 0
    if not opcode.stack_before:
        item, keys = _leaf(name, arg), 0
    else:
        taken = _taken(opcode, stack)
        item, keys = _made(opcode, arg, taken), _crafted_keys(name, taken)
    if opcode.stack_after:
        stack.append(item)
    return item, keys


def _leaf(name: str, arg: Any) -> _Item:
    """Return a value that is made of no other."""
    if name == "GLOBAL":
        return _Item(1, _modern(*str(arg).split(" ", 1)))
    if isinstance(arg, str):
        return _Item(1, arg)
    if isinstance(arg, int | float):
        return _Item(1, number=True, crafted=int(not _is_distinct(arg)))
    return _Item(1)


def _made(opcode: Any, arg: Any, taken: list[_Item]) -> _Item:
    """Return the value that an operation makes of others."""
    weight = 1 + sum(item.weight for item in taken)
    crafted = sum(item.crafted for item in taken)
    if opcode.name == "STACK_GLOBAL":
        parts = [item.text for item in taken]
        return _Item(weight, None if None in parts else ".".join(str(part) for part in parts))
    if opcode.name == "INST":
        return _Item(weight, _modern(*str(arg).split(" ", 1)), crafted=crafted)
    if opcode.name.startswith("TUPLE"):
        number = any(item.number for item in taken)
        if (
            len(taken) > _KEY and taken[0].text == "storage"
        ):  # the reference to a tensor's data, looked up by its key
            crafted += 2 * taken[_KEY].crafted
        return _Item(weight, number=number, crafted=crafted + number)
    if opcode.name in _CALLS:
        function = taken[0].text or ""
        plain = function.startswith(_TENSORS) or function in _HASHING
        return _Item(weight, crafted=0 if plain else crafted + 1)
    if opcode.name == "BINPERSID":
        return _Item(weight)
    return _Item(weight, crafted=crafted)


def _is_distinct(value: float) -> bool:
    return isinstance(value, int) and abs(value) < _DISTINCT


def _crafted_keys(name: str, taken: list[_Item]) -> int:
    """Return how many of the keys that an operation puts into a table could have been chosen for their hash."""
    if name in ("SETITEM", "SETITEMS", "DICT"):
        keys = taken[1::2] if name.startswith("SET") else taken[::2]
        return sum(key.crafted for key in keys)
    if name in ("ADDITEMS", "FROZENSET"):
        return sum(item.crafted for item in taken[1:])
    if name in _CALLS and (taken[0].text or "") in _HASHING:
        return sum(item.crafted for item in taken[1:])
    if name == "BINPERSID":
        return max(0, taken[0].crafted - _ALWAYS)
    return 0


def _taken(opcode: Any, stack: list[_Item]) -> list[_Item]:
    """Take from the stack what an operation consumes."""
    before = opcode.stack_before
    taken: list[_Item] = []
    if pickletools.markobject in before:
        while stack[-1] is not _MARK:
            taken.append(stack.pop())
        stack.pop()
        before = before[: before.index(pickletools.markobject)]
    for _ in before:
        taken.append(stack.pop())
    if any(item is _MARK for item in taken):
        raise ValueError("a mark where a value belongs")
    return taken[::-1]


def _loaded(path: Path, file: IO[bytes], classes: Mapping[str, type]) -> Any:
    allowed: list[Any] = [(kind, name) for name, kind in classes.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(file, map_location="cpu", weights_only=True)  # noqa: TID251
    except pickle.UnpicklingError as error:
        reason = " ".join(str(error).split())[:200]
        raise NormfixError(
            "NF102",
            f"torch's safe mode refuses it: {reason} If you trust where it came from, add --trust-pickle.",
            where=str(path),
        ) from error
    except Exception as error:
        raise unreadable(path, error) from error


def _is_allowed(name: str, patterns: tuple[str, ...]) -> bool:
    return any(
        name == pattern.replace(":", ".") or (pattern.endswith(".*") and name.startswith(pattern[:-1]))
        for pattern in patterns
    )


def _untrusted(path: Path, needed: list[str]) -> NormfixError:
    return NormfixError(
        "NF102",
        f"the file is a pickle that would import {_listed(needed)}. Loading it runs code; allow single classes "
        "with --allow-class NAME (or PACKAGE.*), run it with --trust-pickle if you trust where it came from, or "
        "save its state_dict and name the network with --arch.",
        where=str(path),
    )


def _listed(names: list[str]) -> str:
    shown = ", ".join(name[:80] for name in names[:8])
    return shown + (f" and {len(names) - 8} more" if len(names) > 8 else "")


def _harmful(where: str, problem: str) -> NormfixError:
    return NormfixError("NF121", f"{problem}. It is not opened; get the file from its origin.", where=where)
