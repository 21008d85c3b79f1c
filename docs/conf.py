"""The documentation site: `sphinx-build -W docs site` (pip install ".[docs]"), from the pages and the docstrings.

Sphinx reads the docstrings themselves, MyST the pages as they are read on a forge, and both are kept; the common
alternative, mkdocs-material, is in maintenance.
"""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from sphinx.application import Sphinx

import normfix

project = "normfix"
author = "The normfix developers"
copyright = author
release = normfix.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
default_role = "code"
myst_heading_anchors = 4
html_theme = "furo"
html_title = f"normfix {release}"
autodoc_member_order = "bysource"
autodoc_mock_imports = [
    name for name in ("ignite", "monai", "nnunetv2", "pytorch_lightning") if find_spec(name) is None
]
autodoc_typehints = "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
napoleon_numpy_docstring = False

_ROOT = Path(__file__).parents[1]
_FORGE = "https://github.com/normfix/normfix/blob/main"


def front_page(app: Sphinx, page: str, source: list[str]) -> None:
    """Begin with the README, whose links are those of the repository's root."""
    if page != "index":
        return
    readme = (_ROOT / "README.md").read_text(encoding="utf-8").replace("](docs/", "](")
    for outside in ("CONTRIBUTING.md", "CITATION.cff", "LICENSE", "notebooks/README.md"):
        readme = readme.replace(f"]({outside})", f"]({_FORGE}/{outside})")
    source[0] = f"{readme}\n{source[0]}"


def plain_shapes(app: Sphinx, what: str, name: str, obj: Any, options: Any, lines: list[str]) -> None:
    """Keep shapes such as (N, C, *space) from being read as the beginning of an emphasis."""
    lines[:] = [re.sub(r"(?<=[ (])\*(?=\w)", r"\\*", line) for line in lines]


def setup(app: Sphinx) -> None:
    """Connect both."""
    app.connect("source-read", front_page)
    app.connect("autodoc-process-docstring", plain_shapes)
