"""Census: every call of one forward pass, who made it, and whether its operand depends on the image."""

import pytest
import torch
import torch.nn.functional as F
from networks import HiddenLive, LiveInstance, plain_unet
from torch import nn

import normfix
from normfix.errors import NormfixError
from normfix.networks.calling import Caller
from normfix.networks.functions import DIRECT, NORMS
from normfix.scanning.census import census

IMAGE = torch.randn(1, 2, 32, 32, generator=torch.Generator().manual_seed(1))


class Calls(nn.Module):
    """Runs a function as its forward."""

    def __init__(self, function, **children):
        super().__init__()
        self.function = function
        for name, child in children.items():
            self.add_module(name, child)

    def forward(self, x):
        return self.function(self, x)


def _norms(function, **children):
    calls, _, _ = census(Calls(function, **children).eval(), Caller(), IMAGE)
    return [call for call in calls if call.function in {**NORMS, **DIRECT}]


NORMALISING = {
    "batch_norm": lambda self, x: F.batch_norm(x, None, None, training=True),
    "instance_norm": lambda self, x: F.instance_norm(x),
    "group_norm": lambda self, x: F.group_norm(x, 2),
    "layer_norm": lambda self, x: F.layer_norm(x, x.shape[1:]),
    "rms_norm": lambda self, x: F.rms_norm(x, x.shape[1:]),
    "local_response_norm": lambda self, x: F.local_response_norm(x, 3),
    "torch.batch_norm": lambda self, x: torch.batch_norm(x, None, None, None, None, True, 0.1, 1e-5, False),
    "torch.instance_norm": lambda self, x: torch.instance_norm(
        x, None, None, None, None, True, 0.1, 1e-5, False
    ),
    "torch.group_norm": lambda self, x: torch.group_norm(x, 2),
    "torch.layer_norm": lambda self, x: torch.layer_norm(x, x.shape[1:]),
}


@pytest.mark.parametrize("name", NORMALISING)
def test_every_normalising_call_is_seen_once(name):
    """One call in the forward is one call in the census, with its operand's shape and dependence."""
    (call,) = _norms(NORMALISING[name])
    assert call.function == name
    assert (call.arguments["input"].shape, call.arguments["input"].depends) == ((1, 2, 32, 32), True)


def test_a_call_without_norm_is_no_norm():
    """Control: a network without norms has none in its census."""
    assert _norms(lambda self, x: x.relu()) == []


def test_calls_are_numbered_per_owner_and_function():
    """The second call of a function in one forward has index 1, that of another function 0."""
    calls = _norms(lambda self, x: F.instance_norm(F.group_norm(F.instance_norm(x), 2)))
    assert [(c.function, c.index) for c in calls] == [
        ("instance_norm", 0),
        ("group_norm", 0),
        ("instance_norm", 1),
    ]


def test_a_module_that_runs_twice_has_two_invocations():
    """Owner and invocation tell two runs of one module apart."""
    shared = nn.InstanceNorm2d(2)
    calls = _norms(lambda self, x: self.norm(self.norm(x)), norm=shared)
    assert [(c.owner, c.invocation, c.index) for c in calls] == [("norm", 0, 0), ("norm", 1, 0)]


def test_owners_are_named_from_the_root():
    """`within` holds the modules around the call, root first."""
    (call,) = _norms(lambda self, x: self.block(x), block=nn.Sequential(nn.InstanceNorm2d(2)))
    assert call.within == ("", "block", "block.0")


def test_a_norm_of_weights_does_not_depend_on_the_image():
    """Weight standardisation is recorded as a norm of something else."""
    (call,) = _norms(lambda self, x: x * F.instance_norm(torch.ones(1, 2, 4, 4) * 3).mean())
    assert not call.arguments["input"].depends


@pytest.mark.parametrize(
    "write",
    [
        lambda buffer, x: buffer.__setitem__(slice(None), x),
        lambda buffer, x: buffer.copy_(x),
        lambda buffer, x: torch.mul(x, 2, out=buffer),
        lambda buffer, x: buffer.add_(x),
    ],
    ids=["setitem", "copy_", "out=", "add_"],
)
def test_dependence_survives_writing_into_a_buffer(write):
    """A buffer that the image was written into depends on the image."""

    def forward(self, x):
        buffer = torch.zeros(x.shape)
        write(buffer, x)
        return F.instance_norm(buffer)

    (call,) = _norms(forward)
    assert call.arguments["input"].depends


@pytest.mark.slow
def test_dependence_survives_writing_by_a_view():
    """A buffer that a view of it was written into depends on the image, so its norm is a live site."""
    (site,) = normfix.scan(HiddenLive(), torch.randn(1, 1, 128, 128)).live
    assert site.function == "instance_norm"


@pytest.mark.slow
def test_values_that_leave_tensors_are_a_live_site():
    """Known limit: leaving tensors loses the dependence of what follows, and the call that leaves them is named."""

    def forward(self, x):
        return F.instance_norm(torch.from_numpy(x.numpy().copy()))

    found = normfix.scan(Calls(forward), torch.randn(1, 1, 16, 16))
    assert not found.tile_invariant
    assert [site.function for site in found.live] == ["numpy"]


def test_the_output_is_that_of_a_plain_run():
    """Watching changes no bit of the output, nor of the input."""
    net, image = plain_unet().eval(), torch.randn(1, 1, 64, 64)
    kept = image.clone()
    _, _, output = census(net, Caller(), image)
    with torch.no_grad():
        assert torch.equal(output, net(image))
    assert torch.equal(image, kept)


def _hooks(net):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in net.modules())


def test_no_hook_stays():
    """After a census the modules have the hooks they had."""
    net = LiveInstance()
    census(net, Caller(), torch.randn(1, 1, 32, 32))
    assert _hooks(net) == 0


def test_no_hook_stays_after_an_error():
    """A forward that raises leaves no hook and no mode behind."""
    net = LiveInstance()
    with pytest.raises(NormfixError, match="NF109"):
        census(net, Caller(), torch.randn(1, 3, 32, 32))
    assert _hooks(net) == 0
    assert torch.overrides._get_current_function_mode() is None


def test_an_error_that_the_network_handles_keeps_owners_right():
    """After a submodule failed and was caught, later calls belong to the module that makes them."""

    def forward(self, x):
        try:
            self.broken(x)
        except RuntimeError:
            return F.instance_norm(x)

    (call,) = _norms(forward, broken=nn.Conv2d(5, 1, 1))
    assert call.owner == ""


def test_the_line_is_that_of_the_callers_code():
    """A functional call names the file and line it stands on."""
    (call,) = _norms(lambda self, x: F.instance_norm(x))
    assert "test_census.py:" in call.line
