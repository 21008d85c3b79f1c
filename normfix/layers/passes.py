"""Triton kernels of BatchRenorm in training: moments of the batch, corrections, normalisation, and the way back.

A map (n, c, *space) is seen as rows of `inner` values, one row per image and channel, or, channels last, as n
positions of c values. A tile is `rows` x `columns` of it; a program takes `per` tiles of one channel (of `columns`
channels where they are last), and a channel has `splits` programs. Moments of tiles are merged by Chan's rule, as in
normfix.layers.moments.
Per channel is kept (7, c): mean, var, r, d, invstd, scale, shift, with

    y = (x - mean) * scale + shift            scale = weight * r * invstd        shift = bias + weight * d
    dx = scale * (dy - sum(dy) / n - (x - mean) * invstd^2 * sum(dy * (x - mean)) / n)
    dweight = sum(dy * (x - mean)) * invstd * r + sum(dy) * d                    dbias = sum(dy)
"""

# ruff: noqa: ANN001, ANN201, ANN202
# mypy: disable-error-code="untyped-decorator, no-untyped-def"

import triton
import triton.language as tl

__all__ = [
    "backward_at_once",
    "conclude",
    "correct",
    "forward_at_once",
    "gather",
    "measure",
    "normalise",
    "propagate",
]


@triton.jit
def _tile(t, first, n, c, inner, last: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Return where tile t of the channels from `first` on begins, its places from there, which are inside, how many."""
    down = tl.arange(0, rows)[:, None]
    along = tl.arange(0, columns)[None, :]
    if last:
        row = t * rows
        start = row.to(tl.int64) * c + first
        places = down * c + along
        inside = (down < n - row) & (along < c - first)
        size = tl.minimum(n - row, rows)
    else:
        across = tl.cdiv(inner, columns)
        row = (t // across) * rows
        column = (t % across) * columns
        start = (row.to(tl.int64) * c + first) * inner + column
        places = down * (c * inner) + along
        inside = (down < n - row) & (along < inner - column)
        size = tl.minimum(n - row, rows) * tl.minimum(inner - column, columns)
    return start, places, inside, tl.maximum(size, 0).to(tl.float32)


@triton.jit
def _sum(values, last: tl.constexpr):
    total = tl.sum(values, 0, keep_dims=True)
    if not last:
        total = tl.sum(total, 1, keep_dims=True)
    return total


@triton.jit
def _channels(first, last: tl.constexpr, columns: tl.constexpr):
    return first + (tl.arange(0, columns)[None, :] if last else tl.zeros((1, 1), tl.int32))


@triton.jit
def _moments(
    x, begin, per, first, n, c, inner, last: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr
):
    """Return count, mean and sum of squared deviations over some tiles."""
    wide: tl.constexpr = columns if last else 1
    count = begin.to(tl.float32) * 0.0
    mean = tl.zeros((1, wide), tl.float32)
    m2 = tl.zeros((1, wide), tl.float32)
    for k in range(per):
        start, places, inside, size = _tile(begin + k, first, n, c, inner, last, rows, columns)
        values = tl.load(x + start + places, mask=inside, other=0.0).to(tl.float32)
        here = _sum(values, last) / tl.maximum(size, 1.0)
        apart = tl.where(inside, values - here, 0.0)
        share = size / tl.maximum(count + size, 1.0)
        delta = here - mean
        mean += delta * share
        m2 += _sum(apart * apart, last) + delta * delta * (count * share)
        count += size
    return count, mean, m2


@triton.jit
def _corrections(
    vectors,
    mean,
    var,
    channel,
    here,
    running_mean,
    running_var,
    seen,
    r_max,
    d_max,
    weight,
    bias,
    c,
    eps,
    unbias,
    momentum,
    cumulative: tl.constexpr,
    has_weight: tl.constexpr,
    has_bias: tl.constexpr,
):
    """Keep and return the vectors of some channels, and merge them into the running statistics of `seen` batches."""
    m_run = tl.load(running_mean + channel, mask=here, other=0.0)
    v_run = tl.load(running_var + channel, mask=here, other=1.0)
    # a fresh layer has no statistics to correct towards
    most_r = tl.where(seen > 0, tl.load(r_max), 1.0)
    most_d = tl.where(seen > 0, tl.load(d_max), 0.0)
    invstd = 1.0 / tl.sqrt(var + eps)
    invstd_run = 1.0 / tl.sqrt(v_run + eps)
    r = tl.minimum(tl.maximum(invstd_run / invstd, 1.0 / most_r), most_r)
    d = tl.minimum(tl.maximum((mean - m_run) * invstd_run, -most_d), most_d)
    scale = r * invstd
    shift = d
    if has_weight:
        w = tl.load(weight + channel, mask=here, other=0.0)
        scale = w * scale
        shift = w * shift
    if has_bias:
        shift = shift + tl.load(bias + channel, mask=here, other=0.0)
    tl.store(vectors + channel, mean, mask=here)
    tl.store(vectors + c + channel, var, mask=here)
    tl.store(vectors + 2 * c + channel, r, mask=here)
    tl.store(vectors + 3 * c + channel, d, mask=here)
    tl.store(vectors + 4 * c + channel, invstd, mask=here)
    tl.store(vectors + 5 * c + channel, scale, mask=here)
    tl.store(vectors + 6 * c + channel, shift, mask=here)
    share = momentum
    if cumulative:
        share = 1.0 / (seen + 1).to(tl.float32)
    tl.store(running_mean + channel, m_run + share * (mean - m_run), mask=here)
    tl.store(running_var + channel, v_run + share * (var * unbias - v_run), mask=here)
    return scale, shift


@triton.jit
def _normalised(
    y,
    x,
    mean,
    scale,
    shift,
    begin,
    per,
    first,
    n,
    c,
    inner,
    last: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    for k in range(per):
        start, places, inside, _ = _tile(begin + k, first, n, c, inner, last, rows, columns)
        values = tl.load(x + start + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(y + start + places, (values - mean) * scale + shift, mask=inside)


@triton.jit
def _gathered(
    grad,
    x,
    mean,
    begin,
    per,
    first,
    n,
    c,
    inner,
    last: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Return the sums of dy and of dy * (x - mean) over some tiles."""
    plain = tl.zeros((rows, columns), tl.float32)
    moment = tl.zeros((rows, columns), tl.float32)
    for k in range(per):
        start, places, inside, _ = _tile(begin + k, first, n, c, inner, last, rows, columns)
        slope = tl.load(grad + start + places, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + start + places, mask=inside, other=0.0).to(tl.float32)
        plain += slope
        moment += slope * (values - mean)
    return _sum(plain, last), _sum(moment, last)


@triton.jit
def _propagated(
    grad_x,
    grad,
    x,
    mean,
    scale,
    constant,
    linear,
    begin,
    per,
    first,
    n,
    c,
    inner,
    last: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    for k in range(per):
        start, places, inside, _ = _tile(begin + k, first, n, c, inner, last, rows, columns)
        slope = tl.load(grad + start + places, mask=inside, other=0.0).to(tl.float32)
        values = tl.load(x + start + places, mask=inside, other=0.0).to(tl.float32)
        tl.store(grad_x + start + places, scale * (slope - constant - (values - mean) * linear), mask=inside)


@triton.jit(do_not_specialize=["n", "per", "splits"])
def measure(part, x, n, c, inner, per, splits, last: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr):
    """Write the moments of each split, (2, c, splits) and then their counts."""
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    first = block * columns if last else block
    count, mean, m2 = _moments(x, split * per, per, first, n, c, inner, last, rows, columns)
    channel = _channels(first, last, columns)
    place = channel * splits + split
    tl.store(part + place, mean, mask=channel < c)
    tl.store(part + c * splits + place, m2, mask=channel < c)
    tl.store(part + 2 * c * splits + split, count)


@triton.jit(do_not_specialize=["c", "splits"])
def correct(
    vectors,
    part,
    running_mean,
    running_var,
    batches,
    r_max,
    d_max,
    weight,
    bias,
    c,
    splits,
    eps,
    unbias,
    momentum,
    cumulative: tl.constexpr,
    has_weight: tl.constexpr,
    has_bias: tl.constexpr,
    block: tl.constexpr,
    wide: tl.constexpr,
):
    """Merge the splits' moments, and turn them into the layer's vectors."""
    channel = tl.program_id(0) * block + tl.arange(0, block)
    split = tl.arange(0, wide)[None, :]
    places = channel[:, None] * splits + split
    inside = (channel[:, None] < c) & (split < splits)
    sizes = tl.load(part + 2 * c * splits + split, mask=split < splits, other=0.0)
    means = tl.load(part + places, mask=inside, other=0.0)
    squares = tl.load(part + c * splits + places, mask=inside, other=0.0)
    count = tl.sum(sizes, 1, keep_dims=True)
    mean = tl.sum(means * (sizes / count), 1, keep_dims=True)
    apart = tl.where(inside, means - mean, 0.0)
    var = tl.sum(squares + apart * apart * sizes, 1, keep_dims=True) / count
    _corrections(
        vectors,
        mean,
        var,
        channel[:, None],
        channel[:, None] < c,
        running_mean,
        running_var,
        tl.load(batches),
        r_max,
        d_max,
        weight,
        bias,
        c,
        eps,
        unbias,
        momentum,
        cumulative,
        has_weight,
        has_bias,
    )


@triton.jit(do_not_specialize=["n", "per", "splits"])
def normalise(
    y,
    x,
    vectors,
    batches,
    n,
    c,
    inner,
    per,
    splits,
    counts: tl.constexpr,
    last: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Write y, and count the batch."""
    if counts:  # noqa: SIM102 - one condition is the compiler's, the other the program's
        if tl.program_id(0) == 0:
            tl.store(batches, tl.load(batches) + 1)
    # what was read last is in the cache yet
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    split = number % splits
    block = number // splits
    first = block * columns if last else block
    channel = _channels(first, last, columns)
    mean = tl.load(vectors + channel, mask=channel < c, other=0.0)
    scale = tl.load(vectors + 5 * c + channel, mask=channel < c, other=0.0)
    shift = tl.load(vectors + 6 * c + channel, mask=channel < c, other=0.0)
    _normalised(y, x, mean, scale, shift, split * per, per, first, n, c, inner, last, rows, columns)


@triton.jit(do_not_specialize=["n", "per"])
def forward_at_once(
    y,
    x,
    vectors,
    running_mean,
    running_var,
    batches,
    r_max,
    d_max,
    weight,
    bias,
    n,
    c,
    inner,
    per,
    eps,
    unbias,
    momentum,
    cumulative: tl.constexpr,
    has_weight: tl.constexpr,
    has_bias: tl.constexpr,
    last: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Do all of forward where a program can take all of its channels' values; the batch is counted already."""
    first = tl.program_id(0) * columns if last else tl.program_id(0)
    channel = _channels(first, last, columns)
    begin = tl.program_id(0) * 0
    count, mean, m2 = _moments(x, begin, per, first, n, c, inner, last, rows, columns)
    scale, shift = _corrections(
        vectors,
        mean,
        m2 / count,
        channel,
        channel < c,
        running_mean,
        running_var,
        tl.load(batches) - 1,
        r_max,
        d_max,
        weight,
        bias,
        c,
        eps,
        unbias,
        momentum,
        cumulative,
        has_weight,
        has_bias,
    )
    _normalised(y, x, mean, scale, shift, begin, per, first, n, c, inner, last, rows, columns)


@triton.jit
def _concluded(grad_weight, grad_bias, vectors, plain, moment, channel, here, c, count):
    """Write the affine's gradients and return the coefficients of x's."""
    r = tl.load(vectors + 2 * c + channel, mask=here, other=0.0)
    d = tl.load(vectors + 3 * c + channel, mask=here, other=0.0)
    invstd = tl.load(vectors + 4 * c + channel, mask=here, other=0.0)
    tl.store(grad_weight + channel, moment * invstd * r + plain * d, mask=here)
    tl.store(grad_bias + channel, plain, mask=here)
    return plain / count, moment * (invstd * invstd) / count


@triton.jit(do_not_specialize=["n", "per", "splits"])
def gather(
    part,
    grad,
    x,
    vectors,
    n,
    c,
    inner,
    per,
    splits,
    last: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Write the sums of each split, (2, c, splits)."""
    split = tl.program_id(0) % splits
    block = tl.program_id(0) // splits
    first = block * columns if last else block
    channel = _channels(first, last, columns)
    mean = tl.load(vectors + channel, mask=channel < c, other=0.0)
    plain, moment = _gathered(grad, x, mean, split * per, per, first, n, c, inner, last, rows, columns)
    place = channel * splits + split
    tl.store(part + place, plain, mask=channel < c)
    tl.store(part + c * splits + place, moment, mask=channel < c)


@triton.jit(do_not_specialize=["c", "splits"])
def conclude(
    grad_weight, grad_bias, part, vectors, c, splits, count, block: tl.constexpr, wide: tl.constexpr
):
    """Add the splits' sums up, and write the affine's gradients, and after the sums the two terms of x's."""
    channel = tl.program_id(0) * block + tl.arange(0, block)[:, None]
    split = tl.arange(0, wide)[None, :]
    places = channel * splits + split
    here = channel < c
    inside = here & (split < splits)
    plain = tl.sum(tl.load(part + places, mask=inside, other=0.0), 1, keep_dims=True)
    moment = tl.sum(tl.load(part + c * splits + places, mask=inside, other=0.0), 1, keep_dims=True)
    constant, linear = _concluded(grad_weight, grad_bias, vectors, plain, moment, channel, here, c, count)
    terms = part + 2 * c * splits
    tl.store(terms + channel, constant, mask=here)
    tl.store(terms + c + channel, linear, mask=here)


@triton.jit(do_not_specialize=["n", "per", "splits"])
def propagate(
    grad_x,
    grad,
    x,
    vectors,
    part,
    n,
    c,
    inner,
    per,
    splits,
    last: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Write dx."""
    number = tl.num_programs(0) - 1 - tl.program_id(0)
    split = number % splits
    block = number // splits
    first = block * columns if last else block
    channel = _channels(first, last, columns)
    here = channel < c
    mean = tl.load(vectors + channel, mask=here, other=0.0)
    scale = tl.load(vectors + 5 * c + channel, mask=here, other=0.0)
    terms = part + 2 * c * splits
    constant = tl.load(terms + channel, mask=here, other=0.0)
    linear = tl.load(terms + c + channel, mask=here, other=0.0)
    _propagated(
        grad_x,
        grad,
        x,
        mean,
        scale,
        constant,
        linear,
        split * per,
        per,
        first,
        n,
        c,
        inner,
        last,
        rows,
        columns,
    )


@triton.jit(do_not_specialize=["n", "per"])
def backward_at_once(
    grad_x,
    grad_weight,
    grad_bias,
    grad,
    x,
    vectors,
    n,
    c,
    inner,
    per,
    count,
    last: tl.constexpr,
    rows: tl.constexpr,
    columns: tl.constexpr,
):
    """Do all of backward where a program can take all of its channels' values."""
    first = tl.program_id(0) * columns if last else tl.program_id(0)
    begin = tl.program_id(0) * 0
    channel = _channels(first, last, columns)
    here = channel < c
    mean = tl.load(vectors + channel, mask=here, other=0.0)
    scale = tl.load(vectors + 5 * c + channel, mask=here, other=0.0)
    plain, moment = _gathered(grad, x, mean, begin, per, first, n, c, inner, last, rows, columns)
    constant, linear = _concluded(grad_weight, grad_bias, vectors, plain, moment, channel, here, c, count)
    _propagated(
        grad_x, grad, x, mean, scale, constant, linear, begin, per, first, n, c, inner, last, rows, columns
    )
