"""TorchScript archives, opened as the programs that torch makes of them, in a process of their own.

torch.jit.load runs methods of an archive while it reads it (`__setstate__`), makes objects of C++ classes, and follows
pickles that nobody looked at. So the file never reaches it: members are read once, an archive of code, constants and
tensors is written anew from those that hold nothing of the kind, and torch reads that in a process whose memory and
time are bounded. There a program is made of it and compared with it (normfix.storage.transcription), and what comes
back is a .pt2 file, which is opened through the same gate as anybody's.
"""

from __future__ import annotations

import io
import json
import pickle  # noqa: TID251 - of names that were looked at, and nothing is made of them
import re
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from normfix.errors import NormfixError, printable
from normfix.networks.releases import writes_archives
from normfix.storage.fresh import run_fresh
from normfix.storage.opening.archives import Archive
from normfix.storage.opening.pickles import inspect_pickle
from normfix.storage.opening.request import unreadable

__all__ = ["program_of"]

_PICKLES = ("data.pkl", "constants.pkl")
_CODE = re.compile(r"code/__torch__(/\w+)*\.py", re.ASCII)
_TENSORS = re.compile(r"(data|constants)/\d{1,9}", re.ASCII)
_LARGEST = 32 << 20
"""Bytes of code, and of a pickle: a U-Net has 20,000 of code."""
_ALLOWED = re.compile(
    r"__torch__\.(?!torch\.classes).*|torch\.jit\._pickle\.(build_\w+|restore_type_tag)|collections\.OrderedDict"
    r"|torch\._utils\._rebuild_tensor_v2|torch\.\w+Storage|torch\.device"
)
"""What the pickles of an archive name: its own classes, lists of one kind, tensors."""
_RUN_ON_READING = (b"__setstate__", b"torch.classes")
_HOOKS = re.compile(rb"__forward(_pre)?_hooks__ = \[\s*[^\]\s]")
_ROOM, _GROWTH, _SECONDS, _BYTES_A_SECOND = 1 << 30, 16, 240, 1 << 20
"""Bytes and seconds that the process may take, and more for those of the file: it runs the network ten times."""
_ALONE = "from normfix.storage.scripts_alone import main; main()"


@contextmanager
def program_of(path: Path) -> Iterator[tuple[Path, str]]:
    """Give a temporary .pt2 file of what a TorchScript archive computes, and what was found of the two.

    Raises:
        NormfixError: NF101 damaged, NF121 built to harm, or taking more than it is worth, NF123 if torch makes no
            program of it, NF224 if that computes something else, NF420 if this torch reads no programs.
    """
    if not writes_archives():
        raise NormfixError(
            "NF420",
            "TorchScript is opened as an exported program, and these are written and read from torch 2.8 on; this is "
            f"{torch.__version__}. The network that it was made of opens here.",
            where=str(path),
        )
    with tempfile.TemporaryDirectory(prefix="normfix-script-") as temporary:
        folder = Path(temporary)
        _write_anew(path, folder / "script.pt")
        found = _transcribed(path, folder)
        yield folder / "program.pt2", found


def _write_anew(path: Path, target: Path) -> None:
    """Write an archive of the code, constants and tensors of another, none of which runs when it is read."""
    with Archive(path) as archive:
        names = [n for n in archive.names if n in _PICKLES or _CODE.fullmatch(n) or _TENSORS.fullmatch(n)]
        if sum(archive.size(name) for name in names if _CODE.fullmatch(name)) > _LARGEST:
            raise _harmful(path, f"it holds more than {_LARGEST >> 20} MB of code")
        for name in names:
            if name.endswith(".py"):
                _require_code(path, name, archive.read(name, _LARGEST))
            elif name in _PICKLES:
                content = archive.read(name, _LARGEST)
                _require_plain(path, content)
                _require_data(path, archive, name.removesuffix(".pkl"), content)
        around: dict[str, bytes] = {}
        for name in ("version", "byteorder"):
            if name in archive.names:
                around[name] = archive.read(name, 64)
        with target.open("wb") as file:
            shutil.copyfileobj(archive.rewritten(names, around), file)


def _require_code(path: Path, name: str, text: bytes) -> None:
    """Refuse code of which a part runs when it is read, or unseen when it is called."""
    met = next((word.decode() for word in _RUN_ON_READING if word in text), None)
    if met is not None:
        raise _harmful(path, f"its {name[:80]} holds {met}, which runs when torch reads it")
    if _HOOKS.search(text):
        raise NormfixError(
            "NF123",
            f"its {name[:80]} has hooks, which its program would not run. {_INSTEAD}",
            where=str(path),
        )


def _require_plain(path: Path, content: bytes) -> None:
    """Refuse a pickle that names anything but the archive's own classes, lists and tensors."""
    strange = sorted(n for n in inspect_pickle(io.BytesIO(content), str(path)) if not _ALLOWED.fullmatch(n))
    if strange:
        raise _harmful(path, f"its pickle names {', '.join(strange)[:160]}")


def _require_data(path: Path, archive: Archive, folder: str, content: bytes) -> None:
    """Refuse tensors of more values than their member holds: torch would read on in memory that is not the file's."""
    tensors = _Tensors(io.BytesIO(content))
    try:
        tensors.load()
        needed = [
            (f"{folder}/{key}", getattr(torch, kind).dtype.itemsize * n) for kind, key, n in tensors.found
        ]
    except Exception as error:  # a pickle that is none, or of something else than numbers
        raise unreadable(path, f"its {folder}.pkl cannot be followed") from error
    for name, size in needed:
        held = archive.size(name) if name in archive.names else 0
        if not 0 <= size <= held:
            raise unreadable(path, f"its {name[:80]} has {held} bytes, and its tensors need {size}")


class _Nothing:
    """Stands for whatever a pickle makes, and does nothing."""

    def __new__(cls, *_: Any, **__: Any) -> _Nothing:
        return object.__new__(cls)

    def __setstate__(self, _: object) -> None: ...

    def __setitem__(self, _: object, __: object) -> None: ...

    def append(self, _: object) -> None: ...

    def extend(self, _: object) -> None: ...


class _Tensors(pickle.Unpickler):
    """Follows a pickle, and notes of each tensor's data the kind, the key and the number of values."""

    def __init__(self, content: io.BytesIO) -> None:
        super().__init__(content)
        self.found: list[tuple[str, str, int]] = []

    def find_class(self, module: str, name: str) -> type:
        """Return what stands for a class or function, under its name."""
        return type(name, (_Nothing,), {})

    def persistent_load(self, pid: Any) -> _Nothing:
        """Note what it refers to, as torch writes it: ("storage", kind, key, device, number of values)."""
        _, kind, key, _, number = pid
        self.found.append((kind.__name__, str(key), int(number)))
        return _Nothing()


def _transcribed(path: Path, folder: Path) -> str:
    """Have a fresh process make a program of the archive in a folder; return what it found.

    Raises:
        NormfixError: NF121, NF123, NF224.
    """
    size, threads = path.stat().st_size, str(torch.get_num_threads())
    seconds = _SECONDS + size // _BYTES_A_SECOND
    reason = run_fresh(_ALONE, str(folder), str(_ROOM + _GROWTH * size), threads, seconds=seconds)
    if reason:
        raise _harmful(path, f"the process that read it ended: {printable(reason[:200])}")
    answer: Any = json.loads((folder / "answer.json").read_text(encoding="utf-8"))
    if "refused" not in answer:
        return f"{path}: TorchScript, opened as the program that torch makes of it: {answer['found']}."
    why = printable(answer["refused"]).replace(str(folder / "script.pt"), str(path))
    if answer["code"] == "NF121":
        raise _harmful(path, why)
    if answer["code"] == "NF224":
        raise NormfixError("NF224", f"{why}, so it is not used.", where=str(path))
    raise NormfixError(
        "NF123", f"torch makes no program of this TorchScript: {why}. {_INSTEAD}", where=str(path)
    )


_INSTEAD = (
    "Where the network's source is, trace it (torch.jit.trace), save a program (torch.export.save), or save its "
    "weights, torch.save(model.state_dict(), 'weights.pt'), and give them with --arch."
)


def _harmful(path: Path, problem: str) -> NormfixError:
    return NormfixError(
        "NF121", f"{problem}. It is not opened; get the file from its origin.", where=str(path)
    )
