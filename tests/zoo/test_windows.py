"""Restoration networks that attend in windows, as their authors wrote them: exact on a lattice that examples agree on.

Needs `pip install spandrel` (MIT), which no other test does; left out where it is not there.
"""

import importlib

import pytest
import torch

import normfix

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
        (hat, [(40, 56), (48, 36)], 13, 2),
    ],
    ids=["SwinIR", "HAT"],
)
def test_examples_of_any_size_give_one_lattice(build, sizes, halo, live):
    """Stride and halo are those of the windows whatever the example; sizes need not be multiples of them."""
    net = build()
    for size in sizes:
        found = normfix.scan(net, torch.rand(1, 3, *size))
        assert (found.stride, found.halo) == ((4, 4), ((halo, halo), (halo, halo)))
        assert [str(site.family) for site in found.live] == ["pool"] * live


def test_a_size_of_which_a_mask_is_kept_is_told():
    """SwinIR keeps the mask of its own size, at which it makes other calls: another example is asked for."""
    found = normfix.scan(swinir(), torch.rand(1, 3, 32, 32))
    assert any(f.code == "NF201" and "example of another size" in f.message for f in found.findings)


@pytest.mark.parametrize("size", [(64, 80), (45, 70)])
def test_check_agrees(size):
    """Tiles of an image of another size are what the whole is."""
    verdict = normfix.check(swinir(), torch.rand(1, 3, *size), tile=16)
    assert verdict.passed, verdict


def test_windows_that_start_off_the_lattice_are_phase():
    """With context enough, starts on multiples of 6 are the one cause, and no attention is blamed."""

    def every_six(x, network):
        rows = []
        for top in range(0, x.shape[2], 6):
            first, last = max(0, top - 14), min(x.shape[2], top + 20)
            rows.append(network(x[:, :, first:last])[:, :, top - first : min(top + 6, x.shape[2]) - first])
        return torch.cat(rows, 2)

    with torch.no_grad():
        found = normfix.diagnose(
            every_six, torch.rand(1, 3, 80, 48), 34, network=swinir(), margin=20, stride=4
        )
    assert [c.cause for c in found.culprits] == ["phase"]
