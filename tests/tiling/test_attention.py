"""Attention over all positions in blocks: its keys and values are those of the whole image."""

import math
import pickle
from functools import cache

import pytest
import torch
import torch.nn.functional as F
from attentive import FORMS, Attends
from torch import nn

import normfix
from normfix.errors import NormfixError
from normfix.networks.calling import Caller
from normfix.tiling.stages import cache as capturing
from normfix.tiling.stages import scheduling, tokens
from normfix.tiling.stages.attention import with_attention
from normfix.tiling.stages.biases import Bias, Numbers
from normfix.tiling.stages.canonical import with_canonical_forms
from normfix.tiling.stages.overviews import overview_of
from normfix.tiling.stages.program import captured_program, computes, marked
from normfix.tiling.stages.reach import _DOUBTFUL, _Cells
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.scheduling import largest_difference, schedule
from normfix.tiling.stages.store import Store
from normfix.tiling.stages.tokens import (
    ATTEND,
    ATTEND_BIASED,
    Tokens,
    attend_to_stored,
    attend_to_stored_biased,
)

GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.randn(1, 1, 48, 60, generator=GENERATOR, dtype=torch.float64) + torch.linspace(
    0, 3, 60, dtype=torch.float64
)


def of(form="fused", **options):
    return Attends(form, **options).double().eval()


@cache
def program(form, **options):
    """A program with its barriers."""
    net = of(form, norm=False, **options)
    return with_attention(with_canonical_forms(captured_program(net, Caller(), IMAGE, [])), IMAGE.shape)


def barriers(found):
    return [n for n in found.body.graph.nodes if n.target is ATTEND]


def exact(q, k, v, scale):
    """Attention in float64, row by row, by nothing that the package uses."""
    rows = []
    for row in q.double().unbind(-2):
        products = (row.unsqueeze(-2) * k.double()).sum(-1) * scale
        weights = (products - products.amax(-1, keepdim=True)).exp()
        rows.append((weights.unsqueeze(-1) * v.double()).sum(-2) / weights.sum(-1, keepdim=True))
    return torch.stack(rows, -2)


def stored(value):
    """A value (..., h, w, E) as the store has it."""
    kept = Store().create("x", value.shape, value.dtype, value.shape)
    kept.write(tuple(slice(0, n) for n in value.shape), value)
    return Tokens(kept, tuple(value.shape), 2, torch.device("cpu"))


def operands(dtype, spread=3.0, width=4):
    q = torch.randn(2, 3, 50, 5, generator=GENERATOR) * spread
    k = torch.randn(2, 3, 7, 9, 5, generator=GENERATOR) * spread
    v = torch.randn(2, 3, 7, 9, width, generator=GENERATOR)
    return q.to(dtype), k.to(dtype), v.to(dtype)


@pytest.mark.parametrize("width", [4, 5])
@pytest.mark.parametrize("most", [1, 1000, 1 << 23])
@pytest.mark.parametrize(
    ("dtype", "rounding"), [(torch.float64, 1e-13), (torch.float32, 2e-7), (torch.bfloat16, 4e-3)]
)
def test_blocks_of_keys_merge_to_attention(monkeypatch, dtype, rounding, most, width):
    """However few keys are taken at a time, the attention is about as close to exact as torch's own of all of them.

    Values as wide as the keys take torch's kernel, others are written out. Of 300 draws in float32 neither was more
    than 3 times as far as torch's own, 1.0 and 1.1 times in the mean.
    """
    monkeypatch.setattr(tokens, "_SCORES", most)
    q, k, v = operands(dtype, width=width)
    given = attend_to_stored(q, stored(k), stored(v), 0.4, 2)
    flat = k.flatten(2, 3), v.flatten(2, 3)
    expected = exact(q, *flat, 0.4)
    theirs = float((F.scaled_dot_product_attention(q, *flat, scale=0.4) - expected).abs().max())
    assert given.dtype == dtype
    assert float((given - expected).abs().max()) < 3 * theirs + rounding


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("apart", ["queries", "keys", "values"])
def test_features_are_read_where_they_lie(apart, dtype):
    """Tokens of a convolution, as `flatten(2).transpose(1, 2)` makes them: a channel's positions are neighbours."""
    q, k, v = operands(dtype, width=5)
    given = {"queries": q, "keys": k, "values": v}
    given[apart] = given[apart].transpose(-1, -2).contiguous().transpose(-1, -2)
    found = tokens.attend(*given.values(), 0.4, 2)
    assert torch.equal(found, tokens.attend(q, k, v, 0.4, 2))
    assert (found - exact(q, k.flatten(2, 3), v.flatten(2, 3), 0.4)).abs().max() < 1e-4


@pytest.mark.parametrize("width", [4, 5])
def test_large_products_do_not_overflow(monkeypatch, width):
    """Scores whose exponentials are no floats merge like others, to the rounding of the scores themselves."""
    monkeypatch.setattr(tokens, "_SCORES", 1000)
    q, k, v = operands(torch.float32, spread=40.0, width=width)
    given = attend_to_stored(q, stored(k), stored(v), 1.0, 2)
    flat = k.flatten(2, 3), v.flatten(2, 3)
    expected = exact(q, *flat, 1.0)
    # a score of s is rounded by s eps, its exponential by as much of itself, and the mean of the values by theirs
    score = float((q.double() @ flat[0].double().transpose(-1, -2)).abs().max())
    bound = score * torch.finfo(torch.float32).eps * float(flat[1].abs().max())
    assert float((given - expected).abs().max()) < bound


_QUICK = ("fused", "matmul", "keys in rows", "einsum, turned")


@pytest.mark.slow
@pytest.mark.parametrize(
    "form", [form if form in _QUICK else pytest.param(form, marks=pytest.mark.zoo) for form in FORMS]
)
def test_every_form_is_found(form):
    """The program attends to stored keys, and computes what the network does."""
    found = program(form)
    assert len(barriers(found)) == 1
    assert len(found.whole) == 2
    with torch.no_grad():
        given, expected = found.body(IMAGE)[0], of(form, norm=False)(IMAGE)
    assert float((given - expected).abs().max() / expected.std()) < (1e-6 if "before" in form else 1e-12)


def _offsets(q, k):
    return torch.arange(q.shape[-2])[:, None] - torch.arange(k.shape[-2])


def _lower(q, k, v):
    mask = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).tril()
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _causal(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _sloping(q, k, v):
    """A bias by distance, another slope for each head (ALiBi; Press et al., arXiv 2108.12409)."""
    bias = -_offsets(q, k).abs() * torch.tensor([0.05, 0.3], dtype=q.dtype)[:, None, None]
    return (q @ k.transpose(-1, -2) * 0.5 + bias).softmax(-1) @ v


def _looked_up(q, k, v):
    """A table of a bias per offset and head, the far ones alike (Shaw et al., arXiv 1803.02155)."""
    table = torch.linspace(-2, 2, 62, dtype=q.dtype).sin().reshape(31, 2)
    bias = table[_offsets(q, k).clamp(-15, 15) + 15].permute(2, 0, 1).unsqueeze(0)
    return ((q @ k.transpose(-1, -2) + bias) * 0.5).softmax(-1) @ v


def _near(q, k, v):
    """Keys within a window of each query, below a bias of keys alone."""
    scores = q @ k.transpose(-1, -2) + torch.arange(k.shape[-2]) * 0.01
    return scores.masked_fill(_offsets(q, k).abs() > 9, -torch.inf).softmax(-1) @ v


def _in_a_square(q, k, v):
    """Keys within a window of each query along both axes, itself left out: masks that are put together."""
    y, x = torch.arange(k.shape[-2]) // 3, torch.arange(k.shape[-2]) % 3
    near = ((y[:, None] - y).abs() <= 2) & ((x[:, None] - x).abs() <= 1) | (y[:, None] == y)
    mask = near & ~torch.eye(q.shape[-2], k.shape[-2], dtype=torch.bool)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _floored(q, k, v):
    mask = torch.where(_offsets(q, k).abs() < 30, 0.0, -100.0)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask.to(q.dtype))


def _chosen(q, k, v):
    scores = q @ k.transpose(-1, -2) / 2
    return torch.where(_offsets(q, k).abs() // 7 < 5, scores, -1e4).softmax(-1) @ v


def _looked_up_along_axes(q, k, v):
    """A table of two offsets, each with an index of its own (Liu et al., arXiv 2103.14030, without their sum)."""
    table = torch.linspace(-2, 2, 2 * 7 * 5, dtype=q.dtype).sin().reshape(2, 7, 5)
    y, x = torch.arange(k.shape[-2]) // 3, torch.arange(k.shape[-2]) % 3
    bias = table[:, (y[:, None] - y).clamp(-3, 3) + 3, (x[:, None] - x) + 2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=bias)


def _like_another(q, k, v):
    """A mask of numbers made like one of truth values, as `nn.MultiheadAttention` does."""
    later = torch.ones(q.shape[-2], k.shape[-2], dtype=torch.bool).triu(1)
    mask = torch.zeros_like(later, dtype=q.dtype).masked_fill(later, -torch.inf)
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask)


def _with_temperatures(q, k, v):
    """Of directions, sharpened by a number of each head before a bias (Liu et al., arXiv 2111.09883)."""
    scores = F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).mT
    return (scores * torch.tensor([3.0, 9.0], dtype=q.dtype)[:, None, None] + _offsets(q, k) * 0.01).softmax(
        -1
    ) @ v


def _sharpened_by_the_image(q, k, v):
    return (q @ k.mT * q.amax((-2, -1), keepdim=True)).softmax(-1) @ v


def _sharpened_after_a_bias(q, k, v):
    temperatures = torch.tensor([0.3, 0.9], dtype=q.dtype)[:, None, None]
    return ((q @ k.mT + _offsets(q, k) * 0.01) * temperatures).softmax(-1) @ v


def _weighed(q, k, v):
    """The weights themselves count beside what they give."""
    weights = (q @ k.mT).softmax(-1)
    return weights @ v + weights.amax(-1, keepdim=True)


def _masked_by_the_image(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, attn_mask=q @ k.transpose(-1, -2) > -1)


def _cumulated(q, k, v):
    bias = _offsets(q, k).to(q.dtype).cumsum(-1) * 1e-3
    return (q @ k.transpose(-1, -2) + bias).softmax(-1) @ v


def _over_channels(q, k, v):
    return v @ (k.transpose(-1, -2) @ q).softmax(-1)


def _over_channels_by_the_size(q, k, v):
    return v @ (k.transpose(-1, -2) @ q / q.shape[-2]).softmax(-1)


def _by_the_size(q, k, v):
    return (q @ k.transpose(-1, -2) / q.shape[-2] * 50).softmax(-1) @ v


def _beside_the_size(q, k, v):
    scores = q.shape[-2] - q @ k.transpose(-1, -2) * (k.shape[-2] ** -0.5)
    return (scores + q.shape[-2]).softmax(-1) @ v * q.shape[-2] / k.shape[-2]


@pytest.mark.slow
def test_channels_are_compared_by_a_size_as_a_number():
    """As DANet's channel attention may be scaled: products over all positions by how many there are."""
    net, image = of(_over_channels_by_the_size), IMAGE[..., :36, :40]
    given, expected = predicted(net, image), whole(net, image)
    assert float((given - expected).abs().max() / expected.std()) < 1e-9


@pytest.mark.zoo
@pytest.mark.parametrize("form", [_by_the_size, _beside_the_size])
def test_scores_by_a_size_as_a_number_are_refused(form):
    """In a block it would be the block's: nothing is computed in blocks, and it is said."""
    with pytest.raises(NotInStages, match="NF324"):
        predicted(of(form), IMAGE[..., :36, :40])


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        _masked_by_the_image,
        _cumulated,
        _over_channels,
        _sharpened_by_the_image,
        _sharpened_after_a_bias,
        _weighed,
        _over_channels_by_the_size,
        _by_the_size,
    ],
)
def test_what_is_not_of_positions_pair_by_pair_is_left(form):
    """A mask or a factor by the image, a bias cumulated over keys or multiplied, weights that are used, channels."""
    found = program(form)
    assert not [n for n in found.body.graph.nodes if n.target in (ATTEND, ATTEND_BIASED)]


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [
        _causal,
        _in_a_square,
        _sloping,
        _looked_up_along_axes,
        *(
            pytest.param(f, marks=pytest.mark.zoo)
            for f in (_chosen, _with_temperatures, _lower, _looked_up, _near, _floored, _like_another)
        ),
    ],
)
def test_masks_and_biases_of_positions_are_those_of_the_whole(form):
    """Blocks have them by the place of their queries in the whole image, at another size than was captured."""
    found = program(form)
    assert len(found.biases) == len(found.numbers) == 1
    with torch.no_grad():
        given, expected = found.body(IMAGE)[0], of(form, norm=False)(IMAGE)
    assert float((given - expected).abs().max() / expected.std()) < 1e-12
    assert largest_difference(schedule(found, stride=(2, 2)), (1, 1, 46, 38)) < 1e-12


@pytest.mark.slow
@pytest.mark.parametrize("mistake", ["numbers of the block", "rows one off"])
def test_a_wrong_offset_is_caught(monkeypatch, mistake):
    """The proof finds a bias that is read at another place."""
    found = with_attention(captured_program(of(_sloping, norm=False), Caller(), IMAGE, []), IMAGE.shape)
    if mistake == "numbers of the block":
        read = Numbers.read
        monkeypatch.setattr(Numbers, "read", lambda self, index: read(self, index) - read(self, index).min())
    else:
        part = Bias.part
        monkeypatch.setattr(
            Bias, "part", lambda self, rows, columns: part(self, (rows + 1) % (rows.max() + 1), columns)
        )
    with pytest.raises(NotInStages, match="NF325"):
        schedule(found, stride=(2, 2))


@pytest.mark.slow
def test_a_bias_travels_between_processes():
    """It gives there what it gave here."""
    found = program(_sloping)
    (node,) = found.biases
    shapes, seen = found.shapes(IMAGE.shape), overview_of(found, [node])
    bias = Bias(seen.run, tuple(shapes[size.args[0]][size.args[1]] for size in seen.sizes))
    there = pickle.loads(pickle.dumps(bias))
    for one in (bias, there):
        part = one.part(torch.tensor([0, 5, 7]), slice(3, 9))
        assert torch.equal(
            part, bias.whole(next(iter(seen.run.graph.output_node().args[0])))[..., [0, 5, 7], 3:9]
        )


def test_a_block_without_a_key_that_counts_adds_nothing(monkeypatch):
    """Blocks of keys that a mask drops for all of a query merge with weight nought, whatever their order."""
    monkeypatch.setattr(tokens, "_SCORES", 2000)
    q, k, v = (x.double() for x in operands(torch.float32))
    length = math.prod(k.shape[-3:-1])
    mask = torch.arange(length) // 3 == (torch.arange(q.shape[-2]) % (length // 3))[:, None]
    merged = tokens._Merged(q, 0.5)
    merged.add(k.flatten(-3, -2), v.flatten(-3, -2), mask)
    scores = (q @ k.flatten(-3, -2).transpose(-1, -2) * 0.5).masked_fill(~mask, -torch.inf)
    torch.testing.assert_close(merged.result(), scores.softmax(-1) @ v.flatten(-3, -2), rtol=0, atol=1e-12)


def _to_itself(q, k, v):
    """Each position attends to itself alone: others are set to a score that is no infinity."""
    n = torch.arange(q.shape[-2])
    return ((q @ k.transpose(-1, -2)).masked_fill(n[:, None] != n, -1e4)).softmax(-1) @ v


class Itself:
    """A mask by which each position attends to itself alone."""

    def part(self, rows, columns):
        return rows[:, None] == torch.arange(columns.start, columns.stop)


@pytest.mark.slow
def test_scores_as_low_as_what_a_mask_sets_are_refused():
    """Beside such a score the keys that the mask sets count as well, which no noise of a proof need show."""
    (attend,) = [n for n in program(_to_itself).body.graph.nodes if n.target is ATTEND_BIASED]
    floor = attend.args[-1]
    assert floor == -1e4
    q = torch.ones(1, 2, 3, 4, dtype=torch.float64)
    held = [stored(sign * q.reshape(1, 2, 1, 3, 4)) for sign in (-1, 1)]

    def attended(scale, floor):
        return attend_to_stored_biased(q, *held, scale, 2, Itself(), torch.arange(3), floor)

    assert torch.equal(attended(2480.0, floor), q)
    assert torch.equal(attended(2490.0, -math.inf), q)
    with pytest.raises(NotInStages, match=r"NF324.*-10000"):
        attended(2490.0, floor)


class Floored:
    """A bias that lowers the scores of some queries by a floor for all keys but the first, those of others for all."""

    def __init__(self, floor):
        self.whole = torch.zeros(50, 63, dtype=torch.float64)
        self.whole[:10, 1:], self.whole[10:20] = floor, floor

    def part(self, rows, columns):
        return self.whole[rows][:, columns]


@pytest.mark.parametrize("floor", [-1e4, -1e9, -1e30, torch.finfo(torch.float32).min])
def test_a_floor_for_all_keys_merges_as_it_is_computed(monkeypatch, floor):
    """Where a mask leaves a query no key, all count as its scores say then, however few are taken at a time."""
    monkeypatch.setattr(tokens, "_SCORES", 1000)
    q, k, v = operands(torch.float64)
    bias = Floored(floor)
    given = attend_to_stored_biased(q, stored(k), stored(v), 0.4, 2, bias, torch.arange(50), -math.inf)
    scores = q @ k.flatten(2, 3).transpose(-1, -2) * 0.4 + bias.whole
    torch.testing.assert_close(given, scores.softmax(-1) @ v.flatten(2, 3), rtol=1e-12, atol=1e-12)


def _twice(q, k, v):
    return F.scaled_dot_product_attention(F.scaled_dot_product_attention(q, k, v), k, v)


@pytest.mark.slow
def test_attention_of_what_attention_gave_is_left():
    """Queries that are another attention's result as it is make no second barrier, and no broken program."""
    assert len(barriers(program(_twice))) == 1


class Multihead(nn.Module):
    """torch's own attention, which returns its weights as well unless it is told not to."""

    def __init__(self, *, batch_first):
        super().__init__()
        self.inner, self.outer = nn.Conv2d(1, 8, 4, 4), nn.ConvTranspose2d(8, 1, 4, 4)
        self.attention = nn.MultiheadAttention(8, 2, batch_first=batch_first)
        self.order = (0, 2, 1) if batch_first else (2, 0, 1)

    def forward(self, x):
        y = self.inner(x)
        tokens = y.flatten(2).permute(self.order) * 3
        seen, _ = self.attention(tokens, tokens, tokens)
        return self.outer(y + seen.permute([self.order.index(d) for d in range(3)]).reshape(y.shape))


@pytest.mark.zoo
@pytest.mark.parametrize("batch_first", [True, False])
def test_weights_that_nobody_uses_do_not_count(batch_first):
    """Torch's attention module is found as it is called by default; what its weights' mean takes is left out."""
    torch.manual_seed(0)
    net = Multihead(batch_first=batch_first).double().eval()
    found = with_attention(captured_program(net, Caller(), IMAGE, []), IMAGE.shape)
    assert len(barriers(found)) == 1
    expected = whole(net)
    assert float((predicted(net) - expected).abs().max() / expected.std()) < 1e-12


class Windowed(nn.Module):
    """Attention within windows of 4 x 4: as many keys at every size."""

    def forward(self, x):
        n, c, h, w = x.shape
        y = x.view(n, c, h // 4, 4, w // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, c)
        y = F.scaled_dot_product_attention(y, y, y)
        return y.view(n, h // 4, w // 4, 4, 4, c).permute(0, 5, 1, 3, 2, 4).reshape(n, c, h, w)


@pytest.mark.zoo
def test_attention_in_windows_is_no_barrier():
    """Its keys do not grow with the image."""
    found = with_attention(captured_program(Windowed(), Caller(), IMAGE, []), IMAGE.shape)
    assert not barriers(found)
    assert not found.whole


def predicted(net, image=IMAGE, **options):
    return normfix.predict(net, image, tile=16, statistics="per-image", **options)


def whole(net, image=IMAGE):
    with torch.no_grad():
        return net(image)


@pytest.fixture(scope="module")
def net():
    return of("fused", reduced=2)


@pytest.mark.slow
def test_an_unconverted_network_gives_its_whole_image_output(net):
    """Norms over tokens, attention to reduced keys: equal to the untiled forward pass, its tiles are not."""
    given, expected = predicted(net), whole(net)
    assert float((given - expected).abs().max() / expected.std()) < 1e-9
    tiles = torch.cat([whole(net, part) for part in IMAGE.split(20, 3)], 3)
    assert float((tiles - expected).abs().max() / expected.std()) > 0.1


class Volume(nn.Module):
    """Attention between all voxels of a map that is half as coarse as the image."""

    def __init__(self):
        super().__init__()
        self.down, self.norm = nn.Conv3d(1, 4, 2, stride=2), nn.GroupNorm(2, 4)
        self.up = nn.ConvTranspose3d(4, 1, 2, stride=2)

    def forward(self, x):
        y = self.norm(self.down(x))
        tokens = y.flatten(2).mT
        return self.up(F.scaled_dot_product_attention(tokens, tokens, tokens * 2).mT.reshape(y.shape))


@pytest.mark.zoo
def test_a_volume_is_proved_on_few_voxels(monkeypatch):
    """All of them are compared with all: 32 more along each axis would take minutes, in float64 and many times."""
    sizes = []
    monkeypatch.setattr(
        scheduling,
        "largest_difference",
        lambda planned, size, *rest: sizes.append(size[2:]) or largest_difference(planned, size, *rest),
    )
    torch.manual_seed(0)
    net, image = Volume().double().eval(), torch.randn(1, 1, 12, 20, 18, dtype=torch.float64)
    given, expected = normfix.predict(net, image, tile=8, statistics="per-image"), whole(net, image)
    assert float((given - expected).abs().max() / expected.std()) < 1e-9
    assert sizes
    assert max(math.prod(size) for size in sizes) <= 24 * 24 * 16


class Far(nn.Module):
    """Attention whose output varies by less than it is rounded to."""

    def __init__(self):
        super().__init__()
        self.seen = of("matmul")

    def forward(self, x):
        return self.seen(x) + 3e4


@pytest.mark.parametrize("off", [1.0, 1.01])
def test_what_differs_by_rounding_alone_is_told_in_float64(monkeypatch, off):
    """An attention that is off by a hundredth is another, however its output is rounded."""

    def found(captured, shape):
        barred = with_attention(captured, shape)
        for node in barriers(barred):
            node.update_arg(3, node.args[3] * off)
        barred.body.recompile()
        return barred

    monkeypatch.setattr(capturing, "with_attention", found)
    net, image = Far().float(), IMAGE.float()
    assert float(whole(net, image).std()) < 1e4 * torch.finfo(torch.float32).eps * 3e4
    if off == 1:
        again = capturing._captured(net, Caller(), image, ())
        assert not computes(again.body, net, marked(Caller(), ()), image, guarded=False)
    else:
        with pytest.raises(NotInStages, match="NF320"):
            capturing._captured(net, Caller(), image, ())


@pytest.mark.slow
def test_another_image_of_another_size_is_exact_too(net):
    """Keys and statistics are those of the image that is predicted, also where no usual stride divides its size."""
    image = 2 * IMAGE[..., 6:, 6:]
    expected = whole(net, image)
    assert float((predicted(net, image) - expected).abs().max() / expected.std()) < 1e-9


@pytest.mark.slow
@pytest.mark.parametrize(
    "mistake",
    [
        "a lost block",
        *(pytest.param(m, marks=pytest.mark.zoo) for m in ("an unscaled merge", "keys of another image")),
    ],
)
def test_planted_mistakes_are_caught(monkeypatch, mistake):
    """The proof of the plan, or the network's own output, finds what attention would get wrong."""
    if mistake == "a lost block":
        bands = Tokens.bands
        monkeypatch.setattr(Tokens, "bands", lambda self, most: list(bands(self, 40))[:-1])
    elif mistake == "an unscaled merge":
        monkeypatch.setattr(tokens, "_SCORES", 2000)
        merge = tokens._Merged._merge
        monkeypatch.setattr(
            tokens._Merged,
            "_merge",
            lambda self, part, largest, total: merge(self, part, torch.zeros_like(largest), total),
        )
    else:
        read = Tokens.bands
        monkeypatch.setattr(Tokens, "bands", lambda self, most: (k.flip(-2) * 1.1 for k in read(self, most)))
    with pytest.raises(NotInStages) as caught:
        predicted(of("matmul"))
    assert caught.value.code in ("NF320", "NF325")


@pytest.mark.slow
@pytest.mark.parametrize("form", [_masked_by_the_image, _cumulated])
def test_a_mask_is_refused_by_name(monkeypatch, form):
    """What is not supported is named, not computed: once, on strips that are short as its graph has no bound."""
    lengths, refused = [], []
    run, measure = _Cells.__call__, scheduling.measure_reach

    def measured(stage, *rest):
        try:
            return measure(stage, *rest)
        except NotInStages:
            refused.append(stage.number)
            raise

    monkeypatch.setattr(_Cells, "__call__", lambda self, x: lengths.append(max(x.shape[2:])) or run(self, x))
    monkeypatch.setattr(scheduling, "measure_reach", measured)
    with pytest.raises(NotInStages, match=r"NF324.*no halo is enough \(aten\.(scaled_dot|matmul)"):
        predicted(of(form))
    assert len(refused) == 1
    assert max(lengths) == 256 + 2 * _DOUBTFUL


@pytest.mark.slow
def test_no_tile_is_enough_for_attention(net):
    """Tiles and a halo are refused: stages alone have the keys of the whole image."""
    for options in ({"engine": "tiles"}, {"halo": 8}):
        with pytest.raises(NormfixError) as caught:
            predicted(net, **options)
        assert caught.value.code == "NF410"


@pytest.mark.slow
def test_live_norms_are_refused_with_stored_statistics(net):
    """Only an image's own statistics make an unconverted network's output."""
    with pytest.raises(NormfixError) as caught:
        normfix.predict(net, IMAGE, tile=16)
    assert caught.value.code == "NF409"


class Timed:
    """A watch that wants to know how long it takes, as that of the command line does."""

    timed = True

    def begin(self, outlook):
        self.outlook = outlook

    def block(self, step):
        self.last = step


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fused", _causal])
def test_a_watch_that_wants_seconds_is_told_of_stages(form):
    """No trial has the keys of the whole image, so the time is not known; how far the run is, is."""
    net, watch = of(form), Timed()
    found = normfix.predict(
        net, IMAGE, statistics="per-image", blocks=normfix.Blocks(tile=16, watch=watch), engine="stages"
    )
    with torch.no_grad():
        torch.testing.assert_close(found, net(IMAGE), rtol=0, atol=1e-9)
    assert watch.outlook.seconds is None
    assert (watch.last.done, watch.last.stage) == (watch.last.blocks, watch.outlook.stages - 1)


@pytest.mark.slow
@pytest.mark.parametrize("form", ["fused", _causal])
def test_a_stage_with_attention_can_be_sent(form):
    """What a worker of a cluster makes of a stage computes the same: the call is not traced through."""
    found = schedule(program(form), stride=(2, 2))
    calls = (attend_to_stored, attend_to_stored_biased)
    sent = [pickle.loads(pickle.dumps(stage.run)) for stage in found.stages]
    kinds = [node.target for run in sent for node in run.graph.nodes if node.target in calls]
    assert kinds == [attend_to_stored if form == "fused" else attend_to_stored_biased]
