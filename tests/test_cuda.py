"""Every command and function on a GPU; needs torch, numpy, safetensors, click, rich and pytest, nothing else."""

import copy
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from cuda_networks import Branching, Small, small, uneven
from torch import nn
from torch.testing import assert_close

import normfix
from normfix.conversion.lowering import fold, lower
from normfix.layers import FrozenNorm2d, FrozenNorm3d
from normfix.layers.affine import normalise, normalise_rectified
from normfix.layers.moments import measure, measure_there, union
from normfix.networks.devices import accelerator

pytestmark = [
    pytest.mark.cuda,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA GPU"),
]

GPU = torch.device("cuda", 0)
HALVES = [torch.bfloat16, torch.float16]


@pytest.fixture(scope="module")
def image():
    return uneven(192, 256)


@pytest.fixture(scope="module")
def converted(image):
    return normfix.convert(small().to(GPU), image.to(GPU))


@pytest.fixture(scope="module")
def reference(image):
    """The same conversion on the CPU."""
    return normfix.convert(small(), image)


def statistics(model):
    return {
        name: value.double().cpu()
        for name, value in model.state_dict().items()
        if name.split(".")[-1] in RUNNING
    }


RUNNING = ("running_mean", "running_var")


def worst(ours, theirs):
    """Return the largest difference of means in sd, and of variances relative to them."""
    found = 0.0
    for name, mean in theirs.items():
        if name.endswith("running_mean"):
            var = theirs[name.replace("running_mean", "running_var")]
            found = max(found, float(((ours[name] - mean).abs() / (var + 1e-5).sqrt()).max()))
        else:
            found = max(found, float(((ours[name] - mean).abs() / (mean + 1e-5)).max()))
    return found


def deviation(a, b):
    return float((a.double().cpu() - b.double().cpu()).abs().max() / b.double().std())


# What is found, and proved


def test_scan_finds_what_it_finds_on_the_cpu(image, converted, reference):
    """Sites, stride and halo do not depend on the device."""
    here, there = normfix.scan(small(), image), normfix.scan(small().to(GPU), image.to(GPU))
    assert [s.id for s in here.sites] == [s.id for s in there.sites]
    assert here.halo == there.halo
    assert here.stride == there.stride
    assert [d.action for d in normfix.plan(here).decisions] == [
        d.action for d in normfix.plan(there).decisions
    ]


def test_convert_proves_with_tf32_allowed(converted):
    """The proof passes whatever the process allows, and the network stays where it was."""
    assert converted.proof.passed, converted.proof
    assert next(converted.model.parameters()).device == GPU


def test_statistics_are_those_of_the_cpu(converted, reference):
    """In float32 statistics agree to 1e-5 sd."""
    assert worst(statistics(converted.model), statistics(reference.model)) < 1e-5


def test_statistics_in_double_are_those_of_the_cpu(image):
    """In float64 statistics agree to 1e-9 sd."""
    wide = uneven(96, 128).double()
    ours = normfix.convert(small().double().to(GPU), wide.to(GPU))
    theirs = normfix.convert(small().double(), wide)
    assert ours.proof.passed
    assert worst(statistics(ours.model), statistics(theirs.model)) < 1e-9


@pytest.mark.parametrize("dtype", HALVES)
def test_convert_proves_in_16_bits(image, dtype):
    """Networks of 16 bits are proved by the bound that holds on the CPU too."""
    done = normfix.convert(small().to(GPU, dtype), image.to(GPU, dtype))
    assert done.proof.passed, [(s.name, s.status, s.value, s.bound, s.note) for s in done.proof.steps]


def test_convert_proves_in_channels_last(image):
    """Memory format is kept through conversion, and proved in."""
    network = small().to(GPU, memory_format=torch.channels_last)
    given = image.to(GPU).to(memory_format=torch.channels_last)
    done = normfix.convert(network, given)
    assert done.proof.passed
    with torch.no_grad():
        assert deviation(done.model(given), done.model(given.contiguous())) < 1e-2  # TF32


def test_check_passes_what_was_converted_and_fails_the_original(converted, image):
    """Tiles of the converted network equal the whole; those of the original do not."""
    assert normfix.check(converted.model, image.to(GPU), tile=64).passed
    assert normfix.check(small().to(GPU), image.to(GPU), tile=64).status == "failed"


def test_diagnose_names_the_norms(image):
    """Diagnosis runs on the GPU and finds what the CPU finds."""
    there = normfix.diagnose(small().to(GPU), image.to(GPU), tile=64)
    here = normfix.diagnose(small(), image, tile=64)
    assert [c.cause for c in there.record.culprits] == [c.cause for c in here.record.culprits]


def test_prove_passes(converted, image):
    """What a fine-tuned network owes can be proved on a GPU, in every form."""
    proof = normfix.prove(converted.model, image.to(GPU), source="cuda_networks:small")
    assert proof.passed, [(s.name, s.status, s.value, s.note) for s in proof.steps]


# Statistics measured anew, and predictions


@pytest.fixture(scope="module")
def whole(converted, image):
    """A calibration in one pass."""
    return normfix.calibrate(converted.model, image.to(GPU))


def test_stages_measure_what_passes_measure(converted, whole, image):
    """Stages run on the GPU, and their statistics are those of whole passes."""
    done = normfix.calibrate(converted.model, image.to(GPU), tile=64)
    assert done.summary.engine == "stages"
    assert worst(statistics(done.model), statistics(whole.model)) < 1e-5


def test_images_on_the_host_are_moved_block_by_block(converted, whole, image):
    """A network on the GPU is calibrated on an image that is read by window, in the host's memory."""
    opened = normfix.open_image(image[0].numpy(), converted.model, axes="CYX")
    done = normfix.calibrate(converted.model, opened, tile=64)
    assert done.summary.engine == "stages"
    assert worst(statistics(done.model), statistics(whole.model)) < 1e-5


def test_what_does_not_fit_the_device_lies_on_the_host(converted, whole, image, monkeypatch):
    """Maps that find no room on the GPU are kept in the host's memory, and the statistics are the same."""
    monkeypatch.setattr("normfix.tiling.stages.store.room", lambda device: 0)
    done = normfix.calibrate(converted.model, image.to(GPU), tile=64)
    assert done.summary.engine == "stages"
    assert worst(statistics(done.model), statistics(whole.model)) < 1e-5
    prediction = normfix.predict(converted.model, image.to(GPU), tile=64, engine="stages")
    with torch.no_grad():
        assert deviation(prediction, normfix.predict(converted.model, image.to(GPU), tile=256)) < 1e-4


def test_stages_stay_within_the_budget():
    """Peak device memory of a calibration in stages is at most the budget that is given."""
    given = uneven(2048, 2048)
    network = small().to(GPU)
    model = normfix.convert(network, given[..., :256, :256].to(GPU)).model
    opened = normfix.open_image(given[0].numpy(), model, axes="CYX")
    normfix.calibrate(model, opened, tile=128)  # captured and proved, whose memory is another matter
    budget = 600 << 20
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    normfix.calibrate(model, opened, tile=128, blocks=normfix.Blocks(budget=budget))
    assert torch.cuda.max_memory_allocated() - before <= budget


def test_masks_and_several_images(converted, image):
    """What masks ignore is no part of the statistics of several images, as on the CPU."""
    images = [image, image.flip(-1)[..., :128]]
    masks = [
        (torch.rand(i.shape[2:], generator=torch.Generator().manual_seed(2)) > 0.7).numpy() for i in images
    ]
    ours = normfix.calibrate(converted.model, [i.to(GPU) for i in images], tile=64, mask=masks)
    theirs = normfix.calibrate(copy.deepcopy(converted.model).cpu(), images, tile=64, mask=masks)
    assert worst(statistics(ours.model), statistics(theirs.model)) < 1e-5


def test_samples(converted, image):
    """A random sample of blocks is drawn and measured on the GPU."""
    done = normfix.calibrate(converted.model, image.to(GPU), tile=32, sample=0.5)
    assert done.summary.sample is not None


@pytest.mark.parametrize("engine", ["tiles", "stages"])
@pytest.mark.parametrize("statistics", ["stored", "per-image"])
def test_predict_gives_the_whole(converted, image, engine, statistics):
    """Both engines give the prediction of the whole image, on the GPU, with either statistics."""
    given = image.to(GPU)[..., :160, :224]
    parts = normfix.predict(converted.model, given, tile=64, engine=engine, statistics=statistics)
    expected = normfix.predict(converted.model, given, tile=256, engine="tiles", statistics=statistics)
    assert parts.device == GPU
    assert deviation(parts, expected) < 1e-4


def test_tiles_share_calls(converted, image):
    """Small tiles go through the network several at a time, and give what they give one at a time."""
    given = image.to(GPU)
    calls = []

    def count(module, arguments):
        calls.append(len(arguments[0]))

    with torch.nn.modules.module.register_module_forward_pre_hook(
        lambda module, arguments: count(module, arguments) if isinstance(module, Small) else None
    ):
        together = normfix.predict(converted.model, given, tile=32, engine="tiles")
    assert max(calls) > 4
    alone = normfix.predict(converted.model, given, tile=32, engine="tiles", blocks=normfix.Blocks(batch=1))
    assert deviation(together, alone) < 1e-4


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, *HALVES])
def test_moments_of_a_window_are_those_of_float64(dtype):
    """The one reading gives mean and variance of float64, far from zero as well, and merges where it is."""
    generator = torch.Generator().manual_seed(0)
    x = (torch.randn(2, 3, 7, 60, 150, generator=generator) * 3 + 200).to(dtype)[..., 1:, 2:55, 3:140]
    parts = [measure_there(x.to(GPU)[..., :20, :]), measure_there(x.to(GPU)[..., 20:, :])]
    joined, expected = union(*parts), measure(x)
    assert joined.mean.device == GPU
    assert joined.count == expected.count
    assert_close(joined.mean.cpu(), expected.mean, rtol=1e-13, atol=0)
    assert_close(joined.m2.cpu(), expected.m2, rtol=1e-11, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_a_window_is_normalised_where_it_lies(dtype):
    """A window of a map gives what its copy gives, rectified the bits of ReLU, and NaN stays NaN."""
    x = torch.randn(2, 6, 40, 300, device=GPU).to(dtype)
    x[0, 0, 9, 9] = torch.nan
    constants = (*(torch.randn(6, device=GPU) for _ in range(3)), torch.rand(6, device=GPU) + 0.1, 1e-5)
    window = x[..., 3:37, 5:290]
    y = normalise(window, *constants)
    near = torch.finfo(dtype).eps
    assert_close(y, normalise(window.contiguous(), *constants), rtol=near, atol=near, equal_nan=True)
    assert_close(normalise_rectified(window, *constants), y.relu(), rtol=0, atol=0, equal_nan=True)
    assert bool(y.isnan().any())


def test_a_fallback_is_said_or_refused(image, caplog):
    """A network without a graph is measured in passes, which is said; an image read by window is not read whole."""
    network = Branching().eval().to(GPU)
    normfix.calibrate(network, image.to(GPU), tile=64)
    assert "passes over whole images" in caplog.text
    opened = normfix.open_image(image[0].numpy(), network, axes="CYX")
    with pytest.raises(normfix.NormfixError, match="is not read whole"):
        normfix.calibrate(network, opened, tile=64)


# Saved, loaded, exported, folded, compiled


def test_a_folder_comes_back(converted, image, tmp_path):
    """A folder is written from the GPU, and read on the device that is asked for."""
    normfix.save(converted, tmp_path / "saved", source="cuda_networks:small")
    back = normfix.load(tmp_path / "saved", arch="cuda_networks:small", device="cuda")
    assert next(back.parameters()).device.type == "cuda"
    expected = normfix.predict(converted.model, image.to(GPU), tile=256)
    assert deviation(normfix.predict(back, image.to(GPU), tile=256), expected) < 1e-4
    assert normfix.load(tmp_path / "saved", arch="cuda_networks:small").head.weight.device.type == "cpu"


def test_a_program_comes_back(converted, image, tmp_path):
    """A program written from the GPU runs on both devices, and is checked on either."""
    normfix.save(converted, tmp_path / "net.pt2")
    for device in ("cpu", "cuda"):
        back = normfix.load(tmp_path / "net.pt2", device=device)
        given = image.to(device)
        assert (
            deviation(normfix.predict(back, given, tile=64), normfix.predict(converted.model, image.to(GPU)))
            < 1e-3
        )
        assert normfix.check(back, given, tile=64).passed


def test_compiled_it_gives_the_same(converted, image):
    """Under torch.compile the frozen network gives what it gives eagerly."""
    compiled = torch.compile(converted.model)
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            assert deviation(compiled(image.to(GPU)), converted.model(image.to(GPU))) < 1e-4
    finally:
        torch.backends.cudnn.allow_tf32 = True


def test_lowered_and_folded_it_is_the_same_function(converted, image):
    """Stock batch norm and folded convolutions differ by rounding."""
    torch.backends.cudnn.allow_tf32 = False
    try:
        with torch.no_grad():
            expected = converted.model(image.to(GPU))
            assert deviation(lower(converted.model).model(image.to(GPU)), expected) < 1e-4
            assert deviation(fold(converted.model, image.to(GPU)).model(image.to(GPU)), expected) < 1e-4
    finally:
        torch.backends.cudnn.allow_tf32 = True


@pytest.mark.parametrize("dtype", HALVES)
def test_under_autocast_it_is_as_near_as_the_original(converted, image, dtype):
    """Under autocast the frozen network is no further from its float32 output than the original from its own.

    Nor is one of stock batch norms, which is what giving back writes: their precision is another than group norm's.
    """
    ratios = []
    for network in (lower(converted.model).model, converted.model, small().to(GPU)):
        with torch.no_grad():
            exact = network.double()(image.to(GPU).double())
            network.float()
            with torch.autocast("cuda", dtype=dtype):
                ratios.append(deviation(network(image.to(GPU)), exact))
    assert max(ratios[:2]) <= 4 * ratios[2]


# Layers


FROZEN = [
    (FrozenNorm2d, nn.BatchNorm2d, (1, 6, 40, 50)),
    (FrozenNorm3d, nn.BatchNorm3d, (2, 6, 8, 9, 10)),
]


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(("kind", "stock", "shape"), FROZEN)
@pytest.mark.parametrize("last", [False, True])
@pytest.mark.parametrize("triton", [True, False])
def test_frozen_is_within_rounding(dtype, kind, stock, shape, last, triton, monkeypatch):
    """One multiply-add is within 4 roundings of |x * scale| + |shift| in float32 and one of the result in its dtype."""
    if not triton:
        monkeypatch.setattr("normfix.layers.affine.kernels_of", lambda device: None)
    layer = kind(6, device=GPU, trainable=False)
    layer.set_statistics_(torch.randn(6) * 3, torch.rand(6) + 0.1)
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    x = (torch.randn(shape, device=GPU) * 2).to(dtype)
    format_ = torch.channels_last if x.dim() == 4 else torch.channels_last_3d
    x = x.to(memory_format=format_) if last else x
    y = layer(x)
    view = (1, -1, *(1,) * (x.dim() - 2))
    scale = (layer.weight.double() / (layer.running_var.double() + layer.eps).sqrt()).view(view)
    shift = layer.bias.double().view(view) - layer.running_mean.double().view(view) * scale
    expected = x.double() * scale + shift
    bound = (
        4 * 2.0**-24 * ((x.double() * scale).abs() + shift.abs())
        + torch.finfo(dtype).eps / 2 * expected.abs()
    )
    assert y.dtype == dtype
    assert y.stride() == x.stride()
    assert bool(((y.double() - expected).abs() <= bound + 1e-7).all())


@pytest.mark.parametrize("dtype", HALVES)
def test_frozen_keeps_autocasts_dtype(dtype):
    """Under autocast the result has the dtype that batch norm's has."""
    x = torch.randn(1, 6, 8, 8, device=GPU, dtype=dtype)
    frozen, stock = FrozenNorm2d(6, device=GPU, trainable=False), nn.BatchNorm2d(6, device=GPU).eval()
    with torch.no_grad(), torch.autocast("cuda", dtype=dtype):
        assert frozen(x).dtype == stock(x).dtype


def test_frozen_keeps_batch_norms_bits_in_double():
    """In float64 it is batch norm's call, to the bit."""
    x = torch.randn(1, 6, 8, 8, device=GPU, dtype=torch.float64)
    frozen, stock = (
        FrozenNorm2d(6, device=GPU, dtype=torch.float64, trainable=False),
        nn.BatchNorm2d(6, device=GPU, dtype=torch.float64).eval(),
    )
    stock.load_state_dict(frozen.state_dict())
    assert torch.equal(frozen(x), stock(x))


def test_frozen_has_gradients():
    """With gradients wanted it is batch norm's call, and trains the affine."""
    layer = FrozenNorm2d(6, device=GPU)
    x = torch.randn(2, 6, 8, 8, device=GPU, requires_grad=True)
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert layer.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
def test_finetuning_under_autocast(converted, dtype):
    """A network with BatchRenorm trains under autocast, with a GradScaler, and is calibrated and checked after."""
    model = normfix.convert(small().to(GPU), uneven(64, 64).to(GPU), to="batchrenorm").model
    run = normfix.prepare_finetune(model, total_steps=4)
    optimizer = torch.optim.SGD(run.groups, 1e-3)
    run.follow(optimizer)
    scaler = torch.amp.GradScaler("cuda", enabled=dtype == torch.float16)
    for step in range(4):
        x = uneven(64, 64).repeat(2, 1, 1, 1).to(GPU) * (1 + step)
        with torch.autocast("cuda", dtype=dtype, enabled=dtype != torch.float32):
            loss = model(x).float().square().mean()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
    model.eval()
    after = normfix.calibrate(model, uneven(128, 128).to(GPU)).model
    assert normfix.check(after, uneven(192, 192).to(GPU), tile=64).passed


# The command line

SMALL = f"{Path(__file__).parent / 'support' / 'cuda_networks.py'}:small"


def normfix_(place, *words):
    return subprocess.Popen(
        [sys.executable, "-m", "normfix", *words],
        cwd=place,
        env={**os.environ, "PYTHONPATH": str(Path(normfix.__file__).parent.parent)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


TILED = ("--tile", "64", "--arch", SMALL)
COMMANDS = {
    "scan": (("scan", SMALL), 1),
    "check": (("check", "saved", "image.npy", *TILED), 0),
    "diagnose": (("diagnose", SMALL, "image.npy", "--tile", "64"), 1),
    "calibrate": (("calibrate", "saved", "image.npy", *TILED, "-o", "again"), 0),
    "prove": (("prove", "saved", "image.npy", "--arch", SMALL), 0),
    "predict": (("predict", "saved", "image.npy", *TILED, "-o", "out.npy", "--batch", "4"), 0),
}


def test_commands(tmp_path, image):
    """Each command runs on the GPU that is there, says so, and ends as on the CPU; all at a time, for the time."""
    np.save(tmp_path / "image.npy", image[0].numpy())
    done = normfix_(tmp_path, "convert", SMALL, "image.npy", "-o", "saved", "--to", "frozen")
    said = done.communicate()[1]
    assert done.returncode == 0, said
    assert "computing on cuda" in said
    plain = normfix_(tmp_path, "scan", SMALL, "--device", "cpu", "--format", "json")
    running = {name: normfix_(tmp_path, *words) for name, (words, _) in COMMANDS.items()}
    for name, process in running.items():
        out, err = process.communicate()
        assert "computing on cuda" in err, (name, err)
        assert process.returncode in (COMMANDS[name][1], 0), (name, out[-2000:], err[-2000:])
        assert "NF901" not in err
    out, err = plain.communicate()
    assert "computing on" not in err
    assert json.loads(out)["sites"]


def test_the_accelerator_is_the_gpu():
    """What auto means here is the GPU."""
    assert accelerator().type == "cuda"
