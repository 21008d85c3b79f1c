"""Foresee what each operation of a network from a file makes and costs, before it runs.

A program of a few kilobytes may ask for a tensor of terabytes, or add up a trillion values of one that is stored once.
So each operation first runs on tensors without data, which say what it would give; what it would add to memory, and
how long it would take on one core, are counted against what a file of its size may take.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch._ops import OpOverload
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from torch.utils.flop_counter import flop_registry

from normfix.errors import NormfixError
from normfix.networks.functions import by_position
from normfix.networks.graph.soundness import require_sound

__all__ = ["Foreseen", "TooMuchError", "Workload"]

_LEAST, _GROWTH = 640 << 20, 8
"""Bytes at once: what a three-dimensional network takes for 64 pixels a side, and what it takes of its weights."""
_GENEROUS, _PATIENT = 3 << 29, 120.0
"""Bytes and seconds for a library's network: attention over 64 x 64 pixels takes as many bytes, a deep one as long."""
_WITH_FREE_SIZES = "If it is right and its sizes are fixed, export it with free sizes, of a smaller image."
_ON_A_SMALLER_EXAMPLE = "If it is right, convert the network again on a smaller example, and save that."
_PER_VALUE, _MOST_OF_VALUES = 1600, 3 << 30
"""Bytes for each value of an image that has to be run on: the maps of a U-Net of 64 channels."""
_SECONDS, _PER_BYTE, _SECONDS_PER_VALUE = 6.0, 1e-6, 2e-6
_SECONDS_OF_LARGE = 2e-4
"""For each value of an image whose size is fixed: 8 million multiplications; U-Nets of 32 channels take one."""
_CHEAP, _DEAR = 1e-9, 1e-8
"""Seconds for each value of an operation that adds or copies, and of one that sorts, samples or takes roots."""
_DEAREST, _TRANSFORMED = 1e-7, 5e-8
"""Seconds for each value that is sorted, searched for or drawn by weight, and of a Fourier transform."""
_FLOPS = 4e10
"""Multiplications and additions that one core does in a second, in a convolution."""
_SLOWER = {torch.float16: 8, torch.float64: 2, torch.complex64: 4, torch.complex128: 8}
"""How much longer multiplications take on numbers of other kinds than float32."""
_OF_MATRICES = 3e-9
"""Seconds for each value and each row of a matrix that is decomposed: those of singular values."""
_STEP = 1e-5
"""Seconds for each step of a recurrence, beside its multiplications."""
_BLOCK, _LAID_OUT = 16, 7e-9
"""Channels to a block in which convolutions of float32 are computed, and seconds for each value laid out in others."""
_BESIDE_CONVOLUTIONS = 256 << 20
"""Bytes that each may take beside its output without being counted: four times what 64 channels of 256 x 256 take."""
_OPERATIONS = 200_000
# fmt: off
_COPYING = frozenset((
    "add", "sub", "mul", "div", "add_", "sub_", "mul_", "div_", "neg", "relu", "relu_", "clamp", "maximum", "minimum",
    "clone", "copy_", "cat", "stack", "_to_copy", "constant_pad_nd", "where", "index", "index_select", "select_scatter",
    "slice_scatter", "fill_", "zero_", "zeros", "ones", "full", "empty", "empty_strided", "new_empty", "new_zeros",
    "empty_like", "zeros_like", "ones_like", "full_like", "sum", "mean", "convolution", "mm", "addmm", "bmm", "baddbmm",
))
_CUBIC = frozenset((
    "_linalg_det", "_linalg_eigh", "_linalg_slogdet", "_linalg_solve_ex", "_linalg_svd", "cholesky_inverse",
    "cholesky_solve", "linalg_cholesky_ex", "linalg_inv_ex", "linalg_lu_factor_ex", "linalg_lu_solve", "linalg_qr",
    "linalg_solve_triangular", "triangular_solve",
))
_SORTING = frozenset((
    "sort", "argsort", "topk", "mode", "_unique", "_unique2", "unique_dim", "isin", "gcd", "lcm", "gcd_", "lcm_",
    "searchsorted", "bucketize", "multinomial",
))
_FALLING_APART = frozenset(("unbind", "unbind_copy", "split", "unsafe_split", "split_copy"))
_PAIRS = frozenset(("_cdist_forward", "_pdist_forward", "_euclidean_dist"))
_FOLLOWS_DATA = frozenset((
    "nonzero", "masked_select", "_local_scalar_dense", "item", "is_nonzero", "index",
    "_unique", "_unique2", "unique_dim", "unique_consecutive",
))
# fmt: on
"""What gives as much as the values say, and never more than there are."""
_DIMENSIONS = 8


class TooMuchError(NormfixError):
    """A network would make or cost more than is in proportion."""


class Workload(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Run operations, and refuse the first that would make or cost too much.

    Args:
        stored: bytes of the file that says what is run.
        where: named in the error.
        values: of the image it is run on, where that is given and not chosen small.
        generous: a library's network is run, which is known to be in proportion to its weights, and no program.

    Raises:
        NormfixError: NF144.
        ValueError: for a call with which an operator would read beyond its tensors.

    Example:
        >>> with Workload(1 << 20, "p.pt2"):
        ...     _ = torch.ones(8) + 1
    """

    def __init__(self, stored: int, where: str, values: int = 0, *, generous: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._where = where
        least = _GENEROUS if generous else _LEAST
        self._most_bytes = least + _GROWTH * stored + min(_PER_VALUE * values, _MOST_OF_VALUES)
        seconds = _SECONDS + _PER_BYTE * stored + _SECONDS_PER_VALUE * values
        self._most_seconds = max(seconds, _PATIENT) if generous else seconds
        self._next = _ON_A_SMALLER_EXAMPLE if generous else _WITH_FREE_SIZES
        self._bytes = 0
        self._seconds = 0.0
        self._left = _OPERATIONS
        self._alive: dict[int, tuple[StorageWeakRef, int]] = {}
        self._foreseen: dict[object, tuple[int, float]] = {}

    def __torch_dispatch__(
        self, func: OpOverload, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        """Count an operation, and run it unless it makes or costs too much."""
        kwargs = kwargs or {}
        self._left -= _tensors(func, args)
        if self._left < 0:
            self._refuse(func, f"more than {_OPERATIONS} operations")
        if not _is_view(func):
            self._count(func, args, kwargs)
        result = self._run(func, args, kwargs)
        self._hold(result)
        return result

    def _run(self, func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        return func(*args, **kwargs)

    def _count(self, func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> None:
        require_sound(func, args, kwargs)
        key = _key(func, args, kwargs)
        made = self._foreseen.get(key)
        if made is None:
            made = _foresee(func, args, kwargs)
            if "repeat_interleave" not in str(func):  # it gives as much as its values say
                self._foreseen[key] = made
        size, seconds = made
        self._seconds += seconds
        if self._bytes + size > self._most_bytes:
            self._forget()
        if self._bytes + size > self._most_bytes:
            self._refuse(func, f"{(self._bytes + size) >> 20} MB at once")
        if self._seconds > self._most_seconds:
            self._refuse(func, f"about {self._seconds:.0f} s")

    def _hold(self, result: Any) -> None:
        """Add the storages of what was made to those that are alive."""
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and self._is_held(tensor):
                storage = tensor.untyped_storage()
                reference = StorageWeakRef(storage)  # type: ignore[no-untyped-call]
                known = self._alive.get(reference.cdata)
                if known is None or _is_gone(known[0]):
                    self._alive[reference.cdata] = reference, storage.nbytes()
                    self._bytes += storage.nbytes()

    def _is_held(self, tensor: Tensor) -> bool:
        return tensor.device.type != "meta"

    def _forget(self) -> None:
        """Leave out the storages that are gone."""
        self._alive = {key: held for key, held in self._alive.items() if not _is_gone(held[0])}
        self._bytes = sum(size for _, size in self._alive.values())

    def _refuse(self, func: OpOverload, what: str) -> None:
        raise TooMuchError(
            "NF144",
            f"running it once takes {what} ({func}), out of proportion to a file of its size. "
            f"It is not opened. {self._next}",
            where=self._where,
        )


class Foreseen(Workload):  # type: ignore[no-untyped-call]
    """Foresee operations and run none: what they give has extents and no data, and is counted as if it had.

    Args:
        stored, where: as of Workload.
        values: of an image whose size is fixed by what is run; 0 for what is run when a file is opened.

    Raises:
        NormfixError: NF144 beyond the proportion, or beyond the memory of this machine.
    """

    def __init__(self, stored: int, where: str, values: int = 0) -> None:
        super().__init__(stored, where)
        if values:
            self._most_bytes = min(self._most_bytes + _PER_VALUE * values, _memory())
            self._most_seconds += _SECONDS_OF_LARGE * values

    @property
    def seconds(self) -> float:
        """Return how long what was foreseen takes on one core."""
        return self._seconds

    def _run(self, func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Any:
        """Give what an operation would, without data."""
        bare, named = _bare(func, args, kwargs)
        return func(*bare, **named)

    def _is_held(self, tensor: Tensor) -> bool:
        return True


def _memory() -> int:
    """Return the bytes of memory of this machine; more than any has where it does not say."""
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, OSError, ValueError):
        return 1 << 50


def _is_gone(reference: StorageWeakRef) -> bool:
    return bool(reference.expired())  # type: ignore[no-untyped-call]


def _foresee(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[int, float]:
    """Return the bytes that an operation makes, with what it needs beside them, and the seconds it takes."""
    given = [value for value in tree_leaves((args, kwargs)) if isinstance(value, Tensor)]
    read = max((value.numel() for value in given), default=0)
    name = func._schema.name.partition("::")[2]
    longer = _beyond_size(name, given)
    try:
        bare, named = _bare(func, args, kwargs)
        result = func(*bare, **named)
    except Exception:  # noqa: BLE001 - what has no such form says so in many ways
        size, seconds = _bound(name, given, args, kwargs)
        return size, seconds + longer
    made = [value for value in tree_leaves(result) if isinstance(value, Tensor)]
    own = {id(value) for value in tree_leaves((bare, named)) if isinstance(value, Tensor)}
    size = sum(value.numel() * value.itemsize for value in made if id(value) not in own)
    # of an empty result torch still goes through the longer extents
    written = sum(value.numel() or max(value.shape, default=0) for value in made)
    slower = max((_SLOWER.get(value.dtype, 1) for value in given), default=1)
    multiplied = _multiplications(func, bare, named, result) + _uncounted(name, given, written)
    seconds = _rate(name) * max(read, written) + slower * multiplied / _FLOPS
    if "pool" in name and written:
        seconds += _CHEAP * written * (_shrunk(given[0], made[0]) if "adaptive" in name else _window(args))
    between = _between(name, given, made)
    size, seconds = size + between * 4, seconds + _DEAR * between
    if name in ("convolution", "_convolution"):
        beside, laid_out = _laid_out(
            {**by_position([a.name for a in func._schema.arguments], bare), **named}, made[0]
        )
        size, seconds = size + max(0, beside - _BESIDE_CONVOLUTIONS), seconds + _LAID_OUT * laid_out
    # operands that are not stored as their extents say are copied before they are multiplied
    copied = max((v.numel() * v.itemsize for v in given if not v.is_contiguous()), default=0)
    return size + copied * (_multiplies(func)), seconds + longer


def _tensors(func: OpOverload, args: tuple[Any, ...]) -> int:
    """Return how many tensors an operation gives at least; one for most."""
    name = func._schema.name.partition("::")[2]
    if name not in _FALLING_APART or not isinstance(args[0], Tensor) or not args[0].dim():
        return 1
    size, rest = (1, args[1:]) if name.startswith("unbind") else (args[1], args[2:])
    dim = rest[0] if rest else 0
    return max(1, args[0].shape[dim] // max(1, size)) if isinstance(size, int) else len(size)


def _rate(name: str) -> float:
    if name in _SORTING:
        return _DEAREST
    return _TRANSFORMED if name.startswith("_fft") else _CHEAP if name in _COPYING else _DEAR


def _uncounted(name: str, given: list[Tensor], written: int) -> float:
    """Return the multiplications and additions of what torch has no formula for."""
    match name:
        case "_scaled_dot_product_flash_attention_for_cpu":
            # (..., queries, channels), (..., keys, channels)
            return 4.0 * given[0].numel() * given[1].shape[-2]
        case "conv_tbc":
            # (taps, channels in, channels out)
            return 2.0 * written * math.prod(given[1].shape[:2])
        case "deform_conv2d" | "conv_depthwise3d":
            return 2.0 * written * math.prod(given[1].shape[1:])
        case "addbmm" | "addbmm_":
            return 2.0 * given[1].numel() * given[2].shape[-1]
        case "_trilinear":
            return 2.0 * given[0].numel() * given[2].numel() / max(1, given[0].shape[-1])
        case _:
            return 0.0


def _between(name: str, given: list[Tensor], made: list[Tensor]) -> int:
    """Return how many values an operation has on its way beside those that it gives."""
    if name == "deform_conv2d":
        # every place of the kernel at every place of the output, of up to 32 images
        outputs = math.prod(made[0].shape[2:]) * min(32, made[0].shape[0])
        return given[0].shape[1] * math.prod(given[1].shape[2:]) * outputs
    if name.endswith("2d_aa"):
        # one dimension is resized before the other
        (rows, columns), (high, wide) = given[0].shape[-2:], made[0].shape[-2:]
        return math.prod(given[0].shape[:-2]) * max(rows * wide, high * columns)
    return 0


def _laid_out(called: Mapping[str, Any], made: Tensor) -> tuple[int, int]:
    """Return the bytes that a convolution takes beside what it gives, and the values that it lays out one by one.

    float32 is copied into blocks of channels. In other types torch lays out what each place of the kernel meets at
    each place of the output, or of the input if it is transposed: 121 times as much as it gives for 11 x 11 pixels.
    """
    image, weight, transposed, groups = (called[n] for n in ("input", "weight", "transposed", "groups"))
    # (n, c, *space), (out, c / groups, *kernel); transposed (c, out / groups, *kernel)
    if image.dtype == torch.float32:
        copied = [
            (-(-v.shape[1] // _BLOCK) * _BLOCK) * v.numel() // max(1, v.shape[1]) for v in (image, made)
        ]
        return sum(copied) * image.itemsize, 0
    kernel = math.prod(weight.shape[2:])
    space = math.prod((image if transposed else made).shape[2:])
    values = image.shape[0] * (made if transposed else image).shape[1] // max(1, groups) * kernel * space
    return values * image.itemsize, values


def _shrunk(given: Tensor, made: Tensor) -> int:
    """Return how many values one value of an adaptive pool is made of."""
    space = zip(given.shape[1:], made.shape[1:], strict=True)
    return math.prod(-(-before // after) + 1 if before != after else 1 for before, after in space if after)


def _bare(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """Return the arguments of an operation on the meta device."""
    bare, named = tree_map(_without_data, (args, dict(kwargs)))
    if "generator" in named:
        named["generator"] = None
    if any(argument.name == "device" for argument in func._schema.arguments):
        named["device"] = torch.device("meta")
    named.pop("pin_memory", None)
    return bare, named


def _beyond_size(name: str, given: list[Tensor]) -> float:
    """Return the seconds of what takes longer than its tensors are large: matrices, pairs, recurrence."""
    if name in _CUBIC:
        return _OF_MATRICES * float(max(value.numel() * min((*value.shape[-2:], 1 << 62)) for value in given))
    if name in _PAIRS:
        # (..., n, d) and (..., m, d), or (n, d) with itself -> each pair of d differences
        return _CHEAP * given[0].numel() * given[-1].shape[-2]
    if name == "mkldnn_rnn_layer":
        steps, sequences = given[0].shape[:2]
        weights = given[1].numel() + given[2].numel()
        return _STEP * steps + 2.0 * steps * sequences * weights / _FLOPS
    return 0.0


def _bound(
    name: str, given: list[Tensor], args: tuple[Any, ...], kwargs: Mapping[str, Any]
) -> tuple[int, float]:
    """Return what an operation makes at most that cannot be run without data."""
    read = sum(value.numel() for value in given)
    if name in _FOLLOWS_DATA:
        return 8 * read * (_DIMENSIONS if name == "nonzero" else 1), max(_DEAR, _rate(name)) * read
    asked = max((abs(n) for n in tree_leaves((args, kwargs)) if isinstance(n, int)), default=0)
    lists = [value for value in (*args, *kwargs.values()) if isinstance(value, list | tuple)]
    product = max((math.prod(v) for v in lists if v and all(isinstance(n, int) for n in v)), default=0)
    if name == "repeat_interleave":
        product = int(given[-1].sum())
    if (
        name == "set_" and len(lists) == 2
    ):  # as a deep copy lays a tensor over its storage: extents, then strides
        product = sum((n - 1) * step for n, step in zip(*lists, strict=True))
    most = max(asked, abs(product), read)
    return 16 * most, _DEAR * most


def _without_data(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    if value.layout != torch.strided or value.is_quantized:
        raise TypeError("no plain tensor")
    if value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device="meta")


def _multiplies(func: OpOverload) -> bool:
    return func.overloadpacket in flop_registry


def _multiplications(func: OpOverload, args: Any, kwargs: Any, result: Any) -> float:
    counter: Callable[..., Any] | None = flop_registry.get(func.overloadpacket)
    if counter is None:
        return 0.0
    return float(counter(*args, **{k: v for k, v in kwargs.items() if k != "device"}, out_val=result))


def _window(args: tuple[Any, ...]) -> int:
    """Return how many values one value of a pool is made of."""
    kernel = args[1] if len(args) > 1 else 1
    numbers = kernel if isinstance(kernel, list | tuple) else [kernel]
    return math.prod(n for n in numbers if isinstance(n, int)) if numbers else 1


def _is_view(func: OpOverload) -> bool:
    """Tell whether an operation gives another look at the same values."""
    aliases = [argument.alias_info for argument in func._schema.arguments if argument.alias_info is not None]
    return bool(aliases) and not any(alias.is_write for alias in aliases)


def _key(func: OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> object:
    return func, tuple(_described(value) for value in _flat((args, kwargs)))


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, Mapping):
        for name in value:
            yield name
            yield from _flat(value[name])
    elif isinstance(value, list | tuple):
        yield len(value)
        for inner in value:
            yield from _flat(inner)
    else:
        yield value


def _described(value: Any) -> object:
    if isinstance(value, Tensor):
        return tuple(value.shape), tuple(value.stride()), value.dtype, value.device.type
    return type(value).__name__, str(value)
