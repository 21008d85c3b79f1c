"""ONNX and TorchScript out: run by their own runtimes in a fresh process, or not kept."""

import copy
import os
import subprocess
import sys
import warnings
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from optional import needs_newer_torch
from torch import nn

import normfix
from normfix import NormfixError
from normfix.cli import cli
from normfix.cli.outputs import is_saved
from normfix.networks.provenance import attach_, provenance_of
from normfix.scanning.crossings import Crossings
from normfix.storage import exports

IMAGE = torch.rand(1, 1, 96, 80, generator=torch.Generator().manual_seed(0))

needs_onnx = needs_newer_torch("torch.onnx does not take what onnxscript makes today")
both = pytest.mark.parametrize("suffix", [pytest.param(".onnx", marks=needs_onnx), ".ts"])


class Grouped(nn.Module):
    """A network whose skips are joined at the size of the finer map, and which returns two things."""

    def __init__(self):
        super().__init__()
        self.first = nn.Conv2d(1, 4, 3, padding=1)
        self.norm = nn.GroupNorm(2, 4)
        self.deep = nn.Conv2d(4, 4, 3, padding=1)
        self.last = nn.Conv2d(4, 1, 1)

    def forward(self, x):
        fine = F.relu(self.norm(self.first(x)))
        coarse = self.deep(F.max_pool2d(fine, 2))
        mean = coarse.mean((2, 3), keepdim=True)
        return {"map": self.last(fine + F.interpolate(coarse - mean, size=fine.shape[2:])), "other": coarse}


class Counting(nn.Module):
    """What Python makes of the image's width is a constant once it is traced."""

    def __init__(self, border):
        super().__init__()
        self.conv = nn.Conv2d(1, 2, 3, padding=1)
        self.norm = nn.InstanceNorm2d(2)
        self.border = border

    def forward(self, x):
        return self.norm(self.conv(x)) * (1.0 if int(x.shape[3]) > self.border else 2.0)


@pytest.fixture(scope="module")
def volume():
    """Return a conversion in 3D whose InstanceNorms stand before strided convolutions."""
    torch.manual_seed(0)
    layers = [
        nn.InstanceNorm3d(1),
        nn.Conv3d(1, 4, 3, padding=1),
        nn.InstanceNorm3d(4, affine=True),
        nn.ReLU(),
    ]
    net = nn.Sequential(*layers, nn.Conv3d(4, 4, 2, stride=2), nn.ConvTranspose3d(4, 1, 2, stride=2))
    return normfix.convert(net, torch.rand(1, 1, 16, 32, 32) * 3 + 5)


@pytest.fixture(scope="module")
def grouped():
    """Return a conversion of a group norm and a mean in a network of two outputs."""
    torch.manual_seed(1)
    return normfix.convert(Grouped(), IMAGE, output="map")


@both
@pytest.mark.slow
@pytest.mark.parametrize("network", ["volume", "grouped"])
def test_a_form_is_the_network_whole_and_in_tiles(network, suffix, request, tmp_path):
    """Batch and sizes are free, the runtime gives the network's output, and tiles of the form are its whole."""
    done = request.getfixturevalue(network)
    export = normfix.save(done, tmp_path / f"fixed{suffix}")
    assert export.free == (0, *range(2, len(done.scan.example)))
    assert export.max_sd <= export.limit_sd < 1e-3
    assert export.tiles_sd is not None
    assert export.tiles_sd <= export.limit_sd


@needs_onnx
@pytest.mark.slow
def test_onnx_holds_no_statistic_and_knows_its_plan(volume, tmp_path):
    """No node of the file reduces over space, and plan and halo travel in its metadata."""
    onnx = pytest.importorskip("onnx")
    normfix.save(volume, tmp_path / "fixed.onnx")
    model = onnx.load(tmp_path / "fixed.onnx")
    kinds = {node.op_type for node in model.graph.node}
    assert not kinds & {"InstanceNormalization", "GroupNormalization", "ReduceMean", "LayerNormalization"}
    manifest = {entry.key: entry.value for entry in model.metadata_props}["normfix.json"]
    assert '"halo"' in manifest


@pytest.mark.slow
def test_what_it_is_compared_with_lies_in_its_draft(grouped, tmp_path, monkeypatch):
    """So a kill leaves nothing that the next run does not sweep, and a run that ends leaves the file alone."""
    places, run_alone = [], exports.run_alone

    def watched(script, path, stored, *words):
        places.append(Path(stored).relative_to(tmp_path).parts[0])
        return run_alone(script, path, stored, *words)

    monkeypatch.setattr(exports, "run_alone", watched)
    normfix.save(grouped, tmp_path / "net.ts")
    assert [place.startswith(".normfix-draft-") for place in places] == [True]
    assert [path.name for path in tmp_path.iterdir()] == ["net.ts"]


@pytest.mark.cold
@pytest.mark.slow
def test_torchscript_runs_where_there_is_no_normfix(grouped, tmp_path):
    """A process that cannot import normfix loads the archive, which returns the output that counts."""
    path = tmp_path / "fixed.ts"
    normfix.save(grouped, path)
    torch.save((IMAGE, grouped.model.eval()(IMAGE)["map"].detach()), tmp_path / "pair.pt")
    script = (
        "import sys; sys.modules['normfix'] = None\n"
        "import torch; image, output = torch.load(sys.argv[2])\n"
        "assert torch.equal(torch.jit.load(sys.argv[1])(image), output)\n"
    )
    done = subprocess.run([sys.executable, "-c", script, str(path), str(tmp_path / "pair.pt")], check=False)
    assert done.returncode == 0


@pytest.mark.slow
def test_a_trace_that_is_tied_to_a_size_is_not_kept(tmp_path, monkeypatch):
    """A network that multiplies by what Python makes of the width is NF591 as TorchScript, and nothing is written.

    Its proof, which would see it, does not look for that here.
    """
    monkeypatch.setattr(Crossings, "fitting", lambda self: ())
    done = normfix.convert(Counting(120), IMAGE)
    with pytest.raises(NormfixError, match="sd from the network") as info:
        normfix.save(done, tmp_path / "fixed.ts")
    assert info.value.code == "NF591"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_size_that_was_not_tried_is_said(tmp_path):
    """Where a branch lies beyond what is tried, the record says up to which sizes alone the form may be used."""
    export = normfix.save(normfix.convert(Counting(400), IMAGE), tmp_path / "fixed.ts")
    assert any("up to 192x192" in words for words in export.sizes)
    assert "Only for up to 192x192" in export.words


class Fitting(nn.Module):
    """Python pads to what the stride needs, or counts images: a trace does as it did for the image it was made with."""

    def __init__(self, most=9):
        super().__init__()
        torch.manual_seed(0)
        self.conv, self.norm, self.up = (
            nn.Conv2d(1, 2, 3, 2, 1),
            nn.InstanceNorm2d(2),
            nn.ConvTranspose2d(2, 1, 2, 2),
        )
        self.most = most

    def forward(self, x):
        height, width = x.shape[2:]
        if height % 2 or width % 2:
            x = F.pad(x, (0, width % 2, 0, height % 2), mode="replicate")
        y = self.up(self.norm(self.conv(x)))[..., :height, :width]
        return y * 2 if len(x) > self.most else y


@pytest.fixture(scope="module")
def fitting():
    """Return a conversion of a network that pads to multiples of 2."""
    return normfix.convert(Fitting().eval(), IMAGE[..., :48, :40])


def test_sizes_between_the_multiples_that_are_compared_are_tried(fitting, tmp_path):
    """A trace without the padding that other sizes need is said to be for multiples of the stride alone."""
    export = normfix.save(fitting, tmp_path / "fixed.ts")
    assert export.sizes == ("sizes that are multiples of 2x2, where alone it was the network",)
    odd = IMAGE[..., :41, :39]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)  # torch.jit.load is deprecated
        traced = torch.jit.load(tmp_path / "fixed.ts")
    assert not torch.allclose(traced(odd), fitting.model(odd), atol=1e-3)


@needs_onnx
@pytest.mark.slow
def test_sizes_between_multiples_are_compared_where_the_form_takes_them(grouped, tmp_path):
    """ONNX computes sizes itself, here too, and nothing is said."""
    export = normfix.save(grouped, tmp_path / "fixed.onnx")
    assert (export.sizes, export.shapes[-1][2] % 2) == ((), 1)


@pytest.mark.slow
def test_a_trace_that_is_tied_to_few_images_is_not_kept(fitting, tmp_path):
    """A network that does otherwise with three images is tried with three."""
    model = copy.deepcopy(fitting.model)
    model.most = 2
    with pytest.raises(NormfixError, match=r"NF591.*on an input of 3x1x"):
        normfix.save(replace(fitting, model=model), tmp_path / "fixed.ts")


@both
@pytest.mark.slow
def test_a_form_of_other_weights_is_not_kept(volume, suffix, tmp_path, monkeypatch):
    """A writer that changes one constant is found by the fresh process."""
    name = "_onnx" if suffix == ".onnx" else "_torchscript"
    right = getattr(exports, name)

    def wrong(network, example, manifest):
        other = volume_with(network, factor=1.001)
        return right(other, example, manifest)

    monkeypatch.setattr(exports, name, wrong)
    with pytest.raises(NormfixError) as info:
        normfix.save(volume, tmp_path / f"fixed{suffix}")
    assert info.value.code == "NF591"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_tiles_of_too_small_a_halo_are_seen(grouped, tmp_path):
    """With a halo that is stated a stride too small, the form's tiles are not its whole."""
    known = provenance_of(grouped.model)
    attach_(grouped.model, replace(known, scan=replace(known.scan, halo=((0, 0), (0, 0)))))
    try:
        with pytest.raises(NormfixError, match="its tiles are") as info:
            normfix.save(grouped, tmp_path / "fixed.ts")
    finally:
        attach_(grouped.model, known)
    assert info.value.code == "NF591"


def test_a_missing_runtime_is_named_before_anything_is_computed(tmp_path, monkeypatch, capsys):
    """Without onnxruntime the command ends with NF590 and what to install; the network is not opened."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    with pytest.raises(NormfixError) as info:
        exports.require_exporter(tmp_path / "fixed.onnx")
    assert info.value.code == "NF590"
    assert "normfix[onnx]" in info.value.message


def test_onnx_is_no_model(tmp_path):
    """A .onnx file is refused by name (NF596), whatever it holds."""
    (tmp_path / "net.onnx").write_bytes(b"\x08\x08")
    with pytest.raises(NormfixError) as info:
        normfix.load(tmp_path / "net.onnx")
    assert info.value.code == "NF596"
    assert ".onnx" in info.value.message


def test_bfloat16_is_refused_by_name(tmp_path):
    """A network in bfloat16 is NF590: these runtimes take no such image."""
    net = nn.Sequential(nn.Conv2d(1, 2, 3, padding=1), nn.BatchNorm2d(2)).eval().bfloat16()
    done = normfix.convert(net, IMAGE.bfloat16())
    with pytest.raises(NormfixError) as info:
        normfix.save(done, tmp_path / "fixed.ts")
    assert info.value.code == "NF590"


@pytest.mark.slow
def test_the_command_line_says_what_it_wrote(tmp_path, monkeypatch, capsys):
    """convert -o FILE.ts exits 0, names torch's version and what is free. Another one is kept under another name.

    torch numbers the classes of a trace on in one process, so this one is another; in two processes it is the same.
    """
    monkeypatch.chdir(tmp_path)
    np.save("image.npy", IMAGE[0, 0].numpy())
    words = [
        "convert",
        "normfix.demo.network:nuclei_unet",
        "image.npy",
        "--scale",
        "zscore",
        "--to",
        "frozen",
    ]
    assert cli.main([*words, "-o", "fixed.ts"], standalone_mode=False) == 0
    said = " ".join(capsys.readouterr().err.split())
    assert f"torchscript (torch {torch.__version__}), free: batch, height, width" in said
    with pytest.raises(NormfixError, match=r"NF114.*What this run made is fixed-2\.ts"):
        cli.main([*words, "-o", "fixed.ts"], standalone_mode=False)


@pytest.mark.parametrize("content", [b"", b"mine", None])
@pytest.mark.parametrize("suffix", [".onnx", ".ts", ".pt2"])
def test_what_is_no_form_is_refused_before_anything_is_computed(content, suffix, tmp_path):
    """A file that is no form of normfix's keeps its name, and a pipe is not waited for."""
    path = tmp_path / f"mine{suffix}"
    if content is not None:
        path.write_bytes(content)
    elif hasattr(os, "mkfifo"):
        os.mkfifo(path)
    else:
        path.mkdir()
    assert not is_saved(path)


@needs_onnx
@pytest.mark.slow
def test_an_onnx_has_the_same_bytes_each_time(grouped, tmp_path):
    """So a command that is given again can tell its own output."""
    for name in ("one.onnx", "two.onnx"):
        normfix.save(grouped, tmp_path / name)
    assert is_saved(tmp_path / "one.onnx")
    assert (tmp_path / "one.onnx").read_bytes() == (tmp_path / "two.onnx").read_bytes()


def volume_with(network, factor):
    """Return a copy of a network whose first convolution's weights are multiplied."""
    other = copy.deepcopy(network)
    with torch.no_grad():
        next(m for m in other.modules() if isinstance(m, nn.Conv3d)).weight.mul_(factor)
    return other
