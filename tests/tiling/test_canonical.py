"""What is written in several forms is found in one: softmax by hand, einsum by ellipsis, masks, shared keys."""

import pytest
import torch
import torch.nn.functional as F
from attentive import Attends

import normfix
from normfix.errors import NormfixError
from normfix.networks.calling import Caller
from normfix.tiling.stages import canonical
from normfix.tiling.stages.attention import with_attention
from normfix.tiling.stages.canonical import with_canonical_forms
from normfix.tiling.stages.contractions import CONTRACT, with_contractions
from normfix.tiling.stages.program import captured_program
from normfix.tiling.stages.tokens import ATTEND, ATTEND_BIASED

GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.randn(1, 1, 34, 42, generator=GENERATOR, dtype=torch.float64) + torch.linspace(
    0, 3, 42, dtype=torch.float64
)


def _later(scores):
    return torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)


def by_hand(q, k, v):
    scores = q @ k.mT * 0.4
    raised = (scores - scores.max(-1, keepdim=True)[0]).exp()
    return raised / raised.sum(-1, keepdim=True) @ v


def by_hand_of_keys_in_rows(q, k, v):
    raised = (k @ q.mT * 0.4).exp()
    return (v.mT @ raised / raised.sum(-2, keepdim=True)).mT


def by_a_reciprocal(q, k, v):
    raised = (q @ k.mT * 0.4).exp()
    return raised * (1 / raised.sum(-1)[..., None]) @ v


def divided_at_last(q, k, v):
    scores = torch.einsum("...qd,...kd->...qk", q, k) * 0.4
    raised = torch.exp(scores - scores.amax(-1, keepdim=True).detach())
    return torch.einsum("...qk,...kd->...qd", raised, v) / raised.sum(-1, keepdim=True)


def by_logarithms(q, k, v):
    return F.log_softmax(q @ k.mT * 0.4, -1).exp() @ v


def by_a_log_sum(q, k, v):
    scores = q @ k.mT * 0.4
    return (scores - scores.logsumexp(-1, keepdim=True)).exp() @ v


def less_the_largest(q, k, v):
    scores = q @ k.mT
    return ((scores - scores.amax(-1, keepdim=True)) * 0.4 + 1.5).softmax(-1) @ v


def of_one_less(q, k, v):
    return (1 - q @ k.mT * 0.4).softmax(-1) @ v


def less_than_the_largest(q, k, v):
    """Energies taken away from their largest (as channel attention of Fu et al., arXiv 1809.02983, over positions)."""
    energy = q @ k.mT * 0.4
    return (energy.max(-1, keepdim=True)[0].expand_as(energy) - energy).softmax(-1) @ v


def of_grouped_queries(q, k, v):
    return F.scaled_dot_product_attention(q, k[:, :1], v[:, :1], enable_gqa=True)


def of_shared_keys(q, k, v):
    weights = torch.einsum("bhqd,bkd->bhqk", q, k[:, 0]).mul(0.4).softmax(-1)
    return torch.einsum("bhqk,bkd->bhqd", weights, v[:, 0])


def added_to_a_product(q, k, v):
    n, heads, tokens, size = q.shape
    q, k, v = (x.reshape(n * heads, -1, size) for x in (q, k, v))
    far = (torch.arange(tokens)[:, None] - torch.arange(tokens)).abs().to(q.dtype)
    scores = torch.baddbmm(far.expand(n * heads, -1, -1), q, k.mT, beta=-0.01, alpha=0.4)
    return torch.bmm(scores.softmax(-1), v).reshape(n, heads, tokens, size)


def masked_like_scores(q, k, v):
    scores = q @ k.mT * 0.4 + 3.0
    return scores.masked_fill(torch.ones_like(scores).tril() == 0, -1e9).softmax(-1) @ v


def masked_by_a_tensor(q, k, v):
    scores = q @ k.mT * 0.4
    low = torch.tensor(-torch.inf, dtype=scores.dtype)
    return torch.where(_later(scores), low, scores).softmax(-1) @ v


def masked_by_full(q, k, v):
    scores = q @ k.mT * 0.4
    return torch.where(_later(scores), torch.full_like(scores, -torch.inf), scores).softmax(-1) @ v


def masked_anew(q, k, v):
    n = q.shape[-2]
    return F.scaled_dot_product_attention(q, k, v, attn_mask=q.new_ones(n, n).tril().bool())


def of_two_values(q, k, v):
    weights = (q @ k.mT * 0.4).softmax(-1)
    return weights @ v + weights @ v.square()


def in_single_precision(q, k, v):
    return F.softmax(q @ k.mT * 0.4, dim=-1, dtype=torch.float32).to(v.dtype) @ v


FORMS = (
    *(by_hand, by_hand_of_keys_in_rows, by_a_reciprocal, divided_at_last, by_logarithms, by_a_log_sum),
    *(
        less_the_largest,
        of_one_less,
        less_than_the_largest,
        of_grouped_queries,
        of_shared_keys,
        added_to_a_product,
    ),
    *(masked_like_scores, masked_by_a_tensor, masked_by_full, masked_anew, of_two_values),
)


def over_another_sum(q, k, v):
    scores = q @ k.mT * 0.4
    return scores.exp() / (scores * 1.1).exp().sum(-1, keepdim=True) @ v


def with_a_constant(q, k, v):
    raised = (q @ k.mT * 0.4).exp()
    return raised / (1 + raised.sum(-1, keepdim=True)) @ v


def over_queries(q, k, v):
    raised = (q @ k.mT * 0.4).exp()
    return raised / raised.sum(-2, keepdim=True) @ v


def less_another_largest(q, k, v):
    scores = q @ k.mT * 0.4
    return (scores - scores.amax(-2, keepdim=True)).softmax(-1) @ v


def non_local_from_the_left(q, k, v):
    return (v.mT @ (k @ q.mT / k.shape[-2])).mT


def non_local_turned(q, k, v):
    return (k @ q.mT * 0.1).mT @ v


def non_local_by_einsum(q, k, v):
    return torch.einsum("bhij,bhjd->bhid", torch.einsum("bhid,bhjd->bhij", q, k) / k.shape[2], v)


def of(form):
    return Attends(form).double().eval()


def barriers(form):
    """The barriers of a form, after its graph was held against the network."""
    net = of(form)
    found = with_canonical_forms(captured_program(net, Caller(), IMAGE, []))
    for looked_for in (with_attention, with_contractions):
        found = looked_for(found, IMAGE.shape)
    with torch.no_grad():
        given, expected = found.body(IMAGE)[0], net(IMAGE)
    assert float((given - expected).abs().max() / expected.std()) < 1e-12
    return [n.target for n in found.body.graph.nodes if n.target in (ATTEND, ATTEND_BIASED, CONTRACT)]


@pytest.mark.parametrize(
    "form", [pytest.param(form, marks=pytest.mark.zoo if n % 3 == 2 else ()) for n, form in enumerate(FORMS)]
)
def test_every_form_is_attention(form):
    found = barriers(form)
    assert set(found) <= {ATTEND, ATTEND_BIASED}
    assert len(found) == 1 + (form is of_two_values)


@pytest.mark.parametrize("form", [over_another_sum, with_a_constant, over_queries, less_another_largest])
def test_what_is_no_softmax_over_keys_is_left(form):
    """Another divisor, a sum over queries, and a shift that is another for each key."""
    assert barriers(form) == []


@pytest.mark.parametrize("form", [non_local_from_the_left, non_local_turned, non_local_by_einsum])
def test_products_of_all_pairs_are_summed_over_positions_first(form):
    assert barriers(form) == [CONTRACT]


def predicted(form, image=IMAGE):
    return normfix.predict(of(form), image, tile=16, statistics="per-image")


@pytest.mark.slow
@pytest.mark.parametrize(
    "form",
    [of_grouped_queries, masked_like_scores, in_single_precision]
    + [pytest.param(f, marks=pytest.mark.zoo) for f in (*FORMS, non_local_from_the_left)],
)
def test_blocks_are_the_whole(form, caplog):
    """A softmax in float32 inside a float64 network is as exact as the network itself."""
    image = IMAGE[..., :33, :37]
    with torch.no_grad():
        expected = of(form)(image)
    given = predicted(form, image)
    bound = 1e-6 if form is in_single_precision else 1e-11
    assert float((given - expected).abs().max() / expected.std()) < bound
    assert "in passes" not in caplog.text


@pytest.mark.slow
@pytest.mark.parametrize(
    ("form", "name", "planted"),
    [
        (less_another_largest, "_is_level", lambda operand, value, dim: True),
        pytest.param(*(over_queries, "_kept", lambda node, target: (node.args[0], 3)), marks=pytest.mark.zoo),
        (over_another_sum, "_kept", lambda node, target: (_raised(node.args[0]), 3)),
    ],
)
def test_planted_mistakes_are_found(monkeypatch, form, name, planted):
    """A shift that is another for each key, a sum over queries, and another sum, which are taken for a softmax."""
    monkeypatch.setattr(canonical, name, planted)
    with pytest.raises(NormfixError, match="NF320"):
        predicted(form)


def _raised(node):
    """The exponentials of scores, for those of other scores."""
    scores = node.args[0].args[0]
    return next(user for user in scores.users if user.target is torch.ops.aten.exp.default)
