"""Sizes that a network writes as text or looks something up by while it is captured."""

import logging
import threading

import pytest
import torch
from branching import Branching

from normfix.networks.calling import Caller
from normfix.networks.graph.capture import asked_as_text, exported


def lines(way):
    return asked_as_text(exported(Branching(way).eval(), Caller(), torch.randn(1, 1, 64, 96)))


def looked_up(x):
    try:
        return x * {96: 1.5}[x.shape[3]]
    except (KeyError, TypeError):
        return x


@pytest.mark.parametrize(
    "way",
    [
        lambda x: x * len(str(x.shape[3])),
        lambda x: x * len(f"{x.shape[2] / 2}"),
        lambda x: x * ("64" in repr(x.shape)),
        lambda x: x * len(f"{x.shape[2] > x.shape[3]}"),
        looked_up,
    ],
    ids=["str", "a quotient", "a shape", "an answer", "a key"],
)
def test_where_a_size_becomes_text_or_a_key_is_known(way):
    """The line is named, as the graph goes on with what no image of a number gives."""
    (line,) = lines(way)
    assert line.startswith("networks/test_texts.py:")


@pytest.mark.parametrize(
    "way",
    [
        lambda x: x * len(f"{x.shape[1]}"),
        lambda x: x if x.shape[3] > 8 else x * 2,
        lambda x: logging.getLogger("a network").error("size %s", x.shape) or x,
    ],
    ids=["a number", "a comparison", "a log"],
)
def test_what_is_no_text_of_a_size_is_not_named(way):
    """Control: channels are numbers, comparisons are recorded, and what is logged goes to people."""
    assert lines(way) == ()


@pytest.mark.parametrize(
    ("name", "question", "named"),
    [
        ("einops.einops", "{}[x.shape[3]]", False),
        ("einops.einops", "str(x.shape[3])", True),
        ("network", "{}[x.shape[3]]", True),
    ],
)
def test_a_library_that_does_without_its_table_is_not_named(name, question, named):
    """einops computes what it cannot look up; controls: what it writes as text, and the same code of another name."""
    code = f"""
def way(x):
    try:
        {question}
    except (KeyError, TypeError):
        return x
    return x * 1
"""
    space = {"__name__": name}
    exec(code, space)
    assert bool(lines(space["way"])) == named


def test_sizes_answer_as_before_and_others_are_not_listened_to():
    """The classes of torch are as they were afterwards, and another thread writes what it likes meanwhile."""
    before = [(kind.__repr__, kind.__hash__) for kind in (torch.SymInt, torch.SymFloat, torch.SymBool)]

    def way(x):
        width = x.shape[3]
        other = threading.Thread(target=lambda: str(width))
        other.start()
        other.join()
        return x

    assert lines(way) == ()
    assert before == [
        (kind.__repr__, kind.__hash__) for kind in (torch.SymInt, torch.SymFloat, torch.SymBool)
    ]
