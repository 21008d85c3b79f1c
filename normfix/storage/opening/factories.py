"""Build networks by name, "pkg.mod:factory" or "timm:NAME": any that the caller names, few that a file may.

A factory named by a file is called only if it is a network class that a library defines, or a builder that the
library itself lists, and then only with arguments that name no file or address and are in proportion to the weights
(`arguments`). It is built without memory first (`allocation`), in bounded time (`deadline`), while nothing can be
opened or fetched (`guard`): `timm.models.load_checkpoint` or a `checkpoint_path` would open what the author chose.
"""

from __future__ import annotations

import importlib
import inspect
import json
from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import replace
from difflib import get_close_matches
from types import ModuleType
from typing import Any, TypeVar

from torch import nn

from normfix.errors import NormfixError, printable
from normfix.images.deadline import within
from normfix.images.headroom import lacks_memory
from normfix.networks.naming import UnknownNameError, named, staying
from normfix.networks.quiet_imports import import_compiler
from normfix.records.saved import Source
from normfix.storage.opening.allocation import (
    PLENTY,
    Bounded,
    Sketched,
    Stored,
    require_proportion,
    torch_restored,
)
from normfix.storage.opening.arguments import blanked, require_inert, require_small
from normfix.storage.opening.gate import (
    FACTORIES,
    FORMATS,
    imported,
    is_allowed,
    is_trusted,
    library,
    present,
)
from normfix.storage.opening.guard import watched

__all__ = [
    "FACTORIES",
    "build",
    "built",
    "classes_named",
    "confined",
    "dumped",
    "is_allowed",
    "rebuild",
]

T = TypeVar("T")


def build(source: Source, *, blank: bool = False, stored: Stored | None = None) -> nn.Module:
    """Call a factory the caller chose.

    Args:
        source: of kind "factory".
        blank: the weights come later, so do not fetch pretrained ones.
        stored: the weights beside a file that wrote the arguments; then these are bounded as the file's are.

    Raises:
        NormfixError: NF111 if it cannot be imported, fails, or returns no nn.Module; NF108 if its arguments are
            no JSON object; NF113 or NF121 for a file's arguments that reach out or ask for too much.
    """
    args = _arguments(source)
    factory = _factory(source.spec, named)
    if blank:
        args = blanked(factory, args, defaults=library(source.spec) in FACTORIES)
    if stored is None:
        return built(factory, args, source.spec)
    require_small(args, source.spec, tensors=stored.tensors, elements=stored.elements)
    require_inert(args, source.spec)
    bound = Bounded(4 * stored.elements, source.spec)
    with torch_restored():
        return within(
            2 * stored.seconds,
            lambda: _within_memory(bound, lambda: built(factory, args, source.spec)),
            source.spec,
            growth=stored.room,
        )


def _factory(spec: str, find: Callable[[str], Any]) -> Callable[..., Any]:
    """Import a factory: `named` looks where the caller is too, `imported` among what is installed.

    Raises:
        NormfixError: NF111.
    """
    try:
        if not spec.startswith("timm:"):
            found: Callable[..., Any] = find(spec)
            return found
        timm = importlib.import_module("timm")
        return _TimmFactory(timm.create_model, _registered(timm, spec.removeprefix("timm:")))
    except NormfixError:
        raise
    except ModuleNotFoundError as error:
        raise _uninstalled(error, spec) from error
    except Exception as error:
        raise _failed(spec, error) from error


def _registered(timm: ModuleType, name: str) -> str:
    """Return a name of timm's; one with a scheme, as hf-hub:, is timm's own to understand.

    Raises:
        UnknownNameError: NF111, with names that are like it.
    """
    if ":" in name or timm.is_model(name.partition(".")[0]):
        return name
    near = get_close_matches(name, timm.list_models(), 3)
    hint = (
        f"Did you mean {' or '.join(f'timm:{one}' for one in near)}?" if near else "See timm.list_models()."
    )
    raise UnknownNameError(
        "NF111", f"timm has no network of this name. {hint}", where=printable(f"timm:{name[:200]}")
    )


class _TimmFactory:
    """timm's network of one name."""

    def __init__(self, create: Callable[..., Any], name: str) -> None:
        self._create = create
        self._name = name

    def __call__(self, **args: Any) -> Any:
        return self._create(self._name, **args)


def built(factory: Callable[..., Any], args: Mapping[str, Any], spec: str = "arch") -> nn.Module:
    """Return the network that a factory builds.

    Raises:
        NormfixError: NF111 if it fails or gives something else.
    """
    if isinstance(factory, nn.Module):
        raise NormfixError(
            "NF111",
            "it is a network, not what builds one, and normfix builds it anew to compare. Give its class, or a "
            f"function that returns it: def build(): return {type(factory).__name__}(...).",
            where=spec,
        )
    try:
        with staying(spec):
            model = factory(**args)
    except NormfixError:
        raise
    except ModuleNotFoundError as error:
        raise _uninstalled(error, spec) from error
    except Exception as error:
        raise _failed(spec, error) from error
    if not isinstance(model, nn.Module):
        raise NormfixError("NF111", f"it returned {type(model).__name__}, not an nn.Module.", where=spec)
    if "_parameters" not in model.__dict__:
        raise NormfixError(
            "NF111",
            f"{type(model).__name__} never called nn.Module.__init__, so it is no network. Call super().__init__() "
            "first.",
            where=spec,
        )
    return model


def _uninstalled(error: ModuleNotFoundError, spec: str) -> NormfixError:
    """Return the error for a missing module; only libraries that are known are advised to be installed."""
    top = (error.name or "").partition(".")[0]
    hint = "Install what it needs, from where you know it to come."
    if top == "timm":
        hint = 'Next: pip install "normfix[timm]".'
    elif top in FACTORIES:
        hint = f"Next: pip install {top}."
    return NormfixError("NF111", f"{error}. {hint}", where=spec)


def _failed(spec: str, error: Exception) -> NormfixError:
    reason = " ".join(str(error).split())[:300]
    return NormfixError(
        "NF111", f"{type(error).__name__}: {reason}. Check the name and --arch-args.", where=spec
    )


def rebuild(
    source: Source,
    *,
    arch: str | None = None,
    arch_args: Mapping[str, Any] | None = None,
    stored: Stored = PLENTY,
    trust: Collection[str] = (),
) -> nn.Module:
    """Build the architecture a file names, or the one the caller repeats.

    Args:
        source: what the file names.
        arch: what the caller names, if anything.
        arch_args: its arguments.
        stored: the weights that will fill it.
        trust: modules whose factories a file may name.

    Raises:
        NormfixError: NF113 if the file names a factory that may not be called unasked, or arguments that reach out;
            NF121 if it asks for more than the weights need.
    """
    source = replace(source, spec=present(source.spec))
    if arch is not None:
        args = _arguments(source) if arch_args is None and arch == source.spec else dict(arch_args or {})
        return build(Source(kind="factory", spec=arch, args=dumped(args)), blank=True)
    if source.kind == "object":
        raise NormfixError(
            "NF113",
            "the folder was saved from an object, so it does not say how to build one, and it holds no program.pt2 "
            "to run instead. Give the network: load(folder, model=MyNet()) or load(folder, arch='pkg.mod:factory').",
            where=source.spec,
        )
    if is_trusted(source.spec, trust):
        return build(source, blank=True, stored=stored)
    if not is_allowed(source.spec):
        raise NormfixError(
            "NF113",
            "the file names this factory, but only network classes that "
            f"{', '.join(FACTORIES)} define, and builders they list, are called unasked. If you trust it, repeat it: "
            f"--arch {source.spec} (arch={source.spec!r} in Python), or say so once for the project in its "
            f'pyproject.toml: [tool.normfix] trust = ["{source.spec.partition(":")[0].removesuffix(".py")}"].',
            where=source.spec[:200],
        )
    args = _arguments(source)
    require_small(args, source.spec, tensors=stored.tensors, elements=stored.elements)
    factory = _factory(source.spec, imported)
    if FORMATS.fullmatch(source.spec):
        # Imports take seconds of their own, which are not the file's.
        _called_for(source.spec, "prepare", args)
    args = blanked(factory, args, defaults=True)
    require_inert(args, source.spec, sections=FORMATS.fullmatch(source.spec) is not None)
    return confined(lambda: built(factory, args, source.spec), stored, source.spec)


def _called_for(spec: str, name: str, args: Mapping[str, Any]) -> None:
    """Call a function beside the builder that a loader offers."""
    try:
        imported(f"{spec.partition(':')[0]}:{name}")(**args)
    except NormfixError:
        raise
    except Exception as error:
        raise _failed(spec, error) from error


def confined(
    make: Callable[[], nn.Module],
    stored: Stored,
    where: str,
    *,
    sketch: Callable[[], nn.Module] | None = None,
) -> nn.Module:
    """Build what a file describes: without memory first, in bounded time, while nothing is opened or fetched.

    Args:
        make: builds it; called once or twice.
        stored: the weights that will fill it.
        where: named in errors.
        sketch: builds it without its weights, where `make` fills it too.

    Raises:
        NormfixError: NF113 if it would open or fetch something, NF121 if it is out of proportion to the weights.
    """

    def both() -> nn.Module:
        _sketch(sketch or make, stored, where)
        return _within_memory(Bounded(4 * stored.elements, where, stored.calls), make)

    # What counting needs of torch writes to a temporary folder; that is not the file's doing.
    import_compiler()
    with watched(where), torch_restored():
        return within(stored.seconds, both, where, growth=stored.room)


def _sketch(make: Callable[[], nn.Module], stored: Stored, where: str) -> None:
    """Build it without memory, and compare it with its weights, unless its constructor reads values of its own."""
    try:
        model = _within_memory(Sketched(4 * stored.elements, where, stored.calls), make)
    except NormfixError as error:
        # Such a constructor fails here, and only here.
        reads_values = isinstance(error.__cause__, Exception) and not isinstance(
            error.__cause__, NormfixError
        )
        if reads_values and not lacks_memory(error):
            return
        raise
    require_proportion(model, stored, where)


def _within_memory(bound: Bounded, make: Callable[[], T]) -> T:
    try:
        with bound:
            return make()
    finally:
        # A library may have caught what was refused.
        bound.require_kept()


def classes_named(names: Iterable[str]) -> dict[str, type]:
    """Import classes that the caller allows a pickle to build, by their dotted names.

    Raises:
        NormfixError: NF122 if one of them is no class, NF111 if it cannot be imported.
    """
    found = {}
    for name in names:
        kind = _dotted(name)
        if not inspect.isclass(kind):
            raise NormfixError(
                "NF122",
                f"it is {type(kind).__name__}, and only classes can be allowed one by one. If you trust the file, "
                "run it: --trust-pickle.",
                where=name,
            )
        found[name] = kind
    return found


def _dotted(name: str) -> Any:
    """Import "pkg.mod.Class.Inner", trying the longest module first."""
    parts = name.split(".")
    for cut in range(len(parts) - 1, 0, -1):
        try:
            return named(f"{'.'.join(parts[:cut])}:{'.'.join(parts[cut:])}")
        except UnknownNameError:
            continue
    raise NormfixError("NF111", "it cannot be imported here. Install its package as it was.", where=name)


def dumped(args: Mapping[str, Any]) -> str:
    """Return a factory's arguments as JSON text, the same for equal arguments.

    Raises:
        NormfixError: NF111 if they are not JSON-ready, so that they could not travel with the network.
    """
    try:
        return json.dumps(dict(args), sort_keys=True)
    except (TypeError, ValueError) as error:
        raise NormfixError(
            "NF111",
            f"arguments of a factory travel as JSON: {error}. Write a factory that takes plain values.",
            where="--arch-args",
        ) from error


def _arguments(source: Source) -> dict[str, Any]:
    try:
        args = json.loads(source.args)
    except (ValueError, RecursionError) as error:
        raise NormfixError("NF108", f"its arguments are no JSON: {error}.", where=source.spec) from error
    if not isinstance(args, dict):
        raise NormfixError(
            "NF108", f"its arguments are no JSON object: {source.args[:80]}.", where=source.spec
        )
    return args
