"""What people have opens, what does not is named, and nothing in a file runs unasked."""

import pickle
import sys
import types

import pytest
import torch
from factories import TinyUNet, Wrapped, tiny_unet
from payloads import Payload
from safetensors.torch import save_file

import normfix
from normfix.errors import NormfixError
from normfix.records.saved import Source
from normfix.storage.opening import open_model, open_path
from normfix.storage.opening.request import Request
from normfix.storage.opening.tensors import read_weights

ARCH = "factories:tiny_unet"
IMAGE = torch.linspace(-1, 1, 256).reshape(1, 1, 16, 16)


def refusal(function, *args, **options) -> NormfixError:
    """Return the error a call gives, which must be one paragraph."""
    with pytest.raises(NormfixError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def factory(spec: str, args: str = "{}") -> Source:
    """Return the source that a saved folder would name."""
    return Source(kind="factory", spec=spec, args=args)


def trained() -> TinyUNet:
    """Return a network with other weights than its factory gives."""
    model = tiny_unet()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5)
    return model


def assert_same(actual, expected):
    """Two networks give the same."""
    torch.testing.assert_close(actual(IMAGE), expected(IMAGE), rtol=0, atol=0)


def state(prefix: str = "", model=None) -> dict[str, torch.Tensor]:
    """Return a state dict whose names have a prefix."""
    return {prefix + name: tensor for name, tensor in (model or trained()).state_dict().items()}


@pytest.mark.parametrize(
    "content",
    [
        state(),
        {"state_dict": state(), "epoch": 3},
        {"model_state_dict": state(), "optimizer": {"lr": 0.1}},
        {"model": state()},
        state("module."),
        state("_orig_mod."),
        state("module._orig_mod."),
        state("_orig_mod.module."),
        {"state_dict": state("module.")},
    ],
    ids=["bare", "lightning", "tutorial", "model", "dp", "compiled", "dp(c)", "c(dp)", "nested dp"],
)
def test_a_state_dict_loads_into_its_architecture(tmp_path, content):
    """State dicts bare, nested and from wrappers give the network they were saved from."""
    torch.save(content, tmp_path / "w.pt")
    assert_same(open_model(str(tmp_path / "w.pt"), arch=ARCH).model, trained())


def test_an_empty_name_is_not_the_working_directory(tmp_path, monkeypatch):
    """A network that was saved there is not opened by a name that was left empty by mistake."""
    image = torch.rand(1, 1, 32, 32)
    normfix.save(normfix.convert(tiny_unet(), image), tmp_path / "saved", source=ARCH)
    monkeypatch.chdir(tmp_path / "saved")
    assert normfix.load(".", arch=ARCH)(image).shape == image.shape
    assert refusal(normfix.load, "", arch=ARCH).code == "NF101"


def test_a_prefix_that_the_network_has_is_kept(tmp_path):
    """A network whose own names begin with module. loads its own weights."""
    torch.save(state(model=Wrapped()), tmp_path / "w.pt")
    assert_same(open_model(str(tmp_path / "w.pt"), arch="factories:Wrapped").model, Wrapped())


def test_safetensors_load_into_their_architecture(tmp_path):
    """A .safetensors file gives the network it was saved from."""
    save_file(state(), tmp_path / "w.safetensors")
    assert_same(open_model(str(tmp_path / "w.safetensors"), arch=ARCH).model, trained())


def test_a_state_dict_in_the_old_format_loads(tmp_path):
    """Files from before torch 1.6 are read, running nothing."""
    torch.save(state(), tmp_path / "w.pth", _use_new_zipfile_serialization=False)
    assert_same(open_model(str(tmp_path / "w.pth"), arch=ARCH).model, trained())


def test_the_source_remembers_arch_and_arguments(tmp_path):
    """Where the architecture came from travels on, byte for byte the same for equal arguments."""
    torch.save(state(model=tiny_unet(2, 3)), tmp_path / "w.pt")
    source = open_model(str(tmp_path / "w.pt"), arch=ARCH, arch_args={"width": 3, "channels": 2}).source
    assert source == factory(ARCH, '{"channels": 2, "width": 3}')


def test_weights_without_an_architecture_are_refused(tmp_path):
    """A state dict alone is NF112, which says how to name the network."""
    torch.save(state(), tmp_path / "w.pt")
    error = refusal(open_model, str(tmp_path / "w.pt"))
    assert (error.code, "--arch" in error.message) == ("NF112", True)


def test_missing_and_unexpected_names_are_listed(tmp_path):
    """Weights of another network are NF105, naming what is missing and what is too much."""
    weights = state()
    weights["other.weight"] = weights.pop("head.weight")
    torch.save(weights, tmp_path / "w.pt")
    error = refusal(open_model, str(tmp_path / "w.pt"), arch=ARCH)
    assert error.code == "NF105"
    assert "1 missing (head.weight)" in error.message
    assert "1 unexpected (other.weight)" in error.message


def test_a_shape_that_does_not_fit_is_named(tmp_path):
    """Wrong --arch-args are NF105 with the tensor and both shapes."""
    torch.save(state(), tmp_path / "w.pt")
    error = refusal(open_model, str(tmp_path / "w.pt"), arch=ARCH, arch_args={"channels": 3})
    assert error.code == "NF105"
    assert "first.0.weight" in error.message
    assert "[4, 3, 3, 3]" in error.message


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickled_module_is_listed_and_refused(tmp_path, zipped):
    """A pickled module without trust is NF102, which names the classes it would import."""
    torch.save(trained(), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    error = refusal(open_model, str(tmp_path / "m.pt"))
    assert (error.code, "factories.TinyUNet" in error.message) == ("NF102", True)
    error = refusal(open_model, str(tmp_path / "m.pt"), allow_classes=("factories.TinyUNet",))
    assert (error.code, "factories.TinyUNet" in error.message) == ("NF102", False), (
        "what is allowed is not missing"
    )


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_pickle_runs_nothing_without_trust(tmp_path, zipped):
    """A hostile pickle is refused with what it would call, and does not call it."""
    torch.save(Payload(tmp_path), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    error = refusal(open_model, str(tmp_path / "m.pt"))
    assert (error.code, "getattr" in error.message) == ("NF102", True)
    assert not (tmp_path / "ran").exists()


def test_a_plain_pickle_is_not_even_opened(tmp_path):
    """What torch.save did not write is NF101 also with trust, and does not run."""
    (tmp_path / "m.pkl").write_bytes(pickle.dumps(Payload(tmp_path)))
    assert refusal(open_model, str(tmp_path / "m.pkl"), trust_pickle=True).code == "NF101"
    assert not (tmp_path / "ran").exists()


def test_the_payload_runs_when_trusted(tmp_path):
    """Negative control: the same payload does run once the caller trusts it."""
    torch.save(Payload(tmp_path), tmp_path / "m.pt")
    refusal(open_model, str(tmp_path / "m.pt"), trust_pickle=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.slow
@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_a_trusted_pickle_gives_its_network(tmp_path, zipped):
    """With trust, a pickled module is the network that was pickled."""
    torch.save(trained(), tmp_path / "m.pt", _use_new_zipfile_serialization=zipped)
    opened = open_model(str(tmp_path / "m.pt"), trust_pickle=True)
    assert opened.source == Source(kind="object", spec="factories:TinyUNet")
    assert_same(opened.model, trained())


@pytest.mark.parametrize("part", [0.0, 0.001, 0.3, 0.9, 0.999])
@pytest.mark.parametrize("name", ["w.pt", "w.safetensors", "old.pth"])
def test_a_truncated_file_is_refused(tmp_path, name, part):
    """Weights cut short are NF101, never half loaded."""
    path = tmp_path / name
    if name == "w.safetensors":
        save_file(state(), path)
    else:
        torch.save(state(), path, _use_new_zipfile_serialization=name == "w.pt")
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * part)])
    assert refusal(open_model, str(path), arch=ARCH).code in {"NF101", "NF102"}


def test_a_flipped_bit_never_changes_weights_unnoticed(tmp_path):
    """Of a torch archive with one bit flipped, either all weights are right or it is refused as what is wrong."""
    path, codes = tmp_path / "w.pt", set()
    torch.save(state(), path)
    data = path.read_bytes()
    for place in range(0, len(data), 29):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x20]) + data[place + 1 :])
        try:
            assert_same(open_model(str(path), arch=ARCH).model, trained())
        except NormfixError as error:
            codes.add(error.code)
    assert codes <= {"NF101", "NF105", "NF121"}
    assert "NF101" in codes


def test_a_flipped_bit_in_a_safetensors_header_is_refused(tmp_path):
    """No flip in the header gives anything but the weights, NF101 or NF105."""
    path = tmp_path / "w.safetensors"
    save_file(state(), path)
    data = path.read_bytes()
    for place in range(8 + int.from_bytes(data[:8], "little")):
        path.write_bytes(data[:place] + bytes([data[place] ^ 0x04]) + data[place + 1 :])
        try:
            open_model(str(path), arch=ARCH)
        except NormfixError as error:
            assert error.code in {"NF101", "NF105"}  # noqa: PT017 - success is allowed too


@pytest.mark.filterwarnings("ignore")  # tracing warns about itself in several ways
@pytest.mark.parametrize("trust", [True, False])
def test_a_torchscript_file_is_named_as_such(tmp_path, trust):
    """A TorchScript program is NF123, which says what it is and what to save instead."""
    torch.jit.trace(tiny_unet(), IMAGE).save(str(tmp_path / "m.pt"))
    error = refusal(open_model, str(tmp_path / "m.pt"), trust_pickle=trust)
    assert (error.code, "state_dict()" in error.message) == ("NF123", True)


@pytest.mark.parametrize("content", [{}, {"a": 1}, torch.ones(3), [1], {"state_dict": {}}])
def test_a_file_without_weights_is_refused(tmp_path, content):
    """A torch file with something else in it is NF101."""
    torch.save(content, tmp_path / "w.pt")
    assert refusal(open_model, str(tmp_path / "w.pt"), arch=ARCH).code == "NF101"


@pytest.mark.parametrize("spec", ["", ".", "missing.pt", "text.pt", "x" * 5000, "a b:c", "no/such/dir"])
def test_what_is_no_network_is_refused(tmp_path, monkeypatch, spec):
    """A missing file, a text file, a folder without normfix.json and impossible names are NF101."""
    (tmp_path / "text.pt").write_text("hello")
    monkeypatch.chdir(tmp_path)
    assert refusal(open_model, spec).code == "NF101"


def test_a_missing_safetensors_file_is_refused(tmp_path):
    """Reading weights that are not there is NF101."""
    assert refusal(read_weights, tmp_path / "missing.safetensors").code == "NF101"


@pytest.mark.parametrize(
    "spec",
    ["factories:nope", "nowhere:x", "factories:failing", "factories:no_network", "timm:no_such_network"]
    + ["factories:tiny_unet.nope", "os:getcwd", "sys:exit.nope"],
)
def test_a_factory_that_does_not_work_is_refused(spec):
    """What cannot be imported, fails, or returns no network is NF111."""
    assert refusal(open_model, spec).code == "NF111"


def test_a_name_that_timm_has_not_comes_with_those_like_it():
    """A slip in a name of timm's is answered with the name; one like none with where they are listed."""
    pytest.importorskip("timm")
    assert "Did you mean timm:resnet18 or" in refusal(open_model, "timm:resnet188").message
    assert "timm.list_models()" in refusal(open_model, "timm:qqqqqqqq").message


def test_wrong_arguments_of_a_factory_are_refused():
    """An argument that the factory does not take is NF111 and named."""
    error = refusal(open_model, ARCH, arch_args={"chanels": 1})
    assert (error.code, "chanels" in error.message) == ("NF111", True)


def test_arguments_that_are_no_json_are_refused():
    """An argument that could not travel with the network is NF111."""
    assert refusal(open_model, ARCH, arch_args={"norm": torch.nn.ReLU}).code == "NF111"


def test_a_factory_of_the_callers_is_called_with_its_arguments():
    """pkg.mod:factory with arguments builds that network."""
    assert open_model(ARCH, arch_args={"width": 6}).model.head.in_channels == 12


def test_an_architecture_beside_one_is_said_to_be_unused():
    """MODEL names the network itself; the same name twice, as a project's settings may say it, is nothing to tell."""
    (note,) = open_model(ARCH, arch="timm:test_resnet").notes
    assert "timm:test_resnet (--arch, arch=) is not used" in note
    assert open_model(ARCH, arch=ARCH).notes == open_model(ARCH).notes == ()


def test_a_timm_name_builds_that_network():
    """timm:NAME gives timm's network, and a note that its weights are random."""
    opened = open_model("timm:test_resnet")
    assert type(opened.model).__name__ == "ResNet"
    assert "random weights" in opened.notes[0]


CLASSES = ("factories.TinyUNet", "torch.nn.*")


def test_allowed_classes_build_a_pickled_module(tmp_path):
    """With its classes allowed, a pickled module opens in torch's safe mode, without trust."""
    torch.save(trained(), tmp_path / "m.pt")
    assert_same(open_model(str(tmp_path / "m.pt"), allow_classes=CLASSES).model, trained())


def test_one_class_too_few_is_refused(tmp_path):
    """Negative control: allowing only some of its classes is NF102."""
    torch.save(trained(), tmp_path / "m.pt")
    assert refusal(open_model, str(tmp_path / "m.pt"), allow_classes=("torch.nn.*",)).code == "NF102"


@pytest.mark.parametrize("pattern", ["builtins.*", "__builtin__.getattr", "builtins.getattr"])
def test_a_function_cannot_be_allowed(tmp_path, pattern):
    """A payload that calls a function is refused although its name is allowed, and does not run."""
    torch.save(Payload(tmp_path), tmp_path / "m.pt")
    allowed = (pattern, "pathlib.*", "pathlib.PosixPath")
    assert refusal(open_model, str(tmp_path / "m.pt"), allow_classes=allowed).code in {"NF102", "NF122"}
    assert not (tmp_path / "ran").exists()


def test_what_a_trusted_pickle_imports_is_said_before_it_runs(tmp_path):
    """The listing comes first: when it is said, nothing has run."""
    heard = []
    torch.save(Payload(tmp_path), tmp_path / "m.pt")
    request = Request(trust_pickle=True, tell=lambda text: heard.append((text, (tmp_path / "ran").exists())))
    with pytest.raises(NormfixError):
        open_path(tmp_path / "m.pt", request)
    ((text, ran),) = heard
    assert ("getattr" in text, ran, (tmp_path / "ran").exists()) == (True, False, True)


def test_two_fitting_sets_of_weights_are_named(tmp_path):
    """Weights and their moving average are NF119; --weights takes either, and says what it took."""
    averaged = {name: tensor * 2 for name, tensor in state().items()}
    torch.save(
        {"model": state(), "ema": averaged, "optimizer": {"state": {0: {"m": torch.ones(1)}}}},
        tmp_path / "w.pt",
    )
    error = refusal(open_model, str(tmp_path / "w.pt"), arch=ARCH)
    assert (error.code, "model, ema" in error.message) == ("NF119", True)
    opened = open_model(str(tmp_path / "w.pt"), arch=ARCH, weights="ema")
    assert torch.equal(opened.model.head.weight, averaged["head.weight"])
    assert "took ema" in opened.notes[0]


def test_a_choice_that_is_not_there_is_refused(tmp_path):
    """--weights with an unknown name is NF119, naming what there is."""
    torch.save({"model": state()}, tmp_path / "w.pt")
    error = refusal(open_model, str(tmp_path / "w.pt"), arch=ARCH, weights="ema")
    assert (error.code, "model" in error.message) == ("NF119", True)


def test_a_choice_of_weights_where_there_is_none_is_refused(tmp_path):
    """A factory, and a folder that normfix saved, have no sets of weights that a choice could count for: NF119."""
    image = torch.rand(1, 1, 32, 32)
    normfix.save(normfix.convert(tiny_unet(), image), tmp_path / "fixed", source=ARCH)
    for spec, arch in ((ARCH, None), (str(tmp_path / "fixed"), ARCH)):
        assert refusal(normfix.load, spec, arch=arch, weights="ema").code == "NF119"
        assert normfix.load(spec, arch=arch) is not None


def test_the_one_fitting_set_of_weights_is_taken_and_said(tmp_path):
    """Of generator and discriminator, the one that fits the named network is loaded, with a note."""
    torch.save({"critic": {"w": torch.ones(1)}, "generator": state()}, tmp_path / "w.pt")
    opened = open_model(str(tmp_path / "w.pt"), arch=ARCH)
    assert_same(opened.model, trained())
    assert "took generator" in opened.notes[0]


def test_a_network_inside_another_is_found_and_the_rest_said(tmp_path):
    """Weights under a prefix are loaded, and names outside of it are listed, never silently dropped."""
    torch.save(state("model.net.") | {"loss.weight": torch.ones(2)}, tmp_path / "w.pt")
    opened = open_model(str(tmp_path / "w.pt"), arch=ARCH)
    assert_same(opened.model, trained())
    assert "loss.weight" in opened.notes[-1]


def test_a_student_and_a_teacher_are_named(tmp_path):
    """Two networks under two prefixes are NF119; --weights takes either."""
    doubled = {"teacher." + name: tensor * 2 for name, tensor in state().items()}
    torch.save(state("student.") | doubled, tmp_path / "w.pt")
    assert refusal(open_model, str(tmp_path / "w.pt"), arch=ARCH).code == "NF119"
    assert_same(open_model(str(tmp_path / "w.pt"), arch=ARCH, weights="student").model, trained())


def test_an_averaged_model_of_torch_opens(tmp_path):
    """torch.optim.swa_utils.AveragedModel puts module. before every name and adds a counter."""
    averaged = torch.optim.swa_utils.AveragedModel(trained())
    torch.save(averaged.state_dict(), tmp_path / "w.pt")
    assert_same(open_model(str(tmp_path / "w.pt"), arch=ARCH).model, trained())


def test_a_compiled_part_of_a_network_opens(tmp_path):
    """Names that torch.compile changed in the middle are found."""
    weights = {name.replace("first.", "first._orig_mod."): tensor for name, tensor in state().items()}
    torch.save(weights, tmp_path / "w.pt")
    assert_same(open_model(str(tmp_path / "w.pt"), arch=ARCH).model, trained())


def test_a_leftover_inside_the_network_is_refused(tmp_path):
    """Negative control: a name beside the network's own is no leftover of a wrapper but NF105."""
    torch.save(state() | {"extra.weight": torch.ones(1)}, tmp_path / "w.pt")
    assert refusal(open_model, str(tmp_path / "w.pt"), arch=ARCH).code == "NF105"


@pytest.mark.parametrize("prefix", ["module._orig_mod.", "_orig_mod.module.", "model.module._orig_mod."])
def test_stacked_prefixes_are_found(tmp_path, prefix):
    """DataParallel, torch.compile and Lightning around one another, in any order, are taken off."""
    model = tiny_unet()
    state = {prefix + name: tensor + 1 for name, tensor in model.state_dict().items()}
    torch.save({"state_dict": state}, tmp_path / "w.pt")
    opened = open_model(str(tmp_path / "w.pt"), arch=ARCH).model
    assert all(torch.equal(t, model.state_dict()[n] + 1) for n, t in opened.state_dict().items())


def test_a_prefix_before_half_of_the_names_is_refused(tmp_path):
    """Names of which only some have a prefix are NF105, not filled in part."""
    state = {("module." if i % 2 else "") + n: t for i, (n, t) in enumerate(tiny_unet().state_dict().items())}
    torch.save(state, tmp_path / "w.pt")
    assert refusal(open_model, str(tmp_path / "w.pt"), arch=ARCH).code == "NF105"


@pytest.mark.parametrize("content", ["nested", "prefixed"])
def test_an_average_is_chosen_by_the_name_of_what_holds_it(tmp_path, content):
    """--weights ema finds ema.shadow, and ema.module. before the names, as well as their full names do."""
    state = tiny_unet().state_dict()
    average = {name: tensor + 1 for name, tensor in state.items()}
    nested = {"ema": {"decay": 0.9, "shadow": average}, "model": state}
    prefixed = {f"model.{n}": t for n, t in state.items()} | {
        f"ema.module.{n}": t for n, t in average.items()
    }
    torch.save(nested if content == "nested" else prefixed, tmp_path / "w.pt")
    opened = open_model(str(tmp_path / "w.pt"), arch=ARCH, weights="ema").model
    assert all(torch.equal(tensor, average[name]) for name, tensor in opened.state_dict().items())


@pytest.mark.parametrize("dtype", [torch.int8, torch.complex64, torch.bool])
def test_weights_that_lost_their_scale_are_refused(tmp_path, dtype):
    """Integers or complex numbers for real weights are NF105: torch would copy them without scale or half."""
    state = {name: tensor.to(dtype) for name, tensor in tiny_unet().state_dict().items()}
    torch.save(state, tmp_path / "w.pt")
    assert refusal(open_model, str(tmp_path / "w.pt"), arch=ARCH).code == "NF105"


def test_a_revision_of_a_file_is_refused(tmp_path):
    """A revision of what is no repository is NF125, from open_model and from load."""
    torch.save(tiny_unet().state_dict(), tmp_path / "w.pt")
    for function in (open_model, normfix.load):
        error = refusal(function, str(tmp_path / "w.pt"), arch=ARCH, revision="v1")
        assert (error.code, "v1" in error.message) == ("NF125", True)


def test_names_in_a_file_do_not_steer_the_terminal(tmp_path):
    """Escape sequences and line ends in names of weights, and of files, are shown as such."""
    path = tmp_path / "a\nb.pt"
    torch.save({"\x1b[2Jw": torch.ones(1)}, path)
    error = refusal(open_model, str(path))
    assert error.code == "NF112"
    assert str(error).isprintable()


def test_a_network_pickled_with_another_version_says_so(tmp_path, monkeypatch):
    """What a trusted pickle names and a package no longer has is NF111 with the way out, not a damaged file."""
    moved = types.ModuleType("moved_since")
    moved.Net = type("Net", (torch.nn.Linear,), {"__module__": "moved_since"})
    monkeypatch.setitem(sys.modules, "moved_since", moved)
    torch.save(moved.Net(2, 2), tmp_path / "whole.pt")
    monkeypatch.setitem(sys.modules, "moved_since", types.ModuleType("moved_since"))
    error = refusal(open_model, str(tmp_path / "whole.pt"), trust_pickle=True)
    assert (error.code, "as they were" in error.message) == ("NF111", True)


@pytest.mark.parametrize("given", [tiny_unet, TinyUNet, lambda: tiny_unet(), tiny_unet(), ARCH])
def test_an_architecture_is_named_by_what_the_caller_has(tmp_path, given):
    """A function, a class, a lambda, the network itself or a name: the same network."""
    model = trained()
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert_same(normfix.load(tmp_path / "weights.pth", arch=given).eval(), model.eval())


def test_a_given_network_is_filled_and_left_alone(tmp_path):
    """`model=` counts for weights too, and the caller's network keeps its own."""
    model, mine = trained(), tiny_unet()
    before = {name: tensor.clone() for name, tensor in mine.state_dict().items()}
    torch.save(model.state_dict(), tmp_path / "weights.pth")
    assert_same(normfix.load(tmp_path / "weights.pth", model=mine).eval(), model.eval())
    for name, tensor in mine.state_dict().items():
        torch.testing.assert_close(tensor, before[name], rtol=0, atol=0)


def test_a_given_network_must_fit(tmp_path):
    """Weights of another shape are refused, not left out."""
    torch.save(tiny_unet(width=8).state_dict(), tmp_path / "weights.pth")
    assert refusal(normfix.load, tmp_path / "weights.pth", model=tiny_unet()).code == "NF105"


@pytest.mark.slow
def test_a_saved_folder_may_name_factories_of_trusted_modules_only(tmp_path):
    """A module that the caller trusts, not one whose name begins alike."""
    done = normfix.convert(tiny_unet(), torch.rand(1, 1, 32, 32))
    normfix.save(done, tmp_path / "fixed", source=ARCH)
    assert refusal(normfix.load, tmp_path / "fixed").code == "NF113"
    assert refusal(normfix.load, tmp_path / "fixed", trust=["factor"]).code == "NF113"
    assert_same(normfix.load(tmp_path / "fixed", trust=["factories"]), done.model.eval())


@pytest.mark.parametrize("config", [False, True])
def test_a_folder_says_which_weights_it_holds(tmp_path, config):
    """A folder without the names that libraries use is told of what is there, and of no config that is not."""
    if config:
        (tmp_path / "config.json").write_text('{"architecture": "x"}')
    with pytest.raises(
        NormfixError, match=r"NF101 .*no model\.safetensors and no pytorch_model\.bin\. "
    ) as empty:
        normfix.load(tmp_path, arch="torch.nn:Identity")
    assert "config" not in str(empty.value)
    torch.save({}, tmp_path / "net.pt")
    with pytest.raises(NormfixError, match=r"NF101 .*but net\.pt, of which one may be given"):
        normfix.load(tmp_path, arch="torch.nn:Identity")
