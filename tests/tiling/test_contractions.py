"""Products of maps over all positions in blocks: their sum is that of the whole image."""

import logging
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfix
from normfix.errors import NormfixError
from normfix.tiling.stages import contractions
from normfix.tiling.stages.contractions import Contraction
from normfix.tiling.stages.running import _Shares

IMAGE = torch.rand(1, 1, 42, 54, generator=torch.Generator().manual_seed(0), dtype=torch.float64) * 4
IMAGE += torch.linspace(0, 3, 54, dtype=torch.float64)


class Between(nn.Module):
    """A function of a map of 6 channels, a norm before it, between convolutions."""

    def __init__(self, function, ndim=2):
        super().__init__()
        conv = getattr(nn, f"Conv{ndim}d")
        self.function = function
        self.inner, self.norm, self.outer = (
            conv(1, 6, 3, padding=1),
            nn.GroupNorm(2, 6),
            conv(6, 1, 3, padding=1),
        )

    def forward(self, x):
        return self.outer(self.function(self.norm(self.inner(x)) * 2))


def thirds(y):
    """Queries, keys and values, (N, 2, P) each."""
    return [part.flatten(2) for part in y.chunk(3, 1)]


def back(out, y):
    """Return (N, 2, P) as a map of 6 channels."""
    return out.reshape(y.shape[0], 2, *y.shape[2:]).repeat(1, 3, *[1] * (y.dim() - 2)) * 10


def efficient(y):
    """Softmax of queries over channels, of keys over positions (Shen et al., arXiv 1812.01243)."""
    q, k, v = thirds(y)
    context = torch.einsum("bdn,ben->bde", k.softmax(-1), v)
    return back(torch.einsum("bde,bdn->ben", context, q.softmax(1)), y)


def linear(y):
    """Positive features and their sum (Katharopoulos et al., arXiv 2006.16236)."""
    q, k, v = thirds(y)
    q, k = F.elu(q) + 1, F.elu(k) + 1
    context = k @ v.transpose(1, 2)
    return back((context.transpose(1, 2) @ q) / (k.sum(-1, keepdim=True).transpose(1, 2) @ q + 1e-6), y)


def of_tokens(y):
    q, k, v = (part.transpose(1, 2) for part in thirds(y))
    return back((q.softmax(-1) @ (k.softmax(1).transpose(1, 2) @ v)).transpose(1, 2), y)


def of_heads(y):
    q, k, v = (part.unflatten(1, (2, 1)) for part in thirds(y))
    return back(((q @ k.transpose(-1, -2) / 50).softmax(-1) @ v).flatten(1, 2), y)


def of_channels(y):
    """Channels attend to channels (Fu et al., arXiv 1809.02983)."""
    f = y.flatten(2)
    return ((f @ f.transpose(1, 2) / 100).softmax(-1) @ f).view_as(y)


def cross_covariance(y):
    """Channels over normed positions (El-Nouby et al., arXiv 2106.09681)."""
    q, k, v = thirds(y)
    return back((F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)).softmax(-1) @ v, y)


def gram(y):
    f = y.flatten(2)
    return y * (torch.bmm(f, f.transpose(1, 2)) / f.shape[-1]).mean(-1).view(
        *y.shape[:2], *[1] * (y.dim() - 2)
    )


def non_local(y):
    """All pairs of positions, divided by their number (Wang et al., arXiv 1711.07971)."""
    q, k, v = (part.transpose(1, 2) for part in thirds(y))
    return back(((q @ k.transpose(1, 2) / q.shape[1]) @ v).transpose(1, 2), y)


def non_local_by_a_number(y):
    q, k, v = (part.transpose(1, 2) for part in thirds(y))
    return back((torch.bmm(q, k.transpose(1, 2)) * 0.01 / 7).bmm(v).transpose(1, 2), y)


def sum_of_exponentials(y):
    dims = tuple(range(2, y.dim()))
    return (
        y * torch.logsumexp(y, dims, keepdim=True)
        + torch.logsumexp(y.flatten(2), 2)[(..., *[None] * len(dims))]
    )


def norm_of_channels(y):
    return F.normalize(y.flatten(2), dim=-1).view_as(y) * 30 + y / torch.linalg.vector_norm(
        y, 1, tuple(range(2, y.dim())), keepdim=True
    )


FORMS = [efficient, linear, of_channels, non_local, sum_of_exponentials, norm_of_channels]
LIKE_THEM = [of_tokens, of_heads, cross_covariance, gram, non_local_by_a_number]
"""Forms of which another is one of the same mechanism."""


def whole(net, image):
    with torch.no_grad():
        return net(image)


def difference(function, image, ndim=2, dtype=torch.float64):
    """Return in sd how far blocks are from one pass over the whole image in float64."""
    torch.manual_seed(0)
    net = Between(function, ndim).to(dtype).eval()
    found = normfix.predict(net, image.to(dtype), tile=16, statistics="per-image")
    expected = whole(net.double(), image.double())
    return float((found.double() - expected).abs().max() / expected.std())


def in_blocks(caplog):
    """Tell whether nothing was measured in passes over the whole image."""
    return not [record for record in caplog.records if "passes over whole images" in record.getMessage()]


@pytest.mark.slow
@pytest.mark.parametrize(
    "function", [*FORMS, *(pytest.param(function, marks=pytest.mark.zoo) for function in LIKE_THEM)]
)
def test_blocks_are_the_whole(function, caplog):
    with caplog.at_level(logging.WARNING, logger="normfix"):
        assert difference(function, IMAGE) < 1e-12
    assert in_blocks(caplog)


@pytest.mark.slow
@pytest.mark.parametrize(("function", "ndim", "size"), [(linear, 1, (90,)), (of_channels, 3, (20, 23, 18))])
def test_of_other_dimensions(function, ndim, size, caplog):
    image = torch.rand(1, 1, *size, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    with caplog.at_level(logging.WARNING, logger="normfix"):
        assert difference(function, image, ndim) < 1e-12
    assert in_blocks(caplog)


@pytest.mark.slow
@pytest.mark.parametrize("function", [pytest.param(efficient, marks=pytest.mark.zoo), non_local])
def test_in_single_precision(function):
    assert difference(function, IMAGE, dtype=torch.float32) < 1e-4


@pytest.mark.zoo
def test_what_an_image_changes_between_two_products_is_not_taken_out_of_them():
    """A sigmoid of the products of all pairs has no sum of its own."""

    def gated(y):
        q, k, v = (part.transpose(1, 2) for part in thirds(y))
        return back((torch.sigmoid(q @ k.transpose(1, 2)) @ v).transpose(1, 2), y)

    with pytest.raises(NormfixError, match="NF32"):
        difference(gated, IMAGE)


@pytest.mark.slow
def test_positions_in_another_order_are_not_taken_for_blocks(caplog):
    """Each position meets the one across the image: measured in a pass over all of it, and exact."""

    def across(y):
        f = y.flatten(2)
        return y * torch.tanh(f @ f.flip(-1).transpose(1, 2) / 500).mean(-1).view(*y.shape[:2], 1, 1)

    with caplog.at_level(logging.WARNING, logger="normfix"):
        assert difference(across, IMAGE) < 1e-12
    assert not in_blocks(caplog)


def _halved(self, block, spans, extents):
    return {
        **_PARTIAL(self, block, spans, extents),
        "value": _PARTIAL(self, block, spans, extents)["value"] / 2,
    }


_PARTIAL = Contraction.partial


@pytest.mark.slow
@pytest.mark.parametrize("workers", [1, 3])
def test_what_blocks_give_is_put_together_as_they_come(monkeypatch, workers):
    """No more than waits for a block before it is held, and the result is the same to the bit."""
    held = []
    merged = Contraction.merged

    def counted(self, parts, extents, where):
        held.append(len(parts))
        return merged(self, parts, extents, where)

    monkeypatch.setattr(Contraction, "merged", counted)
    net = Between(gram).double().eval()
    blocks = normfix.Blocks(tile=16, workers=workers)
    given = normfix.predict(net, IMAGE, statistics="per-image", blocks=blocks)
    assert held
    assert set(held) == {1}
    assert torch.equal(given, normfix.predict(net, IMAGE, tile=16, statistics="per-image"))


def test_shares_that_come_too_early_wait():
    work = SimpleNamespace(blocks=[SimpleNamespace(image=0)] * 3 + [SimpleNamespace(image=1)])
    contraction = Contraction(1, 2, (1,))
    blocks = [torch.randn(1, 4, n, dtype=torch.float64) for n in (3, 5, 2, 4)]
    shares = _Shares(work, {"pool": contraction})
    for number in (2, 0, 3, 1):
        part = contraction.partial(blocks[number], [(0, blocks[number].shape[-1])], [10])
        assert shares.add(number, {"pool": part, "site": number}) == {"site": number}
        assert len(shares.parts[0, "pool"]) <= 1
    given = [contraction.merged(shares.parts[image, "pool"], [n], "pool") for image, n in ((0, 10), (1, 4))]
    whole = [torch.cat(blocks[:3], -1), blocks[3]]
    for products, maps in zip(given, whole, strict=True):
        torch.testing.assert_close(products[0, 0], maps[0, :2] @ maps[0, 2:].mT, rtol=1e-14, atol=1e-14)
    with pytest.raises(NormfixError, match="NF325"):
        contraction.merged(shares.parts[0, "pool"], [11], "pool")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "planted"),
    [
        ("partial", _halved),
        ("merged", lambda self, parts, extents, where: _MERGED(self, parts[1:], extents, where)),
        ("merged", lambda self, parts, extents, where: _MERGED(self, parts, extents, where) * 1.001),
    ],
    ids=["half a product", "a lost block", "another scale"],
)
def test_planted_mistakes_are_found(monkeypatch, caplog, name, planted):
    """The proof finds them, and the statistics are measured in passes, which do not make them."""
    monkeypatch.setattr(Contraction, name, planted)
    with caplog.at_level(logging.WARNING, logger="normfix"):
        assert difference(of_channels, IMAGE) < 1e-12
    assert not in_blocks(caplog)


_MERGED = Contraction.merged


@pytest.mark.slow
def test_a_graph_that_computes_something_else_is_refused(monkeypatch):
    """Where products are put into another order, the graph is compared with the network."""
    monkeypatch.setattr(contractions, "_SCALED", (*contractions._SCALED, torch.ops.aten.add.Tensor))

    def shifted(y):
        q, k, v = (part.transpose(1, 2) for part in thirds(y))
        return back(((q @ k.transpose(1, 2) + 1) @ v).transpose(1, 2), y)

    with pytest.raises(NormfixError, match="NF320"):
        difference(shifted, IMAGE)
