"""The rule for images whose size was not proved: refused, said, or nothing to say."""

from fractions import Fraction

import pytest

from normfix.records.sizes import Condition, ProvedSizes
from normfix.tiling.domain import extension, judge_size
from normfix.tiling.grid import Geometry, grid, window_sizes

GEOMETRY = Geometry(stride=(8, 8), halo=((10, 10), (10, 10)), scale=(Fraction(1),) * 2, multiple=(8, 8))


def sizes(*, conditions=(), crossed=(), unknown=()):
    return ProvedSizes(
        axes="HW",
        conditions=tuple(Condition(text=text, line="net.py:7") for text in conditions),
        crossed=tuple(Condition(text=text, line="net.py:7") for text in crossed),
        unknown=unknown,
        extents=(256, 256),
        pixels=1 << 16,
    )


def codes(findings):
    return [finding.code for finding in findings]


def judged(known, size, tile=(64, 64)):
    return judge_size(known, size, tile, GEOMETRY)


def test_an_image_for_which_a_condition_fails_is_outside():
    """The condition is named with its line and the image's extents."""
    known = sizes(conditions=["H*W <= 25600"])
    assert judged(known, (128, 128)).outside == ()
    (finding,) = judged(known, (192, 192)).outside
    assert finding.code == "NF260"
    assert all(part in finding.message for part in ("H*W <= 25600", "net.py:7", "192x192"))


def test_a_window_for_which_a_condition_fails_is_outside():
    """An image may be large enough for a branch that its tiles are too small for."""
    (finding,) = judged(sizes(conditions=["W > 100"]), (192, 192)).outside
    assert "a window of" in finding.message
    assert judged(sizes(conditions=["W > 100"]), (192, 192), (192, 192)).outside == ()


def test_the_padded_image_counts():
    """The network sees the image extended to an exact size."""
    assert codes(judged(sizes(conditions=["W != 200"]), (64, 193)).outside) == ["NF260"]


@pytest.mark.parametrize(
    "known",
    [sizes(crossed=["W <= 300"]), sizes(unknown=["there is no graph of it"])],
    ids=["crossed", "no graph"],
)
def test_what_was_not_proved_is_said(known):
    """Beyond a branch that was crossed, or beyond what was compared without a graph, a finding says so and no more."""
    verdict = judged(known, (64, 320))
    assert verdict.outside == ()
    assert codes(verdict.unproved) == ["NF261"]
    assert judged(known, (64, 256)).unproved == ()


def test_a_scan_without_sizes_has_nothing_to_say():
    """No record, no finding."""
    assert judged(None, (4096, 4096)) == judged(sizes(), (4096, 4096))


def test_windows_have_the_sizes_of_the_grids():
    """The extents by axis, combined, are those that tiles read."""
    for size, tile in [((64, 320), (64, 64)), ((40, 200), (32, 64))]:
        reads = {tuple(s.stop - s.start for s in t.read) for t in grid(size, tile, GEOMETRY)}
        assert set(window_sizes(size, tile, GEOMETRY)) == reads


def test_a_condition_that_holds_here_is_said():
    """Images of other sizes run another network, and a pass on this one does not speak for them."""
    verdict = judged(sizes(conditions=["H*W <= 25600"]), (128, 128))
    (finding,) = verdict.elsewhere
    assert finding.code == "NF244"
    assert "H*W <= 25600" in finding.message
    assert judged(sizes(conditions=["H*W <= 25600"]), (192, 192)).elsewhere == ()
    assert judged(sizes(crossed=["W <= 300"]), (64, 64)).elsewhere == ()


def test_an_image_that_is_extended_is_told():
    """What the network gives for the image itself is another, so it is said; nothing where the size is exact."""
    (finding,) = extension((57, 96), GEOMETRY)
    assert finding.code == "NF263"
    assert all(part in finding.message for part in ("57x96", "64x96"))
    assert extension((64, 96), GEOMETRY) == extension((57, 96), None) == ()
