"""Keys and values of attention held as constants: tiles equal the whole, and each image counts alike."""

import copy

import pytest
import torch
import torch.nn.functional as F
from attentive import FORMS, Attends
from torch import nn

import normfix
from normfix.conversion.keys import require_room, with_all_keys
from normfix.conversion.measuring import remeasure_sites, settle_sites_
from normfix.conversion.rewriting import rewrite
from normfix.conversion.staged import measure_in_stages_
from normfix.conversion.targets import measured_targets
from normfix.errors import NormfixError
from normfix.images.sources import TensorImage
from normfix.layers import FrozenKeys
from normfix.networks.calling import Caller
from normfix.proof.steps import residual
from normfix.proof.values import differing_layers
from normfix.scanning.sites import survey
from normfix.tiling.stages.refusals import NotInStages

GENERATOR = torch.Generator().manual_seed(0)
IMAGE = torch.rand(1, 1, 32, 48, generator=GENERATOR, dtype=torch.float64) + torch.linspace(
    0, 2, 48, dtype=torch.float64
)
OTHER = 3 * torch.rand(1, 1, 16, 32, generator=GENERATOR, dtype=torch.float64)
SITE = "(root)/0/scaled_dot_product_attention/0"


def original(attention="fused"):
    return Attends(attention, reduced=2).double().eval()


def run(net, image):
    with torch.no_grad():
        return net(image)


def apart(given, expected):
    return float((given - expected).abs().max() / expected.std())


def exact(q, keys, values, share):
    """Attention row by row in float64, a key counted `share` times, by nothing that the package uses."""
    rows = []
    for row in q.unbind(-2):
        products = (row.unsqueeze(-2) * keys).sum(-1) / q.shape[-1] ** 0.5
        weights = (products - products.amax(-1, keepdim=True)).exp() * share
        rows.append((weights.unsqueeze(-1) * values).sum(-2) / weights.sum(-1, keepdim=True))
    return torch.stack(rows, -2)


@pytest.fixture(scope="module")
def done():
    return normfix.convert(original(), normfix.Measured(IMAGE, keys="all"), tile=16)


@pytest.fixture(scope="module")
def several():
    return normfix.convert(original(), normfix.Measured([IMAGE, OTHER], keys="all"), tile=16)


def held(net):
    (found,) = (module for module in net.modules() if isinstance(module, FrozenKeys))
    return found


@pytest.mark.slow
def test_tiles_equal_the_originals_whole_image(done):
    """Of the converted network, by an attention written for this test; tiles of the original do not."""
    expected = run(original(lambda q, k, v: exact(q, k, v, 1.0)), IMAGE)
    assert done.proof.passed
    assert apart(normfix.predict(done.model, IMAGE, tile=16), expected) < 1e-12
    parts = torch.cat([run(original(), part) for part in IMAGE.split(16, 3)], 3)
    assert apart(parts, expected) > 0.1


@pytest.mark.slow
def test_windows_hold_what_keys_were_pooled_on():
    """Keys of 24 x 24 pixels want windows as wide, though a halo of a few pixels is enough: the last tile's too."""
    net = Attends(reduced=12).double().eval()
    done = normfix.convert(net, normfix.Measured(IMAGE, keys="all"), tile=32)
    assert done.proof.passed
    assert max(max(halo) for halo in done.scan.halo) < 8
    assert apart(normfix.predict(done.model, IMAGE, tile=32), run(net, IMAGE)) < 1e-12
    with pytest.raises(NormfixError, match=r"NF109.*window of tiles of 12x12 pixels: give a larger tile"):
        normfix.predict(done.model, IMAGE, tile=12)


@pytest.mark.slow
def test_another_image_attends_to_the_keys_that_are_held(done):
    """Its tiles equal what attention to the first image's keys gives for it whole."""
    keys = held(done.model)
    other = IMAGE.flip(-1) * 0.7
    whole = run(done.model, other)
    by_hand = copy.deepcopy(done.model)
    held(by_hand).forward = lambda function, given: exact(given["query"], keys.keys, keys.values, 1.0)
    assert apart(run(by_hand, other), whole) < 1e-12
    assert apart(normfix.predict(done.model, other, tile=16), whole) < 1e-12


def test_images_count_alike_whatever_their_size(several):
    """Keys of an image with a third of the pixels weigh three times as much each."""
    keys = held(several.model)
    counts = [16 * 24 // 4, 8 * 16 // 4]
    assert keys.bias.numel() == sum(counts)
    share = torch.cat([torch.full((n,), 1 / n, dtype=torch.float64) for n in counts])
    q = torch.randn(2, 2, 5, 4, generator=GENERATOR, dtype=torch.float64)
    given = {"query": q, "key": q, "value": q}
    found = keys(F.scaled_dot_product_attention, given)
    assert apart(found, exact(q, keys.keys, keys.values, share)) < 1e-12
    assert several.proof.passed
    assert len(several.proof.shifts) == 2


def test_keys_are_measured_anew_on_images_of_any_size(done):
    """Of another image the network gives what the original gives; of two that are as many keys, each counts alike."""
    anew = normfix.calibrate(done.model, OTHER).model
    assert apart(run(anew, OTHER), run(original(), OTHER)) < 1e-12
    assert apart(run(done.model, IMAGE), run(original(), IMAGE)) < 1e-12
    keys = held(normfix.calibrate(done.model, [OTHER, IMAGE[..., :32]]).model)
    assert keys.bias.numel() == held(done.model).bias.numel() == 96
    share = torch.cat([torch.full((n,), 1 / n, dtype=torch.float64) for n in (32, 64)])
    q = torch.randn(2, 2, 5, 4, generator=GENERATOR, dtype=torch.float64)
    found = keys(F.scaled_dot_product_attention, {"query": q, "key": q, "value": q})
    assert apart(found, exact(q, keys.keys, keys.values, share)) < 1e-12


def test_blocks_give_no_keys(done):
    """Stages refuse them by name with the ways that there are; images in memory are measured in passes instead."""
    targets = measured_targets(done.model, done.plan)
    with pytest.raises(NotInStages, match='statistics="per-image"') as caught:
        measure_in_stages_(
            copy.deepcopy(done.model), targets, [TensorImage(OTHER)], Caller(), normfix.Blocks()
        )
    assert (caught.value.code, caught.value.where) == ("NF323", SITE)
    anew = normfix.calibrate(done.model, OTHER, blocks=normfix.Blocks(tile=16))
    assert "passes" in str(anew.summary.engine)
    assert apart(run(anew.model, OTHER), run(original(), OTHER)) < 1e-12


def _lost(keys):
    keys.hold_([keys.keys[..., 1:, :], keys.values[..., 1:, :]], keys.bias[1:])


def _of_another_image(keys):
    n = keys.bias.numel() // 4
    keys.keys[..., :n, :] = keys.keys[..., n : 2 * n, :].clone()


def _wrong_weight(keys):
    keys.bias[:96] += 0.1


def _exchanged_values(keys):
    keys.values.copy_(keys.values.flip(-2))


@pytest.mark.slow
@pytest.mark.parametrize("mistake", [None, _lost, _of_another_image, _wrong_weight, _exchanged_values])
def test_what_is_held_is_measured_again(several, mistake):
    """A key that is lost or another's, and an image's wrong weight, fail the residual; nothing else does."""
    net = copy.deepcopy(several.model)
    if mistake:
        mistake(held(net))
    images = [TensorImage(IMAGE), TensorImage(OTHER)]
    summary = remeasure_sites(net, measured_targets(net, several.plan), images, Caller().exactly)
    assert residual(summary, torch.float64).status == ("failed" if mistake else "passed")


@pytest.mark.slow
def test_a_bias_that_is_not_used_is_caught(several):
    """The proof holds the layer against the formula, which shares nothing with it."""
    net = copy.deepcopy(several.model)
    assert not differing_layers(net, several.plan, lambda: run(net, IMAGE))
    held(net).biased = False
    assert SITE in differing_layers(net, several.plan, lambda: run(net, IMAGE))[0]


@pytest.mark.slow
def test_some_keys_are_kept_with_equal_shares():
    """Of N keys each image gives half; the identity is proved with all, and each image's error is reported."""
    done = normfix.convert(original(), normfix.Measured([IMAGE, OTHER], keys=40), tile=16)
    assert held(done.model).bias.tolist() == [0.0] * 40
    assert done.proof.passed
    assert [shift.image for shift in done.proof.shifts] == [0, 1]
    assert done.plan.decisions[-1].reason.endswith("40 of them")
    assert held(rewrite(original(), with_all_keys(done.plan))).bias.numel() == 0


@pytest.mark.slow
def test_weights_carry_their_number_of_keys(done):
    """A network rewritten by the same plan takes the keys from a state, whatever their number; no other shapes."""
    fresh = rewrite(original(), done.plan)
    fresh.load_state_dict(done.model.state_dict(), strict=True)
    assert torch.equal(run(fresh, IMAGE), run(done.model, IMAGE))
    state = done.model.state_dict()
    name = next(key for key in state if key.endswith("bias") and "normfix" in key)
    with pytest.raises(RuntimeError, match="size mismatch"):
        rewrite(original(), done.plan).load_state_dict({**state, name: state[name][1:]}, strict=True)


@pytest.mark.slow
def test_a_reviewed_plan_holds_them_again(done):
    """The plan says that keys are held; it is carried out without being asked for once more."""
    again = normfix.convert(original(), IMAGE, to=done.plan, tile=16)
    assert again.plan == done.plan
    assert torch.equal(held(again.model).keys, held(done.model).keys)


def test_what_they_take_is_forecast(done):
    """By the images' sizes; over 2 GiB it has to be said how many are kept."""
    forecast = require_room(done.plan, done.scan.example[2:], [(32, 48)], 8)
    assert forecast == 8 * (held(done.model).keys.numel() + held(done.model).values.numel())
    with pytest.raises(NormfixError, match="--keys N") as caught:
        require_room(done.plan, done.scan.example[2:], [(32000, 48000)], 8)
    assert caught.value.code == "NF598"


@pytest.mark.parametrize("keys", [0, -3, True, "some"])
def test_a_number_of_keys_is_a_number(keys):
    """What is no number of keys is refused before anything runs."""
    with pytest.raises(NormfixError) as caught:
        normfix.convert(nn.Conv2d(1, 1, 1), normfix.Measured(IMAGE, keys=keys))
    assert caught.value.code == "NF598"


@pytest.mark.slow
def test_attention_that_is_written_out_is_held():
    """Its two products take the keys and the values, whichever stands first; images of unlike sizes are refused."""
    net = original("keys in rows")
    done = normfix.convert(net, normfix.Measured(IMAGE, keys="all"), tile=16)
    assert done.proof.passed
    assert [d.site.function for d in done.plan.converted] == ["group_norm", "matmul", "matmul"]
    assert apart(normfix.predict(done.model, IMAGE, tile=16), run(net, IMAGE)) < 1e-12
    targets = measured_targets(done.model, done.plan)
    with pytest.raises(NormfixError, match="--keys 64 or fewer") as caught:
        settle_sites_(done.model, targets, [TensorImage(IMAGE), TensorImage(OTHER)], Caller().exactly)
    assert caught.value.code == "NF230"


@pytest.mark.parametrize("form", [form for form in FORMS if "fused" not in form])
def test_every_form_is_told(form):
    """Keys and values are found in each form in which people write it, and the softmax between is none of it."""
    found = survey(Attends(form).eval(), Caller(), torch.rand(1, 1, 32, 48), keys=0)
    live = [site for site in found.sites if site.live]
    assert [site.statistic.law for site in live if site.statistic] == ["keys", "keys"]
    # which baddbmm is given, and with beta 0 does not read
    assert {site.function for site in live if site.refusal} <= {"new_empty"}


class Encoded(nn.Module):
    """A transformer's layer over the tokens of patches, which torch computes in one fused call where it may."""

    def __init__(self):
        super().__init__()
        self.patches, self.back = nn.Conv2d(1, 8, 4, 4), nn.ConvTranspose2d(8, 1, 4, 4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
        with torch.no_grad():
            for parameter in self.parameters():
                parameter.normal_(0, 0.6, generator=torch.Generator().manual_seed(parameter.numel()))

    def forward(self, x):
        y = self.patches(x)
        return self.back(self.layer(y.flatten(2).transpose(1, 2)).transpose(1, 2).reshape(y.shape))


@pytest.mark.slow
def test_torchs_own_layers_are_exact():
    """nn.MultiheadAttention inside torch's encoder layer, also where nothing watches the calls."""
    net = Encoded().double().eval()
    done = normfix.convert(net, normfix.Measured(IMAGE, keys="all"), tile=16)
    assert done.proof.passed
    tiles = torch.cat([run(done.model, part) for part in IMAGE.split(16, 3)], 3)
    assert apart(tiles, run(net, IMAGE)) < 1e-12


class Placed(nn.Module):
    """Attention among tokens that know where they are: a learned map is stretched to the image."""

    def __init__(self):
        super().__init__()
        self.norm, self.place = nn.InstanceNorm2d(4), nn.Parameter(torch.randn(1, 4, 5, 7))
        self.patches, self.back = nn.Conv2d(1, 4, 4, 4), nn.ConvTranspose2d(4, 1, 4, 4)

    def forward(self, x):
        y = self.norm(self.patches(x))
        tokens = (y + F.interpolate(self.place, size=y.shape[2:])).flatten(2).transpose(1, 2)
        seen = F.scaled_dot_product_attention(tokens, tokens, tokens)
        return self.back(seen.transpose(1, 2).reshape(y.shape))


@pytest.mark.slow
def test_a_network_that_knows_its_size_stays_live_by_name():
    """Holding keys would not make its tiles equal: it is said why, and the rest is converted."""
    done = normfix.convert(Placed().double().eval(), normfix.Measured(IMAGE, keys="all"), tile=16)
    (left,) = done.plan.left_live
    assert "stretched to the image's extent" in left.reason
    assert done.proof.partial


def _masked(q, k, v):
    return F.scaled_dot_product_attention(q, k, v, is_causal=True)


def _penalised(q, k, v):
    return (q @ k.transpose(-2, -1) - torch.arange(k.shape[-2]) * 0.1).softmax(-1) @ v


class Axial(nn.Module):
    def forward(self, x):
        y = x.permute(0, 2, 3, 1)
        return F.scaled_dot_product_attention(y, y, y).permute(0, 3, 1, 2)


@pytest.mark.parametrize(
    ("net", "reason"),
    [
        (Attends(_masked), "its is_causal is made for the whole image"),
        (Attends(_penalised), "not as a softmax between two products"),
        (Axial(), "along one axis"),
    ],
)
def test_what_cannot_be_held_is_refused_by_name(net, reason):
    """A mask, a product of its own and attention along lines keep their attention."""
    image = torch.rand(1, 1, 32, 48)
    found = survey(net.eval(), Caller(), image, keys=0)
    refusals = [site.refusal for site in found.sites if site.family == "attention"]
    assert reason in refusals[0]


def test_it_is_asked_for():
    """Without keys attention stays live, and its refusal says how it would not."""
    found = survey(original().float(), Caller(), torch.rand(1, 1, 32, 48))
    (site,) = (site for site in found.sites if site.family == "attention")
    assert site.live
    assert "--keys all" in site.refusal


class Summarised(nn.Module):
    """A learned query looks at the whole image, and its answer is added to every pixel."""

    def __init__(self):
        super().__init__()
        self.query = nn.Parameter(torch.randn(1, 1, 4))

    def forward(self, x):
        tokens = x.flatten(2).transpose(1, 2)
        seen = F.scaled_dot_product_attention(self.query.expand(len(x), -1, -1), tokens, tokens)
        return x + seen.transpose(1, 2)[..., None]


@pytest.mark.parametrize("keys", [None, 0])
def test_learned_queries_are_refused_by_name(keys):
    """What they give of an image is one value for all of it, for which there is no rule."""
    found = survey(Summarised().eval(), Caller(), torch.rand(1, 4, 32, 48), keys=keys)
    (site,) = (site for site in found.sites if site.live)
    assert "no rule for scaled_dot_product_attention over space" in site.refusal


def test_queries_of_the_image_alone_are_local():
    """Attention to learned tokens looks at no other pixel."""

    class Prompted(nn.Module):
        def __init__(self):
            super().__init__()
            self.tokens = nn.Parameter(torch.randn(1, 5, 1))

        def forward(self, x):
            q = x.flatten(2).transpose(1, 2)
            return F.scaled_dot_product_attention(q, self.tokens, self.tokens).transpose(1, 2).view(x.shape)

    found = survey(Prompted(), Caller(), torch.rand(1, 1, 32, 48))
    assert not [site for site in found.sites if site.live]
