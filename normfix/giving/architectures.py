"""How a package names what builds its network: an installed library's class, and its file where that stands alone.

Consumers of a package have torch and seldom the library. Where the module of a class imports nothing but torch, NumPy
and Python, it travels in the package as it is installed here, with its licence; else the class is named.
"""

from __future__ import annotations

import ast
import hashlib
import importlib
import importlib.metadata
import inspect
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from normfix.storage.opening.descriptions import ArchitectureOf, File
from normfix.storage.opening.formats import unet3d
from normfix.storage.opening.gate import library

__all__ = ["architecture_of"]

_EVERYWHERE = frozenset({"torch", "numpy"})


def architecture_of(spec: str, args: Mapping[str, Any], draft: Path) -> ArchitectureOf:
    """Return how a package names a library's network class; its file is put into the package where it stands alone.

    Args:
        spec: "pkg.mod:Class", or the builder of pytorch-3dunet's networks.
        args: that build it.
        draft: folder of the package.
    """
    module, _, name = spec.partition(":")
    if spec == f"{unet3d.__name__}:network":
        args = dict(args)
        module, name = "pytorch3dunet.unet3d.model", args.pop("name")
    network = getattr(importlib.import_module(module), name)
    code = _alone(network)
    if not code:
        return ArchitectureOf(name=name, kwargs=args, module=module)
    file = draft / f"{library(spec)}_{name}.py"
    file.write_text(code, encoding="utf-8")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return ArchitectureOf(name=name, kwargs=args, file=File(name=file.name, sha256=digest))


def _alone(network: type) -> str:
    """Return the module of a class as text, with where it is from; '' if it needs more than torch."""
    path = inspect.getsourcefile(network)
    if path is None or network.__qualname__ != network.__name__:
        return ""
    code = Path(path).read_text(encoding="utf-8")
    if not _imported(ast.parse(code)) <= _EVERYWHERE | sys.stdlib_module_names:
        return ""
    return f"{_origin(network.__module__)}\n{code}"


def _imported(tree: ast.Module) -> set[str]:
    """Return the packages that code imports anywhere; '' stands for its own."""
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name.partition(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add("" if node.level else str(node.module).partition(".")[0])
    return names


def _origin(module: str) -> str:
    """Return comments that say whose code it is, and under which licence."""
    package = module.partition(".")[0]
    names = importlib.metadata.packages_distributions().get(package) or [package]
    try:
        found = importlib.metadata.distribution(names[0])
    except importlib.metadata.PackageNotFoundError:
        return f"# {module}\n"
    licences = [file for file in found.files or () if file.name.upper().startswith(("LICENSE", "LICENCE"))]
    text = "\n".join(Path(str(file.locate())).read_text(encoding="utf-8") for file in licences[:1])
    lines = [f"{module} of {found.name} {found.version}, unchanged", "", *text.splitlines()]
    return "".join(f"# {line}".rstrip() + "\n" for line in lines)
