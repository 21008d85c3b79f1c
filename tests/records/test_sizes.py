"""Conditions on the size: what they mean, what repeats with the size and what grows, and what is no condition."""

import math

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from normfix import NormfixError
from normfix.records.sizes import Condition, ProvedSizes


def condition(text, **options):
    return Condition(text=text, line="net.py:1", **options)


def sizes(*texts, unknown=(), extents=(96, 128), pixels=4096):
    conditions = tuple(map(condition, texts))
    return ProvedSizes(
        axes="HW", conditions=conditions, crossed=(), unknown=unknown, extents=extents, pixels=pixels
    )


@given(st.integers(1, 3000), st.integers(1, 3000))
@settings(max_examples=100, deadline=None)
def test_a_condition_means_what_python_means(height, width):
    """The syntax tree gives what the expression gives, whatever the extents."""
    text = "max(0, (ceil(H / 4) - 1)*4 + 3 - H) + W//8 - 2*(W % 5) <= 3*(H*W)**0.5"
    left = max(0, (math.ceil(height / 4) - 1) * 4 + 3 - height) + width // 8 - 2 * (width % 5)
    assert condition(text).holds({"H": height, "W": width}) == (left <= 3 * (height * width) ** 0.5)


@pytest.mark.parametrize(
    "text",
    ["H % 16 == 0", "H//8 == 2*(H//16)", "H == 2*(H//2)", "(H//2) % 2 == 0", "H <= 16*((H + -H % 16)//16)"],
)
def test_a_lattice_condition_excludes_no_size(text):
    """What asks the same of H and of H plus a multiple is no branch: no image is outside for it."""
    asked = condition(text)
    assert asked.repeats({"H": 256})
    assert not any(asked.excludes({"H": n}) for n in range(8, 700))


@pytest.mark.parametrize(
    ("text", "inside", "outside"),
    [
        ("H*W <= 25600", (160, 160), (160, 161)),
        ("H//1024 == 0", (1023, 8), (1100, 8)),
        ("W != 1024", (8, 1023), (8, 1024)),
        ("H == W", (64, 64), (64, 65)),
        ("min(H, W) > 40", (41, 64), (64, 40)),
        ("H % 16 + W <= 100", (15, 85), (15, 300)),
    ],
)
def test_a_branch_excludes_the_sizes_for_which_it_fails(text, inside, outside):
    """What grows with the size is a branch, also where it holds remainders or divides."""
    asked = condition(text)
    assert not asked.excludes(dict(zip("HW", inside, strict=True)))
    assert asked.excludes(dict(zip("HW", outside, strict=True)))


def test_a_strict_condition_excludes_remainders():
    """A lattice condition for which tiles differed counts wherever it fails."""
    assert condition("W % 100 != 0", strict=True).excludes({"W": 400})
    assert not condition("W % 100 != 0").excludes({"W": 400})


@pytest.mark.parametrize(
    "text",
    [
        "__import__('os').system('true')",
        "H.bit_length() > 3",
        "open('x') == 0",
        "H if W else 3",
        "[H for H in (1, 2)] == 3",
        "H <",
        "Q <= 3",
        "(" * 400 + "H" + ")" * 400 + " > 3",
        "H + " * 400 + "1 > 3",
        "H",
    ],
)
def test_what_is_no_condition_is_refused(text):
    """A file from a stranger holds arithmetic of extents, or NF108."""
    with pytest.raises(NormfixError) as error:
        condition(text).repeats({"H": 64, "W": 64})
    assert error.value.code == "NF108"


@pytest.mark.parametrize("text", ["9**9**9**9 > H", "H // (W - 64) > 1", "H % 0 == 0"])
def test_a_condition_without_value_does_not_hold(text):
    """Neither a tower of powers nor a division by zero does harm."""
    assert not condition(text).holds({"H": 64, "W": 64})


def test_only_what_was_run_counts_where_no_graph_tells():
    """Longer along one axis or more pixels in all exceed what was compared; with a graph nothing does."""
    run = sizes(unknown=("there is no graph of it",))
    assert not run.exceeded((32, 128))
    assert run.exceeded((32, 129))
    assert run.exceeded((96, 96))
    assert not sizes().exceeded((4096, 4096))
    assert not run.including((96, 96)).exceeded((96, 96))


def test_sizes_come_back_from_json():
    """What a saved folder holds of sizes is read back without loss."""
    known = sizes("H*W <= 25600", unknown=("there is no graph of it",))
    assert ProvedSizes.loads(known.dumps()) == known
