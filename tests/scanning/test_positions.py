"""Size and position: calls that no dye and no statistic shows are named, with owner and line."""

import pytest
import torch
import torch.nn.functional as F
from networks import AlignedCorners, Blocks, DilatedStack, ResizesToSkip, ShiftedWindows, plain_unet
from torch import nn

import normfix


class Around(nn.Module):
    """A convolution, then a function of the map."""

    def __init__(self, function, **parameters):
        super().__init__()
        self.conv = nn.Conv2d(1, 4, 3, padding=1)
        self.function = function
        for name, value in parameters.items():
            setattr(self, name, nn.Parameter(value))

    def forward(self, x):
        return self.function(self, self.conv(x))


def _findings(net, size=128):
    found = normfix.scan(net.eval(), torch.randn(1, 1, size, size), fast=True)
    return [(f.where, f.message) for f in found.findings if f.code == "NF244"]


def _coordinates(self, x):
    rows = torch.arange(x.shape[2], dtype=x.dtype) / x.shape[2]
    return x * rows[:, None]


def _sampled(self, x):
    grid = F.affine_grid(torch.eye(2, 3)[None], x.shape, align_corners=False)
    return F.grid_sample(x, grid, align_corners=False)


def _stretched(self, x):
    return x + F.interpolate(self.table, size=x.shape[2:], mode="bilinear")


def _fixed(self, x):
    return F.interpolate(F.interpolate(x, size=(32, 32)), size=x.shape[2:])


# name: (network, words of the message)
NAMED = {
    "aligned corners": (AlignedCorners(), "align_corners=True"),
    "circular padding": (nn.Conv2d(1, 1, 3, padding=1, padding_mode="circular"), "opposite border"),
    "rolling": (Around(lambda self, x: x.roll(3, 2)), "rolls"),
    "fixed size": (Around(_fixed), "resizes to 32x32"),
    "pooling to six": (
        Around(lambda self, x: F.interpolate(F.adaptive_avg_pool2d(x, 6), x.shape[2:])),
        "6x6 cells",
    ),
    "coordinates": (Around(_coordinates), "coordinates of the image's extent"),
    "sampling": (Around(_sampled), "absolute coordinates"),
    "stretched embedding": (Around(_stretched, table=torch.randn(1, 4, 7, 7)), "stretched"),
    "stored embedding": (
        Around(lambda self, x: x + self.table, table=torch.randn(1, 4, 128, 128)),
        "fixed extent",
    ),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMED)
def test_names(name):
    """Each dependence on size or position is a finding that says what it is."""
    net, words = NAMED[name]
    assert any(words in message for _, message in _findings(net))


@pytest.mark.slow
@pytest.mark.parametrize("make", [plain_unet, DilatedStack, ResizesToSkip])
def test_says_nothing_of_ordinary_networks(make):
    """Negative control: pooling, upsampling by a factor and to a skip connection are none of it."""
    assert _findings(make()) == []


def test_a_constant_table_of_numbers_is_no_coordinate():
    """An arange that does not grow with the image is no position."""
    assert _findings(Around(lambda self, x: x * torch.arange(4.0)[:, None, None])) == []


def test_a_linear_layer_over_space_is_named_where_it_stops():
    """A network of one size says which call has the size built in."""
    net = nn.Sequential(nn.Conv2d(1, 1, 3, padding=1), nn.Flatten(), nn.Linear(64 * 64, 8))
    findings = _findings(net, size=64)
    assert ("1", True) in [(where, "features of all of space" in message) for where, message in findings]
    assert ("2", True) in [(where, "size is built in" in message) for where, message in findings]


def test_calls_at_one_line_are_one_finding():
    """Three blocks that roll are one finding with a count."""
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), *(_Rolls() for _ in range(3)))
    ((where, message),) = _findings(net)
    assert where == "1"
    assert "(3 calls)" in message


class _Rolls(nn.Module):
    def forward(self, x):
        return x.roll(1, 3)


@pytest.mark.slow
@pytest.mark.parametrize("extent", [60, 64])
@pytest.mark.parametrize("make", [Blocks, pytest.param(ShiftedWindows, marks=pytest.mark.zoo)])
def test_padding_to_a_lattice_is_tile_invariant_at_every_example(make, extent):
    """Whether the example is a multiple of the lattice changes nothing; masked shifts were measured harmless."""
    scan = normfix.scan(make().eval(), torch.randn(1, 1, extent, extent))
    assert scan.tile_invariant, scan.findings
    assert {finding.code for finding in scan.findings} <= {"NF252"}


@pytest.mark.zoo
def test_what_is_shifted_and_masked_is_bounded_by_the_graph():
    """The graph bounds what windows read; that their masks hide the other border it does not tell."""
    scan = normfix.scan(ShiftedWindows().eval(), torch.randn(1, 1, 64, 64))
    assert scan.tile_invariant
    assert scan.reach.used == "graph"
    assert scan.reach.wraps == ()
    assert len(scan.reach.shifts) == 2
    assert scan.halo == scan.reach.bound == ((5, 5), (5, 5))
    assert "masks hide what aten.roll.default" in scan.reach.words
    assert [text for text in scan.sizes.unknown if "masks hide" in text]


class _Misplaced(ShiftedWindows):
    """Masks a pair of rows beside those that were brought around the border."""

    def _mask(self, x, shift):
        return super()._mask(x, shift - 1)


@pytest.mark.slow
def test_a_mask_at_another_place_hides_no_border():
    """Control: its graph is like that of one whose mask is right; windows are compared with the whole."""
    scan = normfix.scan(_Misplaced().eval(), torch.randn(1, 1, 64, 64))
    assert len(scan.reach.shifts) == 2
    assert not scan.tile_invariant
    assert "NF213" in {finding.code for finding in scan.findings}


class _Lowered(ShiftedWindows):
    """Lowers pairs that a mask hides by a hundred, which the products of large values exceed."""

    def _hidden(self, weights, mask):
        return weights + mask.clamp(min=-100)


class _SetTo(ShiftedWindows):
    """Sets pairs that a mask hides to less than most: where all others are lower still, they are the largest."""

    def _hidden(self, weights, mask):
        return (-weights.abs()).masked_fill(mask.isinf(), -1e4)


class _Normalised(_Lowered):
    """Products of normalised values, which a hundred exceeds on any image."""

    def __init__(self):
        super().__init__()
        self.projections = nn.ModuleList(
            nn.Sequential(nn.LayerNorm(2), projection) for projection in self.projections
        )


@pytest.mark.zoo
@pytest.mark.parametrize("net", [_Lowered, _SetTo])
def test_a_mask_that_large_values_exceed_hides_no_border(net):
    """On small values it does."""
    torch.manual_seed(0)
    scan = normfix.scan(net().eval(), torch.randn(1, 1, 64, 64))
    assert len(scan.reach.shifts) == 2
    assert not scan.tile_invariant
    assert "NF213" in {finding.code for finding in scan.findings}


@pytest.mark.slow
def test_a_finite_mask_hides_the_border_of_normalised_values():
    """Control."""
    torch.manual_seed(0)
    assert normfix.scan(_Normalised().eval(), torch.randn(1, 1, 64, 64)).tile_invariant


def test_a_shift_without_a_mask_stays_a_finding():
    """Control: what rolls around the border without a mask has no geometry, and is named."""
    net = Around(lambda self, y: y + torch.roll(y, 2, -1))
    scan = normfix.scan(net.eval(), torch.randn(1, 1, 64, 64))
    assert not scan.tile_invariant
    assert "NF244" in {finding.code for finding in scan.findings}


class _FixedBatch(nn.Module):
    """A median of neighbours of one image, which fixes the batch: a convolution then asks for the size of its map."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 3, 3, padding=1), nn.Conv2d(3, 1, 1)

    def forward(self, x):
        y = F.unfold(self.conv(x), 3, padding=1).view(1, 3, 9, *x.shape[2:])
        return self.head(y.median(dim=2).values)


class _FixedRow(nn.Module):
    """The same along a line, by sorting."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv1d(1, 3, 3, padding=1), nn.Conv1d(3, 1, 1)

    def forward(self, x):
        y = F.pad(self.conv(x), (2, 2)).unfold(2, 5, 1).reshape(1, 3, x.shape[2], 5)
        return self.head(y.quantile(0.5, dim=3))


@pytest.mark.slow
@pytest.mark.parametrize(("net", "size"), [(_FixedBatch, (64, 96)), (_FixedRow, (512,))])
def test_the_size_at_which_torch_takes_another_kernel_is_no_branch(net, size):
    """A convolution asks how large its map is to choose a kernel: scan and check agree that tiles equal the whole."""
    image = torch.randn(1, 1, *size, generator=torch.Generator().manual_seed(0))
    scan = normfix.scan(net().eval(), image)
    assert not [f for f in scan.findings if f.code == "NF244"]
    assert scan.tile_invariant
    assert normfix.check(net().eval(), image, tile=32).passed
