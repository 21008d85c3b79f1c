"""What README and docs show is executed."""

import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from pages import ROOT, blocks

from normfix.cli import cli
from normfix.demo.data import nuclei_image

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page, tmp_path, monkeypatch):
    """Every Python block runs, in the order of the page, and prints what its comments say."""
    monkeypatch.chdir(tmp_path)
    namespace = {}
    for block in blocks(page, "python"):
        exec(compile(block, str(page), "exec"), namespace)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_run(page, tmp_path, monkeypatch):
    """Every normfix command runs and exits with 0, in a folder that holds a real image."""
    import imageio.v3 as iio

    monkeypatch.chdir(tmp_path)
    iio.imwrite("nuclei.png", np.ascontiguousarray(nuclei_image()[:512, :512]))
    commands = [
        line for block in blocks(page, "sh") for line in block.splitlines() if line.startswith("normfix ")
    ]
    for command in commands:
        arguments, _, target = command.partition(" > ")
        assert cli.main(shlex.split(arguments)[1:], standalone_mode=False) in (None, 0), command
        if target:
            Path(target).write_text("{}")


def test_printed_comments_are_true(capsys, tmp_path, monkeypatch):
    """The outputs stated in the README's comments are those printed."""
    monkeypatch.chdir(tmp_path)
    (block,) = blocks(ROOT / "README.md", "python")
    exec(compile(block, "README.md", "exec"), {})
    stated = re.findall(r"print\(.*\)  # (.*)$", block, re.MULTILINE)
    assert capsys.readouterr().out.splitlines() == stated
    assert stated


def test_first_commands():
    """README starts with the two commands that CI takes from it."""
    commands = [line for block in blocks(ROOT / "README.md", "sh") for line in block.splitlines()]
    assert commands[:2] == ['pip install ".[demo]" && normfix demo', 'pip install -e ".[test]" && pytest']
