"""Read what torch.save wrote, running nothing unless asked.

A pickle is a program for a small machine. `inspect_pickle` follows that program without executing it: which
classes and functions it would import, and how large the tuples grow that it builds (hashing a tuple of tuples
that share their parts takes time exponential in the depth, so a hundred bytes can hang a reader).
"""

from __future__ import annotations

import pickle  # noqa: TID251 - for its exception
import pickletools
import zipfile
from _compat_pickle import IMPORT_MAPPING, NAME_MAPPING
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import _weights_only_unpickler

from normfix.errors import NormfixError
from normfix.factories import classes_named
from normfix.loading import archives
from normfix.loading.request import Request, unreadable

__all__ = ["inspect_pickle", "is_torch_file", "read_torch", "require_plain", "unsafe_imports"]

_LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # how torch.save before 1.6 began its files
_LEGACY_PICKLES = 5
_LARGEST = 64 * archives.CHUNK  # the pickle alone, without tensors; ten thousand layers take 3 MB
_SHARING = 1000
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
    if archives.is_archive(path):
        archives.require_sound(path)
    needed = unsafe_imports(path)
    allowed = [name for name in needed if _is_allowed(name, request.allow_classes)]
    if set(needed) <= set(allowed):
        return _loaded(path, classes_named(allowed))
    if not request.trust_pickle:
        raise _untrusted(path, needed)
    request.tell(f"{path}: running a pickle that imports {_listed(needed)}.")
    try:
        return torch.load(path, map_location="cpu", weights_only=False)  # noqa: TID251
    except Exception as error:
        raise unreadable(path, error) from error


def require_plain(path: Path) -> None:
    """Refuse a weights file that another library shall read, if its pickle needs more than tensors.

    Raises:
        NormfixError: NF101 damaged, NF102 a pickle that needs classes, NF121 built to harm.
    """
    if archives.is_archive(path):
        archives.require_sound(path)
    needed = unsafe_imports(path)
    if needed:
        raise _untrusted(path, needed)


def unsafe_imports(path: Path) -> list[str]:
    """List what a file of torch.save would import beyond tensors and plain values, without executing it.

    Raises:
        NormfixError: NF101 if it is no such file, NF121 if its pickle is built to harm.
    """
    found: set[str] = set()
    try:
        if archives.is_archive(path):
            with zipfile.ZipFile(path) as archive, archives.opened(archive, "data.pkl") as file:
                found = inspect_pickle(file, str(path))
        else:
            with path.open("rb") as file:
                for _ in range(_LEGACY_PICKLES):
                    found |= inspect_pickle(file, str(path))
    except NormfixError:
        raise
    except Exception as error:  # pickletools and zipfile raise half a dozen kinds
        raise unreadable(path, error) from error
    return beyond_tensors(found)


def beyond_tensors(names: Iterable[str]) -> list[str]:
    """Return those of the names that torch's safe mode would not import, sorted."""
    return sorted(set(names) - (_weights_only_unpickler._get_allowed_globals().keys() - _ALLOCATING))


@dataclass(frozen=True, slots=True)
class _Item:
    """A value on the machine's stack: how many leaves it has, shared ones counted again, and its text."""

    weight: int
    text: str | None = None


_MARK = _Item(-1)


def inspect_pickle(file: IO[bytes], where: str) -> set[str]:
    """Follow one pickle up to its STOP without executing it; return the names it would import.

    Raises:
        NormfixError: NF121 if it is huge or its values grow out of proportion to its length.
        ValueError: if it is malformed.
    """
    names: set[str] = set()
    stack: list[_Item] = []
    memo: dict[int, _Item] = {}
    start = file.tell()
    for count, (opcode, arg, place) in enumerate(pickletools.genops(file)):
        if (place or 0) - start > _LARGEST:
            raise _harmful(where, f"its pickle alone is longer than {_LARGEST >> 20} MB")
        item = _step(opcode, arg, stack, memo)
        if opcode.name in ("GLOBAL", "INST"):
            names.add(_modern(*str(arg).split(" ", 1)))
        elif opcode.name == "STACK_GLOBAL":
            names.add(item.text or _HIDDEN)
        elif opcode.name.startswith("EXT"):
            names.add(_HIDDEN)
        if item.weight > _SHARING * (count + 100):
            raise _harmful(where, "its values share their parts so often that reading it would not end")
    return names


def _modern(module: str, name: str = "") -> str:
    """Return the name that Python 3 imports, as pickles of torch's protocol 2 still use Python 2's."""
    module, name = NAME_MAPPING.get((module, name), (IMPORT_MAPPING.get(module, module), name))
    return f"{module}.{name}"


def _step(opcode: Any, arg: Any, stack: list[_Item], memo: dict[int, _Item]) -> _Item:
    """Carry one operation out on stack and memo; return what it leaves on top."""
    if opcode.name == "MARK":
        stack.append(_MARK)
        return _MARK
    if "GET" in opcode.name:
        stack.append(memo[int(arg)])
        return stack[-1]
    if "PUT" in opcode.name or opcode.name == "MEMOIZE":
        memo[len(memo) if arg is None else int(arg)] = stack[-1]
        return stack[-1]
    if opcode.name == "DUP":
        stack.append(stack[-1])
        return stack[-1]
    taken = _taken(opcode, stack)
    text = arg if isinstance(arg, str) else None
    if opcode.name == "STACK_GLOBAL":
        parts = [item.text for item in taken]
        text = None if None in parts else ".".join(str(part) for part in parts)
    item = _Item(1 + sum(item.weight for item in taken), text)
    if opcode.stack_after:
        stack.append(item)
    return item


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


def _loaded(path: Path, classes: Mapping[str, type]) -> Any:
    allowed: list[Any] = [(kind, name) for name, kind in classes.items()]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True)  # noqa: TID251
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
