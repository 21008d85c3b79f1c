"""Triton kernels of the layers: normalisation by constants in one launch, moments in two.

Imported only where Triton is: it comes with torch's wheels for CUDA. What is small is launched more than computed, and
a frozen norm is five launches of torch's. The formulas are those of normfix.layers.affine and normfix.layers.moments.
"""

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["moments", "normalised"]


@triton.jit  # type: ignore[untyped-decorator]
def _normalise_rows(  # type: ignore[no-untyped-def]  # noqa: ANN202
    y,  # noqa: ANN001
    x,  # noqa: ANN001
    mean,  # noqa: ANN001
    var,  # noqa: ANN001
    weight,  # noqa: ANN001
    bias,  # noqa: ANN001
    c,  # noqa: ANN001
    inner,  # noqa: ANN001
    per_row,  # noqa: ANN001
    eps,  # noqa: ANN001
    has_weight: tl.constexpr,
    has_bias: tl.constexpr,
    rectified: tl.constexpr,
    block: tl.constexpr,
):
    number = tl.program_id(0)
    row = number // per_row
    channel = row % c
    m = tl.load(mean + channel).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.load(var + channel).to(tl.float32) + eps)
    if has_weight:
        scale = scale * tl.load(weight + channel).to(tl.float32)
    i = (number % per_row) * block + tl.arange(0, block)
    here = i < inner
    start = row.to(tl.int64) * inner
    values = (tl.load(x + start + i, mask=here).to(tl.float32) - m) * scale
    if has_bias:
        values = values + tl.load(bias + channel).to(tl.float32)
    if rectified:
        values = tl.where(values < 0, 0.0, values)  # NaN stays
    tl.store(y + start + i, values, mask=here)


@triton.jit  # type: ignore[untyped-decorator]
def _normalise_last(  # type: ignore[no-untyped-def]  # noqa: ANN202
    y,  # noqa: ANN001
    x,  # noqa: ANN001
    mean,  # noqa: ANN001
    var,  # noqa: ANN001
    weight,  # noqa: ANN001
    bias,  # noqa: ANN001
    c,  # noqa: ANN001
    count,  # noqa: ANN001
    eps,  # noqa: ANN001
    has_weight: tl.constexpr,
    has_bias: tl.constexpr,
    rectified: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    channel = tl.arange(0, columns)[None, :]
    position = tl.program_id(0).to(tl.int64) * rows + tl.arange(0, rows)[:, None]
    inside = channel < c
    here = inside & (position < count)
    m = tl.load(mean + channel, mask=inside, other=0.0).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.load(var + channel, mask=inside, other=1.0).to(tl.float32) + eps)
    if has_weight:
        scale = scale * tl.load(weight + channel, mask=inside, other=0.0).to(tl.float32)
    place = position * c + channel
    values = (tl.load(x + place, mask=here, other=0.0).to(tl.float32) - m) * scale
    if has_bias:
        values = values + tl.load(bias + channel, mask=inside, other=0.0).to(tl.float32)
    if rectified:
        values = tl.where(values < 0, 0.0, values)  # NaN stays
    tl.store(y + place, values, mask=here)


_SIZES = ["s_image", "s_channel", "s_plane", "s_row", "c", "planes", "height", "width", "per_row"]
"""Arguments that differ from map to map: a kernel is compiled once, not for each of their divisors."""


@triton.jit(do_not_specialize=_SIZES)  # type: ignore[untyped-decorator]
def _normalise_window(  # type: ignore[no-untyped-def]  # noqa: ANN202
    y,  # noqa: ANN001
    x,  # noqa: ANN001
    mean,  # noqa: ANN001
    var,  # noqa: ANN001
    weight,  # noqa: ANN001
    bias,  # noqa: ANN001
    s_image,  # noqa: ANN001
    s_channel,  # noqa: ANN001
    s_plane,  # noqa: ANN001
    s_row,  # noqa: ANN001
    c,  # noqa: ANN001
    planes,  # noqa: ANN001
    height,  # noqa: ANN001
    width,  # noqa: ANN001
    per_row,  # noqa: ANN001
    eps,  # noqa: ANN001
    has_weight: tl.constexpr,
    has_bias: tl.constexpr,
    rectified: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    number = tl.program_id(0)
    per_map = per_row * ((planes * height + rows - 1) // rows)
    one = number // per_map
    channel = one % c
    m = tl.load(mean + channel).to(tl.float32)
    scale = 1.0 / tl.sqrt(tl.load(var + channel).to(tl.float32) + eps)
    if has_weight:
        scale = scale * tl.load(weight + channel).to(tl.float32)
    row = (number % per_map) // per_row * rows + tl.arange(0, rows)[:, None]
    column = number % per_row * columns + tl.arange(0, columns)[None, :]
    here = (row < planes * height) & (column < width)
    start = (one // c).to(tl.int64) * s_image + channel.to(tl.int64) * s_channel
    place = start + (row // height).to(tl.int64) * s_plane + (row % height).to(tl.int64) * s_row + column
    values = (tl.load(x + place, mask=here).to(tl.float32) - m) * scale
    if has_bias:
        values = values + tl.load(bias + channel).to(tl.float32)
    if rectified:
        values = tl.where(values < 0, 0.0, values)  # NaN stays
    tl.store(y + (one.to(tl.int64) * planes * height + row) * width + column, values, mask=here)


@triton.jit(do_not_specialize=[*_SIZES, "images", "tiles"])  # type: ignore[untyped-decorator]
def _moments_of_tiles(  # type: ignore[no-untyped-def]  # noqa: ANN202
    parts,  # noqa: ANN001
    x,  # noqa: ANN001
    s_image,  # noqa: ANN001
    s_channel,  # noqa: ANN001
    s_plane,  # noqa: ANN001
    s_row,  # noqa: ANN001
    images,  # noqa: ANN001
    planes,  # noqa: ANN001
    height,  # noqa: ANN001
    width,  # noqa: ANN001
    per_row,  # noqa: ANN001
    tiles,  # noqa: ANN001
    rows: tl.constexpr,
    columns: tl.constexpr,
    steps: tl.constexpr,
):
    number = tl.program_id(0)
    channel = number // tiles
    first_row = (number % tiles) // per_row * (rows * steps)
    first_column = (number % tiles) % per_row * columns
    area = planes * height
    column = first_column + tl.arange(0, columns)[None, :]
    x += channel.to(tl.int64) * s_channel
    # one of the values: their distance to it is as large as their spread, so squares lose nothing that counts
    first = (first_row // area).to(tl.int64) * s_image + (first_row % area // height).to(tl.int64) * s_plane
    origin = tl.load(x + first + (first_row % height).to(tl.int64) * s_row + first_column).to(tl.float64)
    sums = tl.zeros((rows, columns), tl.float64)
    squares = tl.zeros((rows, columns), tl.float64)
    for step in range(steps):
        row = first_row + step * rows + tl.arange(0, rows)[:, None]
        here = (row < images * area) & (column < width)
        start = (row // area).to(tl.int64) * s_image + (row % area // height).to(tl.int64) * s_plane
        values = tl.load(x + start + (row % height).to(tl.int64) * s_row + column, mask=here, other=0.0)
        away = tl.where(here, values.to(tl.float64) - origin, 0.0)
        sums += away
        squares += away * away
    count = tl.minimum(images * area - first_row, rows * steps) * tl.minimum(width - first_column, columns)
    count = count.to(tl.float64)
    total = tl.sum(tl.sum(sums, 0), 0)
    tl.store(parts + number * 3, count)
    tl.store(parts + number * 3 + 1, origin + total / count)
    tl.store(parts + number * 3 + 2, tl.sum(tl.sum(squares, 0), 0) - total * total / count)


@triton.jit(do_not_specialize=["c", "tiles"])  # type: ignore[untyped-decorator]
def _moments_of_parts(  # type: ignore[no-untyped-def]  # noqa: ANN202
    out,  # noqa: ANN001
    parts,  # noqa: ANN001
    c,  # noqa: ANN001
    tiles,  # noqa: ANN001
    block: tl.constexpr,
):
    channel = tl.program_id(0)
    part = channel * tiles + tl.arange(0, block)
    counts = tl.zeros((block,), tl.float64)
    sums = tl.zeros((block,), tl.float64)
    for first in range(0, tiles, block):
        here = first + tl.arange(0, block) < tiles
        count = tl.load(parts + (part + first) * 3, mask=here, other=0.0)
        counts += count
        sums += count * tl.load(parts + (part + first) * 3 + 1, mask=here, other=0.0)
    mean = tl.sum(sums, 0) / tl.sum(counts, 0)
    squares = tl.zeros((block,), tl.float64)
    for first in range(0, tiles, block):
        here = first + tl.arange(0, block) < tiles
        count = tl.load(parts + (part + first) * 3, mask=here, other=0.0)
        away = tl.load(parts + (part + first) * 3 + 1, mask=here, other=0.0) - mean
        squares += tl.load(parts + (part + first) * 3 + 2, mask=here, other=0.0) + count * away * away
    tl.store(out + channel, mean)
    tl.store(out + c + channel, tl.sum(squares, 0))


_BLOCK, _WARPS = 4096, 8
_WIDEST = 2048
"""Channels of a position that one program holds."""
_ROWS, _COLUMNS = 32, 128
"""Of a window, what one program takes."""
_HEIGHT, _STEPS = 8, 16
"""Rows of a tile that are read at a time, and times, where moments are measured."""
_PARTS = 256
"""Tiles of a channel that are put together at a time."""


def normalised(
    x: Tensor,
    weight: Tensor | None,
    bias: Tensor | None,
    mean: Tensor,
    var: Tensor,
    eps: float,
    *,
    rectified: bool = False,
) -> Tensor | None:
    """Return (x - mean) / sqrt(var + eps) * weight + bias, computed in float32 and rounded once, in one launch.

    Where `rectified`, what is below 0 is 0. None for a layout that is neither contiguous nor channels last nor a window
    of a contiguous tensor.
    """
    c, inner = x.shape[1], x.shape[2:].numel()
    y = torch.empty_like(x)
    constants = (mean, var, mean if weight is None else weight, mean if bias is None else bias)
    flags: dict[str, Any] = {
        "has_weight": weight is not None,
        "has_bias": bias is not None,
        "rectified": rectified,
    }
    if x.is_contiguous() and inner > 1:
        per_row = -(-inner // _BLOCK)
        grid = (x.shape[0] * c * per_row,)
        tail = (c, inner, per_row, eps)
        _launch(_normalise_rows, grid, y, x, *constants, *tail, **flags, block=_BLOCK, num_warps=_WARPS)
        return y
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    if x.dim() in formats and x.is_contiguous(memory_format=formats[x.dim()]):
        if c > _WIDEST:
            return None
        columns = triton.next_power_of_2(c)
        positions, height = x.shape[0] * inner, max(1, _BLOCK // columns)
        grid = (-(-positions // height),)
        flags |= {"rows": height, "columns": columns}
        _launch(_normalise_last, grid, y, x, *constants, c, positions, eps, **flags, num_warps=_WARPS)
        return y
    window = _window(x)
    if window is None or not y.is_contiguous():
        return None
    strides, (images, planes, height, width) = window
    per_row = -(-width // _COLUMNS)
    grid = (images * c * per_row * -(-planes * height // _ROWS),)
    sizes = (*strides, c, planes, height, width, per_row, eps)
    _launch(_normalise_window, grid, y, x, *constants, *sizes, **flags, rows=_ROWS, columns=_COLUMNS)
    return y


def moments(x: Tensor) -> Tensor | None:
    """Return mean and sum of squared deviations of each channel of x (N, C, *space), (2, C) float64, in one reading.

    Of a tile with n values, by their distances d = x - x0 to one of them: M2 = sum d^2 - (sum d)^2 / n, which loses at
    most a factor n in precision, for x0 is among the values: (sum d)^2 / n = n (mean - x0)^2 <= n M2. n is 16384, so M2
    is right to 2e-12. Tiles are put together as moments are merged. None for a layout that is no window of a contiguous
    tensor.
    """
    window = _window(x)
    if window is None:
        return None
    strides, (images, planes, height, width) = window
    c, per_row = x.shape[1], -(-width // _COLUMNS)
    tiles = per_row * -(-images * planes * height // (_HEIGHT * _STEPS))
    parts = torch.empty((c * tiles, 3), dtype=torch.float64, device=x.device)
    out = torch.empty((2, c), dtype=torch.float64, device=x.device)
    sizes = (*strides, images, planes, height, width, per_row, tiles)
    shape = {"rows": _HEIGHT, "columns": _COLUMNS, "steps": _STEPS}
    _launch(_moments_of_tiles, (c * tiles,), parts, x, *sizes, **shape)
    _launch(_moments_of_parts, (c,), out, parts, c, tiles, block=_PARTS)
    return out


def _window(x: Tensor) -> tuple[tuple[int, ...], tuple[int, ...]] | None:
    """Return strides of image, channel, plane and row and extents but channels; None unless rows lie in one piece."""
    if not 3 <= x.dim() <= 5 or not x.numel() or (x.shape[-1] > 1 and x.stride(-1) != 1):
        return None
    missing = 5 - x.dim()
    space = (*(1,) * missing, *x.shape[2:])
    strides = (*(0,) * missing, *x.stride()[2:])
    return (x.stride(0), x.stride(1), *strides[:2]), (x.shape[0], *space)


def _launch(kernel: Any, grid: tuple[int, ...], out: Tensor, *arguments: Any, **options: Any) -> None:
    """Launch a kernel on the device of its output, which Triton does not ask for."""
    if not out.is_cuda or out.get_device() == torch.cuda.current_device():
        kernel[grid](out, *arguments, **options)
        return
    with torch.cuda.device(out.device):
        kernel[grid](out, *arguments, **options)
