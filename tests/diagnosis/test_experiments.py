"""Planted causes are named exactly, with the mismatch that independent code finds they introduce and remove."""

import itertools

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import normfix
from normfix.diagnosis.experiments import UNKNOWN, culprits
from normfix.diagnosis.setting import bench_of, prepare
from normfix.errors import NormfixError
from normfix.networks.calling import Caller
from normfix.networks.numerics import exact_arithmetic
from normfix.records.diagnoses import Tiling
from normfix.records.saved import Scaling

TILE, ENOUGH, SMALLEST = 32, 8, 6
WITHIN = 1e-6
"""How far a measured mismatch may lie from the truth; 0.1 would do to tell causes apart."""


class Middle(nn.Module):
    """One operation over space; `held` computes it from a tile with what it has on the whole image."""

    family = ""

    def forward(self, x):
        return self.held(x, x)


class Nothing(Middle):
    def held(self, x, whole):
        return x


class Instance(Middle):
    family = "instance"

    def forward(self, x):
        return F.instance_norm(x)

    def held(self, x, whole):
        centre, variance = whole.mean((2, 3), keepdim=True), whole.var((2, 3), correction=0, keepdim=True)
        return (x - centre) / torch.sqrt(variance + 1e-5)


class Group(Middle):
    family = "group"

    def forward(self, x):
        return F.group_norm(x, 2)

    def held(self, x, whole):
        halves = [whole[:, i : i + 2] for i in (0, 2)]
        parts = zip((x[:, :2], x[:, 2:]), halves, strict=True)
        return torch.cat([(a - h.mean()) / torch.sqrt(h.var(correction=0) + 1e-5) for a, h in parts], 1)


class SqueezeExcite(Middle):
    family = "pool"

    def __init__(self):
        super().__init__()
        self.gate = nn.Conv2d(4, 4, 1)
        nn.init.normal_(self.gate.weight, std=2)

    def forward(self, x):
        return x * torch.sigmoid(self.gate(F.adaptive_avg_pool2d(x, 1)))

    def held(self, x, whole):
        return x * torch.sigmoid(self.gate(whole.mean((2, 3), keepdim=True)))


class Response(Middle):
    """Global response normalisation, as ConvNeXt V2 writes it."""

    family = "response"

    def forward(self, x):
        energy = torch.norm(x, p=2, dim=(2, 3), keepdim=True)
        return x + x * energy / (energy.mean(1, keepdim=True) + 1e-6)

    def held(self, x, whole):
        energy = whole.square().sum((2, 3), keepdim=True).sqrt()
        return x + x * energy / (energy.mean(1, keepdim=True) + 1e-6)


class Attention(Middle):
    """All pixels look at all pixels: by the fused call, by the same with keywords, or spelled out."""

    family = "attention"

    def __init__(self, written="fused"):
        super().__init__()
        self.project = nn.Conv2d(4, 12, 1)
        self.written = written
        nn.init.normal_(self.project.weight)

    def forward(self, x):
        q, k, v = self.project(x).flatten(2).transpose(1, 2).chunk(3, 2)
        if self.written == "fused":
            mixed = F.scaled_dot_product_attention(q, k, v)
        elif self.written == "keywords":
            mixed = F.scaled_dot_product_attention(query=q, key=k, value=v)
        else:
            mixed = (q @ k.transpose(1, 2) / 2).softmax(-1) @ v
        return x + mixed.transpose(1, 2).reshape(x.shape)

    def held(self, x, whole):
        q = self.project(x)[:, :4].flatten(2)[0]
        k, v = (self.project(whole)[:, i : i + 4].flatten(2)[0] for i in (4, 8))
        weights = torch.softmax(torch.einsum("cq,ck->qk", q, k) / 2, 1)
        return x + torch.einsum("qk,ck->cq", weights, v).reshape(x.shape)


class Planted(nn.Module):
    """A U-Net of one level, stride 2, into which every cause can be planted."""

    def __init__(self, middle=None, align=False, pads=False):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4)
        self.deep, self.middle = nn.Conv2d(4, 4, 3, padding=1), middle or Nothing()
        self.head = nn.Conv2d(8, 1, 3, padding=1)
        self.align, self.pads = align, pads
        for parameter in self.parameters():
            nn.init.normal_(parameter, std=0.5)

    def forward(self, x):
        h, w = x.shape[2:]
        if self.pads:
            x = F.pad(x, (0, w % 2, 0, h % 2))
        skip, deep = self.before(x)
        deep = self.middle(deep)
        options = {"mode": "bilinear", "align_corners": True} if self.align else {}
        up = F.interpolate(deep, skip.shape[2:], **options)
        return self.head(torch.cat([skip, up], 1))[..., :h, :w]

    def before(self, x):
        skip = F.leaky_relu(self.norm(self.stem(x)))
        return skip, self.deep(F.avg_pool2d(skip, 2))


def zscore(x):
    return (x - x.mean()) / x.std(correction=0)


def reflected(i, n):
    return -i if i < 0 else 2 * (n - 1) - i if i >= n else i


def resized(deep, size, top, left, whole_deep, whole_size):
    """Resize with align_corners=True by the rows of the whole image's interpolation matrix."""
    for axis, first in ((2, top), (3, left)):
        n, m = whole_deep[axis - 2], whole_size[axis - 2]
        matrix = F.interpolate(torch.eye(n, dtype=torch.float64)[None], m, mode="linear", align_corners=True)[
            0
        ].T  # (n, n) -> (m, n)
        rows = matrix[first : first + size[axis - 2], first // 2 : first // 2 + deep.shape[axis]]
        deep = torch.tensordot(deep, rows, ([axis], [1])).movedim(-1, axis)
    return deep


def truth(net, image, planted, present):
    """Return the mean |stitched - whole| / sd with the causes in `present`, in loops of its own."""
    height, width = image.shape[2:]
    if "size" in planted and "size" not in present:
        image = F.pad(image, (0, width % 2, 0, height % 2), mode="replicate")
    net.norm.train("train mode" in present)
    net.norm.momentum = 0.0
    scale = zscore if "tile scaling" in planted else lambda x: x
    n, m = image.shape[2:]
    material = scale(image)
    whole, (skip, deep) = (
        net(material),
        net.before(F.pad(material, (0, m % 2, 0, n % 2)) if net.pads else material),
    )
    stitched = torch.zeros_like(whole)
    enough = SMALLEST if "halo" in planted else ENOUGH  # fixed: the smallest halo that is enough
    before, after = (SMALLEST - 2,) * 2 if "halo" in present else (enough, enough)
    if "phase" in planted:
        before, after = before + 1, after - 1
    if "phase" not in present:  # fixed: windows grow outwards to the stride grid
        before, after = before + before % 2, after + after % 2

    def spans(extent):
        for start in range(0, extent, TILE):
            stop = min(start + TILE, extent)
            first, last = start - before, stop + after
            if "border padding" not in present:
                first, last = max(0, first), min(extent, last)
                if "last tile" in present and stop == extent:
                    first = extent - (TILE + before + after)
                elif (last - first) % 2 and "phase" in present:
                    first, last = (first, last + 1) if last < extent else (first - 1, last)
            yield first, last, start, stop

    for (top, bottom, y0, y1), (left, right, x0, x1) in itertools.product(spans(n), spans(m)):
        rows = [reflected(i, n) for i in range(top, bottom)]
        columns = [reflected(i, m) for i in range(left, right)]
        source = image if "tile scaling" in present else material
        window = source[:, :, rows][..., columns]
        if "tile scaling" in present:
            window = scale(window)
        h, w = window.shape[2:]
        if net.pads:
            window = F.pad(window, (0, w % 2, 0, h % 2))
        here, low = net.before(window)
        low = net.middle(low) if net.middle.family in present else net.middle.held(low, deep)
        if net.align and "position" not in present:
            up = resized(low, here.shape[2:], top, left, deep.shape[2:], skip.shape[2:])
        elif net.align:
            up = F.interpolate(low, here.shape[2:], mode="bilinear", align_corners=True)
        else:
            up = F.interpolate(low, here.shape[2:])
        out = net.head(torch.cat([here, up], 1))
        stitched[..., y0:y1, x0:x1] = out[..., y0 - top : y1 - top, x0 - left : x1 - left]
    difference = (stitched - whole)[..., :height, :width]
    net.norm.eval()
    return float(difference.abs().mean() / whole[..., :height, :width].std())


MIDDLES = {
    "instance": Instance,
    "group": Group,
    "pool": SqueezeExcite,
    "response": Response,
    "attention": Attention,
}
FAULTS = (
    "halo",
    "phase",
    "size",
    "border padding",
    "tile scaling",
    "train mode",
    "position",
    "last tile",
)
PAIRS = [
    *itertools.product(("instance",), FAULTS),
    ("response", "halo"),
    ("pool", "phase"),
    ("pool", "size"),
    ("attention", "halo"),
    ("attention", "tile scaling"),
    ("halo", "phase"),
    ("halo", "tile scaling"),
    ("phase", "train mode"),
    ("border padding", "train mode"),
    ("size", "tile scaling"),
    ("position", "tile scaling"),
    ("position", "train mode"),
    ("last tile", "train mode"),
    ("size", "train mode"),
]

SOME = [pytest.param(pair, marks=pytest.mark.zoo if n % 3 else ()) for n, pair in enumerate(PAIRS)]
LONG = [
    pytest.param(pair, marks=pytest.mark.zoo) for pair in itertools.product(("response", "group"), FAULTS)
]


def plant(causes):
    """Return the network, the image and the tiling that have exactly these causes."""
    middle = next((MIDDLES[c]() for c in causes if c in MIDDLES), None)
    net = Planted(middle, align="position" in causes, pads="last tile" in causes).eval()
    small = "attention" in causes
    n = (64 if small else 96) + 17 * bool({"size", "last tile"} & set(causes))
    image = torch.rand(1, 1, n, n)
    image[..., : n // 2] *= 3
    halo = [SMALLEST - 2] * 2 if "halo" in causes else [ENOUGH, ENOUGH]
    if "phase" in causes:
        halo = [halo[0] + 1, halo[1] - 1]
    tiling = Tiling(
        tile=(TILE, TILE),
        halo=(tuple(halo),) * 2,
        last="pushed back" if "last tile" in causes else "grid",
        context="mirrored border" if "border padding" in causes else "image",
        scaling=Scaling(kind="zscore") if "tile scaling" in causes else None,
        train="train mode" in causes,
    )
    return net, image, tiling


def named(net, image, tiling):
    """Return the culprits by cause."""
    with exact_arithmetic():
        setting = prepare(net, image, tiling, tile=TILE, halo="auto", kind=None, caller=Caller())
        found = culprits(bench_of(setting, lambda stage, done, total: None))
    # what an energy over space is called is the scan's business; here it is one cause
    return {{"reduction": "response"}.get(c.cause, c.cause): c for c in found}


@pytest.mark.slow
@pytest.mark.parametrize("causes", [(c,) for c in (*MIDDLES, *FAULTS)] + SOME + LONG, ids="+".join)
def test_planted_causes_are_named_with_their_share(causes):
    """Exactly the planted causes are named; introduced and removed are the truth's."""
    net, image, tiling = plant(causes)
    found = named(net, image, tiling)
    assert set(found) == set(causes)
    net, image = net.double(), image.double()
    with torch.no_grad():
        everything = truth(net, image, causes, set(causes))
        for cause in causes:
            alone = truth(net, image, causes, {cause})
            without = truth(net, image, causes, set(causes) - {cause})
            assert found[cause].introduced == pytest.approx(alone, rel=WITHIN, abs=1e-9)
            assert found[cause].removed == pytest.approx(everything - without, rel=WITHIN, abs=1e-9)


def test_the_smallest_halo_is_what_the_truth_takes():
    """The hand-set numbers of the truth: 6 pixels are enough, 4 are not."""
    net, image, _ = plant(("halo",))
    with torch.no_grad():
        assert truth(net.double(), image.double(), {"halo"}, set()) < 1e-12
        assert truth(net, image.double(), {"halo"}, {"halo"}) > 1e-6


def test_nothing_planted_names_nothing():
    """Control: the same network and tiling without a cause name none, with BatchNorm on its constants."""
    assert named(*plant(())) == {}


@pytest.mark.zoo
@pytest.mark.parametrize("written", ["keywords", "spelled out"])
def test_attention_is_held_however_it_is_written(written):
    """Keys and values are found behind keywords and two matrix products as well as in the fused call."""
    fused, image, tiling = plant(("attention",))
    other = Planted(Attention(written)).eval()
    other.load_state_dict(fused.state_dict())
    mine, theirs = (named(net, image, tiling)["attention"] for net in (fused, other))
    assert theirs.introduced == pytest.approx(mine.introduced)
    assert theirs.removed == pytest.approx(mine.removed)


class Frequencies(nn.Module):
    """Filters in frequency space: named by the scan, and no constant holds it."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        return torch.fft.irfft2(torch.fft.rfft2(y) * 0.5, s=y.shape[2:]) + y


def test_what_cannot_be_held_is_refused():
    """Without a right tiling there is nothing to compare with, and that is said with the way out."""
    with pytest.raises(NormfixError, match=r"NF601.*predict"):
        named(Frequencies(), torch.rand(1, 1, 96, 96), None)


class KnowsPlaces(nn.Module):
    """Adds to each pixel its column's place in the extent: no call that a scan names."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(1, 1, 3, padding=1)

    def forward(self, x):
        y = self.conv(x)
        place = torch.linspace(0, 1, x.shape[3], dtype=x.dtype)
        return y + place.to(y)


def test_what_no_experiment_explains_is_unknown_or_refused():
    """A map of positions is no known cause: it is not passed over."""
    with pytest.raises(NormfixError, match="NF601"):
        named(KnowsPlaces(), torch.rand(1, 1, 96, 96), None)


@pytest.mark.parametrize("wrong", ["halo", "context"])
def test_a_truth_of_another_pipeline_is_told_apart(wrong):
    """Control of the comparison itself: the truth of a slightly different pipeline is off by far more."""
    net, image, tiling = plant(("halo",))
    found = named(net, image, tiling)["halo"]
    net, image = net.double(), image.double()
    other = {"halo": {"halo", "phase"}, "context": {"halo", "border padding"}}[wrong]
    with torch.no_grad():
        assert found.introduced != pytest.approx(truth(net, image, other, other), rel=0.1)


def test_unknown_is_named_where_something_is_left():
    """A cause that no toggle takes away is reported as unknown, with what it introduces."""
    net, image, tiling = plant(("instance",))
    with exact_arithmetic():
        setting = prepare(net, image, tiling, tile=TILE, halo="auto", kind=None, caller=Caller())
        bench = bench_of(setting, lambda stage, done, total: None)
        bench.live = {False: (), True: ()}  # as if the scan had overlooked the norm
        (found,) = culprits(bench)
    assert found.cause == UNKNOWN
    assert found.removed is None
    assert found.introduced > 0.01


@pytest.mark.parametrize(("step", "tile", "halo", "size"), [(4, 30, 8, (128, 160)), (8, 20, 3, (100, 90))])
def test_a_tiling_off_the_grid_is_diagnosed_where_outputs_are_rounded(step, tile, halo, size):
    """Windows whose outputs lack pixels of their tiles make `phase` the cause and are told, and nothing crashes."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, step, step), nn.ReLU(), nn.ConvTranspose2d(2, 1, step, step)).eval()
    found = normfix.diagnose(
        net, torch.rand(1, 1, *size), tiling=Tiling(tile=(tile,) * 2, halo=((halo,) * 2,) * 2)
    )
    assert found.culprits[0].cause == "phase"
    assert "NF255" in {finding.code for finding in found.record.findings}


def test_a_tiling_on_the_grid_lacks_nothing():
    """Control: tiles and halos of whole strides leave no pixel out."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 2, 4, 4), nn.ReLU(), nn.ConvTranspose2d(2, 1, 4, 4)).eval()
    tiling = Tiling(tile=(32, 32), halo=((8, 8), (8, 8)))
    found = normfix.diagnose(net, torch.rand(1, 1, 128, 160), tiling=tiling)
    assert (found.culprits, found.record.findings) == ((), ())


@pytest.mark.slow
def test_the_halo_curve_is_that_of_the_converted_network():
    """With live statistics held, the curve is that of the frozen network by `halo_curve`, and ends in rounding."""
    torch.manual_seed(0)
    net = nn.Sequential(
        nn.Conv2d(1, 4, (3, 5), padding=(1, 2)), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 3, padding=1)
    )
    image = torch.rand(1, 1, 64, 64) * torch.linspace(0.1, 2, 64)
    record = normfix.diagnose(net.eval(), image, 16, halo=1, halo_curve=True).record
    frozen = normfix.convert(net, image, to="frozen").model
    expected = normfix.halo_curve(frozen, image, 16)
    assert {c.cause for c in record.culprits} == {"instance", "halo"}
    assert record.cost.experiments == 4 + len(expected.points)
    assert record.halo_curve.points[-1].max_sd < 1e-9
    for mine, theirs in zip(record.halo_curve.points, expected.points, strict=True):
        assert (mine.axis, mine.halo) == (theirs.axis, theirs.halo)
        assert mine.cost == pytest.approx(theirs.cost)
        assert mine.max_sd == pytest.approx(theirs.max_sd, rel=1e-3, abs=1e-5)


class Decides(torch.nn.Module):
    """A network that returns classes or a mask, which have no gradient."""

    def __init__(self, last):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.last = (
            torch.nn.Conv2d(1, 3, 3, padding=1),
            torch.nn.InstanceNorm2d(3),
            last,
        )

    def forward(self, x):
        return self.last(self.norm(self.conv(x)))


@pytest.mark.parametrize(
    "last", [lambda y: y.argmax(1, keepdim=True), lambda y: y > 0, lambda y: y.round().to(torch.uint8)]
)
def test_classes_and_masks_are_diagnosed(last):
    """Their effective receptive field is unknown, which ended the diagnosis in an error of torch's autograd."""
    image = torch.rand(1, 1, 48, 40, generator=torch.Generator().manual_seed(0))
    found = normfix.diagnose(Decides(last).eval(), image, tile=16)
    assert "instance" in [culprit.cause for culprit in found.culprits]
    assert found.receptive_field.outside is None


@pytest.mark.parametrize(("tile", "left_out", "compared"), [(1, [1], [4]), (4, [], [1, 4])])
def test_train_mode_that_takes_no_statistics_of_a_patch_is_named(tile, left_out, compared):
    """A batch of one pixel has none, which is said in place of ending the diagnosis; of larger patches it has."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.BatchNorm2d(4), nn.Conv2d(4, 1, 1)).eval()
    found = normfix.diagnose(net, torch.rand(1, 1, 12, 12), tile=tile)
    said = [finding.message for finding in found.record.findings if finding.code == "NF571"]
    assert len(said) == len(left_out)
    assert all(f"in batches of {n}" in text for n, text in zip(left_out, said, strict=True))
    assert [entry.batch for entry in found.train_eval] == compared
    assert found.status == "passed"
