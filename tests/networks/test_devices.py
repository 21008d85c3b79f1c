"""Devices by name: what cannot compute here is refused by name, however torch says so."""

import pytest
import torch
from factories import tiny_unet

import normfix
from normfix.errors import NormfixError
from normfix.networks.devices import chosen, place_


@pytest.mark.parametrize("name", ["hpu", "privateuseone", "mtia", "opengl", "nothing", "cpu:x"])
def test_a_device_that_is_not_there_is_named(name):
    """Whatever torch raises for it, ModuleNotFoundError and AssertionError included, and the network stays."""
    network = tiny_unet()
    with pytest.raises(NormfixError) as caught:
        place_(network, name)
    assert caught.value.code == "NF116"
    assert name in str(caught.value)
    assert {p.device.type for p in network.parameters()} == {"cpu"}


def test_loading_names_it(tmp_path):
    """`load(device=)` has the error that its docstring promises."""
    torch.save(tiny_unet().state_dict(), tmp_path / "weights.pt")
    with pytest.raises(NormfixError) as caught:
        normfix.load(tmp_path / "weights.pt", arch=tiny_unet, device="hpu")
    assert caught.value.code == "NF116"


def test_a_device_that_is_there_takes_it():
    """Device and dtype are taken, and None leaves them."""
    network = tiny_unet()
    place_(network, None)
    assert next(network.parameters()).dtype == torch.float32
    place_(network, "cpu", torch.float64)
    assert next(network.parameters()).dtype == torch.float64


@pytest.mark.parametrize("name", ["cpu:1", torch.device("cpu", 7)])
def test_there_is_one_cpu(name):
    """torch takes any number of it, and computes on the one; cpu:0 is that."""
    with pytest.raises(NormfixError, match=r"NF116 .*there is one CPU"):
        chosen(name)
    assert chosen("cpu:0") == torch.device("cpu:0")
