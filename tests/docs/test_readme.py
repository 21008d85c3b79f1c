"""What README and docs show is executed, as a reader would: page by page, from top to bottom, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks, shown

pytestmark = pytest.mark.slow

PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = Path(sys.executable).parent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_can_be_followed(page, tmp_path, monkeypatch):
    """Every normfix command exits with 0 and every Python block runs, in their order, and no name is taken twice."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}")
    namespace = {}
    for language, text in shown(page, "sh", "python"):
        if language == "python":
            exec(compile(text, str(page), "exec"), namespace)
            continue
        for line in text.splitlines():
            if line.startswith("normfix "):
                done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_program_is_installed_where_pages_are_followed():
    """Else the shell would not find it, and a page without Python would be followed by nobody."""
    assert any((PROGRAMS / name).exists() for name in ("normfix", "normfix.exe"))


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
