"""Statistics that are no norms in exported programs: converted without source, like the network's own."""

import io

import pytest
import torch
from monai.networks.blocks import ChannelSELayer
from nasty import ConvolutionalBlock, HandNorm, HandNormTorch, SumOverExtent, Twice
from networks import TOLERANCE
from real_blocks import BLOCKS
from timm.layers import SqueezeExcite, StdConv2d
from torch import nn
from torch.testing import assert_close

import normfix
from normfix import NormfixError
from normfix.networks.graph import parts
from normfix.networks.graph.capture import export
from normfix.networks.graph.program import Submodule
from normfix.networks.graph.raising import raised
from normfix.records.plans import Plan
from normfix.storage.programs import export_program

IMAGE = torch.rand(1, 1, 64, 96, generator=torch.Generator().manual_seed(0))
OTHER = torch.randn(2, 1, 64, 64, generator=torch.Generator().manual_seed(1))


def _between(block):
    return nn.Sequential(nn.Conv2d(1, 8, 3, padding=1), nn.SiLU(), block, nn.Conv2d(8, 1, 3, padding=1))


NETWORKS = {
    "mean and variance": HandNorm,
    "torch.mean": HandNormTorch,
    "sum over extent": SumOverExtent,
    "one block, two calls": Twice,
    "squeeze-excite": lambda: _between(SqueezeExcite(8, rd_channels=4)),
    "GRN": lambda: _between(BLOCKS["GRN"][0]()),
    "two pools": ConvolutionalBlock,
    "pool of MONAI": lambda: _between(ChannelSELayer(2, 8)),
    "norm of weights": lambda: _between(nn.Sequential(StdConv2d(8, 8, 3, padding=1), nn.GroupNorm(2, 8))),
}
RENAMED = {
    "GRN": ["2.block/0/sum/0"],
    "two pools": ["(root)/0/mean/0", "(root)/0/adaptive_max_pool2d/0"],
    "pool of MONAI": ["2.avg_pool/0/mean/0"],
}
"""What is called otherwise once it is decomposed: a norm is a sum of powers, a pool to one pixel a mean."""


@pytest.fixture(scope="module")
def converted():
    """Each network, its program as read from a file, and its conversion, made once."""
    made = {}

    def make(name):
        if name not in made:
            torch.manual_seed(0)
            model = NETWORKS[name]().eval()
            file = io.BytesIO()
            torch.export.save(export(model, torch.randn(1, 1, 32, 32)), file)
            file.seek(0)
            made[name] = model, torch.export.load(file), normfix.convert(model, IMAGE)
        return made[name]

    return make


def _output(done):
    with torch.no_grad():
        return done.model.eval()(OTHER)


@pytest.mark.slow
@pytest.mark.parametrize("name", NETWORKS)
def test_a_program_is_converted_like_the_module(converted, name):
    """The program's sites have the module's names, its proof passes, and it gives the module's output to the bit."""
    _, program, expected = converted(name)
    done = normfix.convert(raised(program), IMAGE)
    assert [d.site.id for d in done.plan.converted] == [d.site.id for d in expected.plan.converted]
    assert done.plan.left_live == ()
    assert done.proof.passed, done.proof.steps
    assert torch.equal(_output(done), _output(expected))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["mean and variance", *RENAMED])
def test_a_decomposed_program_too(converted, name):
    """After run_decompositions() the same statistics are found, under the names they then have, and proved."""
    _, program, expected = converted(name)
    done = normfix.convert(raised(program.run_decompositions()), IMAGE)
    names = RENAMED.get(name) or [d.site.id for d in expected.plan.converted]
    assert [d.site.id for d in done.plan.converted] == names
    assert done.proof.passed, done.proof.steps
    assert_close(_output(done), _output(expected), **TOLERANCE[torch.float32])


@pytest.mark.slow
def test_two_images(converted):
    """The population's statistics of two unequal images are those of the module."""
    model, program, _ = converted("mean and variance")
    images = [IMAGE, OTHER[:1] * 2 + 1]
    mine, theirs = normfix.convert(raised(program), images), normfix.convert(model, images)
    assert mine.proof.passed
    assert torch.equal(_output(mine), _output(theirs))


@pytest.mark.slow
def test_the_result_is_a_program_without_statistics(converted):
    """What is exported from a converted program gives its output to the bit and reduces nothing."""
    done = normfix.convert(raised(converted("GRN")[1]), IMAGE)
    program = export_program(done.model, None, IMAGE)
    with torch.no_grad():
        assert torch.equal(program.module()(OTHER), _output(done))
    assert not [n for n in program.graph.nodes if "linalg" in str(n.target)]


@pytest.mark.slow
def test_a_plan_is_replayed_on_a_program(converted):
    """A reviewed plan of a program goes through JSON and is carried out."""
    program = raised(converted("squeeze-excite")[1])
    plan = Plan.from_json(normfix.plan(normfix.scan(program, IMAGE)).to_json())
    done = normfix.convert(program, IMAGE, to=plan)
    assert [d.site.id for d in done.plan.converted] == ["2/0/mean/0"]
    assert done.proof.passed


@pytest.mark.slow
def test_a_module_called_twice_has_two_parts(converted):
    """Each call of a block has nodes of its own."""
    lifted = raised(converted("one block, two calls")[1])
    assert {path: len(m.graphs) for path, m in lifted.named_modules() if isinstance(m, Submodule)} == {
        "block": 2
    }


# ---- planted mistakes


class Gain(nn.Module):
    """Does something else in each call."""

    def forward(self, x, gain):
        return x * (x.mean((2, 3), keepdim=True) * gain)


class Gains(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.gain = nn.Conv2d(1, 2, 3, padding=1), Gain()

    def forward(self, x):
        return self.gain(self.conv(self.gain(x, 2.0)[:, :1]), 5.0)


def test_an_exchanged_call_is_caught(tmp_path, monkeypatch):
    """Two calls of one block with their nodes exchanged differ from the file, so the file is not opened."""
    honest = parts._take_out

    def planted(body, path, part, runs):
        honest(body, path, part, runs)
        part.graphs.reverse()

    torch.export.save(export(Gains().eval(), torch.randn(1, 1, 32, 32)), tmp_path / "gains.pt2")
    assert normfix.load(tmp_path / "gains.pt2")(OTHER).shape == (2, 2, 64, 64)
    monkeypatch.setattr(parts, "_take_out", planted)
    with pytest.raises(NormfixError, match=r"NF224.*does not compute"):
        normfix.load(tmp_path / "gains.pt2")


@pytest.mark.slow
def test_a_statistic_that_is_not_written_as_a_call_is_caught(converted, monkeypatch):
    """An operator that interception does not see is never left live without a word."""
    from normfix.networks.graph import calls

    honest, program = calls.function_of, converted("mean and variance")[1]  # made before anything is planted
    monkeypatch.setattr(calls, "function_of", lambda n: None if n.name == "mean" else honest(n))
    with pytest.raises(NormfixError, match=r"NF207 \(root\)/0/mean/0"):
        normfix.convert(raised(program), IMAGE)


@pytest.mark.slow
def test_a_wrong_constant_fails_the_identity(converted, monkeypatch):
    """A frozen value of the program that is off is found by comparing with the original program."""
    from normfix.layers import FrozenStatistic

    honest, program = (
        FrozenStatistic.set_values_,
        converted("mean and variance")[1],
    )  # made before it is planted
    monkeypatch.setattr(
        FrozenStatistic, "set_values_", lambda self, *values: honest(self, *(v.flip(1) for v in values))
    )
    done = normfix.convert(raised(program), IMAGE)
    assert not done.proof.passed
    assert done.proof.step("identity").status == "failed"


# ---- measured anew


@pytest.mark.slow
def test_norms_of_a_converted_program_are_measured_anew(tmp_path):
    """A written program calibrated on other images equals the module calibrated on them, also once written."""
    model = _between(nn.GroupNorm(2, 8))
    done = normfix.convert(model, IMAGE)
    normfix.save(done, tmp_path / "a.pt2")
    mine = normfix.calibrate(normfix.load(tmp_path / "a.pt2"), IMAGE * 3 - 1)
    theirs = normfix.calibrate(done.model, IMAGE * 3 - 1)
    assert mine.summary == theirs.summary
    assert torch.equal(_output(mine), _output(theirs))
    assert not torch.equal(_output(mine), _output(done))


@pytest.mark.slow
def test_constants_of_a_converted_program_are_not(converted, tmp_path):
    """A frozen mean is a constant and nothing else in a written program: refused with what to do."""
    normfix.save(converted("squeeze-excite")[2], tmp_path / "a.pt2")
    with pytest.raises(NormfixError, match=r"NF228 2/0/mean/0.*write it again"):
        normfix.calibrate(normfix.load(tmp_path / "a.pt2"), IMAGE)
