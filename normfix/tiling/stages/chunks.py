"""An array on disk, in Zarr: whole chunks with a checksum each, written out before a block counts as done.

Each block of the stage that writes is a whole number of chunks, so two writers never share one. A chunk appears
under its name when it is whole, and what is read is checked against its sum, so nothing torn or missing is ever
taken for a value. A seal binds each chunk to its run, its value and its place there: a chunk that is whole but
another's is no value either. Chunks are not compressed: they are read once or twice and then deleted.
"""

from __future__ import annotations

import errno
import hashlib
import itertools
import os
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from normfix.errors import NormfixError
from normfix.tiling.stages.journal import is_own_file

__all__ = ["Chunked", "Seals", "chunk_edge", "sync"]

Index = tuple[slice, ...]
Seals = dict[str, str]
"""Digests of what was written, by "value/place of the chunk"."""

_EDGE = 128
"""Largest edge of a chunk: a window with a halo of a few pixels then reads little more than it needs."""

_LONGEST = 1 << 16
"""Bytes of the description of an array, which takes 700."""

_CHECKSUM = 4
"""Bytes that a checksum adds to a chunk."""


class Chunked:
    """An array in Zarr format 3, bfloat16 as its bits. It travels between processes as its place, layout and seals."""

    def __init__(
        self,
        path: Path,
        shape: Sequence[int],
        dtype: torch.dtype,
        chunks: Sequence[int],
        device: torch.device,
        run: str = "",
    ) -> None:
        self._run, self._seals = run, Seals()
        self._path, self._dtype, self._device, self._shape = path, dtype, device, tuple(shape)
        self._stored_as = torch.int16 if dtype == torch.bfloat16 else dtype
        self._edges = tuple(chunk_edge(c, n) for c, n in zip(chunks, shape, strict=True))
        self._array: Any = None

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_array": None}

    def create(self) -> bool:
        """Make the array on disk unless it is there in this layout; tell whether it was not."""
        zarr = _zarr()
        try:
            if self._is_there():
                return False
            self._array = zarr.create_array(
                store=str(self._path),
                shape=self._shape,
                chunks=self._edges,
                dtype=_NUMPY[self._stored_as],
                compressors=[zarr.codecs.Crc32cCodec()],
                config={"write_empty_chunks": True},  # a chunk that is missing is missing, not zero
                overwrite=True,
            )
        except OSError as error:
            raise self._failed(error) from error
        return True

    def read(self, index: Index) -> Tensor:
        """Return a window.

        Raises:
            NormfixError: NF327 if the disk fails, NF330 if a chunk is not what was written.
        """
        spans = [s.indices(n)[:2] for s, n in zip(index, self._shape, strict=True)]
        outer = [
            (a // e * e, min(n, -(-b // e) * e))
            for (a, b), e, n in zip(spans, self._edges, self._shape, strict=True)
        ]
        # before it is read: a pipe in place of a chunk would wait for ever
        if not self.whole(index):
            raise self._damaged("a chunk is missing")
        try:
            array = np.asarray(self._opened()[tuple(slice(a, b) for a, b in outer)])
        except OSError as error:
            raise self._failed(error) from error
        except (ValueError, TypeError, LookupError, AttributeError, RuntimeError) as error:
            raise self._damaged(str(error)) from error
        for place, seal in self._sealed(array, outer):
            if self._seals.get(place) != seal:
                raise self._damaged(f"chunk {place} is not the one that was written there")
        inner = tuple(slice(a - c, b - c) for (a, b), (c, _) in zip(spans, outer, strict=True))
        return torch.from_numpy(np.ascontiguousarray(array[inner])).view(self._dtype).to(self._device)

    def write(self, index: Index, value: Tensor) -> Seals:
        """Write a window of whole chunks, which is on the disk when this returns.

        Returns:
            The seals of its chunks.

        Raises:
            NormfixError: NF327 if the disk fails.
        """
        array = value.detach().cpu().contiguous().view(self._stored_as).numpy()
        spans = [s.indices(n)[:2] for s, n in zip(index, self._shape, strict=True)]
        seals = dict(self._sealed(array, spans))
        try:
            self._opened()[index] = array
            for chunk in self._chunks(index):
                sync(chunk)
        except OSError as error:
            raise self._failed(error) from error
        self._seals.update(seals)
        return seals

    def seal(self, seals: Mapping[str, str]) -> None:
        """Take over the seals of chunks that another process wrote."""
        self._seals.update(seals)

    def whole(self, index: Index) -> bool:
        """Tell whether every chunk of a window is there at full length."""
        size = int(np.prod(self._edges)) * np.dtype(_NUMPY[self._stored_as]).itemsize + _CHECKSUM
        chunks = (self._path.joinpath("c", *map(str, place)) for place in self._places(index))
        return all(chunk.is_file() and chunk.stat().st_size == size for chunk in chunks)

    def delete(self) -> None:
        """Delete it."""
        shutil.rmtree(self._path, ignore_errors=True)

    def _opened(self) -> Any:
        if self._array is None:
            self._array = _zarr().open_array(
                str(self._path), mode="r+", zarr_format=3, config={"write_empty_chunks": True}
            )
        return self._array

    def _is_there(self) -> bool:
        said = self._path / "zarr.json"
        if not os.path.lexists(said):
            return False
        if not is_own_file(said) or said.stat().st_size > _LONGEST:
            raise self._damaged("its zarr.json is no file that was written there")
        try:
            array = self._opened()
            layout = tuple(array.shape), tuple(array.chunks), str(array.dtype)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            layout = None
        if layout != (self._shape, self._edges, _NUMPY[self._stored_as]):
            self._array = None
        return self._array is not None

    def _places(self, index: Index) -> Iterator[tuple[int, ...]]:
        """Yield the numbers of the chunks that a window touches."""
        spans = (s.indices(n)[:2] for s, n in zip(index, self._shape, strict=True))
        numbers = (range(a // e, -(-b // e)) for (a, b), e in zip(spans, self._edges, strict=True))
        yield from itertools.product(*numbers)

    def _chunks(self, index: Index) -> Iterator[Path]:
        """Yield the files of the chunks that a window touches."""
        for place in self._places(index):
            yield self._path.joinpath("c", *map(str, place))

    def _sealed(self, array: NDArray[Any], spans: Sequence[tuple[int, int]]) -> Iterator[tuple[str, str]]:
        """Yield the name and the seal of each chunk of an array that lies at these spans, in whole chunks."""
        for place in self._places(tuple(slice(a, b) for a, b in spans)):
            part = array[
                tuple(
                    slice(max(0, p * e - a), p * e + e - a)
                    for p, e, (a, _) in zip(place, self._edges, spans, strict=True)
                )
            ]
            name = f"{self._path.name}/{'/'.join(map(str, place))}"
            digest = hashlib.sha256(f"{self._run} {name} {part.shape}\n".encode())
            digest.update(np.ascontiguousarray(part).data.cast("B"))
            yield name, digest.hexdigest()[:32]

    def _failed(self, error: OSError) -> NormfixError:
        full = error.errno in (errno.ENOSPC, errno.EDQUOT)
        reason = "the disk is full" if full else " ".join(str(error).split())[:160]
        remedy = "Make room" if full else "Check that the disk is still there"
        return NormfixError(
            "NF327",
            f"keeping values between stages failed: {reason}. {remedy}; nothing that is half written is used.",
            where=str(self._path),
        )

    def _damaged(self, reason: str) -> NormfixError:
        return NormfixError(
            "NF330",
            f"what was kept there is not what was written: {' '.join(reason.split())[:120]}. Check the disk, delete "
            "the unfinished run's folder and start anew.",
            where=str(self._path),
        )


def sync(path: Path) -> None:
    """Wait until a file is on the disk."""
    # Windows writes out only what is open for writing, and opens no folders
    descriptor = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def chunk_edge(block: int, extent: int) -> int:
    """Return an edge that divides the block (if the block is smaller than the extent) and is no longer than a chunk."""
    if block >= extent:
        block = extent
        return max(1, min(block, _EDGE))
    for parts in range(1, block + 1):
        if block % parts == 0 and block // parts <= _EDGE:
            return block // parts
    return 1


_NUMPY: dict[torch.dtype, str] = {
    torch.float64: "float64",
    torch.float32: "float32",
    torch.float16: "float16",
    torch.int16: "int16",
    torch.int32: "int32",
    torch.int64: "int64",
    torch.uint8: "uint8",
    torch.int8: "int8",
    torch.bool: "bool",
}


def _zarr() -> Any:
    with _IMPORT:
        try:
            import zarr
            import zarr.codecs
        except ImportError as error:
            raise NormfixError(
                "NF326",
                'values are kept on disk with zarr: pip install "normfix[stream]" (Python 3.11 or newer).',
                where="store",
            ) from error
    return zarr


_IMPORT = threading.Lock()
