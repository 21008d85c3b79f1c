"""Results show themselves: the answer in a line, parts when printed, a table in notebooks, and nothing unescaped."""

from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import normfix
from normfix.records.sites import Finding
from normfix.records.tables import Shown, Table


@pytest.fixture(scope="module")
def results():
    """What scanning, converting and checking a network of one live norm return."""
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(1, 4, 3, padding=1), nn.InstanceNorm2d(4), nn.Conv2d(4, 1, 1)).eval()
    image = torch.rand(1, 1, 96, 96)
    done = normfix.convert(net, image)
    failed = normfix.check(net, image, tile=32)
    small = normfix.check(net, image, tile=128)
    return done, failed, small


def test_each_result_says_its_answer_first(results):
    """A line names the network, whether it passed and the numbers that count; a record is not its hundred fields."""
    done, failed, small = results
    assert "not tile-invariant; 1 live site (1 instance); stride 1x1, halo 1/1, 1/1" in repr(done.scan)
    assert "1 of 1 site converted; proof passed, 5 steps" in repr(done)
    assert repr(done.plan).endswith("to frozen: 1 of 1 site converted>")
    assert repr(done.proof) == "<Proof: passed, 5 steps>"
    assert repr(done.calibration).startswith(
        "<Calibration: Sequential, 1 site on 1 image, by passes; largest residual"
    )
    assert repr(failed).startswith("<Verdict: failed; tiles of 32x32 are up to ")
    assert repr(small).startswith("<Verdict: inconclusive; ")
    assert "sd" not in repr(small).split(";")[1]  # nothing was compared
    for result in (done, done.scan, done.plan, done.proof, done.calibration, failed, small):
        assert len(repr(result)) < 400
        assert "\n" not in repr(result)


def test_printed_they_name_their_parts(results):
    """print(proof) has a row for each step, print(verdict) one for each finding with all that it says."""
    done, failed, _ = results
    assert [line.split()[0] for line in str(done.proof).splitlines()[1:]] == [
        s.name for s in done.proof.steps
    ]
    assert all(finding.message in str(failed) for finding in failed.findings)


def test_what_is_open_in_a_proof_is_in_its_line(results):
    """Control: a step that failed is named where a proof is shown in one line."""
    from dataclasses import replace

    proof = results[0].proof
    wrong = replace(proof, steps=(replace(proof.steps[0], status="failed", value=3.0), *proof.steps[1:]))
    assert repr(wrong) == "<Proof: failed, 5 steps; identity failed, 3 (bound 0.0001)>"


class _Cells(HTMLParser):
    """Reads the tags, and the texts of cells."""

    def __init__(self):
        super().__init__()
        self.tags, self.texts = [], []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.texts.append(data)


def test_notebooks_show_a_table(results):
    """_repr_html_ has the line and every row, and what a finding says is text there, not markup."""
    done, failed, _ = results
    cells = _Cells()
    cells.feed(done._repr_html_())
    assert cells.tags.count("tr") == 1 + len(done.proof.steps)
    assert done.headline in "".join(cells.texts)
    from dataclasses import replace

    planted = replace(failed, findings=(Finding(code="NF403", where="<script>", message="a & <b>b</b>"),))
    cells = _Cells()
    cells.feed(planted._repr_html_())
    assert not {"script"} & set(cells.tags)
    assert cells.tags.count("b") == 1
    assert "a & <b>b</b>" in cells.texts


def test_long_tables_are_cut_and_say_so():
    """Twenty rows are printed and two hundred shown, with how many are left."""

    class Long(Shown):
        headline = "long"

        def table(self):
            return Table(("number", "text"), [(str(n), "x" * 500) for n in range(250)])

    lines = str(Long()).splitlines()
    assert len(lines) == 22
    assert lines[-1] == "  and 230 more"
    assert max(map(len, lines)) < 300
    assert "and 50 more" in Long()._repr_html_()
