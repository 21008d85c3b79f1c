"""A file names few factories and no file or address of its choice; the caller names any."""

import sys
import types

import pytest
import torch
from factories import TinyUNet, tiny_unet

from normfix.errors import NormfixError
from normfix.records.saved import Source
from normfix.storage.opening import open_model
from normfix.storage.opening.factories import build, built, rebuild

ARCH = "factories:tiny_unet"


def refusal(function, *args, **options) -> NormfixError:
    """Return the error a call gives, which must be one paragraph."""
    with pytest.raises(NormfixError) as caught:
        function(*args, **options)
    assert "\n" not in str(caught.value)
    return caught.value


def factory(spec: str, args: str = "{}") -> Source:
    """Return the source that a saved folder would name."""
    return Source(kind="factory", spec=spec, args=args)


@pytest.mark.parametrize(
    "spec",
    [
        "os:system",
        "posix:system",
        "builtins:exec",
        "subprocess:run",
        "factories:tiny_unet",
        "torch:load",
        "torch.hub:load",
        "timmy:create_model",
        "normfix.storage.opening.factories:importlib.import_module",
        "normfix.storage.opening:os.system",
        "normfix.storage.opening.pickles:torch.load",
        "normfix.storage.opening.formats.nnunet:open_network",
        "normfix.storage.opening.formats.nnunet:importlib.import_module",
        "normfix.storage.opening:open_model",
        "normfix.storage.opening.factories:build",
        "normfix.storage.opening:build",
        "normfix.api:load",
        "normfix.storage.loading:open_any",
        "normfix.storage.fresh:subprocess.run",
        "normfix.cli:main",
        "normfix.storage.opening:Path.touch",
        "timm.models:load_checkpoint",
        "timm.models._helpers:load_state_dict",
        "timm.models.resnet:nn.Linear",
        "torchvision.datasets.utils:download_url",
        "timm:hf-hub:someone/network",
        "timm:local-dir:/tmp",
        "timm:",
        "",
    ],
)
def test_a_factory_named_by_a_file_is_not_called(spec):
    """A saved folder cannot name anything but network classes and builders: NF113."""
    assert refusal(rebuild, factory(spec)).code == "NF113"


def test_a_factory_named_by_a_file_does_not_run(tmp_path):
    """A folder that names normfix's own opener, which would call os.system, runs nothing."""
    inner = f'{{"spec": "os:system", "arch_args": {{"command": "touch {tmp_path}/ran"}}}}'
    assert refusal(rebuild, factory("normfix.storage.opening:open_model", inner)).code == "NF113"
    assert not (tmp_path / "ran").exists()


def test_the_same_call_runs_when_the_caller_makes_it(tmp_path):
    """Negative control: repeated by the caller, the same words do run."""
    refusal(open_model, "os:system", arch_args={"command": f"touch {tmp_path}/ran"})
    assert (tmp_path / "ran").exists()


def test_an_attribute_imported_into_an_allowed_package_is_not_called(monkeypatch):
    """A function of elsewhere does not become allowed by an import into an allowed package."""
    module = types.ModuleType("timm.models.planted")
    module.build, module.Net = tiny_unet, TinyUNet
    monkeypatch.setitem(sys.modules, "timm.models.planted", module)
    codes = {refusal(rebuild, factory(f"timm.models.planted:{name}")).code for name in ("build", "Net")}
    assert codes == {"NF113"}


@pytest.mark.parametrize(
    "args",
    [
        '{"checkpoint_path": "evil.pth"}',
        '{"pretrained_cfg": {"file": "evil.pth"}}',
        '{"pretrained_cfg_overlay": {"url": "http://127.0.0.1/evil"}}',
        '{"block_args": [{"cache_dir": "/tmp"}]}',
    ],
)
def test_an_argument_that_opens_something_is_not_passed(args):
    """A folder cannot hand an allowed factory a file or address of its choice: NF113."""
    assert refusal(rebuild, factory("timm:test_resnet", args)).code == "NF113"


@pytest.mark.parametrize("args", ["not json", "[1]", "3", "null", "[" * 100000, "NaN"])
def test_arguments_in_a_file_that_are_no_object_are_refused(args):
    """Edited arguments are NF108."""
    assert refusal(build, factory(ARCH, args)).code == "NF108"


@pytest.mark.parametrize(
    ("spec", "name"),
    [
        ("timm:test_resnet", "ResNet"),
        ("timm.models.resnet:resnet10t", "ResNet"),
        ("torchvision.models:squeezenet1_1", "SqueezeNet"),
        ("torchvision.models:SqueezeNet", "SqueezeNet"),
        ("normfix.demo.network:NucleiUNet", "NucleiUNet"),
    ],
)
def test_an_allowed_factory_named_by_a_file_is_called(spec, name):
    """Negative control: networks of the fixed list are built from the file alone."""
    assert type(rebuild(factory(spec))).__name__ == name


def test_pretrained_weights_are_not_fetched_for_a_folder():
    """A folder brings its weights, so a stored pretrained=true fetches none."""
    assert type(rebuild(factory("timm:test_resnet.r160_in1k", '{"pretrained": true}'))).__name__ == "ResNet"


def test_a_factory_the_caller_repeats_is_called_with_the_stored_arguments():
    """Repeating the name alone is enough; the arguments come from the folder."""
    assert rebuild(factory(ARCH, '{"width": 6}'), arch=ARCH).head.in_channels == 12


def test_another_factory_does_not_take_the_stored_arguments():
    """Arguments stored for one factory are not passed to another."""
    assert rebuild(factory("os:system", '{"width": 6}'), arch=ARCH).head.in_channels == 8


def test_an_object_needs_its_network_again():
    """A folder saved from an object is NF113, with both ways to give the network."""
    error = refusal(rebuild, Source(kind="object", spec="factories:TinyUNet"))
    assert (error.code, "model=" in error.message, "arch=" in error.message) == ("NF113", True, True)


class _Unmade(torch.nn.Module):
    """A class whose constructor leaves out that of its base, as one of MONAI's schedulers does."""

    def __init__(self):
        self.steps = 3


def test_a_module_that_was_never_made_is_no_network():
    """Its class alone makes it a module: reading its parameters would fail, wherever that is first done."""
    error = refusal(built, _Unmade, {})
    assert error.code == "NF111"
    assert "nn.Module.__init__" in error.message
    assert built(torch.nn.Identity, {}).training
