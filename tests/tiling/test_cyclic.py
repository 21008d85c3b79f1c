"""Cyclic shifts: those whose wrapped part meets masked attention alone, and those that let the other border in."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from reaching import Function, bound_for, true_reach
from torch import Tensor, nn

_SIZE, _SHIFT = 4, 2


def _windows(x: Tensor, size: int = _SIZE) -> Tensor:
    """(b, c, h, w) -> (b, h' w', size size, c)."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // size, size, w // size, size).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(b, (h // size) * (w // size), size * size, c)


def _whole(tokens: Tensor, like: Tensor, size: int = _SIZE) -> Tensor:
    b, c, h, w = like.shape
    x = tokens.reshape(b, h // size, w // size, size, size, c).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, c, h, w)


def _regions(x: Tensor, shift: int = _SHIFT) -> Tensor:
    """Number the parts of a turned map that lay apart, in windows (h' w', size size)."""
    numbers = torch.zeros(1, 1, *x.shape[2:], dtype=x.dtype)
    parts = slice(0, -_SIZE), slice(-_SIZE, -shift), slice(-shift, None)
    for number, (rows, columns) in enumerate((a, b) for a in parts for b in parts):
        numbers[:, :, rows, columns] = number
    return _windows(numbers)[0, :, :, 0]


def _apart(x: Tensor, shift: int = _SHIFT) -> Tensor:
    """Tell which pairs inside each window lay apart, (h' w', size size, size size)."""
    cut = _regions(x, shift)
    return cut[:, None] != cut[:, :, None]


def _added(x: Tensor, scores: Tensor) -> Tensor:
    return scores + torch.where(_apart(x), -1e30, 0.0).to(scores)


def _filled(x: Tensor, scores: Tensor) -> Tensor:
    return scores.masked_fill(_apart(x), float("-inf"))


def _chosen(x: Tensor, scores: Tensor) -> Tensor:
    return torch.where(_apart(x), torch.finfo(scores.dtype).min, scores)


def _turned(x: Tensor, shift: int = -_SHIFT) -> Tensor:
    return x.roll((shift, shift), (2, 3))


def _shifted(mask: Callable[[Tensor, Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    """Return attention in windows that are shifted by half of their extent."""

    def attend(x: Tensor) -> Tensor:
        tokens = _windows(_turned(x))
        weights = torch.softmax(mask(x, tokens @ tokens.transpose(-1, -2)), -1)
        return x + _turned(_whole(weights @ tokens, x), _SHIFT)

    return attend


def _fused(x: Tensor) -> Tensor:
    tokens = _windows(_turned(x))
    found = F.scaled_dot_product_attention(tokens, tokens, tokens, attn_mask=~_apart(x))
    return x + _turned(_whole(found, x), _SHIFT)


def _summed(x: Tensor) -> Tensor:
    tokens = _windows(_turned(x))
    scores = torch.einsum("bwpc,bwqc->bwpq", tokens, tokens) / 2
    weights = scores.masked_fill_(_apart(x), float("-inf")).softmax(-1)
    return x + _turned(_whole(torch.einsum("bwpq,bwqc->bwpc", weights, tokens), x), _SHIFT)


def _with_biases(x: Tensor) -> Tensor:
    """Biases of pairs before and after the mask, in float32, and a norm and a product over channels on the way."""

    def mask(x: Tensor, scores: Tensor) -> Tensor:
        biases = torch.arange(256.0).view(1, 1, 16, 16).to(scores).sin()
        return (_added(x, scores + biases) + biases).contiguous().to(torch.float64).to(scores)

    tokens = F.layer_norm(_windows(_turned(x)), (x.shape[1],)) @ torch.eye(x.shape[1], dtype=x.dtype)
    weights = torch.softmax(mask(x, tokens @ tokens.transpose(-1, -2)), -1)
    return x + _turned(_whole(F.gelu(weights @ tokens), x), _SHIFT)


def _of_columns(x: Tensor) -> Tensor:
    """Turned and cut along one axis alone."""
    b, c, h, w = x.shape
    turned = x.roll(-_SHIFT, 3).view(b, c, h, w // _SIZE, _SIZE).permute(0, 2, 3, 4, 1)
    apart = torch.zeros(w // _SIZE, _SIZE, _SIZE, dtype=torch.bool)
    apart[-1, :_SHIFT, _SHIFT:] = True
    apart[-1, _SHIFT:, :_SHIFT] = True
    weights = (turned @ turned.transpose(-1, -2)).masked_fill(apart, float("-inf")).softmax(-1)
    return x + (weights @ turned).permute(0, 4, 1, 2, 3).reshape(x.shape).roll(_SHIFT, 3)


MASKED: dict[str, Callable[[], nn.Module]] = {
    "a mask is added": lambda: Function(_shifted(_added)),
    "a mask is filled in": lambda: Function(_shifted(_filled)),
    "a mask chooses": lambda: Function(_shifted(_chosen)),
    "fused": lambda: Function(_fused),
    "einsum": lambda: Function(_summed),
    "with biases": lambda: Function(_with_biases),
    "one axis": lambda: Function(_of_columns),
    "turned back and forth": lambda: Function(lambda x: x + F.relu(_turned(x)).sin().roll((2, 2), (2, 3))),
}


_DEAR = {"a mask is filled in", "a mask chooses", "with biases"}
"""Second cases, of the long runs."""


@pytest.mark.slow
@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.zoo] * (name in _DEAR)) for name in MASKED]
)
def test_a_bound_holds_where_masks_hide_the_seam(name: str):
    """Every shift is named, none is open, and no tile reads beyond the bound: the first, one inside and the last."""
    torch.manual_seed(0)
    module = MASKED[name]()
    bound = bound_for(module, (1, 1, 16, 32))
    assert bound.obstacles() == bound.wraps == ()
    assert len(bound.shifts) == 2
    assert bound.is_whole_if_masked
    assert not bound.is_whole
    assert not bound.knows_places  # the masks are known as such
    last = 32 // bound.lattice[1] - 1
    for tile in (0, last // 2, last):
        before, after = true_reach(module, bound, 1, 32, cross=8, tile=tile)
        assert bound.halo(bound.lattice)[1][0] >= before
        assert bound.halo(bound.lattice)[1][1] >= after


def _unmasked(x: Tensor, scores: Tensor) -> Tensor:
    return scores


def _biased(x: Tensor, scores: Tensor) -> Tensor:
    """What is the same for every window is no mask."""
    return scores + torch.arange(256.0).view(1, 1, 16, 16).to(scores)


def _lost(x: Tensor, scores: Tensor) -> Tensor:
    return _added(x, scores).clamp_min(-1)


def _late(x: Tensor) -> Tensor:
    tokens = _windows(_turned(x))
    weights = torch.softmax(tokens @ tokens.transpose(-1, -2), -1) * ~_apart(x)
    return x + _turned(_whole(weights @ tokens, x), _SHIFT)


def _mixed_in_windows(x: Tensor) -> Tensor:
    tokens = _windows(_turned(x)).transpose(-1, -2)
    return _turned(_whole((tokens @ torch.ones(16, 16).to(x)).transpose(-1, -2), x), _SHIFT)


def _otherwise_joined(x: Tensor) -> Tensor:
    """The rows of a window are joined with the columns of windows."""
    b, c, h, w = x.shape
    cut = _turned(x).view(b, c, h // 4, 4, w // 4, 4).permute(0, 1, 2, 5, 4, 3)
    return _turned(cut.reshape(x.shape), _SHIFT)


OPEN: dict[str, Callable[[Tensor], Tensor]] = {
    "no mask": _shifted(_unmasked),
    "biases alone": _shifted(_biased),
    "a mask that is lost": _shifted(_lost),
    "a mask after the softmax": _late,
    "a product over windows": _mixed_in_windows,
    "windows joined otherwise": _otherwise_joined,
    "added to itself": lambda x: x + x.roll(5, 3),
    "behind a gate": lambda x: x + F.relu(x.roll(5, 3) - 1000),
    "chosen": lambda x: torch.where(x.roll(5, 3) > 1000, x.roll(5, 3), x),
    "not turned back": lambda x: x.roll(5, 3),
    "turned back too far": lambda x: x.roll(5, 3).roll(-4, 3),
    "a convolution between": lambda x: F.avg_pool2d(x.roll(5, 3), 3, 1, 1).roll(-5, 3),
    "cropped between": lambda x: F.pad(x.roll(5, 3)[..., 3:], (0, 3)).roll(-5, 3),
    "flipped between": lambda x: x.roll(5, 3).flip(3).roll(-5, 3).flip(3),
    "circular padding": lambda x: F.pad(x, (2, 0, 0, 0), mode="circular")[..., :-2],
}


@pytest.mark.parametrize(
    "name",
    [pytest.param(name, marks=[pytest.mark.slow] * ("mask" in name or "window" in name)) for name in OPEN],
)
def test_an_open_shift_is_named(name: str):
    """Control: what may show the other border leaves no bound to rely on."""
    bound = bound_for(Function(OPEN[name]), (1, 1, 16, 32))
    assert not bound.is_whole_if_masked
    assert bound.wraps or bound.obstacles()
    assert bound.shifts == ()


def test_channels_go_around_no_border():
    bound = bound_for(Function(lambda x: x + x.roll(1, 1)), (1, 2, 24, 48))
    assert bound.is_whole
    assert bound.halo((1, 1)) == ((0, 0), (0, 0))


@pytest.mark.slow
def test_one_of_two_shifts_is_open():
    bound = bound_for(Function(lambda x: _shifted(_added)(x) + x.roll(3, 2)), (1, 1, 16, 32))
    assert len(bound.wraps) == 1
    assert len(bound.shifts) == 2
    assert not bound.is_whole_if_masked
