"""What the caller names: "pkg.mod:attribute" or "path/to/file.py:attribute", imported as Python itself would.

A name is looked for among what is installed, and then in the working directory, which an installed script does not
search. Only names that the caller wrote may come here: what a file names is never looked for where the file may lie.
"""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import pkgutil
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from importlib.machinery import PathFinder
from itertools import islice
from pathlib import Path
from types import ModuleType
from typing import Any

from normfix.errors import NormfixError, printable

__all__ = [
    "UnknownNameError",
    "defined_in",
    "file_hint",
    "file_named",
    "is_name",
    "is_named",
    "make_importable",
    "name_of",
    "named",
    "require_findable",
    "source_hint",
    "staying",
]

_NAME = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")
_IN_FILE = re.compile(r"(?P<path>.*\.py):(?P<attribute>[A-Za-z_][\w.]*)", re.DOTALL)
_MOST_FILES, _MOST_CHARACTERS = 200, 200_000
"""How much of the working directory is looked through for a hint."""

_MOST_NAMES = 1000
"""Names of a folder that are looked through for a hint."""


class UnknownNameError(NormfixError):
    """What the caller names cannot be found."""


def is_name(text: str) -> bool:
    """Tell whether a text has the form pkg.mod:attribute, as timm:NAME has.

    >>> is_name("torchvision.models:resnet18"), is_name("model.pt")
    (True, False)
    """
    return _NAME.fullmatch(text) is not None


def is_named(text: str) -> bool:
    """Tell whether a text has the form pkg.mod:attribute or file.py:attribute.

    >>> is_named("torchvision.models:resnet18"), is_named("nets/mine.py:UNet"), is_named("model.pt")
    (True, True, False)
    """
    return is_name(text) or _IN_FILE.fullmatch(text) is not None


def named(name: str) -> Any:
    """Import what the caller names.

    A module that is installed nowhere and lies in the working directory puts that directory at the end of
    `sys.path`, a named file its own, so that the modules beside it are found too.

    Args:
        name: "pkg.mod:attribute" or "path/to/file.py:attribute".

    Raises:
        UnknownNameError: NF111 if there is no such module, file or attribute, or it imports what is not installed.
    """
    file = file_named(name)
    if file is not None:
        attribute = name.rpartition(":")[2]
        with staying(name):
            module = _module_of(file, name)
    else:
        place, _, attribute = name.partition(":")
        if not attribute:
            raise UnknownNameError(
                "NF111",
                f"it has not the form module:name.{source_hint(name)} Say which class or function in it builds the "
                "network: path/to/file.py:Name.",
                where=printable(name[:200]),
            )
        with staying(name):
            module = _module(place, name)
    found: Any = module
    for part in attribute.split("."):
        if not hasattr(found, part):
            raise _without(module, found, part, name)
        found = getattr(found, part)
    return found


@contextmanager
def staying(name: str) -> Iterator[None]:
    """Refuse code of the caller's that ends the program: whoever waits for the exit code takes it for a result.

    Raises:
        UnknownNameError: NF111.
    """
    try:
        yield
    except SystemExit as stop:
        raise UnknownNameError(
            "NF111",
            f"it ends the program (SystemExit, {printable(str(stop.code))[:80]}) where it is imported or builds the "
            'network, so nothing was done. What it does as a script belongs under: if __name__ == "__main__".',
            where=printable(name[:200]),
        ) from stop


def require_findable(name: str) -> None:
    """Refuse what the caller names where there is no such module or file, without importing what there is.

    Raises:
        UnknownNameError: NF111, also for what has another form.
    """
    file, top = file_named(name), name.partition(":")[0].partition(".")[0]
    found = (
        file.is_file()
        if file is not None
        else _is_installed(top) or PathFinder.find_spec(top, [str(Path.cwd())])
    )
    if not is_named(name) or not found:
        named(name)


def file_named(name: str) -> Path | None:
    """Return the file of "path/to/file.py:attribute"; None for another form."""
    match = _IN_FILE.fullmatch(name)
    return Path(match["path"]) if match else None


def make_importable(module: str) -> None:
    """Let a module be imported from the working directory, if it lies there and is installed nowhere."""
    top, here = module.partition(".")[0], str(Path.cwd())
    if top not in sys.modules and not _is_installed(top) and PathFinder.find_spec(top, [here]):
        _search(here)


def name_of(found: Callable[..., Any]) -> str | None:
    """Return the name by which any process finds a class or function; None if it has none."""
    name = f"{getattr(found, '__module__', None)}:{getattr(found, '__qualname__', None)}"
    if name.startswith("__main__:"):
        return None
    try:
        return name if pkgutil.resolve_name(name) is found else None
    except (ImportError, AttributeError, ValueError):
        return None


def _module(place: str, name: str) -> ModuleType:
    """Import a module by its dotted name, from here if it is installed nowhere."""
    make_importable(place)
    return _imported(place, name)


def _is_installed(top: str) -> bool:
    try:
        return importlib.util.find_spec(top) is not None
    except (ImportError, ValueError):
        return False


def _search(folder: str) -> None:
    if folder not in sys.path:
        sys.path.append(folder)
        importlib.invalidate_caches()


def _imported(place: str, name: str) -> ModuleType:
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        missing = error.name or place
        if f"{place}.".startswith(f"{missing}."):
            raise UnknownNameError(
                "NF111",
                f"there is no module {missing} among what is installed here, nor in {Path.cwd()}.{source_hint(name)} "
                f"Give its file, path/to/file.py:{name.rpartition(':')[2]}, or run where it lies.",
                where=name[:200],
            ) from error
        raise _lacking(name, error) from error


def _module_of(file: Path, name: str) -> ModuleType:
    """Import a file as the module that it is: of its package, if it lies in one."""
    if not file.is_file():
        raise UnknownNameError(
            "NF111",
            f"there is no file {file}.{source_hint(name)} Check the path.",
            where=printable(name[:200]),
        )
    file = file.resolve()
    root = file.parent
    while (root / "__init__.py").is_file():
        root = root.parent
    place = ".".join(file.relative_to(root).with_suffix("").parts).removesuffix(".__init__")
    _search(str(root))
    if all(part.isidentifier() for part in place.split(".")):
        module = _imported_from(file, place, name)
        if module is not None:
            return module
    return _loaded(file, name)


def _imported_from(file: Path, place: str, name: str) -> ModuleType | None:
    """Import a file under its own name; None if another module has that name."""
    known = sys.modules.get(place)
    try:
        origin = known.__file__ if known else getattr(importlib.util.find_spec(place), "origin", None)
    except (ImportError, ValueError, AttributeError):
        origin = None
    if origin is None or not Path(origin).exists() or not Path(origin).samefile(file):
        return None
    return _imported(place, name)


def _loaded(file: Path, name: str) -> ModuleType:
    """Load a file whose name another module has, or which no module can have."""
    # files of which only signs differ, a-b.py and a b.py, are two modules
    digest = hashlib.sha256(str(file).encode(errors="surrogateescape")).hexdigest()[:8]
    alias = f"_normfix_{re.sub(r'[^0-9A-Za-z_]', '_', str(file))}_{digest}"
    if alias in sys.modules:
        return sys.modules[alias]
    spec = importlib.util.spec_from_file_location(alias, file)
    if spec is None or spec.loader is None:
        raise UnknownNameError("NF111", f"Python cannot import {file}.", where=printable(name[:200]))
    module = importlib.util.module_from_spec(spec)
    sys.modules[alias] = module
    try:
        spec.loader.exec_module(module)
    except BaseException as error:
        del sys.modules[alias]
        if isinstance(error, ModuleNotFoundError):
            raise _lacking(name, error) from error
        raise
    return module


def _lacking(name: str, error: ModuleNotFoundError) -> UnknownNameError:
    """Return the error for a module that is there, and imports one that is not."""
    problem = f"it was found, but imports {error.name}, which is not installed here."
    return UnknownNameError("NF111", problem, where=printable(name[:200]))


def _without(module: ModuleType, owner: Any, part: str, name: str) -> UnknownNameError:
    """Return the error for a module without the attribute, with what it defines of a like name."""
    own = defined_in(module, owner)
    places = {**_within(module), **{key: key.lower() for key in own}}
    near = get_close_matches(part.lower(), places.values(), 1)
    if near:
        hint = f"Did you mean {next(place for place, key in reversed(places.items()) if key == near[0])}?"
    else:
        hint = f"It defines {', '.join(own[:6]) or 'nothing that can be called'}."
    return UnknownNameError(
        "NF111", f"{module.__name__} has no {printable(part)}. {hint}", where=printable(name[:200])
    )


def _within(package: ModuleType) -> dict[str, str]:
    """Return what the package's modules hold that were imported with it: the lower-case name of each place."""
    return {
        f"{inner.__name__}:{key}": key.lower()
        for inner in vars(package).values()
        if isinstance(inner, ModuleType) and inner.__name__.startswith(f"{package.__name__}.")
        for key, value in vars(inner).items()
        if callable(value) and not key.startswith("_")
    }


def defined_in(module: ModuleType, owner: Any = None) -> list[str]:
    """Return the public names that a module, or a class of it, defines itself."""
    return [
        key
        for key, value in vars(module if owner is None else owner).items()
        if not key.startswith("_") and getattr(value, "__module__", None) == module.__name__
    ]


def file_hint(path: Path) -> str:
    """Return which name beside a path that is not there it may be a slip of, as a sentence; "" for none."""
    try:
        near = get_close_matches(path.name, (p.name for p in islice(path.parent.iterdir(), _MOST_NAMES)), 1)
    except OSError:  # no such folder, or no file can have such a name
        near = []
    return f" Did you mean {path.with_name(near[0])}?" if near else ""


def source_hint(name: str) -> str:
    """Return which files here define what the name ends in, or have a like name, as a sentence; "" for none."""
    place, _, attribute = name.rpartition(":")
    found = list(islice(_definers(attribute), 3))
    if found:
        return f" Did you mean {' or '.join(f'{path}:{attribute}' for path in found)}?"
    stems = {path.stem: path for path in _sources()}
    near = get_close_matches(Path(place).stem if place.endswith(".py") else place, stems, 1)
    return f" Did you mean {stems[near[0]]}:{attribute}?" if near else ""


def _sources() -> list[Path]:
    return [Path(path.name) for path in islice(sorted(Path.cwd().glob("*.py")), _MOST_FILES)]


def _definers(attribute: str) -> Iterator[Path]:
    definition = re.compile(
        rf"^(class|def) {re.escape(attribute)}\b|^{re.escape(attribute)} *=", re.MULTILINE
    )
    for path in _sources():
        try:
            with path.open(encoding="utf-8", errors="replace") as file:
                if definition.search(file.read(_MOST_CHARACTERS)):
                    yield path
        except OSError:
            continue
