"""A network is given back as its own library's, with BatchNorms, or refused by name; nothing half is left."""

import copy
import json
import zipfile

import originals
import pytest
import switchable
import torch
from torch import nn

import normfix
from normfix.giving.formats import plain
from normfix.giving.refusals import NotAlone, NotGiven, Unequal, Unfit
from normfix.records.saved import statement_of

IMAGE = torch.rand(1, 1, 64, 64, generator=torch.Generator().manual_seed(0))
OTHER = torch.rand(1, 1, 96, 64, generator=torch.Generator().manual_seed(1))


CONVERTED = {}


def converted(factory, dtype=torch.float32, to="frozen", **args):
    """Return the one conversion of a factory's network, in which no weight is one that its factory gives to all."""
    key = (factory, dtype, to, repr(args))
    if key not in CONVERTED:
        CONVERTED[key] = conversion(factory, dtype, to, **args)
    return CONVERTED[key]


def conversion(factory, dtype, to, **args):
    """Convert a network of a factory."""
    torch.manual_seed(0)
    network = factory(**args).to(dtype).eval()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.1 * torch.rand_like(parameter))
    return normfix.convert(network, IMAGE.to(dtype), to=to)


def given(done, folder, factory, args=None, **options):
    """Give it back; return the record and the network that its files make."""
    record = normfix.give_back(done, folder, f"switchable:{factory.__name__}", args or {}, **options)
    told = json.loads((folder / plain.ARGUMENTS).read_text())
    network = factory(**told["arguments"]).to(getattr(torch, told["dtype"])).eval()
    network.load_state_dict(torch.load(folder / plain.WEIGHTS, weights_only=True), strict=True)
    return record, network


@pytest.mark.parametrize("to", ["frozen", "batchrenorm"])
@pytest.mark.parametrize(
    ("factory", "args"),
    [
        (switchable.generator, {}),
        (switchable.Functional, {}),
        (switchable.Renamed, {"settings": {"normalization": "GroupNorm"}}),
        (switchable.Grouped, {"norm": ["group", {"num_groups": 2, "affine": False}]}),
    ],
)
def test_the_library_network_gives_the_converted_output(tmp_path, factory, args, to):
    """Built from what was written, with BatchNorms alone, it gives the converted output on another image."""
    done = converted(factory, to=to, **args)
    record, network = given(done, tmp_path / "back", factory, args)
    kinds = {type(module).__module__.partition(".")[0] for module in network.modules()}
    assert "normfix" not in kinds
    assert not any(isinstance(m, nn.InstanceNorm2d | nn.GroupNorm) for m in network.modules())
    with torch.no_grad():
        wanted = done.model(OTHER)
        assert (network(OTHER) - wanted).abs().max() < 1e-4 * wanted.std()
    assert record.verdict.passed
    assert max(record.double_sd, record.single_sd, record.alone_sd) < 1e-5


def test_constants_in_float64_are_held_to_1e_9(tmp_path):
    """A network that was converted in float64 is the same to 1e-9 sd, though biases moved into its means."""
    done = converted(switchable.generator, torch.float64)
    _, network = given(done, tmp_path / "back", switchable.generator)
    with torch.no_grad():
        wanted = done.model(OTHER.double())
        assert (network(OTHER.double()) - wanted).abs().max() < 1e-9 * wanted.std()


def test_another_eps_is_made_up_for(tmp_path):
    """Where the library's BatchNorm has another eps, the variance written is another."""
    args = {"settings": {"normalization": "GroupNorm"}}
    done = converted(switchable.Renamed, **args)
    _, network = given(done, tmp_path / "back", switchable.Renamed, args)
    before = done.model.GroupNorm_0.running_var
    torch.testing.assert_close(network.BatchNorm_0.running_var, before + 1e-5 - 1e-3)


def test_a_variance_below_the_other_eps_moves_into_the_weight(tmp_path):
    """Where the variance would be negative, it is 0 and the weight makes up for it."""
    args = {"settings": {"normalization": "GroupNorm"}}
    torch.manual_seed(0)
    network = switchable.Renamed(**args).eval()
    with torch.no_grad():
        network.conv_GroupNorm_0.weight.mul_(1e-3)
    done = normfix.convert(network, IMAGE)
    _, back = given(done, tmp_path / "back", switchable.Renamed, args)
    assert (back.BatchNorm_0.running_var == 0).any()
    with torch.no_grad():
        wanted = done.model(OTHER)
        assert (back(OTHER) - wanted).abs().max() < 1e-4 * wanted.std()


@pytest.mark.parametrize(
    ("factory", "kind", "says"),
    [
        (switchable.Twice, Unfit, "NF551.*normalises twice with one BatchNorm"),
        (switchable.Another, Unequal, "NF552.*holds the constants and differs"),
        (switchable.Numbered, Unfit, "no argument that switches"),
        (switchable.Pooled, NotGiven, "NF550.*no norm"),
    ],
)
def test_what_no_library_holds_is_refused_and_nothing_is_left(tmp_path, factory, kind, says):
    """No switch, a switch to another network, or a statistic that is no norm: refused with the reason."""
    done = converted(factory)
    with pytest.raises(kind, match=says):
        normfix.give_back(done, tmp_path / "back", f"switchable:{factory.__name__}")
    assert list(tmp_path.iterdir()) == []


def test_a_switch_that_is_named_is_taken(tmp_path):
    """What nobody can guess is said: switch={"kind": 1}."""
    record, _ = given(
        converted(switchable.Numbered), tmp_path / "back", switchable.Numbered, switch={"kind": 1}
    )
    assert record.changes[0].line == "+ arguments.json: kind = 1"


def test_what_stays_live_is_refused(tmp_path):
    """A site that was kept would be live in the library too."""
    network = switchable.generator().eval()
    done = normfix.convert(network, IMAGE, keep=["1"])
    with pytest.raises(NotGiven, match="stay live"):
        normfix.give_back(done, tmp_path / "back", "switchable:generator")


def test_batchrenorm_in_train_mode_is_refused(tmp_path):
    """BatchRenorm that trains follows the batch; what it will be is not known."""
    model = copy.deepcopy(converted(switchable.generator, to="batchrenorm").model).train()
    with pytest.raises(NotGiven, match="train mode"):
        normfix.give_back(model, tmp_path / "back", "switchable:generator")


def test_what_normfix_did_not_convert_is_refused(tmp_path):
    """A network without a plan has no constants."""
    with pytest.raises(NotGiven, match="did not convert it"):
        normfix.give_back(switchable.generator(), tmp_path / "back", "switchable:generator")


def test_a_network_without_a_source_is_refused(tmp_path):
    """Without a factory no library can be asked for the network."""
    with pytest.raises(NotGiven, match="what builds it"):
        normfix.give_back(converted(switchable.generator), tmp_path / "back")


def test_nothing_is_written_over(tmp_path):
    """A folder that exists is NF114 and stays as it is."""
    (tmp_path / "back").mkdir()
    with pytest.raises(normfix.NormfixError, match="NF114"):
        normfix.give_back(converted(switchable.generator), tmp_path / "back", "switchable:generator")
    assert list((tmp_path / "back").iterdir()) == []


@pytest.mark.parametrize("change", [0.1, 1e-6])
def test_a_weight_that_was_changed_in_the_file_is_caught(tmp_path, monkeypatch, change):
    """Negative control: one changed weight in what was written, be it by a rounding, and nothing appears."""
    write = plain.write

    def spoiled(draft, gift):
        changes = write(draft, gift)
        state = torch.load(draft / plain.WEIGHTS, weights_only=True)
        state["0.weight"][0, 0, 0, 0] += change
        torch.save(state, draft / plain.WEIGHTS)
        return changes

    monkeypatch.setattr(plain, "write", spoiled)
    with pytest.raises(NotAlone, match="differs by"):
        normfix.give_back(converted(switchable.generator), tmp_path / "back", "switchable:generator")
    assert list(tmp_path.iterdir()) == []


@pytest.mark.slow
def test_a_missing_weight_is_caught_in_the_fresh_process(tmp_path, monkeypatch):
    """Negative control: the library loads strictly, in a process that cannot import normfix."""
    write = plain.write

    def spoiled(draft, gift):
        changes = write(draft, gift)
        state = torch.load(draft / plain.WEIGHTS, weights_only=True)
        del state["1.running_mean"]
        torch.save(state, draft / plain.WEIGHTS)
        return changes

    monkeypatch.setattr(plain, "write", spoiled)
    with pytest.raises(NotAlone, match=r"NF554.*does not load"):
        normfix.give_back(converted(switchable.generator), tmp_path / "back", "switchable:generator")


@pytest.mark.cold
@pytest.mark.slow
def test_the_fresh_process_cannot_import_normfix(tmp_path, monkeypatch):
    """Negative control: a loader that imports normfix fails there."""
    monkeypatch.setattr(plain, "LOADER", f"import normfix\n{plain.LOADER}")
    with pytest.raises(NotAlone, match="normfix"):
        normfix.give_back(converted(switchable.generator), tmp_path / "back", "switchable:generator")


@pytest.mark.slow
def test_the_files_load_in_a_fresh_process_without_normfix(tmp_path):
    """The library alone, in a process of its own, gives the converted network's output."""
    record = normfix.give_back(converted(switchable.generator), tmp_path / "back", "switchable:generator")
    assert record.alone_sd < 1e-4


def test_the_readme_says_what_a_tool_must_be_told(tmp_path):
    """Halo, stride, exact sizes, scaling, train mode and what differs stand in the folder."""
    record, _ = given(converted(switchable.generator), tmp_path / "back", switchable.generator)
    text = (tmp_path / "back" / "README.md").read_text()
    halo = "(6, 6), (6, 6)"
    assert all(
        word in text
        for word in (halo, "multiples of 1, 1", "eval()", 'norm = "batch"', "- model.pth: 0.bias")
    )
    assert normfix.GivenBack.loads(record.dumps()) == record


def test_the_callers_network_is_not_modified(tmp_path):
    """Its state and its mode are what they were."""
    done = converted(switchable.generator)
    before = {name: tensor.clone() for name, tensor in done.model.state_dict().items()}
    given(done, tmp_path / "back", switchable.generator)
    assert not done.model.training
    assert all(torch.equal(tensor, before[name]) for name, tensor in done.model.state_dict().items())


@pytest.fixture
def planted(tmp_path, monkeypatch):
    """Put a module where this process looks, and stand beside another: whatever imports one leaves a mark."""
    for folder in (tmp_path / "here", tmp_path / "path"):
        folder.mkdir()
        mark = tmp_path / f"ran-{folder.name}"
        text = f"open({str(mark)!r}, 'w').close()\ndef net(norm='instance'): raise SystemExit\n"
        for name in ("planted", "safetensors" if folder.name == "here" else "planted"):
            (folder / f"{name}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path / "path")
    monkeypatch.chdir(tmp_path / "here")
    return lambda: [path.name for path in tmp_path.glob("ran-*")]


def test_the_fresh_process_does_not_import_from_the_working_directory(tmp_path, planted):
    """A safetensors.py in the folder that one stands in is not run."""
    given(converted(switchable.generator), tmp_path / "back", switchable.generator)
    assert not planted()


def test_a_bundle_given_back_runs_none_of_its_expressions(tmp_path, planted):
    """MONAI's parser would run every import in a configuration, and what stands under a name within the network."""
    network = originals.bundle(tmp_path / "bundle")
    path = tmp_path / "bundle" / "configs" / "inference.json"
    config = {"imports": ["$import planted"], "network_def#norm": "$__import__('planted').norm"}
    path.write_text(json.dumps(config | json.loads(path.read_text()) | {"imports": ["$import planted"]}))
    assert network is not None
    done = normfix.convert(normfix.load(tmp_path / "bundle"), IMAGE)
    normfix.give_back(done, tmp_path / "back", original=tmp_path / "bundle")
    assert not planted()


def test_a_module_that_is_planted_leaves_its_mark(planted):
    """Control: what these tests look for is seen when the module is imported."""
    __import__("planted")
    assert planted() == ["ran-path"]


def _claiming(path, spec, args):
    """Write a converted program whose file names another factory, with its checksum put right."""
    normfix.save(converted(switchable.generator), path)
    with zipfile.ZipFile(path) as archive:
        members = {info: archive.read(info) for info in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for info, data in members.items():
            if info.filename.endswith("normfix.json"):
                manifest = json.loads(data)
                manifest["provenance"]["source"] |= {
                    "kind": "factory",
                    "spec": spec,
                    "args": json.dumps(args),
                }
                data = json.dumps(manifest | {"statement": statement_of(manifest)}).encode()
            archive.writestr(info, data)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(
    ("spec", "args"),
    [
        ("planted:net", {"norm": "instance"}),
        ("monai.networks.utils:save_state", {"src": {}, "path": "ran-state"}),
    ],
)
def test_a_factory_that_only_a_program_names_is_not_called(tmp_path, planted, spec, args):
    """Nothing was built to open it, so giving it back does not call, or import, what its file names: NF550."""
    network = normfix.load(_claiming(tmp_path / "p.pt2", spec, args))
    with pytest.raises(NotGiven, match="NF550"):
        normfix.give_back(network, tmp_path / "back")
    assert not planted()
    assert not list(tmp_path.rglob("ran-state"))


@pytest.mark.slow
@pytest.mark.parametrize("way", ["model", "arch"])
def test_a_factory_that_only_a_folder_names_is_not_called_to_read_it_back(tmp_path, planted, way):
    """Opened with the caller's own network, a folder is saved again without calling what it names."""
    normfix.save(converted(switchable.generator), tmp_path / "saved")
    path = tmp_path / "saved" / "normfix.json"
    manifest = json.loads(path.read_text())
    manifest["provenance"]["source"] |= {"kind": "factory", "spec": "planted:net"}
    path.write_text(json.dumps(manifest | {"statement": statement_of(manifest)}))
    own = {"model": {"model": switchable.generator()}, "arch": {"arch": "switchable:generator"}}
    normfix.save(normfix.load(tmp_path / "saved", **own[way]), tmp_path / "again")
    assert not planted()
    source = json.loads((tmp_path / "again" / "normfix.json").read_text())["provenance"]["source"]
    assert (source["kind"], source["spec"]) == (
        ("object", "planted:net") if way == "model" else ("factory", "switchable:generator")
    )
