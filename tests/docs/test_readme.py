"""What README and docs show is executed, as a reader would: page by page, from top to bottom, in an empty folder."""

import hashlib
import os
import re
import shlex
import shutil
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

import imageio.v3
import pytest
from pages import ROOT, blocks, shown
from warm import PROGRAM, warm_program

pytestmark = pytest.mark.slow

README = ROOT / "README.md"
LONG = ("choosing", "programs", "streaming")
PAGES = [README, *sorted((ROOT / "docs").glob("*.md"))]


@pytest.fixture(scope="session")
def kept(tmp_path_factory):
    """Give the folder of what conversions left in this run of the tests, whichever worker ran them."""
    base = tmp_path_factory.getbasetemp()
    folder = (base.parent if "PYTEST_XDIST_WORKER" in os.environ else base) / "converted-on-pages"
    folder.mkdir(exist_ok=True)
    return folder


@pytest.mark.parametrize(
    "page",
    [pytest.param(p, marks=pytest.mark.zoo if p.stem in LONG else ()) for p in PAGES],
    ids=lambda page: page.name,
)
def test_a_page_can_be_followed(page, kept, tmp_path, monkeypatch, capsys):
    """Every normfix command exits with 0 and every Python block runs, in order, and prints what the README says.

    Pages but the README are followed on a quarter of the demo's image. A conversion that several show is run for one.
    """
    monkeypatch.chdir(tmp_path)
    program = PROGRAM if page == README else warm_program()
    monkeypatch.setenv("PATH", f"{program.parent}{os.pathsep}{os.environ['PATH']}")
    namespace = {}
    for language, text in shown(page, "sh", "python"):
        if language == "python":
            exec(compile(text, str(page), "exec"), namespace)
            printed = capsys.readouterr().out.splitlines()
            if page == README:
                assert printed == re.findall(r"print\(.*\)  # (.*)$", text, re.MULTILINE) != []
            continue
        for line in text.splitlines():
            if line.startswith("normfix convert ") and line.endswith(" -o fixed"):
                once(line, kept)
            elif line.startswith("normfix "):
                carry_out(line)
            if line == "normfix demo --image nuclei.png" and page != README:
                image = imageio.v3.imread("nuclei.png")
                imageio.v3.imwrite("nuclei.png", image[: image.shape[0] // 2, : image.shape[1] // 2])


def once(line, kept):
    """Carry out a conversion into fixed/, or take what it left for another page, of the same files."""
    digest = hashlib.sha256(line.encode())
    for path in filter(Path.is_file, map(Path, shlex.split(line))):
        digest.update(path.read_bytes())
    whole = kept / digest.hexdigest()
    if whole.exists():
        shutil.copytree(whole, "fixed")
        return
    carry_out(line)
    draft = Path(tempfile.mkdtemp(dir=kept)) / "fixed"
    shutil.copytree("fixed", draft)
    with suppress(OSError):  # another worker was first
        draft.rename(whole)


def carry_out(line):
    """Run a command as a reader does."""
    done = subprocess.run(["sh", "-c", line], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{line}\n{done.stderr}"


def test_the_program_is_installed_where_pages_are_followed():
    """Else the shell would not find it, and a page without Python would be followed by nobody."""
    assert any(PROGRAM.with_name(name).exists() for name in ("normfix", "normfix.exe"))


def test_first_commands():
    """README starts with the two commands that CI takes from it."""
    commands = [line for block in blocks(README, "sh") for line in block.splitlines()]
    assert commands[:2] == ['pip install ".[demo]" && normfix demo', 'pip install -e ".[test]" && pytest']
