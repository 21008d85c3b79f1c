"""Importing normfix and asking for help does not wait for torch."""

import subprocess
import sys

import pytest


def modules_after(statement: str) -> set[str]:
    """Return the top-level modules a fresh Python holds after a statement."""
    script = (
        f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\n"
        "print('\\n' + ' '.join(sorted({name.partition('.')[0] for name in sys.modules})))"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    return set(done.stdout.splitlines()[-1].split())


@pytest.mark.parametrize(
    "statement",
    [
        "import normfix",
        "import normfix.cli",
        "import normfix.records.sites, normfix.errors",
        "import normfix.cli; sys.argv = ['normfix', '--help']; normfix.cli.main()",
        "import normfix.cli; sys.argv = ['normfix', 'convert', '--help']; normfix.cli.main()",
        "import normfix.cli; sys.argv = ['normfix', 'explain', 'NF203']; normfix.cli.main()",
        "import normfix.cli; sys.argv = ['normfix', 'convert', 'm.pt', 'i.tif', '-o', 'o']; normfix.cli.main()",
        "import normfix.cli; sys.argv = 'normfix convert m i.tif --to frozen -o o --scale minmax'.split(); "
        "normfix.cli.main()",
        "import normfix.cli; sys.argv = 'normfix check m.pt i.tif --scale percentile:9'.split(); normfix.cli.main()",
        "import normfix.cli; sys.argv = 'normfix check m.pt i.tif --report r.txt'.split(); normfix.cli.main()",
        "import normfix.cli; sys.argv = 'normfix predict m i.tif -o p.tif --scale unit --preprocess a:b'.split(); "
        "normfix.cli.main()",
        "import normfix.cli; sys.argv = 'normfix predict m i.tif -o p.tif --tile 8,x'.split(); normfix.cli.main()",
    ],
)
def test_torch_is_not_imported(statement):
    """Import, help, explanations and usage errors need neither torch nor numpy."""
    assert not modules_after(statement) & {"torch", "numpy", "matplotlib"}


@pytest.mark.slow
def test_the_guard_notices_torch():
    """Negative control: the same check sees a planted import."""
    assert "torch" in modules_after("import normfix, torch")


def test_every_public_name_resolves():
    """Each name in __all__ leads to an object."""
    import normfix

    assert all(getattr(normfix, name) is not None for name in normfix.__all__)


def test_an_unknown_name_is_an_attribute_error():
    """A typing mistake is reported as Python does."""
    import normfix

    with pytest.raises(AttributeError, match="covnert"):
        normfix.covnert  # noqa: B018 - the access is the test


def test_dir_lists_the_public_names():
    """Completion shows exactly what is public."""
    import normfix

    assert dir(normfix) == normfix.__all__
