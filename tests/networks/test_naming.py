"""What the caller names is found as Python finds it, from the working directory too, and what is not gets a hint."""

import sys

import pytest
from factories import tiny_unet

from normfix.errors import NormfixError
from normfix.networks.naming import name_of, named
from normfix.storage.spec import require_spec

NETWORK = "from torch import nn\n\n\nclass Mine(nn.Identity):\n    pass\n"


@pytest.fixture
def here(tmp_path, monkeypatch):
    """Stand in an empty folder, which an installed script does not search, and forget what is imported from it."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [place for place in sys.path if place])
    before = set(sys.modules)
    yield tmp_path
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def reason(name: str) -> str:
    """Return why a name is not found."""
    with pytest.raises(NormfixError) as caught:
        named(name)
    assert caught.value.code == "NF111"
    assert "install " not in caught.value.message
    return caught.value.message


@pytest.mark.parametrize("name", ["lone_net:Mine", "lone_net.py:Mine", "./lone_net.py:Mine"])
def test_a_module_of_the_working_directory_is_found(here, name):
    """By its module's name or its file's, although nothing has put the folder on the path."""
    (here / "lone_net.py").write_text(NETWORK)
    assert named(name).__name__ == "Mine"


def test_a_file_finds_the_modules_beside_it(here):
    """As a script of that folder would."""
    (here / "far").mkdir()
    (here / "far" / "far_parts.py").write_text(NETWORK)
    (here / "far" / "far_net.py").write_text("from far_parts import Mine\n")
    assert named("far/far_net.py:Mine").__module__ == "far_parts"


def test_a_file_of_a_package_is_imported_as_its_module(here):
    """Relative imports work, and its classes have the name that a pickle would give them."""
    (here / "some_package" / "nets").mkdir(parents=True)
    for place in ("", "nets/"):
        (here / "some_package" / place / "__init__.py").write_text("")
    (here / "some_package" / "parts.py").write_text(NETWORK)
    (here / "some_package" / "nets" / "unet.py").write_text("from ..parts import Mine\n")
    assert named("some_package/nets/unet.py:Mine").__module__ == "some_package.parts"


def test_a_file_whose_name_is_taken_is_still_that_file(here):
    """A network in json.py is not looked for in Python's own."""
    (here / "json.py").write_text(NETWORK)
    assert named("json.py:Mine").__name__ == "Mine"


def test_what_is_installed_comes_before_what_lies_here(here):
    """A planted copy of a library's module is not run where the library is meant."""
    (here / "torch.py").write_text("raise SystemExit\n")
    (here / "factories.py").write_text("raise SystemExit\n")
    assert named("factories:tiny_unet") is tiny_unet


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("Mine", "Did you mean lone_net.py:Mine?"),
        ("lone_net", "module:name"),
        ("lone_nat:Mine", "Did you mean lone_net.py:Mine?"),
        ("lone_nat.py:Mine", "Did you mean lone_net.py:Mine?"),
        ("lone_net:mine", "Did you mean Mine?"),
        ("lone_net:Other", "It defines Mine."),
        ("torchvision:resnet188", "Did you mean torchvision.models:resnet18?"),
        ("torch:InstanceNorm2D", "Did you mean torch.nn:InstanceNorm2d?"),
        ("needs_more:Mine", "imports no_such_library, which is not installed"),
        ("needs_more.py:Mine", "imports no_such_library, which is not installed"),
    ],
)
def test_a_name_that_leads_nowhere_gets_a_hint_and_no_advice_to_install_it(here, name, hint):
    """Whoever follows "install my_model" may install what a stranger called so."""
    (here / "lone_net.py").write_text(NETWORK)
    (here / "needs_more.py").write_text("import no_such_library\n")
    assert hint in reason(name)


def test_a_name_alone_and_a_slip_of_a_file_get_a_hint(here):
    """What is neither a file nor a name of the form module:name is most often one of the two written wrongly."""
    (here / "lone_net.py").write_text(NETWORK)
    (here / "cells_fixed").mkdir()
    for spec, hint in (("Mine", "lone_net.py:Mine"), ("cells_fixd", "cells_fixed")):
        with pytest.raises(NormfixError, match=f"NF101.*Did you mean {hint}"):
            require_spec(spec)


def test_only_what_leads_back_to_a_class_or_function_is_its_name():
    """Functions within functions have none."""
    assert name_of(tiny_unet) == "factories:tiny_unet"
    assert name_of(lambda: tiny_unet()) is None


def test_files_of_which_only_signs_differ_are_two_modules(here):
    """Neither is a name of Python, so both are loaded under one that is made up."""
    for name in ("a-b.py", "a b.py"):
        (here / name).write_text(f"WHERE = {name!r}\n")
    assert [named(f"{here / name}:WHERE") for name in ("a-b.py", "a b.py")] == ["a-b.py", "a b.py"]


@pytest.mark.parametrize(
    ("source", "name"),
    [
        ("import sys\nsys.exit()\n", "ends.py:Net"),
        ("def build():\n    raise SystemExit('0')\n", "ends.py:build"),
        ("from torch.nn import Identity\nnetwork = Identity()\n", "ends.py:network"),
    ],
    ids=["a script", "a factory", "no factory"],
)
def test_code_that_ends_the_program_is_no_success(here, run, source, name):
    """Whoever waits for exit code 0 would take it for a check that passed."""
    (here / "ends.py").write_text(source)
    code, _, error = run("scan", name, "--input", "1x1x8x8")
    assert (code, error[:5]) == (2, "NF111"), error


def test_a_network_that_ends_the_program_is_no_success(here, run):
    """Also where it is only run."""
    (here / "quits.py").write_text(
        "from torch import nn\nclass Net(nn.Identity):\n    def forward(self, x):\n        raise SystemExit\n"
    )
    code, _, error = run("scan", "quits.py:Net", "--input", "1x1x8x8")
    assert (code, error[:5]) == (2, "NF109"), error
