"""Restoration networks that attend in windows, as their authors wrote them: exact on a lattice that examples agree on.

Needs `pip install spandrel` (MIT), which no other test does; left out where it is not there.
"""

import importlib
from fractions import Fraction

import pytest
import torch

import normfix

from .tiling import Pencil, distance, stitched

pytestmark = [pytest.mark.zoo, pytest.mark.filterwarnings("ignore")]


def _of(name, **options):
    pytest.importorskip("spandrel")
    module = importlib.import_module(f"spandrel.architectures.{name}.__arch.{name}")
    torch.manual_seed(0)
    net = getattr(module, name)(**options).eval()
    with torch.no_grad():
        for parameter in net.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.05)
    return net


def swinir():
    options = {"depths": [2], "num_heads": [2], "upscale": 1, "upsampler": "", "drop_path_rate": 0.0}
    return _of("SwinIR", img_size=32, embed_dim=12, window_size=4, mlp_ratio=2, **options)


def hat():
    options = {"depths": (2,), "num_heads": (2,), "squeeze_factor": 3, "num_feat": 8, "conv_scale": 0.5}
    options |= {"upscale": 2, "drop_path_rate": 0.0}
    return _of("HAT", img_size=32, embed_dim=12, window_size=4, mlp_ratio=2, **options)


@pytest.mark.parametrize(
    ("build", "sizes", "halo", "live"),
    [
        (swinir, [(40, 56), (45, 34)], 9, 0),
        # its channel attention has a pool in each of two blocks
        (hat, [(40, 56), (48, 36)], 14, 2),
    ],
    ids=["SwinIR", "HAT"],
)
def test_examples_of_any_size_give_one_lattice(build, sizes, halo, live):
    """Stride and halo are those of the windows whatever the example; sizes need not be multiples of them.

    The graph bounds the halo: for HAT, whose windows overlap, by a pixel more than the dye shows.
    """
    net = build()
    for size in sizes:
        found = normfix.scan(net, torch.rand(1, 3, *size))
        assert (found.reach.used, len(found.reach.shifts)) == ("graph", 2)
        assert (found.stride, found.halo) == ((4, 4), ((halo, halo), (halo, halo)))
        assert [str(site.family) for site in found.live] == ["pool"] * live


def test_a_size_of_which_a_mask_is_kept_is_as_others():
    """SwinIR keeps the mask of its own size and makes other calls there: it is looked at beside it, and tried at it."""
    net, image = swinir(), torch.rand(1, 3, 32, 32)
    found = normfix.scan(net, image)
    assert (found.stride, found.halo, found.tile_invariant) == ((4, 4), ((9, 9), (9, 9)), True)
    assert [condition.text for condition in found.sizes.crossed] == ["H != 32"]
    with torch.no_grad():
        whole = net.double()(image.double())
    assert distance(normfix.predict(net.float(), image, tile=8).double(), whole) < 1e-5


@pytest.mark.parametrize(("build", "halo", "scale"), [(swinir, 9, 1), (hat, 14, 2)], ids=["SwinIR", "HAT"])
def test_tiles_on_the_lattice_are_the_whole(build, halo, scale):
    """By the zoo's own arithmetic, in float64; half a window off the lattice they are not, which is phase.

    The channel attention of HAT, which looks at the whole image, is held out: its gates are set to one half.
    """
    net = build().double()
    for name, module in net.named_modules():
        if name.endswith("cab.3.attention"):
            module[3].weight.data.zero_(), module[3].bias.data.zero_()

    def apart(stride, offset=0):
        pencil = Pencil((40, 40), 0, stride, (halo, halo), Fraction(scale))
        image = torch.rand(1, 3, *pencil.size, generator=torch.Generator().manual_seed(1)).double()
        whole = net(image)
        if offset:
            first = pencil.tile + offset
            part = net(image[:, :, first - 20 : first + 60])
            middle = slice(20 * scale, 40 * scale)
            return distance(part[:, :, middle], whole[:, :, first * scale : (first + 20) * scale])
        return distance(stitched(net, image, pencil), whole)

    with torch.no_grad():
        assert apart(4) < 1e-9
        assert apart(4, offset=4) < 1e-9
        assert apart(4, offset=2) > 1e-3
