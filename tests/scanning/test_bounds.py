"""What a captured graph says of sizes: branches in words, what only repeats, what was built in, maps laid over it."""

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from branching import BY_PLACE, BY_SIZE, LOCAL, UNRECORDED, Branching
from optional import needs_newer_torch

from normfix.networks.calling import Caller
from normfix.networks.graph.capture import exported
from normfix.networks.releases import writes_archives
from normfix.scanning.graph.bounds import read_sizes


def look(way, height=64, width=96):
    program = exported(Branching(way).eval(), Caller(None, None), torch.randn(1, 1, height, width))
    return read_sizes(program)


def texts(conditions):
    return [condition.text for condition in conditions]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("area", ["H*W <= 25600"]),
        ("between", ["W <= 500"]),
        ("one size", ["W != 1024"]),
        ("wide", ["W <= 4*H"]),
        ("elements", ["H*N*W <= 30000"]),
    ],
)
def test_a_branch_is_a_condition_in_words(name, expected):
    """The side that was captured is the condition, with the line that asks; nothing else is open."""
    found = look(BY_SIZE[name].way)
    assert texts(found.conditions) == expected
    assert found.unknown == ()
    assert all(condition.line.startswith("support/branching.py:") for condition in found.conditions)


@pytest.mark.parametrize(
    ("name", "expected", "earlier"),
    [
        ("first 200 columns", ["W - 200 <= 0"], ["W < 200"]),
        ("at most 256", ["H <= 256", "W <= 256"], ["H < 256", "W < 256"]),
    ],
)
def test_a_size_that_is_cut_is_a_condition(name, expected, earlier):
    """Releases that keep no formula for a minimum ask which side is taken, within torch itself for a slice."""
    found = look(BY_SIZE[name].way)
    assert texts(found.conditions) in (expected, earlier)
    assert found.unknown == ()


@pytest.mark.parametrize(
    ("cut", "expected", "earlier"),
    [
        (lambda x: x[..., :200], ["W <= 199"], ["W < 200"]),
        (lambda x: x[..., -150:], ["W <= 149"], ["W - 150 < 0"]),
        (lambda x: torch.cat([part.tanh() for part in x.split(120, 3)], 3), ["W <= 120"], []),
        (lambda x: x[..., 5:], [], []),
    ],
)
def test_what_takes_all_of_a_small_image_has_a_largest_one(cut, expected, earlier):
    """A slice or a part that ends beyond the captured image cuts larger ones; control: one that cuts every image."""
    found = look(lambda x: torch.nn.functional.pad(y := cut(x), (0, x.shape[3] - y.shape[3])))
    assert texts(found.conditions) == (expected if writes_archives() else earlier or expected)


def test_a_slice_of_all_pixels_in_a_row_has_a_largest_image():
    """Rows and columns that are laid end to end have no largest extent each; torch asks for their product."""

    def ends(x):
        flat = x.flatten(2)
        return torch.cat([flat[..., :150_000].tanh(), flat[..., 150_000:]], 2).reshape(x.shape)

    found = texts(look(ends).conditions)
    assert found
    assert all("H*W" in text for text in found)


def test_extents_that_were_taken_for_one_are_a_condition():
    """A network that asks whether the image is square, captured on a square one, is known for squares."""
    assert texts(look(BY_SIZE["square"].way, 96, 96).conditions) == ["H == W"]


@pytest.mark.slow
@pytest.mark.parametrize("name", ["padded to 16", "padded if odd", "windows", "plain", "replicated by hand"])
def test_what_only_repeats_is_no_branch(name):
    """Padding to multiples leaves no branch and nothing open."""
    found = look(LOCAL[name].way)
    assert (found.conditions, found.built, found.unknown) == ((), (), ())


def test_an_asked_remainder_is_a_lattice_condition():
    """`if h % 2` is kept apart, to be tried."""
    assert "H % 2 == 0" in texts(look(LOCAL["padded if odd"].way).lattice)


@pytest.mark.parametrize(
    ("name", "expected"), [("rounds by width", "W//150 == 0"), ("kernel by width", "W//128 == 0")]
)
def test_a_number_that_was_built_in_is_said(name, expected):
    """A count of rounds or a kernel's size is a number in the graph: for which sizes is not known from it alone."""
    found = look(BY_SIZE[name].way)
    assert expected in texts(found.built)
    assert any(expected in reason for reason in found.unknown)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (lambda x: x * (1 + x.shape[3] // 64), "W//64 + 1 == 2"),
        (lambda x: torch.nn.functional.softplus(x, beta=x.shape[2] / 32), "H / 32 == 2.0"),
        (lambda x: x * torch.ones(x.shape[3]).sum(), "W == 96"),
        (lambda x: torch.cat([x, -x], 1).narrow(1, x.shape[3] // 64 % 2, 1), "(W//64) % 2 == 1"),
    ],
    ids=["factor", "parameter", "counted", "channel"],
)
def test_a_number_that_values_are_made_of_is_a_condition(way, expected):
    """A size that is multiplied with, or counted, leaves no guard."""
    found = look(way)
    assert expected in texts(found.numbers)
    assert (found.conditions, found.built, found.unknown) == ((), (), ())


def test_a_number_without_a_formula_is_that_of_one_size_and_leaves_others_open():
    """Which sizes it singles out no condition says."""
    found = look(lambda x: x * torch.scalar_tensor(x.shape[3] & 64))
    assert texts(found.numbers) == ["W == 96"]
    assert any("has no formula" in reason for reason in found.unknown)


@pytest.mark.parametrize("name", sorted(set(UNRECORDED) - {"unless it is captured"}))
def test_what_is_done_by_size_and_not_recorded_is_left_open(name):
    """A table, a text, a length: the graph has one extent, or says where it was asked for what no graph follows."""
    found = look(UNRECORDED[name])
    assert found.unknown
    assert (found.conditions, found.built) == ((), ())


@pytest.mark.parametrize(
    ("number", "chosen"),
    [
        (lambda n: (n == 50) * 2.0, True),
        (lambda n: n.clamp(max=70), True),
        (lambda n: (n / 64).floor(), True),
        pytest.param(
            lambda n: torch.tensor([1.0, 2.0])[(n > 64).long()],
            True,
            marks=needs_newer_torch("captures no look-up by a number"),
        ),
        (lambda n: (n.double() / 64).sqrt() + 1, False),
    ],
    ids=["compares", "clamps", "rounds", "looks up", "scales"],
)
def test_a_tensor_made_of_the_size_that_chooses_is_left_open(number, chosen):
    """Where it jumps need not have been tried; control: one that changes throughout shows at any size."""
    found = look(lambda x: x * number(torch.scalar_tensor(x.shape[3])))
    assert bool([reason for reason in found.unknown if "chooses" in reason]) == chosen
    assert found.numbers


def test_a_branch_in_a_library_beside_torch_is_a_condition():
    """torchvision's files begin as torch's folder does, and torch's own questions do not count."""
    space = {}
    file = str(Path(torch.__file__).parent) + "beside/network.py"
    exec(compile("def way(x):\n    return x * 2 if x.shape[3] == 80 else x", file, "exec"), space)
    (condition,) = look(space["way"]).conditions
    assert (condition.text, condition.line) == ("W != 80", "torchbeside/network.py:2")


def test_two_maps_that_did_not_fit_are_a_condition():
    """torch asks it for the network, which goes on without; control: a bias of channels fits at every size.

    Releases that make a number of the size there leave others open.
    """

    def caught(x):
        try:
            return x + torch.ones(80)
        except RuntimeError:
            return x

    found = look(caught)
    assert texts(found.conditions) == (["W != 80"] if writes_archives() else [])
    assert bool(found.unknown) != writes_archives()
    assert look(lambda x: x + torch.ones(1, 1, 1)).conditions == ()


def test_an_operator_of_another_library_leaves_sizes_open():
    """Its code is in no graph; control: torch's own."""

    @torch.library.custom_op("normfix_bounds::doubled_at_80", mutates_args=())
    def doubled(x: torch.Tensor) -> torch.Tensor:
        return x * (2 if x.shape[3] == 80 else 1)

    doubled.register_fake(torch.empty_like)
    (reason,) = look(lambda x: torch.ops.normfix_bounds.doubled_at_80(x)).unknown
    assert "normfix_bounds.doubled_at_80" in reason
    assert look(torch.relu).unknown == ()


def test_the_larger_of_two_numbers_is_a_condition():
    """torch asks it for `max`, and means what the network means."""
    assert texts(look(lambda x: x * max(x.shape[3] / 128, 1.0)).conditions) == ["W / 128 < 1.0"]


@pytest.mark.parametrize("name", BY_PLACE)
def test_a_map_laid_over_the_image_is_said(name):
    """What a table or a ramp holds further out was not run."""
    assert any("laid over the image" in reason for reason in look(BY_PLACE[name].way).unknown)


@pytest.mark.parametrize(
    ("way", "expected"),
    [
        (lambda x, p: F.pad(x, (p, p, p, p), mode="reflect")[..., p:, p:], {"W//64 == 1"}),
        (lambda x, p: F.conv2d(x, torch.ones(1, 1, 3, 3), padding=p + 1), {"W//64 + 1 == 2"}),
        (lambda x, p: torch.cat([x.new_ones(*x.shape[:3], p), x], 3), {"W//64 == 1"}),
        (lambda x, p: F.pad(x[..., : x.shape[3] - p], (2, 2)), {"W//64 == 1"}),
        (lambda x, p: F.pad(x, (4, 4 + x.shape[3] % 2))[..., 4 : 4 + x.shape[3]], set()),
        (lambda x, p: torch.cat([x[..., 1:], x.new_zeros(*x.shape[:3], 1)], 3).roll(2, 1), set()),
    ],
    ids=["padding", "of a convolution", "joined", "cut", "to a multiple", "by a constant"],
)
def test_what_moves_a_map_by_more_on_a_larger_image_is_tried(way, expected):
    """A border that grows with the size looks the same on long strips; control: what repeats, constants."""
    numbers = {t for t in texts(look(lambda x: way(x, x.shape[3] // 64)).lattice) if t.startswith("W//64")}
    assert numbers == expected


def places(x, used):
    """Use what a pool says of where its maxima are."""
    values, where = F.max_pool2d(x, 2, return_indices=True)
    return used(values, where)


@pytest.mark.parametrize(
    "used",
    [lambda v, i: v * (i > 20000), lambda v, i: v + v.flatten(2).gather(2, i.flatten(2) // 4).view_as(v)],
    ids=["number", "gather"],
)
def test_places_of_maxima_that_are_numbers_are_a_map(used):
    """They count pixels of the whole image, which strips of a few thousand do not show; control: unpooling."""
    (reason,) = look(lambda x: places(x, used)).unknown
    assert "laid over the image" in reason
    assert look(lambda x: places(x, lambda v, i: F.max_unpool2d(v * 2, i, 2))).unknown == ()


@pytest.mark.parametrize(
    "way",
    [
        lambda x: x * torch.ones_like(x),
        lambda x: x + torch.zeros(x.shape[2:]) + 1,
        lambda x: x.new_full(x.shape, 2.0) * x,
        lambda x: x * torch.conv2d(torch.ones(x.shape[0], 1, 1, 1), torch.ones(1, 1, 1, 1)),
    ],
    ids=["ones", "zeros", "full", "of a batch"],
)
def test_an_even_map_is_none(way):
    """Control: one value throughout has no place."""
    assert look(way).unknown == ()


_TEXT = """
class Net(torch.nn.Module):
    def forward(self, x):
        return branching(self, x)

def branching(net, x):
    return x.sigmoid() if x.shape[2] > 48 else x * 2
"""


@pytest.mark.parametrize("way", ["network", "forward_fn"])
@pytest.mark.parametrize("extent", [40, 56])
def test_a_branch_in_code_without_a_file_is_a_condition(way, extent):
    """What `python -c` or exec runs has the name of no file, and torch says of its questions that its caller asked."""
    names = {"torch": torch}
    exec(_TEXT, names)
    net, forward_fn = (
        (names["Net"](), None) if way == "network" else (torch.nn.Identity(), names["branching"])
    )
    program = exported(net.eval(), Caller(forward_fn), torch.rand(1, 1, extent, extent))
    (condition,) = read_sizes(program).conditions
    assert condition.text == ("H <= 48" if extent == 40 else "H > 48")
