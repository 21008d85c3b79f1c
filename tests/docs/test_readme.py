"""What README and docs show is executed, as a reader would: page by page, from top to bottom, in an empty folder."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from pages import ROOT, blocks, shown

pytestmark = pytest.mark.slow

README = ROOT / "README.md"
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]
PROGRAMS = Path(sys.executable).parent


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_a_page_can_be_followed(page, tmp_path, monkeypatch, capsys):
    """Every normfix command exits with 0 and every Python block runs, in order, and prints what the README says."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("PATH", f"{PROGRAMS}{os.pathsep}{os.environ['PATH']}")
    namespace = {}
    for language, text in shown(page, "sh", "python"):
        if language == "python":
            exec(compile(text, str(page), "exec"), namespace)
            printed = capsys.readouterr().out.splitlines()
            if page == README:
                assert printed == re.findall(r"print\(.*\)  # (.*)$", text, re.MULTILINE) != []
            continue
        for line in text.splitlines():
            if line.startswith("normfix "):
                done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
                assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_program_is_installed_where_pages_are_followed():
    """Else the shell would not find it, and a page without Python would be followed by nobody."""
    assert any((PROGRAMS / name).exists() for name in ("normfix", "normfix.exe"))


def test_first_commands():
    """README starts with the two commands that CI takes from it."""
    commands = [line for block in blocks(README, "sh") for line in block.splitlines()]
    assert commands[:2] == ['pip install ".[demo]" && normfix demo', 'pip install -e ".[test]" && pytest']
