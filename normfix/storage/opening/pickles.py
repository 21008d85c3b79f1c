"""Read what torch.save wrote, running nothing unless asked.

A pickle is a program. `inspect_pickle` follows it without executing it (normfix.storage.opening.machine):
which classes and functions it would import, and whether its values grow, or collide, so that reading it would not end.
"""

from __future__ import annotations

import io
import pickle  # noqa: TID251 - for its exception
import re
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import torch
from torch import _weights_only_unpickler

from normfix.errors import NormfixError
from normfix.images.deadline import within
from normfix.networks.naming import make_importable
from normfix.storage.opening import archives
from normfix.storage.opening.allocation import Bounded, uncounted
from normfix.storage.opening.factories import classes_named
from normfix.storage.opening.machine import Machine, OutOfProportionError, followed
from normfix.storage.opening.plain_numpy import STAND_INS
from normfix.storage.opening.request import Request, unreadable
from normfix.storage.opening.unfolding import is_out_of_proportion

__all__ = ["inspect_pickle", "is_torch_file", "read_torch", "unsafe_imports"]

_LEGACY = b"l\xfc\x9cF\xf9 j\xa8P\x19"  # how torch.save before 1.6 began its files
_LEGACY_PICKLES = 5
_STORAGE = re.compile(r"data/[0-9A-Za-z_]{1,18}")
"""Members that hold tensors: torch.save numbers them, and before 1.10 named them by their place in memory."""
_LARGEST = 64 * archives.CHUNK  # the pickle alone, without tensors; ten thousand layers take 3 MB
_SECONDS, _BYTES_A_SECOND = 8.0, 16 << 20
"""Processor time that following one pickle may take, and bytes of the file for a second more."""
_GROWTH, _ROOM = 10, 1 << 30
"""Bytes by which the process may grow for each of the file, and beside: a compressed one unpacks to eight times."""
_INSTEAD = "get the file from its origin"
_COLLIDING = 2000
"""Keys of one hash cost the square of their number; weights are named by texts, whose hashes nobody can choose."""
_SMALL = frozenset(
    {
        *(
            "collections.OrderedDict",
            "collections.Counter",
            "builtins.set",
            "builtins.complex",
            "_codecs.encode",
        ),
        *("torch.Size", "torch.device", "torch.serialization._get_layout", "torch.nn.parameter.Parameter"),
        *(f"torch._utils._rebuild_{name}" for name in ("tensor", "tensor_v2", "tensor_v3", "parameter")),
        *("torch._utils._rebuild_parameter_with_state", "torch._tensor._rebuild_from_type_v2"),
        *STAND_INS,
    }
)
"""What a pickle of tensors calls that makes views of what the file stores, and nothing larger."""
_LARGE = re.compile(r"torch\._utils\._rebuild_\w+|torch\.\w*Tensor|torch\.\w+\.\w*Tensor")
"""What else it may call; the memory that this takes is counted."""
_ALLOCATING = frozenset({"builtins.bytearray", "torch._utils._rebuild_meta_tensor_no_storage"})
"""What torch's safe mode lets a pickle call although state dicts have no use for it and it can take all memory."""


def is_torch_file(path: Path) -> bool:
    """Tell whether torch.save wrote a file, in the format of today or in that before 1.6."""
    start = archives.start_of(path)
    return "data.pkl" in archives.inventory(path).names if start.startswith(b"PK") else _LEGACY in start


def read_torch(path: Path, request: Request) -> Any:
    """Return the content of a file that torch.save wrote.

    Raises:
        NormfixError: NF101 damaged, NF102 a pickle that needs more than tensors and is not trusted, NF121 built
            to harm, NF122 an allowed class that is none, NF111 a trusted pickle of packages that are others now.
    """
    with _inspected(path) as content:
        needed = beyond_tensors(content.names)
        allowed = [name for name in needed if _is_allowed(name, request.allow_classes)]
        if set(needed) <= set(allowed):
            loaded = _loaded(path, content, classes_named(allowed))
            if is_out_of_proportion(loaded):
                raise _harmful(str(path), "its values hold themselves, or share their parts without end")
            return loaded
        if not request.trust_pickle:
            raise _untrusted(path, [name for name in needed if name not in allowed])
        request.tell(f"{path}: running a pickle that imports {_listed(needed)}.")
        for name in needed:
            make_importable(name)
        try:
            return torch.load(content.file, map_location="cpu", weights_only=False)  # noqa: TID251
        except (AttributeError, ImportError) as error:
            raise NormfixError(
                "NF111",
                f"{error}. A network that was pickled whole needs its packages as they were: open it with them and "
                "save its state_dict or a normfix folder, which do not.",
                where=str(path),
            ) from error
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
    calls: set[str]


@contextmanager
def _inspected(path: Path) -> Iterator[_Content]:
    """Give what torch may read of a file: its pickle and tensors, in an archive written anew, or the old format."""
    if archives.is_archive(path):
        with archives.Archive(path) as archive:
            if "data.pkl" not in archive.names:
                raise unreadable(path, "it holds no data.pkl, so torch.save did not write it")
            data = archive.read("data.pkl", _LARGEST)
            (machine,) = _followed(path, io.BytesIO(data), 1)
            order = archive.read("byteorder", 16) if "byteorder" in archive.names else b"little"
            storages = [name for name in archive.names if _STORAGE.fullmatch(name)]
            around = {"data.pkl": data, "byteorder": order, "version": b"3\n"}
            yield _Content(archive.rewritten(storages, around), machine.names, machine.calls)
        return
    if _is_tar(path):  # torch would unpack what tar says, which nobody looked at
        raise _harmful(str(path), "it is an archive of tar, the format of torch before 0.1.10")
    with path.open("rb") as file:
        machines = _followed(path, file, _LEGACY_PICKLES)
        _require_listed(path, machines)
        names = set[str]().union(*(machine.names for machine in machines))
        calls = set[str]().union(*(machine.calls for machine in machines))
        yield _Content(archives.without_descriptor(file, path.stat().st_size), names, calls)


def _is_tar(path: Path) -> bool:
    """Tell whether a file begins with a header of tar.

    Only that is looked at: `tarfile.is_tarfile` unpacks a compressed archive, and reads a header as long as it says.
    """
    try:
        tarfile.TarInfo.frombuf(archives.start_of(path, tarfile.BLOCKSIZE), "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return False
    return True


def _require_listed(path: Path, machines: list[Machine]) -> None:
    """Refuse a file of the old format whose tensors refer to data that its list of data does not name.

    torch leaves such tensors as the memory happened to be.

    Raises:
        NormfixError: NF101.
    """
    *_, content, listed = machines
    absent = content.data - listed.texts
    if absent:
        raise unreadable(
            path, f"the values of {len(absent)} of its {len(content.data)} tensors are not in it"
        )


def _followed(path: Path, file: IO[bytes], pickles: int) -> list[Machine]:
    """Follow a number of pickles, one behind the other."""
    try:
        return [
            within(_seconds(path), lambda: _inspected_one(file, str(path)), str(path), instead=_INSTEAD)
            for _ in range(pickles)
        ]
    except NormfixError:
        raise
    except Exception as error:  # pickletools raises half a dozen kinds
        raise unreadable(path, error) from error


def _seconds(path: Path) -> float:
    return _SECONDS + path.stat().st_size / _BYTES_A_SECOND


def beyond_tensors(names: Iterable[str]) -> list[str]:
    """Return those of the names that are needed beyond what torch's safe mode imports, sorted.

    Numbers of numpy need nothing where nothing else is needed. A class that is allowed gets numpy's own arrays or none.
    """
    beyond = set(names) - (_weights_only_unpickler._get_allowed_globals().keys() - _ALLOCATING)
    return [] if beyond <= STAND_INS.keys() else sorted(beyond)


def inspect_pickle(file: IO[bytes], where: str) -> set[str]:
    """Follow one pickle up to its STOP without executing it; return the names it would import.

    Raises:
        NormfixError: NF121 if it is huge, its values grow out of proportion to its length, or it needs nothing but
            tensors and calls what those do not.
        ValueError: if it is malformed.
    """
    return _inspected_one(file, where).names


def _inspected_one(file: IO[bytes], where: str) -> Machine:
    try:
        machine = followed(file, _LARGEST)
    except OutOfProportionError as error:
        raise _harmful(where, str(error)) from error
    strange = sorted(name for name in machine.calls - _SMALL if not _LARGE.fullmatch(name))
    if beyond_tensors(machine.names):
        return machine
    if strange:
        raise _harmful(where, f"its pickle calls {_listed(strange)} in a way that no tensors are saved")
    if machine.crafted > _COLLIDING:
        raise _harmful(
            where,
            f"{machine.crafted} of its keys are numbers or tuples, chosen so that reading it would not end",
        )
    return machine


def _loaded(path: Path, content: _Content, classes: Mapping[str, type]) -> Any:
    size = path.stat().st_size

    def load() -> Any:
        return torch.load(content.file, map_location="cpu", weights_only=True)  # noqa: TID251

    allowed: list[Any] = [(kind, name) for name, kind in (classes or STAND_INS).items()]
    try:
        # most of torch's own list makes views of what the file stores; classes may make anything
        large = classes or not content.calls <= _SMALL
        counting = Bounded(size, str(path)) if large else nullcontext()
        room = _GROWTH * size + _ROOM
        with uncounted(), counting, torch.serialization.safe_globals(allowed):
            return within(_seconds(path), load, str(path), growth=room, instead=_INSTEAD)
    except NormfixError:
        raise
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
