"""A saved folder is whole, belongs together, loads strictly, and appears only when it was read back."""

import collections
import hashlib
import json
import math
import shutil
import stat
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path

import hostile
import pytest
import torch
from factories import ExtraState, Gained, Tied, batched, tiny_unet
from optional import needs_programs
from safetensors.torch import load_file, save_file

import normfix
from normfix.errors import NormfixError
from normfix.networks.provenance import provenance_of
from normfix.records.saved import statement_of
from normfix.storage import saving
from normfix.storage.folder import MANIFEST, PROGRAM, WEIGHTS, appearing
from normfix.storage.fresh import run_fresh
from normfix.storage.loading import open_any
from normfix.storage.opening.request import Request

IMAGE = torch.randn(1, 1, 96, 80, generator=torch.Generator().manual_seed(1))
OTHER = torch.randn(1, 1, 64, 64, generator=torch.Generator().manual_seed(2))
FILES = {"model.safetensors", "normfix.json", "README.md"}
ARCH = "factories:tiny_unet"


@pytest.fixture(scope="module")
def done():
    """Convert a network whose source is an object."""
    return normfix.convert(tiny_unet(), IMAGE)


@pytest.fixture(scope="module")
def saved_once(done, tmp_path_factory):
    """Save a folder for tests that each change a copy."""
    folder = tmp_path_factory.mktemp("once") / "fixed"
    normfix.save(done, folder)
    return folder


@pytest.fixture
def folder(saved_once, tmp_path):
    """Copy the saved folder."""
    return Path(shutil.copytree(saved_once, tmp_path / "fixed"))


def refusal(function, *args, **options) -> NormfixError:
    """Return the error a call gives, which must be one paragraph."""
    with pytest.raises(NormfixError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def edited(folder, change, *, sealed=True):
    """Change the parsed normfix.json of a folder, by default with its checksum put right."""
    data = json.loads((folder / MANIFEST).read_text("utf-8"))
    change(data)
    if sealed:
        data["statement"] = statement_of(data)
    (folder / MANIFEST).write_text(json.dumps(data), "utf-8")
    return folder


def assert_same(actual, expected, image=OTHER):
    """Two networks give the same on an image neither was calibrated on."""
    with torch.no_grad():
        torch.testing.assert_close(actual(image), expected(image), rtol=0, atol=0)


@pytest.mark.slow
@needs_programs
def test_the_folder_holds_its_files(folder):
    """Weights, normfix.json, a model card, and of an object's network a program; nothing else."""
    assert {path.name for path in folder.iterdir()} == FILES | {"program.pt2"}


@pytest.mark.slow
@needs_programs
def test_a_folder_from_a_factory_holds_a_graph_and_no_program(tmp_path):
    """Where the source can be called again, its graph is written without weights: for the certificate alone."""
    source = normfix.Source(kind="factory", spec="factories:batched")
    normfix.save(normfix.convert(batched()), tmp_path / "fixed", source)
    assert {path.name for path in (tmp_path / "fixed").iterdir()} == FILES | {"graph.pt2"}


@pytest.mark.slow
def test_the_program_needs_no_source(folder, done):
    """program.pt2 gives the converted network's output, on another size, in a process without the source."""
    save_file({"x": OTHER}, folder / "x.safetensors")
    script = (
        "import sys, torch; from safetensors.torch import load_file, save_file; "
        "x = load_file(sys.argv[1] + '/x.safetensors')['x']; "
        "y = torch.export.load(sys.argv[1] + '/program.pt2').module()(x); "
        "save_file({'y': y.detach().contiguous()}, sys.argv[1] + '/y.safetensors'); "
        "assert not {'normfix', 'factories'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-W", "ignore", "-c", script, str(folder)], check=True)
    with torch.no_grad():
        torch.testing.assert_close(load_file(folder / "y.safetensors")["y"], done.model(OTHER))


class CountsPixels(torch.nn.Module):
    """Knows the number of pixels, for which a program is written at one size and said to take all."""

    def __init__(self):
        super().__init__()
        self.conv, self.norm = torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.InstanceNorm2d(2)

    def forward(self, x):
        return self.norm(self.conv(x)) * math.log(x.shape[2] * x.shape[3])


class CountsRoots(CountsPixels):
    """Knows it by its root."""

    def forward(self, x):
        return self.norm(self.conv(x)) / math.sqrt(x.shape[2] * x.shape[3] + 1)


@pytest.mark.slow
@pytest.mark.parametrize("network", [CountsPixels, CountsRoots])
def test_a_network_whose_program_runs_on_one_size_alone_is_saved_without_program(network, tmp_path):
    """The folder is whole without it; no bare error of a guard in the program comes through."""
    done = normfix.convert(network().eval(), IMAGE)
    normfix.save(done, tmp_path / "fixed", partial=True)
    assert not (tmp_path / "fixed" / PROGRAM).exists()
    again = normfix.load(tmp_path / "fixed", model=network())
    assert torch.equal(again(OTHER), done.model(OTHER))


@dataclass
class Found:
    """What a network of somebody's own returns."""

    logits: torch.Tensor
    loss: torch.Tensor | None = None


class Returns(torch.nn.Sequential):
    """Returns its output in a class."""

    def __init__(self, kind):
        super().__init__(torch.nn.Conv2d(1, 2, 3, padding=1), torch.nn.InstanceNorm2d(2))
        self.kind = kind

    def forward(self, x):
        return self.kind(super().forward(x), None)


@pytest.mark.parametrize("kind", [Found, collections.namedtuple("Named", "logits loss")])
def test_an_output_in_a_class_is_chosen_by_its_name(kind, tmp_path):
    """In every verb, and in the program, which holds no class and returns what counts."""
    network = Returns(kind).eval()
    with pytest.raises(NormfixError, match=r"NF110.*'logits', 'loss'"):
        normfix.scan(network, IMAGE)
    done = normfix.convert(network, IMAGE, output="logits")
    assert done.proof.passed
    expected = network(IMAGE).logits
    live = normfix.predict(network, IMAGE, 32, statistics="per-image", output="logits")
    for given in (live, normfix.predict(done.model, IMAGE, 32)):
        torch.testing.assert_close(given, expected, rtol=1e-4, atol=1e-5)
    normfix.save(done, tmp_path / "fixed")
    if (tmp_path / "fixed" / PROGRAM).exists():
        assert_same(normfix.load(tmp_path / "fixed"), lambda image: done.model(image).logits)


def test_a_network_that_cannot_be_exported_is_saved_without_program(tmp_path, monkeypatch):
    """If torch.export fails, the folder is written without a program, and loads."""

    def fail(*args, **options):
        raise RuntimeError("data-dependent")

    monkeypatch.setattr(torch.export, "export", fail)
    done = normfix.convert(tiny_unet(), IMAGE)
    normfix.save(done, tmp_path / "fixed")
    assert not (tmp_path / "fixed" / "program.pt2").exists()
    assert_same(normfix.load(tmp_path / "fixed", arch=ARCH), done.model)


def test_a_batch_norm_network_goes_back_into_its_own_class(tmp_path):
    """Portable: a state dict with the original names, which the original class loads strictly with equal output."""
    done = normfix.convert(batched(), OTHER)
    normfix.save(done, tmp_path / "out", "factories:batched", portable=True)
    fresh = batched()
    fresh.load_state_dict(torch.load(tmp_path / "out" / "state_dict.pt", weights_only=True), strict=True)
    assert_same(fresh.eval(), done.model)


def test_an_instance_norm_network_does_not_go_back(done, tmp_path):
    """Portable of a network whose class would stay live is NF411, naming the sites, and nothing is left."""
    error = refusal(normfix.save, done, tmp_path / "out", portable=True)
    assert (error.code, "first.1" in error.message) == ("NF411", True)
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_the_card_names_the_base_and_the_proof(tmp_path):
    """The model card has tags, the base model and every step of the proof."""
    source = normfix.Source(kind="factory", spec=ARCH, origin="hf-hub:org/net@abc")
    done = normfix.convert(tiny_unet(), IMAGE)
    normfix.save(done, tmp_path / "fixed", source)
    card = (tmp_path / "fixed" / "README.md").read_text()
    assert "base_model: org/net\n" in card
    assert "- tile-invariant" in card
    assert all(step.claim in card for step in done.proof.steps)


@pytest.mark.slow
def test_the_folder_is_all_there_is(folder):
    """No temporary folder stays beside it."""
    assert [path.name for path in folder.parent.iterdir()] == ["fixed"]


@pytest.mark.slow
def test_whoever_reads_one_file_reads_all(folder):
    """Weights have the permissions of the other files, so a colleague can load the folder."""
    assert len({stat.S_IMODE(path.stat().st_mode) for path in folder.iterdir()}) == 1


@pytest.mark.slow
def test_a_network_loads_from_a_fresh_base(folder, done):
    """The folder and a fresh base network give the converted network."""
    assert_same(normfix.load(folder, model=tiny_unet()), done.model)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_network_loads_whatever_the_default_dtype_is(folder, done, dtype):
    """Where the probe's output is looked at does not depend on it: places in 16 bits lay beyond the end."""
    torch.set_default_dtype(dtype)
    try:
        loaded = normfix.load(folder, model=tiny_unet().float())
    finally:
        torch.set_default_dtype(torch.float32)
    assert_same(loaded, done.model)


@pytest.mark.slow
def test_a_network_loads_from_an_architecture(folder, done):
    """The folder and a repeated factory give the converted network."""
    assert_same(normfix.load(folder, arch=ARCH), done.model)


@pytest.mark.slow
def test_loading_differs_from_the_base(folder):
    """Negative control: the base network alone gives something else."""
    with pytest.raises(AssertionError):
        assert_same(normfix.load(folder, arch=ARCH), tiny_unet().eval())


@pytest.mark.slow
def test_the_base_given_to_load_is_not_changed(folder):
    """Loading works on a copy of the given network."""
    base = tiny_unet()
    normfix.load(folder, model=base)
    assert base.state_dict().keys() == tiny_unet().state_dict().keys()


@pytest.mark.slow
def test_a_loaded_network_is_in_eval_mode(folder):
    """No module of a loaded folder is in train mode."""
    assert not any(module.training for module in normfix.load(folder, arch=ARCH).modules())


@pytest.mark.slow
def test_plan_and_scaling_travel(folder, done):
    """What was decided and how images were scaled come back equal; the source is what the caller names."""
    loaded, saved = provenance_of(normfix.load(folder, arch=ARCH)), provenance_of(done.model)
    assert loaded.source.spec == ARCH
    assert replace(loaded, source=saved.source) == saved


@pytest.mark.cold
@pytest.mark.slow
def test_a_folder_saved_from_a_factory_loads_in_a_fresh_process(tmp_path):
    """With a known factory, the folder is proved in a new Python, and names the factory."""
    source = normfix.Source(kind="factory", spec=ARCH)
    normfix.save(normfix.convert(tiny_unet(), IMAGE), tmp_path / "fixed", source)
    assert refusal(normfix.load, tmp_path / "fixed").code == "NF113"


@pytest.mark.slow
def test_a_factory_that_gives_another_network_is_noticed(done, tmp_path):
    """A source that does not build the base is NF503, and nothing is kept."""
    assert refusal(normfix.save, done, tmp_path / "fixed", source="factories:batched").code == "NF503"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_shared_weights_are_stored_once(tmp_path):
    """A tied tensor is in the file once, and its other name is listed."""
    normfix.save(normfix.convert(Tied(), IMAGE), tmp_path / "fixed")
    names = load_file(tmp_path / "fixed" / WEIGHTS).keys()
    assert ("a.weight" in names) != ("b.weight" in names)


@pytest.mark.slow
def test_shared_weights_stay_shared(tmp_path):
    """A tied tensor is tied again after loading."""
    done = normfix.convert(Tied(), IMAGE)
    normfix.save(done, tmp_path / "fixed")
    loaded = normfix.load(tmp_path / "fixed", arch="factories:Tied")
    assert loaded.a.weight is loaded.b.weight
    assert_same(loaded, done.model)


@pytest.mark.slow
def test_integer_buffers_survive(tmp_path):
    """Counters and tables keep values and dtype."""
    normfix.save(normfix.convert(Tied(), IMAGE), tmp_path / "fixed")
    loaded = normfix.load(tmp_path / "fixed", arch="factories:Tied")
    assert (loaded.steps.item(), loaded.steps.dtype) == (7, torch.int64)
    assert torch.equal(loaded.table, torch.arange(5))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_network_keeps_its_dtype(tmp_path, dtype):
    """A network converted in another dtype than its factory's loads in it, with equal output."""
    done = normfix.convert(tiny_unet().to(dtype), IMAGE)
    normfix.save(done, tmp_path / "fixed", partial=True)
    loaded = normfix.load(tmp_path / "fixed", arch=ARCH)
    assert {p.dtype for p in loaded.parameters()} == {dtype}
    assert_same(loaded, done.model, OTHER.to(dtype))


@pytest.mark.slow
def test_buffers_that_are_not_saved_take_the_saved_dtype(tmp_path):
    """A float32 factory with a non-persistent buffer loads a bfloat16 folder, with equal output."""
    done = normfix.convert(Gained().bfloat16(), IMAGE)
    normfix.save(done, tmp_path / "fixed", partial=True)
    torch.manual_seed(5)
    assert_same(normfix.load(tmp_path / "fixed", arch="factories:Gained"), done.model, OTHER.bfloat16())


@pytest.mark.slow
def test_batch_norms_need_no_images(tmp_path):
    """A network with running statistics is converted, saved and loaded without an image."""
    done = normfix.convert(batched())
    normfix.save(done, tmp_path / "fixed")
    assert_same(normfix.load(tmp_path / "fixed", arch="factories:batched"), done.model)


@pytest.mark.slow
def test_a_fine_tuned_network_can_be_saved(done, tmp_path):
    """A converted network that was trained further is saved with its new weights."""
    model = normfix.convert(tiny_unet(), IMAGE, "batchrenorm").model.train()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    model(torch.cat([OTHER, OTHER + 1])).square().mean().backward()
    optimizer.step()
    normfix.save(model, tmp_path / "tuned")
    assert_same(normfix.load(tmp_path / "tuned", arch=ARCH), model.eval())


@pytest.mark.slow
def test_saving_leaves_the_mode_alone(done, tmp_path):
    """A network in training is still in training after it was saved."""
    model = normfix.convert(tiny_unet(), IMAGE).model.train()
    normfix.save(model, tmp_path / "tuned")
    assert all(module.training for module in model.modules())


@pytest.mark.slow
def test_changed_weights_are_noticed(folder):
    """One changed byte in the weights is NF115."""
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-1] ^= 1
    (folder / WEIGHTS).write_bytes(data)
    assert refusal(normfix.load, folder, arch=ARCH).code == "NF115"


@pytest.mark.slow
def test_changed_weights_with_a_changed_checksum_are_noticed(folder):
    """Weights changed together with their checksum do not repeat the probe: NF115."""
    weights = load_file(folder / WEIGHTS)
    weights["head.bias"] += 1
    save_file(weights, folder / WEIGHTS)
    from normfix.storage.folder import digest_of

    edited(folder, lambda data: data.update(sha256=digest_of(folder / WEIGHTS)))
    assert refusal(normfix.load, folder, arch=ARCH).code == "NF115"


@pytest.mark.slow
def test_missing_weights_are_noticed(folder):
    """A folder without its weights is NF101."""
    (folder / WEIGHTS).unlink()
    assert refusal(normfix.load, folder, arch=ARCH).code == "NF101"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("probe", "values"), [1.0]),
        (("probe", "values"), [0.0] * 64),
        (("probe", "dtype"), "load"),
        (("probe", "dtype"), "no_such"),
        (("probe", "dtype"), "int64"),
        (("probe", "shape"), [1, 1, -3, 4]),
        (("probe", "shape"), []),
        (("probe", "shape"), [1, 7, 64, 64]),
        (("probe", "output"), [1, 1, 2, 2]),
        (("provenance", "output"), "logits"),
        (("provenance", "plan", "decisions", 0, "site", "layer"), None),
        (("provenance", "plan", "decisions", 0, "site", "layer", "ndim"), 9),
        (("provenance", "plan", "decisions", 0, "site", "layer", "features"), 10**15),
        (("provenance", "plan", "decisions", 0, "site", "layer", "eps"), 3.0),
        (("provenance", "plan", "decisions", 0, "site", "owner"), "nowhere"),
        (("provenance", "plan", "decisions", 0, "action"), "keep"),
        (("aliases",), [["head.bias", "no.such"], ["x", "head.bias"]]),
    ],
)
def test_a_tampered_manifest_is_refused(folder, path, value):
    """An edited plan, probe or list of names is refused with a code, never with a failure inside torch."""

    def change(data):
        *parents, last = path
        for key in parents:
            data = data[key]
        data[last] = value

    codes = {"NF101", "NF105", "NF108", "NF109", "NF110", "NF115", "NF121", "NF205", "NF206", "NF209"}
    assert refusal(normfix.load, edited(folder, change), arch=ARCH).code in codes


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "{", "[]", "3", "[" * 100000, '{"schema": 1}', '{"schema": 99}', "\0"])
def test_a_malformed_manifest_is_refused(folder, text):
    """A normfix.json that is no JSON or no manifest is NF101 or NF108."""
    (folder / MANIFEST).write_text(text)
    assert refusal(normfix.load, folder, arch=ARCH).code in {"NF101", "NF108"}


@pytest.mark.slow
def test_another_network_of_other_shape_is_refused(folder):
    """A base with other widths is NF105 or NF115."""
    assert refusal(normfix.load, folder, model=tiny_unet(width=5)).code in {"NF105", "NF115"}


@pytest.mark.slow
def test_another_network_of_the_same_weights_is_refused(folder):
    """A base whose code differs but whose tensors fit is caught by the probe: NF115."""
    base = tiny_unet()
    base.up = torch.nn.Upsample(scale_factor=2, mode="bilinear")
    assert refusal(normfix.load, folder, model=base).code == "NF115"


@pytest.mark.slow
@needs_programs
def test_a_folder_from_an_object_gives_its_program(folder, done):
    """Without a base, a folder saved from an object gives the same at another size, predicts and says what it is."""
    opened = open_any(folder, Request())
    with torch.no_grad():
        torch.testing.assert_close(opened.model(OTHER), done.model(OTHER))
    assert "cannot be trained" in opened.notes[0]
    tiled = normfix.predict(opened.model, IMAGE, tile=32)
    torch.testing.assert_close(tiled, normfix.predict(done.model, IMAGE, tile=32))


@pytest.mark.slow
@needs_programs
def test_a_folder_from_an_object_without_program_needs_the_network(folder):
    """Where neither a factory nor a program is there, load is NF113 and asks for the network."""
    (folder / PROGRAM).unlink()
    assert refusal(normfix.load, folder).code == "NF113"


@pytest.mark.slow
def test_a_swapped_program_is_noticed(folder, tmp_path):
    """A program of other weights in place of the saved one is NF115 before it is opened."""
    other = tiny_unet(width=6)
    normfix.save(normfix.convert(other, IMAGE), tmp_path / "other.pt2")
    (folder / PROGRAM).write_bytes((tmp_path / "other.pt2").read_bytes())
    assert refusal(normfix.load, folder).code == "NF115"


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of torch about what it is shown
def test_a_swapped_program_with_its_checksum_is_noticed(folder, tmp_path):
    """With the checksum changed too, the output differs: NF115; and a pickle inside stays unopened."""
    other = tiny_unet()
    torch.nn.init.ones_(other.head.weight)
    normfix.save(normfix.convert(other, IMAGE), tmp_path / "other.pt2")
    for path in (tmp_path / "other.pt2", hostile.sample_inputs(tmp_path)):
        (folder / PROGRAM).write_bytes(path.read_bytes())
        digest = hashlib.sha256(path.read_bytes()).hexdigest()
        edited(folder, lambda data, digest=digest: data.update(program=digest))
        assert refusal(normfix.load, folder).code in ("NF115", "NF502")
    assert not list(tmp_path.rglob(hostile.MARK))


@pytest.mark.slow
def test_a_huge_manifest_is_refused(folder):
    """A normfix.json of a terabyte is NF101 and is not read."""
    with (folder / MANIFEST).open("r+b") as file:
        file.truncate(1 << 40)
    assert refusal(normfix.load, folder, arch=ARCH).code == "NF101"


@pytest.mark.slow
def test_a_manifest_that_programs_read_differently_or_not_at_all_is_refused(folder):
    """A name that stands twice, and countless lists, are NF101."""
    text = (folder / MANIFEST).read_text()
    for harm in (
        f'{{"schema": 1,{text.lstrip()[1:]}',
        f'{{"more": {json.dumps([[0]] * 200_000)},{text.lstrip()[1:]}',
    ):
        (folder / MANIFEST).write_text(harm)
        assert refusal(normfix.load, folder, arch=ARCH).code == "NF101"


@pytest.mark.slow
def test_a_probe_that_takes_all_memory_is_refused(folder):
    """A probe of 10**12 values is NF121, and is not made."""
    edited(folder, lambda data: data["probe"].update(shape=[1, 1, 10**6, 10**6]))
    assert refusal(normfix.load, folder, arch=ARCH).code == "NF121"


@pytest.mark.slow
def test_what_a_probe_takes_is_foreseen(folder, monkeypatch):
    """A probe that a network of these weights cannot run on in the room for it is NF144 before it runs."""
    monkeypatch.setattr("normfix.storage.opening.workload._GENEROUS", 0)
    monkeypatch.setattr("normfix.storage.opening.workload._PER_VALUE", 0)
    error = refusal(normfix.load, folder, arch=ARCH)
    assert (error.code, "smaller example" in error.message) == ("NF144", True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("schema", "todo"), [(2, "Update normfix"), (0, "Make it again"), (-1, "Make it again")]
)
def test_a_folder_of_another_schema_says_what_to_do(folder, schema, todo):
    """A newer or an older schema is NF108 with the next step, whatever else the file holds."""
    edited(folder, lambda data: data.update(schema=schema, unheard_of=1))
    error = refusal(normfix.load, folder, arch=ARCH)
    assert (error.code, todo in error.message) == ("NF108", True)


@pytest.mark.slow
def test_a_factory_named_by_an_edited_folder_does_not_run(folder):
    """os:system as the factory in normfix.json is NF113, and its command does not run."""
    command = json.dumps({"command": f"touch {folder.parent}/ran"})
    source = {"kind": "factory", "spec": "os:system", "args": command, "origin": ""}
    edited(folder, lambda data: data["provenance"].update(source=source))
    assert refusal(normfix.load, folder).code == "NF113"
    assert not (folder.parent / "ran").exists()


@pytest.mark.parametrize("kind", ["folder", "file", "link"])
def test_what_exists_is_not_touched(done, tmp_path, kind):
    """A folder, a file or a dangling link in the way is NF114, and stays as it is."""
    target = tmp_path / "fixed"
    if kind == "folder":
        target.mkdir()
    elif kind == "file":
        target.write_text("mine")
    else:
        target.symlink_to(tmp_path / "nowhere")
    assert refusal(normfix.save, done, target).code == "NF114"
    assert [path.name for path in tmp_path.iterdir()] == ["fixed"]


def test_a_folder_below_a_file_is_refused(done, tmp_path):
    """A path that leads through a file is NF114."""
    (tmp_path / "file").write_text("mine")
    assert refusal(normfix.save, done, tmp_path / "file" / "fixed").code == "NF114"


@pytest.mark.slow
@pytest.mark.parametrize(
    "error", [NormfixError("NF503", "planted"), RuntimeError("planted"), KeyboardInterrupt()]
)
def test_a_failed_reading_back_leaves_nothing(done, tmp_path, monkeypatch, error):
    """If reading back fails or is stopped, neither the folder, a draft nor a new parent is left."""

    def fail(*args):
        raise error

    monkeypatch.setattr(saving, "_read_back", fail)
    with pytest.raises(type(error)):
        normfix.save(done, tmp_path / "new" / "deep" / "fixed")
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_full_disk_leaves_nothing(done, tmp_path, monkeypatch):
    """If writing fails half-way, the error is NF114 and nothing is left."""

    def full(*args, **options):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("normfix.storage.folder._card", full)
    assert refusal(normfix.save, done, tmp_path / "fixed").code == "NF114"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_missing_parents_are_made(done, tmp_path):
    """The folder may lie in folders that do not exist yet."""
    normfix.save(done, tmp_path / "new" / "fixed")
    assert (tmp_path / "new" / "fixed" / WEIGHTS).is_file()


def test_parents_that_were_there_stay(tmp_path):
    """Only folders made for the purpose are removed again."""
    (tmp_path / "old").mkdir()
    with pytest.raises(ZeroDivisionError), appearing(tmp_path / "old" / "new" / "fixed"):
        _ = 1 / 0
    assert [path.name for path in tmp_path.iterdir()] == ["old"]


def test_a_folder_that_appeared_meanwhile_is_not_replaced(tmp_path):
    """An empty folder made by somebody else during the work is left alone: NF114."""
    with pytest.raises(NormfixError, match="NF114"), appearing(tmp_path / "fixed"):
        (tmp_path / "fixed").mkdir()
    assert [path.name for path in tmp_path.iterdir()] == ["fixed"]


@pytest.mark.slow
def test_two_runs_write_the_same_bytes(tmp_path):
    """The same network and image give the same three files, byte for byte."""
    for name in ("one", "two"):
        normfix.save(normfix.convert(tiny_unet(), IMAGE), tmp_path / name)
    assert all((tmp_path / "one" / f).read_bytes() == (tmp_path / "two" / f).read_bytes() for f in FILES)


def test_a_conversion_that_is_not_proved_is_not_saved(tmp_path):
    """With a site kept live the proof does not pass, and saving is NF501."""
    done = normfix.convert(tiny_unet(), IMAGE, keep=("second.1",))
    assert refusal(normfix.save, done, tmp_path / "fixed").code == "NF501"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_a_partial_conversion_is_saved_when_asked(tmp_path):
    """With partial=True it is written, and gives what the conversion gives."""
    done = normfix.convert(tiny_unet(), IMAGE, keep=("second.1",))
    normfix.save(done, tmp_path / "fixed", partial=True)
    assert_same(normfix.load(tmp_path / "fixed", arch=ARCH), done.model)


@pytest.mark.slow
def test_a_network_converted_twice_is_not_saved(done, tmp_path):
    """A second conversion's plan does not start at the original network: NF502, and nothing is left."""
    again = normfix.convert(done.model, IMAGE)
    assert refusal(normfix.save, again, tmp_path / "fixed").code == "NF502"
    assert not list(tmp_path.iterdir())


def test_a_network_without_a_plan_is_not_saved(tmp_path):
    """A network that normfix did not convert is NF502."""
    assert refusal(normfix.save, tiny_unet(), tmp_path / "fixed").code == "NF502"


def test_arguments_that_are_no_json_are_not_saved(done, tmp_path):
    """Factory arguments that JSON cannot hold are NF111, and nothing is left."""
    error = refusal(normfix.save, done, tmp_path / "fixed", source=ARCH, args={"norm": torch.nn.ReLU})
    assert error.code == "NF111"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_state_that_is_no_tensor_is_refused(tmp_path):
    """A network with extra state that no .safetensors holds is NF502, and nothing is left."""
    model = normfix.convert(tiny_unet(), IMAGE).model
    model.add_module("extra", ExtraState())
    assert refusal(normfix.save, model, tmp_path / "fixed").code == "NF502"
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize(
    "change",
    [
        lambda data: data["provenance"]["scan"].update(halo=[[0, 0], [0, 0]]),
        lambda data: data["provenance"]["scan"].update(stride=[1, 1]),
        lambda data: data["provenance"]["scan"].update(dense=not data["provenance"]["scan"]["dense"]),
        lambda data: data["proof"].update(passed=False),
        lambda data: data["probe"].update(seed=data["probe"]["seed"] + 1),
    ],
)
def test_an_edited_statement_is_noticed(folder, change):
    """Whatever is edited in normfix.json, such as a halo of 0, no longer belongs to the weights: NF115."""
    error = refusal(normfix.load, edited(folder, change, sealed=False), arch=ARCH)
    assert error.code in ("NF115", "NF108")
    assert "edited" in str(error)


@pytest.mark.slow
def test_a_statement_that_is_laid_out_anew_is_the_same(folder):
    """Negative control: other spaces and another order of fields change nothing."""
    data = json.loads((folder / MANIFEST).read_text("utf-8"))
    (folder / MANIFEST).write_text(json.dumps(dict(reversed(data.items())), indent=7), "utf-8")
    assert open_any(folder, Request(arch=ARCH)).notes == ()


@pytest.mark.slow
def test_a_folder_of_before_opens_with_a_note(folder):
    """A folder without a checksum of its statement opens, and says that an edit would not be noticed."""
    edited(folder, lambda data: data.pop("statement"), sealed=False)
    (note,) = open_any(folder, Request(arch=ARCH)).notes
    assert "no checksum of its plan" in note


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("exact_sizes", [2**31, 2**31]),
        ("exact_sizes", [0, 0]),
        ("stride", [1, 1, 1]),
        ("stride", [-2, 1]),
        ("halo", [[3, 3]]),
        ("halo", [[3, -3], [3, 3]]),
        ("halo_rounded", []),
        ("scale", ["1"]),
        ("scale", ["1e999999999", "1"]),
        ("scale", ["1/0", "1"]),
        ("smallest_tile", [5]),
        ("smallest_tile", [2**31, 1]),
        ("halo", [[2**31, 3], [3, 3]]),
        ("halo_rounded", [[3, 3], [3, 10**30]]),
        ("model", "\ud800"),
        ("example", [1, 1, 64]),
    ],
)
def test_a_geometry_that_no_network_has_is_refused(folder, name, value):
    """One number for each axis, and none that divides by zero or fills the memory: else NF108, whoever sealed it."""
    edited(folder, lambda data: data["provenance"]["scan"].update({name: value}))
    assert refusal(normfix.load, folder).code == "NF108"


@pytest.mark.parametrize("changes", [{"axes": "H"}, {"extents": [64]}, {"extents": [64, -1]}])
def test_sizes_that_are_not_of_its_axes_are_refused(folder, changes):
    """The sizes that a scan speaks for are one for each axis."""
    edited(folder, lambda data: data["provenance"]["scan"]["sizes"].update(changes))
    assert refusal(normfix.load, folder).code == "NF108"


@pytest.mark.slow
@needs_programs
@pytest.mark.parametrize("name", [WEIGHTS, PROGRAM])
@pytest.mark.parametrize("swap", ["replaced", "linked", "written"])
def test_a_folder_that_changes_while_it_is_read_is_refused(folder, tmp_path, monkeypatch, name, swap):
    """Between the checksum and the reading, another file in the place of the first, or other bytes in it: NF115."""
    from normfix.storage import folder as rooms

    checked, path = rooms.require_unchanged, folder / name

    def then_swapped(asked, digest):
        checked(asked, digest)
        if asked.name == name:
            other = tmp_path / "other"
            other.write_bytes(path.read_bytes())
            {
                "replaced": lambda: other.replace(path),
                "linked": lambda: (path.unlink(), path.symlink_to(other)),
                "written": lambda: path.write_bytes(other.read_bytes()),
            }[swap]()

    monkeypatch.setattr(rooms, "require_unchanged", then_swapped)
    assert refusal(normfix.load, folder).code == "NF115"


def test_a_fresh_process_that_ends_early_has_read_nothing_back():
    """A network's code can end it, and well: then nothing was compared."""
    assert "before it was done" in run_fresh("raise SystemExit(0)\n")
    assert run_fresh("print('a word of its own')") == ""
