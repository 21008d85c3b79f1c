"""Programs that torch.export.save wrote (.pt2): opened from an archive that normfix writes anew.

`torch.export.load` unpickles members, evaluates size expressions with sympy, compiles guards and names of inputs from
text, resolves operator names by attribute and loads shared libraries. So the file itself never reaches it. Its
members are read once, the program and the lists of its tensors are checked field by field and written anew
(normfix.storage.opening.serialized), tensors are handed on as bytes, and whatever else torch would read (sample inputs,
pickles, libraries, extra files) is left out or refused.
"""

from __future__ import annotations

import importlib
import json
import logging
import math
import re
import warnings
from pathlib import Path
from typing import Any

import torch
from torch._export.serde.schema import ScalarType

from normfix.errors import NormfixError
from normfix.networks.releases import writes_archives
from normfix.storage.opening import archives
from normfix.storage.opening.request import Loaded, Request, unreadable
from normfix.storage.opening.serialized import HarmfulProgramError, parsed, payloads, program

__all__ = ["open_network", "read_program", "recognises", "require_inert_program"]

_PROGRAM = "models/model.json"
_BEFORE = "serialized_exported_program.json"
_WEIGHTS, _CONSTANTS = "data/weights/", "data/constants/"
_LISTS = {
    _WEIGHTS: "data/weights/model_weights_config.json",
    _CONSTANTS: "data/constants/model_constants_config.json",
}
_AROUND = {"archive_format": b"pt2", "archive_version": b"0", "byteorder": b"little", ".data/version": b"3\n"}
_LEFT_OUT = re.compile(
    r"(\.?data/)?(version|serialization_id)|data/sample_inputs/model\.pt|extra/[\w./-]*", re.ASCII
)
_TENSORS = re.compile(r"data/(weights/weight|constants/tensor)_\d{1,9}", re.ASCII)
_TORCHVISION = b"torch.ops.torchvision."
_LARGEST = 32 << 20
"""A graph of a thousand operations takes 2 MB of JSON; reading it takes ten times its size in memory."""
_SHARED, _LEAST = 8, 64 << 20
"""Tensors may be this many times what is stored of them (one value for all), beyond some that are always right."""
_BYTES = {
    ScalarType.BYTE: 1,
    ScalarType.CHAR: 1,
    ScalarType.BOOL: 1,
    ScalarType.SHORT: 2,
    ScalarType.HALF: 2,
    ScalarType.BFLOAT16: 2,
    ScalarType.UINT16: 2,
    ScalarType.INT: 4,
    ScalarType.FLOAT: 4,
    ScalarType.COMPLEXHALF: 4,
    ScalarType.LONG: 8,
    ScalarType.DOUBLE: 8,
    ScalarType.COMPLEXFLOAT: 8,
    ScalarType.COMPLEXDOUBLE: 16,
    # what older releases of torch cannot write
    **{
        getattr(ScalarType, name): size
        for name, size in (("UINT32", 4), ("UINT64", 8))
        if hasattr(ScalarType, name)
    },
}


def recognises(path: Path) -> bool:
    """Recognise an archive that says it is one of torch.export's, also of the layout before torch 2.8."""
    return path.is_file() and not archives.inventory(path).names.isdisjoint(("archive_format", _BEFORE))


def open_network(path: Path, request: Request) -> Loaded:
    """Look it through and say that its conversion is another way in; a program has no modules to swap.

    Raises:
        NormfixError: NF124, after what is wrong with the file.
    """
    require_inert_program(path)
    raise NormfixError(
        "NF124",
        "it is an exported program, which holds a graph and no modules. Give the network it was exported from; "
        "normfix.storage.opening.read_program opens the program itself.",
        where=str(path),
    )


def read_program(
    path: Path, extra: dict[str, str] | None = None, *, most: int = 0
) -> torch.export.ExportedProgram:
    """Open a program that torch.export.save wrote; nothing in it runs, and sample inputs are left out.

    Args:
        path: of the file.
        extra: names of extra files inside, filled with their text.
        most: bytes that its tensors may have beyond what is stored of them, where others take their place.

    Raises:
        NormfixError: NF101 damaged, NF111 it calls an operator of torchvision, which is not installed, NF121 built
            to harm, NF420 this torch, or the one that wrote it, is older than 2.8.
    """
    _require_layout(path)
    logger = logging.getLogger("torch.export")
    level = logger.level
    logger.setLevel(logging.CRITICAL)  # it logs the error that is raised below
    try:
        with archives.Archive(path) as archive:
            texts = _texts(archive, path, most)
            for name in extra or {}:
                if f"extra/{name}" in archive.names:
                    (extra or {})[name] = archive.read(f"extra/{name}", _LARGEST).decode()
            if _TORCHVISION in texts[_PROGRAM]:
                _import_torchvision(path)
            tensors = [name for name in archive.names if _TENSORS.fullmatch(name)]
            with warnings.catch_warnings():  # torch 2.11 reads tensors from bytes, and copies them afterwards
                warnings.filterwarnings("ignore", "The given buffer is not writable", UserWarning)
                return torch.export.load(archive.rewritten(tensors, _AROUND | texts))
    except NormfixError:
        raise
    except Exception as error:
        raise unreadable(path, error) from error
    finally:
        logger.setLevel(level)


def _import_torchvision(path: Path) -> None:
    """Make torchvision's operators known to torch; which of them a program may call was decided before."""
    try:
        importlib.import_module("torchvision.ops")
    except ImportError as error:
        raise NormfixError(
            "NF111",
            "it calls an operator of torchvision, which is not installed here: pip install torchvision.",
            where=str(path),
        ) from error


def require_inert_program(path: Path) -> None:
    """Refuse a program in which something would run that is no tensor operation.

    Raises:
        NormfixError: NF101 damaged, NF121 built to harm, NF420 as `read_program`.
    """
    _require_layout(path)
    with archives.Archive(path) as archive:
        _texts(archive, path)


def _require_layout(path: Path) -> None:
    """Refuse programs of the layout before torch 2.8, which holds pickles, and all of them where torch knows no other.

    Raises:
        NormfixError: NF420.
    """
    if not writes_archives():
        reason = f"exported programs are written and read from torch 2.8 on, and this is {torch.__version__}"
    elif _BEFORE in archives.inventory(path).names:
        reason = (
            "a torch before 2.8 wrote it, in a layout that holds pickles. Export it anew with a newer one"
        )
    else:
        return
    raise NormfixError(
        "NF420", f"{reason}. The network that it was exported from opens here.", where=str(path)
    )


def _texts(archive: archives.Archive, path: Path, most: int = 0) -> dict[str, bytes]:
    """Return the members that torch shall read as text, written anew, with sample inputs that are none.

    Raises:
        NormfixError: NF101, NF121.
    """
    strange = next((name for name in archive.names if not _is_known(name)), None)
    if strange is not None:
        raise _harmful(path, f"it holds {strange[:80]!r}, which is no part of a program of tensors")
    try:
        read = _parsed(archive)
        texts = {_PROGRAM: program(read[_PROGRAM])}
        for folder, name in _LISTS.items():
            texts[name] = payloads(read[name])
            _require_stored(archive, folder, texts[name]["config"], most)
        made = {name: json.dumps(content).encode() for name, content in texts.items()}
    except HarmfulProgramError as error:
        raise _harmful(path, str(error)) from error
    except RecursionError as error:
        raise _harmful(path, "its JSON is nested without end") from error
    except (KeyError, TypeError, ValueError) as error:  # what damaged JSON runs into
        raise unreadable(path, f"{type(error).__name__}: {error}") from error
    return made | {"data/sample_inputs/model.pt": b""}


def _parsed(archive: archives.Archive) -> dict[str, Any]:
    """Return what the program's JSON says, by member, if all of it together is as long as programs are."""
    names = (_PROGRAM, *_LISTS.values())
    if sum(map(archive.size, names)) > _LARGEST:
        raise HarmfulProgramError(f"it holds JSON of more than {_LARGEST >> 20} MB")
    return {name: parsed(archive.read(name, _LARGEST)) for name in names}


def _is_known(name: str) -> bool:
    known = (_PROGRAM, *_LISTS.values(), *_AROUND)
    return name in known or bool(_TENSORS.fullmatch(name) or _LEFT_OUT.fullmatch(name))


def _require_stored(archive: archives.Archive, folder: str, config: dict[str, Any], most: int) -> None:
    """Refuse tensors that reach beyond what is stored of them, or are far more than that."""
    claimed = stored = 0
    for path_name in {meta["path_name"] for meta in config.values()}:
        stored += archive.size(f"{folder}{path_name}")
    for name, payload in config.items():
        meta, size = payload["tensor_meta"], archive.size(f"{folder}{payload['path_name']}")
        extents = [list(n.values())[0] for n in (*meta["sizes"], *meta["strides"], meta["storage_offset"])]  # noqa: RUF015
        width = _BYTES.get(ScalarType(meta["dtype"]), 1)
        if any(type(n) is not int or n < 0 for n in extents):
            raise HarmfulProgramError(f"it holds {name[:80]!r}, a tensor of no fixed extents")
        rank = len(meta["sizes"])
        sizes, strides, offset = extents[:rank], extents[rank:-1], extents[-1]
        count = math.prod(sizes)
        last = offset + sum((n - 1) * step for n, step in zip(sizes, strides, strict=True)) + 1
        if count and (last * width > size or size % width):
            raise HarmfulProgramError(f"it holds {name[:80]!r}, a tensor larger than its data")
        claimed += count * width
    if claimed > _LEAST + most + _SHARED * stored:
        raise HarmfulProgramError(f"it holds tensors of {claimed} bytes, of which {stored} are stored")


def _harmful(path: Path, problem: str) -> NormfixError:
    return NormfixError(
        "NF121", f"{problem}. It is not opened; get the file from its origin.", where=str(path)
    )
