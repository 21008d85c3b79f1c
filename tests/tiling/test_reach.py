"""Reach derived from graphs: every rule against brute force, what has no bound named, lattices, sizes and paths."""

from __future__ import annotations

import math
from collections.abc import Callable
from fractions import Fraction
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from optional import needs_newer_torch
from reaching import Function, bound_for, true_reach
from torch import Tensor, nn
from torch.export import ExportedProgram

from normfix.tiling.reach.extents import Unsized
from normfix.tiling.reach.rules import RULES
from normfix.tiling.reach.rules.neighbours import NEIGHBOURS


def _windows(x: Tensor, size: int) -> Tensor:
    """(b, c, h, w) -> (b h' w', size size, c)."""
    b, c, h, w = x.shape
    x = x.view(b, c, h // size, size, w // size, size).permute(0, 2, 4, 3, 5, 1)
    return x.reshape(-1, size * size, c)


def _whole(tokens: Tensor, size: int, like: Tensor) -> Tensor:
    b, c, h, w = like.shape
    x = tokens.view(b, h // size, w // size, size, size, c).permute(0, 5, 1, 3, 2, 4)
    return x.reshape(b, c, h, w)


def _attending(x: Tensor, size: int = 4) -> Tensor:
    tokens = _windows(x, size)
    return _whole(torch.softmax(tokens @ tokens.transpose(1, 2), -1) @ tokens, size, x)


def _sdpa(x: Tensor) -> Tensor:
    tokens = _windows(x, 4)
    return _whole(F.scaled_dot_product_attention(tokens, tokens, tokens), 4, x)


def _tokens(x: Tensor) -> Tensor:
    """Layer norm and a product over channels, on all pixels in one row."""
    flat = F.layer_norm(x.flatten(2).transpose(1, 2), (x.shape[1],)) @ torch.eye(x.shape[1], dtype=x.dtype)
    return flat.transpose(1, 2).reshape(x.shape)


def _columns(x: Tensor) -> Tensor:
    mixed = torch.einsum("bkl,km->bml", F.unfold(x, 3, padding=1), torch.arange(81.0).view(9, 9).to(x).sin())
    return F.fold(mixed, x.shape[2:], 3, padding=1)


def _focus(x: Tensor) -> Tensor:
    return F.pixel_shuffle(
        torch.cat([x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], 1), 2
    )


def _filled(x: Tensor) -> Tensor:
    """Holes are filled from their neighbours."""
    return torch.where(x != 0, x, F.avg_pool2d(x, 5, 1, 2))


def _written(x: Tensor) -> Tensor:
    """A part is written in place into a copy."""
    y = x.clone()
    y[..., 2:] += x[..., :-2]
    return y


def _pasted(x: Tensor) -> Tensor:
    y = torch.zeros_like(x)
    y[..., 1:, :] = x[..., :-1, :]
    return x + y


def _bordered(x: Tensor) -> Tensor:
    """A mask is made of zeros, and numbers are written into parts of it."""
    mask = x.new_zeros(x.shape[2:])
    mask[2:] = 1
    mask[:, -3:] += 2
    return x + F.avg_pool2d(x, 5, 1, 2) * mask


def _masked(x: Tensor) -> Tensor:
    """Scores are masked in place, as attention in windows does it."""
    y = F.avg_pool2d(x, 3, 1, 1)
    y.masked_fill_(x.new_zeros(x.shape[2:]) > 0, -torch.inf)
    return y


def _coded(x: Tensor) -> Tensor:
    """Each pixel becomes the code next to it, as in vector quantisation."""
    codes = torch.linspace(-3, 3, 5).to(x)[:, None]
    pixels = F.avg_pool2d(x, 3, 1, 1).permute(0, 2, 3, 1).contiguous()
    near = F.embedding(torch.cdist(pixels.view(-1, 1), codes).argmin(1), codes).view(pixels.shape)
    return x + (pixels + (near - pixels).detach()).permute(0, 3, 1, 2)


def _causal(x: Tensor) -> Tensor:
    """The first column stands in for those before it, and the last for one behind, as in causal video decoders."""
    row = torch.cat([x[:, :, :, :1].repeat(1, 1, 1, 2), x, x[..., -1:].expand(-1, -1, -1, 1)], 3)
    return F.conv2d(row, torch.ones(1, 1, 3, 4).to(x), padding=(1, 0))


def _levels(x: Tensor) -> Tensor:
    """Tokens of two maps in one row, as of a detector, and each map taken out of it again."""
    coarse = F.avg_pool2d(x, 2)
    row = torch.cat([x.flatten(2), F.avg_pool2d(coarse, 3, 1, 1).flatten(2)], 2)
    pixels = x.shape[2] * x.shape[3]
    fine, rest = row.split([pixels, row.shape[2] - pixels], 2)
    assert fine.shape[2] == pixels
    return fine.reshape(x.shape) + F.interpolate(rest.reshape(coarse.shape), scale_factor=2)


CASES: dict[str, tuple[Callable[[], nn.Module], int]] = {
    # name: (module, lattice)
    "conv": (lambda: nn.Conv2d(1, 2, 3, padding=1), 1),
    "even kernel": (lambda: nn.Conv2d(1, 1, 4, padding="same"), 1),
    "valid": (lambda: nn.Conv2d(1, 1, 5), 1),
    "dilated": (lambda: nn.Conv2d(1, 1, 3, padding=4, dilation=4), 1),
    "grouped": (lambda: nn.Conv2d(2, 2, 3, padding=1, groups=2), 1),
    "strided": (lambda: nn.Conv2d(1, 1, 3, stride=2, padding=1), 2),
    "valid strided": (lambda: nn.Conv2d(1, 1, 4, stride=3), 3),
    "reflect": (lambda: nn.Conv2d(1, 1, 5, padding=2, padding_mode="reflect"), 1),
    "replicate": (lambda: nn.Conv2d(1, 1, 5, padding=2, padding_mode="replicate"), 1),
    "transposed": (lambda: nn.ConvTranspose2d(1, 1, 2, stride=2), 1),
    "transposed 3": (lambda: nn.ConvTranspose2d(1, 1, 3, stride=2, padding=1, output_padding=1), 1),
    "transposed 4": (lambda: nn.ConvTranspose2d(1, 1, 4, stride=2, padding=1), 1),
    "max pool": (lambda: nn.MaxPool2d(3, 2, 1), 2),
    "max pool ceil": (lambda: nn.MaxPool2d(3, 2, ceil_mode=True), 2),
    "dilated pool": (lambda: nn.MaxPool2d(3, 1, 1, dilation=2), 1),
    "avg pool": (lambda: nn.AvgPool2d(4), 4),
    "indices": (lambda: Function(lambda x: F.max_pool2d(x, 3, 2, 1, return_indices=True)[0]), 2),
    "unpooled": (lambda: Function(lambda x: F.max_unpool2d(*F.max_pool2d(x, 2, return_indices=True), 2)), 2),
    "adaptive": (lambda: Function(lambda x: F.adaptive_avg_pool2d(x, (x.shape[2] // 4, x.shape[3] // 4))), 4),
    "nearest": (lambda: nn.Upsample(scale_factor=2), 1),
    "nearest down": (lambda: Function(lambda x: F.interpolate(x, scale_factor=0.5)), 2),
    "nearest exact": (
        lambda: Function(lambda x: F.interpolate(x, scale_factor=0.5, mode="nearest-exact")),
        2,
    ),
    "bilinear": (lambda: nn.Upsample(scale_factor=2, mode="bilinear"), 1),
    "bilinear 4": (lambda: nn.Upsample(scale_factor=4, mode="bilinear"), 1),
    "bilinear to size": (
        lambda: Function(lambda x: F.interpolate(F.avg_pool2d(x, 2), x.shape[2:], mode="bilinear")),
        2,
    ),
    "bicubic": (lambda: nn.Upsample(scale_factor=2, mode="bicubic"), 1),
    "constant pad": (lambda: Function(lambda x: F.pad(x, (3, 0, 1, 0))[..., : x.shape[2], : x.shape[3]]), 1),
    "slice": (lambda: Function(lambda x: x[..., 2:, 1:-3]), 1),
    "strided slice": (lambda: Function(lambda x: x[..., 1::2, ::2]), 2),
    "focus": (lambda: Function(_focus), 2),
    "shuffles": (
        lambda: nn.Sequential(nn.PixelUnshuffle(4), nn.Conv2d(16, 4, 3, padding=1), nn.PixelShuffle(2)),
        4,
    ),
    "flip and back": (
        lambda: Function(lambda x: F.pad(x.flip(-1), (2, 0))[..., : x.shape[3]].flip(-1) + x),
        1,
    ),
    "repeat interleave": (lambda: Function(lambda x: x.repeat_interleave(2, 2).repeat_interleave(2, 3)), 1),
    "windows": (lambda: Function(_attending), 4),
    "padded windows": (
        lambda: Function(
            lambda x: _attending(F.pad(x, (0, -x.shape[3] % 4, 0, -x.shape[2] % 4)))[
                ..., : x.shape[2], : x.shape[3]
            ]
        ),
        4,
    ),
    "sdpa windows": (lambda: Function(_sdpa), 4),
    "tokens": (lambda: Function(_tokens), 1),
    "columns": (lambda: Function(_columns), 1),
    "tensor unfold": (lambda: Function(lambda x: x.unfold(3, 4, 4).unfold(2, 4, 4).amax((-1, -2))), 4),
    "patch embedding": (
        lambda: Function(lambda x: x.view(*x.shape[:2], x.shape[2] // 4, 4, x.shape[3] // 4, 4).mean((3, 5))),
        4,
    ),
    "where": (lambda: Function(_filled), 1),
    "rare mask": (lambda: Function(lambda x: x.masked_fill(F.max_pool2d(x, 7, 1, 3) > 900, 0.0)), 1),
    "written in place": (lambda: Function(_written), 1),
    "pasted": (lambda: Function(_pasted), 1),
    "bordered": (lambda: Function(_bordered), 1),
    "einsum": (
        lambda: Function(
            lambda x: torch.einsum("bchw,dc->bdhw", F.avg_pool2d(x, 3, 1, 1), torch.ones(2, 1).to(x))
        ),
        1,
    ),
    "stacked": (lambda: Function(lambda x: torch.stack([x, F.avg_pool2d(x, 3, 1, 1)], 2).sum(2)), 1),
    "broadcast": (
        lambda: Function(lambda x: torch.broadcast_tensors(x, F.avg_pool2d(x, 5, 1, 2))[1]),
        1,
    ),
    "expanded as another": (
        lambda: Function(lambda x: x * torch.ones(1, 1, 1, 1).to(x).expand_as(F.avg_pool2d(x, 9, 1, 4))),
        1,
    ),
    "repeated borders": (lambda: Function(_causal), 1),
    "codes": (lambda: Function(_coded), 1),
    "levels in a row": (lambda: Function(_levels), 2),
    "chunks": (lambda: Function(lambda x: sum(torch.cat([x, F.avg_pool2d(x, 5, 1, 2)], 1).chunk(2, 1))), 1),
    "channel softmax": (
        lambda: Function(lambda x: torch.cat([x, F.avg_pool2d(x, 3, 1, 1)], 1).softmax(1)),
        1,
    ),
    "diagonal": (lambda: Function(lambda x: x + F.pad(x, (6, 0, 5, 0))[..., : x.shape[2], : x.shape[3]]), 1),
    "two scales": (
        lambda: nn.Sequential(
            nn.Conv2d(1, 2, 3, 2, 1),
            nn.ReLU(),
            nn.Conv2d(2, 2, 3, 2, 1),
            nn.Upsample(scale_factor=4, mode="bilinear"),
        ),
        4,
    ),
    "upsampled by hand": (
        lambda: Function(
            lambda x: (
                x[:, :, :, None, :, None]
                .expand(-1, -1, -1, 2, -1, 2)
                .reshape(*x.shape[:2], 2 * x.shape[2], 2 * x.shape[3])
            )
        ),
        1,
    ),
    "local response": (lambda: Function(lambda x: F.local_response_norm(F.avg_pool2d(x, 3, 1, 1), 3)), 1),
}


def _channels(module: nn.Module) -> int:
    first = next((m for m in module.modules() if isinstance(m, nn.Conv2d | nn.ConvTranspose2d)), None)
    return first.in_channels if first is not None and not isinstance(module, nn.Sequential) else 1


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_a_bound_is_the_truth_of_brute_force(name: str):
    """For the ordinary forms of every operator the bound is exactly what changing one column after the other shows."""
    torch.manual_seed(0)
    build, lattice = CASES[name]
    module = build()
    channels = _channels(module)
    bound = bound_for(module, (1, channels, 32, 48))
    assert bound.obstacles() == ()
    assert bound.lattice == (lattice, lattice)
    for axis in (0, 1):
        truth = true_reach(module, bound, axis, 48, channels=channels, cross=16)
        assert bound.halo(bound.lattice)[axis] == truth


def test_what_is_written_into_a_mask_needs_no_second_trace(monkeypatch: pytest.MonkeyPatch):
    """Rewriting a program takes as long as capturing it; it is done where the image's values are written."""
    rewritten = []
    rewrite = ExportedProgram.run_decompositions

    def counted(program: ExportedProgram, *args: Any) -> ExportedProgram:
        rewritten.append(program)
        return rewrite(program, *args)

    monkeypatch.setattr(ExportedProgram, "run_decompositions", counted)
    assert bound_for(Function(_bordered), (1, 1, 32, 48)).halo((1, 1)) == ((2, 2), (2, 2))
    assert not rewritten
    assert bound_for(Function(_pasted), (1, 1, 32, 48)).halo((1, 1)) == ((1, 0), (0, 0))
    assert len(rewritten) == 1
    assert bound_for(Function(_masked), (1, 1, 32, 48)).halo((1, 1)) == ((1, 1), (1, 1))
    assert len(rewritten) == 1


def _shifted_into(x: Tensor, part: Callable[[Tensor], Tensor]) -> Tensor:
    y = 2 * x
    part(y).add_(F.pad(y, (7, 0, 5, 0))[..., : x.shape[2], : x.shape[3]])
    return y + 1


@pytest.mark.parametrize(
    "part",
    [lambda y: y.chunk(1, 1)[0], lambda y: y.split(1, 1)[0], lambda y: y.contiguous(), lambda y: y[:, :1]],
    ids=["chunk", "split", "the same", "slice"],
)
def test_what_is_written_by_another_name_counts(part: Callable[[Tensor], Tensor]):
    bound = bound_for(Function(lambda x: _shifted_into(x, part)), (1, 1, 32, 48))
    assert bound.halo((1, 1)) == ((5, 0), (7, 0))


LOOSE: dict[str, Callable[[], nn.Module]] = {
    # forms whose bound may be larger than the truth: a fold that only undoes, borders that mirror far, float32 factors
    "unfold and fold": lambda: Function(
        lambda x: F.fold(F.unfold(x, 3, padding=1) * 2, x.shape[2:], 3, padding=1)
    ),
    "far mirror": lambda: Function(lambda x: x + F.pad(x, (9, 0, 0, 0), mode="reflect")[..., : x.shape[3]]),
    "wrapped": lambda: Function(lambda x: x + x.roll(5, 3)),
    "aligned corners": lambda: nn.Upsample(scale_factor=2, mode="bilinear", align_corners=True),
    "antialiased": lambda: Function(
        lambda x: F.interpolate(x, (x.shape[2] // 2, x.shape[3] // 2), mode="bilinear", antialias=True)
    ),
    "by three": lambda: nn.Upsample(scale_factor=3),
    "by three halves": lambda: nn.Upsample(scale_factor=1.5, mode="bilinear"),
    "a third": lambda: Function(lambda x: F.interpolate(x, scale_factor=1 / 3)),
    "holes twice": lambda: Function(lambda x: _filled(_filled(x))),
    "shifted windows": lambda: Function(lambda x: _attending(x.roll((-2, -2), (2, 3))).roll((2, 2), (2, 3))),
    "windows after a convolution": lambda: nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), Function(_attending)),
    "a dead branch": lambda: Function(lambda x: x + 0 * F.avg_pool2d(x, 9, 1, 4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LOOSE)
def test_a_bound_holds_at_every_tile(name: str):
    """Where a bound may be larger than the truth it is never smaller: at the front, inside and at the end."""
    torch.manual_seed(0)
    module = LOOSE[name]()
    bound = bound_for(module, (1, 1, 24, 48))
    assert bound.obstacles() == ()
    inside = len(bound.wraps) > 0
    last = 48 // bound.lattice[1] - 1
    for tile in [last // 2] if inside else [0, last // 2, last]:
        before, after = true_reach(module, bound, 1, 48, cross=24, tile=tile)
        assert bound.halo(bound.lattice)[1][0] >= before
        assert bound.halo(bound.lattice)[1][1] >= after


UNBOUNDED: dict[str, tuple[Callable[[Tensor], Tensor], str]] = {
    "mean": (lambda x: x - x.mean((2, 3), keepdim=True), "mean"),
    "norm": (lambda x: F.instance_norm(x), "instance_norm"),
    "softmax": (lambda x: x.softmax(-1), "softmax"),
    "cumulated": (lambda x: x.cumsum(2), "cumsum"),
    "sorted": (lambda x: x.sort(-1)[0], "sort"),
    "flipped": (lambda x: x + x.flip(-1), "flip"),
    "corner": (lambda x: torch.where(x[:, :, :1, :1] > 0, x, -x), "slice"),
    "picked": (lambda x: x * x[:, :, 3, 4][:, :, None, None], "select"),
    "attention": (lambda x: _global(x), "scaled_dot_product_attention"),
    "product": (lambda x: x @ x.transpose(2, 3) @ x, "matmul"),
    "pooled": (lambda x: x * F.interpolate(F.adaptive_avg_pool2d(x, 4), x.shape[2:]), "adaptive_avg_pool2d"),
    "fourier": (lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real, "fft"),
    "gathered": (lambda x: x.gather(3, (x.abs() * 3).long().clamp(0, 7)), "gather"),
    "half": (lambda x: torch.cat([x[..., x.shape[3] // 2 :], x[..., : x.shape[3] // 2]], 3), "slice"),
}


def _global(x: Tensor) -> Tensor:
    tokens = x.flatten(2).transpose(1, 2)
    return F.scaled_dot_product_attention(tokens, tokens, tokens).transpose(1, 2).reshape(x.shape)


@pytest.mark.parametrize("name", UNBOUNDED)
def test_what_has_no_bound_is_named(name: str):
    """What reads everything, or nobody knows where, is unbounded by the name of its operator."""
    function, operator = UNBOUNDED[name]
    obstacles = bound_for(Function(function), (1, 1, 32, 48)).obstacles()
    assert obstacles
    assert any(operator in obstacle.operator for obstacle in obstacles), obstacles


@needs_newer_torch("has another formula for a part of what was joined, which has no bound")
def test_a_part_across_what_was_joined_is_not_taken_for_one_of_its_maps():
    """Control: tokens of two maps that are cut elsewhere, or in steps, have no bound."""

    def cut(x: Tensor, first: int, step: int) -> Tensor:
        row = torch.cat([x.flatten(2), F.avg_pool2d(x, 2).flatten(2)], 2)
        return row[:, :, first : first + step * x.shape[2] * x.shape[3] : step].reshape(x.shape)

    assert bound_for(Function(lambda x: x + cut(x, 8, 1)), (1, 1, 32, 48)).obstacles()
    assert not bound_for(Function(lambda x: x + cut(x, 0, 1)), (1, 1, 32, 48)).obstacles()


def test_a_border_that_is_put_elsewhere_is_a_place():
    """Control: the first column behind the map, or the second one in front of it, stands for no border."""
    for x_of in (
        lambda x: torch.cat([x, x[..., :1]], 3)[..., 1:],
        lambda x: torch.cat([x[..., 1:2], x], 3)[..., :-1],
    ):
        assert bound_for(Function(x_of), (1, 1, 32, 48)).obstacles()


UNSIZED: dict[str, Callable[[Tensor], Tensor]] = {
    "turned": lambda x: x + x.transpose(2, 3),
    "fixed": lambda x: x + torch.zeros(1, 1, 32, 32),
    "no map": lambda x: x.mean((2, 3)),
}


@pytest.mark.parametrize("name", UNSIZED)
def test_a_graph_of_one_size_has_no_bound(name: str):
    """Where sizes are fixed or tied, or the output is no map, nothing is derived, and the reason says so."""
    with pytest.raises(Unsized):
        bound_for(Function(UNSIZED[name]), (1, 1, 32, 32))


def test_tiles_within_a_lattice_have_their_own_reach():
    """On a stride that is finer than the lattice the halo is that of the tile that reads furthest."""
    net = nn.Sequential(nn.AvgPool2d(4), nn.Upsample(scale_factor=4))
    bound = bound_for(net, (1, 1, 32, 32))
    assert bound.halo((4, 4)) == ((0, 0), (0, 0))
    assert bound.halo((1, 4))[0] == (3, 3)


def test_a_bound_says_how_its_way_is_made():
    """The widest way names the operators that widen it; together they are the halo."""
    net = nn.Sequential(
        nn.Conv2d(1, 1, 3, padding=1),
        nn.MaxPool2d(2),
        nn.Conv2d(1, 1, 5, padding=2),
        nn.Upsample(scale_factor=2),
    )
    bound = bound_for(net, (1, 1, 32, 32))
    before, _ = bound.paths()[0]
    assert [(step.where, step.adds) for step in before] == [("0", 1.0), ("2", 4.0)]
    assert sum(step.adds for step in before) == bound.halo((2, 2))[0][0]


def test_scale_and_offset_are_those_of_the_output():
    """An output has scale n + offset positions."""
    bound = bound_for(nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(1, 1, 5)), (1, 1, 32, 40))
    assert (bound.scale, bound.offset) == ((Fraction(2), Fraction(2)), (-4, -4))


@pytest.mark.parametrize("shift", [3, -5])
def test_a_map_that_was_shifted_does_not_end_at_its_tile(shift: int):
    """What comes after a shift reads positions of the shifted map that only a longer window has."""
    after = nn.Conv2d(1, 1, 3, padding=1)
    bound = bound_for(nn.Sequential(nn.ZeroPad2d((0, 0, shift, -shift)), after), (1, 1, 32, 48))
    assert bound.halo(bound.lattice) == (((shift + 1, 1) if shift > 0 else (1, 1 - shift)), (1, 1))


def test_every_rule_is_a_function_of_one_call():
    """The table holds functions by the name of an operator that torch has, normfix's stages, or NATTEN."""
    assert all(callable(rule) for rule in RULES.values())
    # what a release is too old for, and attention to what stages hold, with biases or without
    assert {name for name in RULES.keys() - NEIGHBOURS.keys() if not hasattr(torch.ops.aten, name)} <= {
        "_fused_rms_norm",
        "attend",
        "attend_biased",
    }


_PARTS = {
    "conv": lambda a, b: nn.Conv2d(1, 1, a, padding=b % a),
    "strided": lambda a, b: nn.Conv2d(1, 1, a + 1, stride=2, padding=a // 2),
    "dilated": lambda a, b: nn.Conv2d(1, 1, 3, padding=b, dilation=a),
    "transposed": lambda a, b: nn.ConvTranspose2d(1, 1, a + 1, stride=2, padding=min(b, a) // 2),
    "pool": lambda a, b: nn.MaxPool2d(a, padding=0, stride=1),
    "halved": lambda a, b: nn.AvgPool2d(2),
    "doubled": lambda a, b: nn.Upsample(scale_factor=2, mode=("nearest", "bilinear", "bicubic")[a % 3]),
    "padded": lambda a, b: nn.ReflectionPad2d((a, b, b, a)),
    "moved": lambda a, b: Function(lambda x: x + F.pad(x, (a, 0, b, 0))[..., : x.shape[2], : x.shape[3]]),
    "flipped": lambda a, b: Function(lambda x: F.pad(x.flip(2), (0, 0, a, 0)).flip(2)),
    "cut": lambda a, b: Function(lambda x: x[..., a:, : x.shape[3] - b]),
    "masked": lambda a, b: Function(lambda x: torch.where(x > 0.3, x, F.max_pool2d(x, 3, 1, 1))),
}


@pytest.mark.zoo
@given(
    st.lists(
        st.tuples(st.sampled_from(sorted(_PARTS)), st.integers(1, 4), st.integers(0, 3)),
        min_size=2,
        max_size=5,
    )
)
@settings(max_examples=12, deadline=None, derandomize=True, database=None)
def test_a_bound_of_any_chain_holds(parts: list[tuple[str, int, int]]):
    """Operators one after the other, with any attributes: no column outside the bound changes a tile."""
    torch.manual_seed(0)
    net = nn.Sequential(*(_PARTS[name](a, b) for name, a, b in parts)).eval()
    try:
        bound = bound_for(net, (1, 1, 64, 64))
    except (Unsized, RuntimeError):  # a chain that leaves nothing of the image
        return
    pixels = bound.lattice[1]
    length = 96 // pixels * pixels
    for tile in (0, length // pixels // 2):
        before, after = true_reach(net, bound, 1, length, cross=64, tile=tile)
        assert bound.halo(bound.lattice)[1][0] >= before
        assert bound.halo(bound.lattice)[1][1] >= after


@pytest.mark.parametrize("strides", [(50,), (2, 25), (6, 35)])
def test_the_lattice_of_coarse_strides_is_the_least(strides):
    """No prime of 50 alone makes a line of ceil(n / 50)."""

    class Sliced(nn.Module):
        def forward(self, x):
            for stride in strides:
                x = x[..., ::stride, :]
            return x

    assert bound_for(Sliced(), (1, 1, 700, 16)).lattice[0] == math.prod(strides)
