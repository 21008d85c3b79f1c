"""The layout of a zip archive: the one that is read, and the one that is written.

    member ... member, directory, [64-bit end, its locator,] end

A member is a header, its data and perhaps a descriptor with checksum and sizes. From the first byte to the last
each belongs to one of these, and what the directory says of a member its header and descriptor say too.
"""

from __future__ import annotations

import io
import struct
import unicodedata
import zipfile
from collections.abc import Mapping
from dataclasses import dataclass
from typing import IO

__all__ = ["DamagedError", "HarmfulError", "Member", "directory", "layout"]

_GROWTH = 8
"""An archive may unpack to this many times its size; torch writes members as they are (1)."""
_LONGEST_NAME = 1000

_END = struct.Struct("<4s4H2LH")
_END64 = struct.Struct("<4sQ2H2L4Q")
_LOCATOR = struct.Struct("<4sLQL")
_ENTRY = struct.Struct("<4s6H3L5H2L")
_HEADER = struct.Struct("<4s5H3L2H")
_FULL, _FULL_SHORT = 0xFFFFFFFF, 0xFFFF
"""Markers: the value stands in a 64-bit field."""
_DESCRIBED, _UTF8 = 0x0008, 0x0800
_FLAGS = _DESCRIBED | _UTF8 | 0x0006
"""Bits an archive may have: sizes behind the data, names in UTF-8, how hard it was compressed."""
_ZIP64, _OTHER_NAME, _OTHER_COMMENT = 0x0001, 0x7075, 0x6375


class DamagedError(ValueError):
    """It ends early, or is no archive."""


class HarmfulError(ValueError):
    """No program that people use writes such an archive."""


@dataclass(frozen=True, slots=True)
class Member:
    """Where one member's data lie."""

    name: str
    start: int
    packed: int
    size: int
    crc: int
    compressed: bool


def directory(file: IO[bytes], length: int, *, flat: bool = False) -> dict[str, Member]:
    """Return the members by their names below the top folder; every byte of the file belongs to one of its parts.

    Args:
        file: of the archive.
        length: of the file.
        flat: there is no top folder.
    """
    start, size, count = _end(file, length)
    file.seek(start)
    data = file.read(size)
    found: list[tuple[int, bytes, Member, int]] = []
    place = 0
    while place < size:
        sign, _, _, flags, method, _, _, crc, packed, unpacked, *rest = _ENTRY.unpack_from(data, place)
        name_length, extra_length, comment_length, disk, _, _, offset = rest
        names_from = place + _ENTRY.size
        raw = data[names_from : names_from + name_length]
        extra = data[names_from + name_length : names_from + name_length + extra_length]
        place = names_from + name_length + extra_length + comment_length
        if sign != b"PK\1\2" or place > size:
            raise DamagedError("its directory is broken")
        if flags & ~_FLAGS or disk:
            raise HarmfulError("the archive is encrypted or of a kind that torch does not write")
        if method not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
            raise HarmfulError("the archive is compressed in a way that torch does not read")
        unpacked, packed, offset = _wide(extra, [unpacked, packed, offset])
        member = Member(_name(raw, flat=flat), 0, packed, unpacked, crc, method == zipfile.ZIP_DEFLATED)
        if not member.compressed and packed != unpacked:
            raise HarmfulError(f"the sizes of {member.name[:80]} disagree")
        found.append((offset, raw, member, flags))
    if len(found) != count:
        raise HarmfulError("the archive says that it has another number of members than it has")
    return _placed(file, sorted(found, key=lambda entry: entry[0]), start, length, flat=flat)


def _end(file: IO[bytes], length: int) -> tuple[int, int, int]:
    """Return start and size of the directory and the number of members, from the records at the very end."""
    if length < _END.size:
        raise DamagedError("it is no zip archive, or cut short")
    at = length - _END.size
    file.seek(at)
    sign, disk, first, here, count, size, start, comment = _END.unpack(file.read(_END.size))
    if sign != b"PK\5\6":
        raise DamagedError("it does not end as a zip archive does")
    if comment or disk not in (0, _FULL_SHORT) or first not in (0, _FULL_SHORT) or here != count:
        raise HarmfulError("the archive is in several parts, or something follows its end")
    if at >= _LOCATOR.size + _END64.size:
        file.seek(at - _LOCATOR.size)
        sign, disk, wide_at, disks = _LOCATOR.unpack(file.read(_LOCATOR.size))
        if sign == b"PK\6\7":
            at -= _LOCATOR.size + _END64.size
            file.seek(at)
            sign, rest, _, _, part, first, here64, count64, size64, start64 = _END64.unpack(
                file.read(_END64.size)
            )
            narrow = ((count, count64, _FULL_SHORT), (size, size64, _FULL), (start, start64, _FULL))
            agree = all(short in (wide, marker) for short, wide, marker in narrow)
            whole = sign == b"PK\6\6" and wide_at == at and rest == _END64.size - 12
            if not whole or not agree or disk or disks > 1 or part or first or here64 != count64:
                raise HarmfulError("the archive has two ends that disagree")
            count, size, start = count64, size64, start64
    if start + size != at:
        raise HarmfulError(
            "the archive's directory is not where its end says, so programs read different ones"
        )
    return start, size, count


def _name(raw: bytes, *, flat: bool) -> str:
    """Return a member's name, which must mean the same place everywhere."""
    name = raw.decode()
    # the top folder has the name that the file once had
    top, _, below = ("flat", "", name.removesuffix("/")) if flat else name.removesuffix("/").partition("/")
    if not name or len(name) > _LONGEST_NAME or not below.isprintable():
        raise HarmfulError("a member of the archive has a name that no file has")
    parts = below.split("/") if below else []
    if "\\" in below or ":" in below or any(part in ("", ".", "..") for part in (top, *parts)):
        raise HarmfulError(f"a member of the archive leads outside of it ({name[:80]!r})")
    return name


def _placed(
    file: IO[bytes],
    entries: list[tuple[int, bytes, Member, int]],
    end: int,
    length: int,
    *,
    flat: bool,
) -> dict[str, Member]:
    """Compare each entry with the header before its data; from the first byte to the directory there are no gaps."""
    total = sum(member.size for _, _, member, _ in entries)
    if total > _GROWTH * length:
        raise HarmfulError(f"the archive of {length} bytes unpacks to {total}")
    result: dict[str, Member] = {}
    taken: set[str] = set()
    tops: set[str] = set()
    place = 0
    for number, (offset, raw, member, flags) in enumerate(entries):
        following = entries[number + 1][0] if number + 1 < len(entries) else end
        if offset != place:
            raise HarmfulError("something stands before, between or within the archive's members")
        start = _after_header(file, offset, raw, member, flags)
        place = following
        _require_end(file, start + member.packed, following, member, described=bool(flags & _DESCRIBED))
        top, _, name = ("", "", member.name) if flat else member.name.partition("/")
        tops.add(top)
        plain = unicodedata.normalize("NFKC", member.name).casefold().removesuffix("/")
        if plain in taken:
            raise HarmfulError(
                "two members of the archive have one name, so programs disagree about what it holds"
            )
        taken.add(plain)
        if not name or name.endswith("/"):
            if member.size or (not name and not member.name.endswith("/")):
                raise HarmfulError(f"the archive's members are not in one folder ({member.name[:80]!r})")
            continue
        result[name] = Member(
            name, start, member.packed, member.size, member.crc, compressed=member.compressed
        )
    if len(tops) > 1:
        raise HarmfulError("the archive's members are not in one folder")
    return result


def _after_header(file: IO[bytes], offset: int, raw: bytes, member: Member, flags: int) -> int:
    """Return where a member's data start, if the header before them says what the directory says."""
    file.seek(offset)
    sign, _, own_flags, method, _, _, crc, packed, size, name_length, extra_length = _HEADER.unpack(
        file.read(_HEADER.size)
    )
    name, extra = file.read(name_length), file.read(extra_length)
    size, packed = _wide(extra, [size, packed])
    told = ((crc, member.crc), (packed, member.packed), (size, member.size))
    later = bool(flags & _DESCRIBED)
    same = all(here == there or (later and here == 0) for here, there in told)
    kind = method == (zipfile.ZIP_DEFLATED if member.compressed else zipfile.ZIP_STORED)
    if sign != b"PK\3\4" or name != raw or own_flags != flags or not kind or not same:
        raise HarmfulError(f"the archive says two things of its member {member.name[:80]!r}")
    return int(offset + _HEADER.size + name_length + extra_length)


def _require_end(file: IO[bytes], end: int, following: int, member: Member, *, described: bool) -> None:
    """Refuse a gap behind a member's data, or a descriptor there that disagrees."""
    gap = following - end
    if gap == 0 and not described:
        return
    if gap not in (12, 16, 20, 24) or not described:
        raise HarmfulError("something stands before, between or within the archive's members")
    file.seek(end)
    data = file.read(gap)
    body = data.removeprefix(b"PK\7\x08") if gap in (16, 24) else data
    kind = "<LLL" if len(body) == 12 else "<LQQ"
    if len(body) not in (12, 20) or struct.unpack(kind, body) != (member.crc, member.packed, member.size):
        raise HarmfulError(f"the archive says two things of its member {member.name[:80]!r}")


def _wide(extra: bytes, values: list[int]) -> list[int]:
    """Return sizes and offset, those that are marked from the 64-bit field."""
    fields: dict[int, bytes] = {}
    place = 0
    while place + 4 <= len(extra):
        kind, length = struct.unpack_from("<HH", extra, place)
        if kind in fields or place + 4 + length > len(extra):
            raise HarmfulError("an extra field of the archive is broken or repeated")
        fields[kind] = extra[place + 4 : place + 4 + length]
        place += 4 + length
    if _OTHER_NAME in fields or _OTHER_COMMENT in fields:
        raise HarmfulError("a member of the archive has two names")
    wide = fields.get(_ZIP64, b"")
    taken = 0
    result = []
    for value in values:
        if value == _FULL and taken + 8 <= len(wide):
            value = struct.unpack_from("<Q", wide, taken)[0]
            taken += 8
        result.append(value)
    return result


def layout(parts: Mapping[str, tuple[IO[bytes], int, int, int]]) -> list[tuple[IO[bytes], int, int]]:
    """Return the parts of an archive: headers, contents, directory and end, nothing compressed."""
    pieces: list[tuple[IO[bytes], int, int]] = []
    entries: list[bytes] = []
    place = 0
    for name, (file, first, size, crc) in parts.items():
        raw = f"archive/{name}".encode()
        large = struct.pack("<HHQQ", _ZIP64, 16, size, size) if size >= _FULL else b""
        short = _FULL if large else size
        header = _HEADER.pack(b"PK\3\4", 45, _UTF8, 0, 0, 0x21, crc, short, short, len(raw), len(large)) + (
            raw + large
        )
        far = struct.pack("<HHQQQ", _ZIP64, 24, size, size, place)
        entries.append(
            _ENTRY.pack(
                *(b"PK\1\2", 45, 45, _UTF8, 0, 0, 0x21, crc, _FULL, _FULL),
                *(len(raw), len(far), 0, 0, 0, 0, _FULL),
            )
            + raw
            + far
        )
        pieces += [(io.BytesIO(header), 0, len(header)), (file, first, size)]
        place += len(header) + size
    index = b"".join(entries)
    count = len(entries)
    end64 = _END64.pack(b"PK\6\6", _END64.size - 12, 45, 45, 0, 0, count, count, len(index), place)
    locator = _LOCATOR.pack(b"PK\6\7", 0, place + len(index), 1)
    end = _END.pack(b"PK\5\6", 0, 0, _FULL_SHORT, _FULL_SHORT, _FULL, _FULL, 0)
    last = index + end64 + locator + end
    return [*pieces, (io.BytesIO(last), 0, len(last))]
