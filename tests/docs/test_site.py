"""The site is built from pages and docstrings without a warning, and its reference holds every public name."""

import re
import shutil
import subprocess
import sys

import pytest
from pages import ROOT

import normfix


def built(docs, out):
    """Build the site as the README says, with warnings as errors; return what was said."""
    command = [sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", str(docs), str(out)]
    return subprocess.run(command, capture_output=True, text=True, check=False)


@pytest.mark.slow
def test_the_site_is_built_without_warnings(tmp_path):
    """Every page is in a table of contents, every link leads somewhere, and the front page begins with the README."""
    pytest.importorskip("furo")
    done = built(ROOT / "docs", tmp_path)
    assert done.returncode == 0, done.stderr
    front = (tmp_path / "index.html").read_text(encoding="utf-8")
    assert "seams.png" in front
    assert 'href="glossary.html"' in front
    assert "Find every statistic of the tile" in (tmp_path / "api.html").read_text(encoding="utf-8")


@pytest.mark.slow
def test_a_link_that_leads_nowhere_is_a_warning(tmp_path):
    """Control: a page whose link is broken fails the build."""
    pytest.importorskip("furo")
    docs = tmp_path / "docs"
    docs.mkdir()
    shutil.copy(ROOT / "docs" / "conf.py", docs)
    shutil.copy(ROOT / "docs" / "seams.png", docs)
    (docs / "index.md").write_text("[there](nowhere.md)\n", encoding="utf-8")
    shutil.copy(ROOT / "README.md", tmp_path)
    done = built(docs, tmp_path / "site")
    assert done.returncode
    assert "nowhere.md" in done.stderr


def test_every_public_name_is_in_the_reference():
    """What `import normfix` shows is what the page lists, no more and no less."""
    page = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    listed = re.findall(r"^\.\. auto(?:function|class):: normfix\.(\w+)$", page, re.MULTILINE)
    assert sorted(listed) == [name for name in normfix.__all__ if name != "__version__"]


def test_versions_agree():
    """The citation file and the badges state what pyproject.toml and the package do."""
    project = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    assert f"version: {normfix.__version__}\n" in (ROOT / "CITATION.cff").read_text(encoding="utf-8")
    (torch,) = re.findall(r'^  "torch>=([\d.]+)"', project, re.MULTILINE)
    (python,) = re.findall(r'^requires-python = ">=([\d.]+)"', project, re.MULTILINE)
    assert f"torch-{torch}+" in readme
    assert f"python-{python}+" in readme
