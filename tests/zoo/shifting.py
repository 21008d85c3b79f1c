"""More adversaries: maps that are moved before, between and after convolutions, and what stands beside such a move.

Where a map is moved, an output reads the same pixels elsewhere, and the border that a convolution sees stands where the
map ends and not where the image does.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["shifting_families"]

Build = Callable[[], nn.Module]
Move = Callable[[Tensor, int], Tensor]


class _Chain(nn.Module):
    """Layers and functions, one after the other."""

    def __init__(self, *parts: nn.Module | Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.layers = nn.ModuleList(part for part in parts if isinstance(part, nn.Module))
        self._parts = [part if not isinstance(part, nn.Module) else None for part in parts]

    def forward(self, x: Tensor) -> Tensor:
        """Return a map."""
        layers = iter(self.layers)
        for part in self._parts:
            x = next(layers)(x) if part is None else part(x)
        return x


def _padded_and_cropped(x: Tensor, n: int) -> Tensor:
    w = x.shape[3]
    return F.pad(x, (n, 0))[..., :w] if n > 0 else F.pad(x, (0, -n))[..., -n : w - n]


def _padded_below_zero(x: Tensor, n: int) -> Tensor:
    return F.pad(x, (n, -n))


def _beside_zeros(x: Tensor, n: int) -> Tensor:
    zeros = torch.zeros_like(x[..., : abs(n)])
    return torch.cat([zeros, x[..., :-n]] if n > 0 else [x[..., -n:], zeros], 3)


def _narrowed(x: Tensor, n: int) -> Tensor:
    w = x.shape[3]
    wide = F.pad(x, (abs(n), abs(n)))
    return wide.narrow(3, abs(n) - n, w)


def _in_the_mirror(x: Tensor, n: int) -> Tensor:
    return _padded_and_cropped(x.flip(3), -n).flip(3)


def _selected(x: Tensor, n: int) -> Tensor:
    w = x.shape[3]
    return x.index_select(3, (torch.arange(w, device=x.device) - n).clamp(0, w - 1))


def _gathered(x: Tensor, n: int) -> Tensor:
    w = x.shape[3]
    place = (torch.arange(w, device=x.device) - n).clamp(0, w - 1)
    return x.gather(3, place.expand(x.shape))


def _edge_repeated(x: Tensor, n: int) -> Tensor:
    w = x.shape[3]
    if n > 0:
        return torch.cat([x[..., :1].repeat(1, 1, 1, n), x], 3)[..., :w]
    return torch.cat([x, x[..., -1:].expand(-1, -1, -1, -n)], 3)[..., -n:]


def _edge_padded(x: Tensor, n: int) -> Tensor:
    return F.pad(F.pad(x, (max(n, 0), max(-n, 0), 0, 0), mode="replicate"), (min(n, 0), min(-n, 0)))


def _by_a_kernel(x: Tensor, n: int) -> Tensor:
    weight = torch.zeros(x.shape[1], 1, 1, 2 * abs(n) + 1, dtype=x.dtype)
    weight[..., abs(n) - n] = 1
    return F.conv2d(x, weight, padding=(0, abs(n)), groups=x.shape[1])


def _rolled_and_blanked(x: Tensor, n: int) -> Tensor:
    y = x.roll(n, 3).clone()
    if n > 0:
        y[..., :n] = 0
    else:
        y[..., n:] = 0
    return y


def _written(x: Tensor, n: int) -> Tensor:
    y = torch.zeros_like(x)
    if n > 0:
        y[..., n:] = x[..., :-n]
    else:
        y[..., :n] = x[..., -n:]
    return y


_MOVES: Mapping[str, Move] = {
    "padded and cropped": _padded_and_cropped,
    "padded below zero": _padded_below_zero,
    "beside zeros": _beside_zeros,
    "narrowed": _narrowed,
    "in the mirror": _in_the_mirror,
    "selected": _selected,
    "gathered": _gathered,
    "edge repeated": _edge_repeated,
    "edge padded": _edge_padded,
    "by a kernel": _by_a_kernel,
    "rolled and blanked": _rolled_and_blanked,
    "written": _written,
    "rolled": lambda x, n: x.roll(n, 3),
}


def _down_the_column(move: Move) -> Move:
    return lambda x, n: move(x.transpose(2, 3), n).transpose(2, 3)


def _conv(k: int = 3, s: int = 1, d: int = 1, mode: str = "zeros", i: int = 2, o: int = 2) -> nn.Module:
    return nn.Conv2d(i, o, k, s, d * (k // 2), d, padding_mode=mode)


def _up(k: int = 4, s: int = 2) -> nn.Module:
    return nn.ConvTranspose2d(2, 2, k, s, (k - s) // 2)


def _moved() -> Iterator[tuple[str, Build]]:
    """Yield one kind of move each before, between and after layers."""
    head, tail = (lambda: _conv(i=1)), (lambda: _conv(1, o=1))
    for number, (name, move) in enumerate(_MOVES.items()):
        n = (5, -5, 3, -7, 12)[number % 5]
        across = _down_the_column(move) if number % 2 else move
        yield (
            f"{name}, convolved",
            lambda m=across, n=n: _Chain(head(), lambda x: m(x, n), _conv(5), tail()),
        )
        yield (
            f"{name}, strided, transposed",
            lambda m=across, n=n: _Chain(head(), lambda x: m(x, n), _conv(3, 2), _up(), tail()),
        )
        yield (
            f"strided, {name}, transposed",
            lambda m=across, n=n: _Chain(head(), _conv(3, 2), lambda x: m(x, n // 2), _up(), _conv(), tail()),
        )
        yield (
            f"transposed, {name}, strided",
            lambda m=across, n=n: _Chain(head(), _up(), lambda x: m(x, n), _conv(4, 2), tail()),
        )
        yield (
            f"{name} there, back",
            lambda m=across, n=n: _Chain(head(), lambda x: m(x, n), _conv(), lambda x: m(x, -n), tail()),
        )
        yield (
            f"{name} twice, on the diagonal",
            lambda m=move, n=n: _Chain(
                head(), lambda x: m(x, n), _conv(), lambda x: _down_the_column(m)(x, n), _conv(), tail()
            ),
        )


def _mixed() -> Iterator[tuple[str, Build]]:
    """Yield what stands beside a move, or decides where it goes."""

    def of(*parts: nn.Module | Callable[[Tensor], Tensor]) -> nn.Module:
        return _Chain(_conv(i=1), *parts, _conv(1, o=1))

    shift = _padded_and_cropped
    down = _down_the_column(shift)
    for mode, n in itertools.product(("reflect", "replicate", "circular"), (4, -4)):
        yield f"moved {n}, padded {mode}", lambda m=mode, n=n: of(lambda x: shift(x, n), _conv(5, mode=m))
    for n in (3, -9):
        yield (
            f"moved {n} into a pool",
            lambda n=n: of(lambda x: F.interpolate(F.max_pool2d(shift(x, n), 4), scale_factor=4.0), _conv()),
        )
        yield f"moved {n} into a dilated", lambda n=n: of(lambda x: down(x, n), _conv(3, d=6))
        yield (
            f"moved {n} among tokens",
            lambda n=n: of(lambda x: shift(x.flatten(2).tanh().view_as(x), n), _conv()),
        )
        yield f"moved {n} over itself", lambda n=n: of(lambda x: torch.where(x > shift(x, n), x, -x), _conv())
        yield f"mask moved {n}", lambda n=n: of(lambda x: x.masked_fill(down(x, n) > 1, 0.0), _conv())
        yield (
            f"moved {n} where bright",
            lambda n=n: of(lambda x: torch.where(x.amax(1, True).expand_as(x) > 1, shift(x, n), x), _conv(5)),
        )
        yield (
            f"cost volume {n}",
            lambda n=n: of(
                lambda x: torch.cat([(x * shift(x, k * n)).mean(1, True) for k in (-1, 1)], 1), _conv()
            ),
        )
        yield (
            f"beside each other {n}",
            lambda n=n: of(lambda x: torch.cat([shift(x[:, :1], n), down(x[:, 1:], -n)], 1), _conv(5)),
        )
        yield (
            f"zoomed {n}",
            lambda n=n: of(
                lambda x: F.interpolate(shift(F.interpolate(x, scale_factor=2.0), n), scale_factor=0.5),
                _conv(),
            ),
        )
        yield (
            f"shuffled, moved {n}",
            lambda n=n: of(lambda x: F.pixel_shuffle(shift(F.pixel_unshuffle(x, 2), n), 2), _conv()),
        )
        yield (
            f"unfolded, moved {n}",
            lambda n=n: of(
                lambda x: F.unfold(shift(x, n), 3, padding=1).view(x.shape[0], 2, 9, *x.shape[2:]).amax(2),
                _conv(),
            ),
        )
    yield (
        "distance to a window",
        lambda: of(
            lambda x: (
                torch.cdist(
                    F.unfold(x, 3, padding=1).transpose(1, 2)[:, :, None, :],
                    F.unfold(shift(x, 6), 3, padding=1).transpose(1, 2)[:, :, None, :],
                )
                .flatten(1)
                .view(x.shape[0], 1, *x.shape[2:])
                .expand_as(x)
                * x
            ),
            _conv(),
        ),
    )
    yield (
        "border repeated on all sides",
        lambda: of(lambda x: F.pad(x, (4, 4, 4, 4), mode="replicate"), nn.Conv2d(2, 2, 9)),
    )
    yield (
        "border repeated by expansion",
        lambda: of(
            lambda x: torch.cat(
                [x[:, :, :1].expand(-1, -1, 6, -1), x, x[:, :, -1:].expand(-1, -1, 6, -1)], 2
            ),
            nn.Conv2d(2, 2, (13, 1)),
        ),
    )
    yield (
        "border repeated on one side",
        lambda: of(lambda x: torch.cat([x[..., :1].expand(-1, -1, -1, 8), x], 3)[..., :-8], _conv(5)),
    )
    yield "row repeated below", lambda: of(lambda x: x + F.pad(x[:, :, 1:], (0, 0, 0, 1)), _conv(3, 2), _up())
    yield (
        "kernel as long as an eighth",
        lambda: of(
            lambda x: F.avg_pool2d(
                F.pad(x, (x.shape[3] // 16, x.shape[3] // 16, 0, 0)), (1, x.shape[3] // 16 * 2 + 1), 1
            )
        ),
    )
    yield (
        "dilated by height",
        lambda: of(
            lambda x: (
                x
                + F.conv2d(
                    x, torch.ones(2, 2, 3, 1) / 9, None, 1, (x.shape[2] // 32, 0), (x.shape[2] // 32, 1)
                )
            )
        ),
    )
    yield (
        "resized by one",
        lambda: of(lambda x: F.interpolate(x, (x.shape[2] + 1, x.shape[3] + 1)), nn.Conv2d(2, 2, 2)),
    )
    yield (
        "resized to even",
        lambda: of(
            lambda x: F.interpolate(F.interpolate(x, (x.shape[2] // 2, x.shape[3] // 2)), x.shape[2:]),
            _conv(),
        ),
    )
    yield "halved until small", lambda: of(_halved_until_small, _conv())
    yield "as often as it is wide", lambda: of(lambda x: _repeated(x, x.shape[3] // 128), _conv())
    yield (
        "turned if tall",
        lambda: of(lambda x: shift(x, 8) if x.shape[2] > x.shape[3] else down(x, 8), _conv()),
    )
    yield "moved if odd", lambda: of(lambda x: shift(x, 8) if x.shape[3] % 2 else x, _conv())
    yield "moved if a rest of seven", lambda: of(lambda x: shift(x, 8) if x.shape[2] % 7 == 3 else x, _conv())
    yield (
        "negated if odd twice",
        lambda: of(lambda x: x * (-1) ** (x.shape[2] % 2) * (-1) ** (x.shape[3] % 2), _conv()),
    )
    yield "moved by its size", lambda: of(lambda x: shift(x, x.shape[3] // 100), _conv())
    yield (
        "cropped to 200",
        lambda: of(lambda x: F.pad(x[..., :200], (0, x.shape[3] - x[..., :200].shape[3])), _conv()),
    )
    yield "padded to blocks of 24", lambda: of(_in_blocks_of_24, _conv())
    yield "windows moved by half", lambda: of(lambda x: _window_means(shift(x, 4), 8), _conv())
    yield "windows beside a move", lambda: of(lambda x: _window_means(x, 8) + down(x, 21), _conv(3, 2), _up())
    yield (
        "rows of tokens",
        lambda: of(
            lambda x: (
                x.permute(0, 2, 3, 1)
                .flatten(1, 2)
                .sigmoid()
                .view(x.shape[0], x.shape[2], x.shape[3], 2)
                .permute(0, 3, 1, 2)
            ),
            _conv(),
        ),
    )
    yield "rows of tokens, one further", lambda: of(_next_token, _conv())
    yield (
        "columns of tokens, two back",
        lambda: of(lambda x: _next_token(x.transpose(2, 3), -2).transpose(2, 3)),
    )
    yield "read as another width", lambda: of(_other_width, _conv())
    yield "corner moved in", lambda: of(lambda x: torch.where(shift(down(x, 40), 40) > 2, -x, x), _conv())
    yield "nearest bright, by dilation", lambda: of(_grown_mask, _conv())
    yield "argmax of moves", lambda: of(_best_move, _conv())


def _halved_until_small(x: Tensor) -> Tensor:
    y = x
    while min(y.shape[2:]) > 40:
        y = F.avg_pool2d(y, 2)
    return x + F.interpolate(y, x.shape[2:])


def _repeated(x: Tensor, times: int) -> Tensor:
    for _ in range(times):
        x = F.avg_pool2d(x, 3, 1, 1)
    return x


def _in_blocks_of_24(x: Tensor) -> Tensor:
    h, w = x.shape[2:]
    y = F.pad(x, (0, -w % 24, 0, -h % 24))
    return _window_means(_padded_and_cropped(y, 3), 24)[..., :h, :w]


def _window_means(x: Tensor, size: int) -> Tensor:
    n, c, h, w = x.shape
    y = x.reshape(n, c, h // size, size, w // size, size)
    return (y + y.mean((3, 5), keepdim=True)).reshape(n, c, h, w)


def _next_token(x: Tensor, n: int = 1) -> Tensor:
    """Add to each pixel the one that is so many further in reading order, beyond the end of its row."""
    tokens = x.flatten(2)
    moved = F.pad(tokens, (0, n))[..., n:] if n > 0 else F.pad(tokens, (-n, 0))[..., :n]
    return x + moved.reshape(x.shape)


def _other_width(x: Tensor) -> Tensor:
    """Convolve a map whose pixels are read in rows of twice the length."""
    n, c, h, w = x.shape
    return F.avg_pool2d(x.reshape(n, c, h // 2, 2 * w), 3, 1, 1).reshape(x.shape)


def _grown_mask(x: Tensor) -> Tensor:
    mask = (x > 1.5).to(x)
    for _ in range(5):
        mask = F.max_pool2d(mask, 3, 1, 1)
    return torch.where(_padded_and_cropped(mask, 6) > 0, x, 0 * x)


def _best_move(x: Tensor) -> Tensor:
    moves = torch.stack([_padded_and_cropped(x, n) for n in (-11, -3, 2, 9)], 1)
    best = moves.square().sum(2).argmax(1, keepdim=True)
    return moves.gather(1, best[:, :, None].expand(-1, -1, *x.shape[1:]))[:, 0]


def shifting_families() -> Iterator[tuple[str, Build]]:
    """Yield (name, what builds it)."""
    yield from _moved()
    yield from _mixed()
