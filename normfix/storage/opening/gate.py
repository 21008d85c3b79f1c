"""Which factories a file may name: network classes that a library defines itself, and builders that it lists.

What a module merely imported is not its own: `monai.networks.nets.hovernet.download_url` fetches what it is told to.
So a name counts only if it leads to a class of networks whose own module and name lead back to it.
"""

from __future__ import annotations

import importlib
import inspect
import re
import sys
from collections.abc import Collection, Mapping
from dataclasses import replace
from typing import Any

from torch import nn

from normfix.errors import NormfixError
from normfix.networks.naming import file_named, is_name
from normfix.records.saved import Source

__all__ = [
    "FACTORIES",
    "FORMATS",
    "MissingLibraryError",
    "imported",
    "is_allowed",
    "is_network",
    "is_trusted",
    "library",
    "present",
    "vouched",
]

FACTORIES: Mapping[str, tuple[str, ...]] = {
    "torchvision": ("torchvision.models",),
    "timm": ("timm.models",),
    "monai": ("monai.networks",),
    "segmentation_models_pytorch": (
        "segmentation_models_pytorch.decoders",
        "segmentation_models_pytorch.encoders",
    ),
    "transformers": ("transformers.models",),
    "diffusers": ("diffusers.models",),
    "pytorch3dunet": ("pytorch3dunet.unet3d.model",),
    "torch_em": ("torch_em.model",),
    "normfix": ("normfix.demo.network",),
}
"""Packages whose network classes a file may name, and the modules below which these are defined."""

_BUILDERS = frozenset(
    {
        "normfix.demo.network:nuclei_unet",
        *(f"monai.networks.nets.resnet:resnet{depth}" for depth in (10, 18, 34, 50, 101, 152, 200)),
    }
)
"""Functions that build networks and that a file may name, besides those that torchvision and timm register."""

FORMATS = re.compile(r"normfix\.storage\.opening\.formats\.\w+:network")
"""Builders of the loaders' own, which check their arguments themselves."""

_FORMER = "normfix.loading.formats."
"""Where folders say that these builders are, which were written before the formats moved."""


def is_allowed(spec: str) -> bool:
    """Tell whether a file may name this factory: a network class defined there, or a builder that is listed.

    Raises:
        NormfixError: NF111 if its package is not installed.
    """
    if FORMATS.fullmatch(spec):
        return True
    package = library(spec)
    if package not in FACTORIES or not is_name(spec):
        return False
    try:
        if spec.startswith("timm:"):
            return bool(
                importlib.import_module("timm").is_model(spec.removeprefix("timm:").partition(".")[0])
            )
        module = spec.partition(":")[0]
        if not _is_public(module, package):
            return False
        found = imported(spec)
    except Exception as error:
        raise MissingLibraryError(
            "NF111", f"{type(error).__name__}: {error}. Install {package} as it was.", where=spec
        ) from error
    return is_network(found, package) or _is_builder(found)


class MissingLibraryError(NormfixError):
    """The package of a factory that a file names cannot be imported."""


def vouched(source: Source, trust: Collection[str]) -> Source:
    """Return what a file says of where its network is from, where the caller gave the network itself.

    A factory that the file may not name is nobody's then: saving or giving the network back would call it.
    """
    try:
        allowed = is_allowed(present(source.spec))
    except MissingLibraryError:
        allowed = False
    if source.kind == "object" or allowed or is_trusted(source.spec, trust):
        return source
    return replace(source, kind="object", args="{}")


def is_trusted(spec: str, trust: Collection[str]) -> bool:
    """Tell whether a factory lies in a module that the caller trusts, or below it.

    >>> is_trusted("nets.unet:UNet", ["nets"]), is_trusted("nets/unet.py:UNet", ["nets.unet"])
    (True, True)
    >>> is_trusted("nets_of_others:UNet", ["nets"]), is_trusted("../nets.py:UNet", ["nets"])
    (False, False)
    """
    file = file_named(spec)
    module = spec.partition(":")[0] if file is None else ".".join(file.with_suffix("").parts)
    return any(_is_below(module, (place,)) for place in trust)


def present(spec: str) -> str:
    """Return the name that a factory has today.

    >>> present("normfix.loading.formats.unet3d:network")
    'normfix.storage.opening.formats.unet3d:network'
    """
    if spec.startswith(_FORMER):
        return f"normfix.storage.opening.formats.{spec.removeprefix(_FORMER)}"
    return spec


def imported(spec: str) -> Any:
    """Import "pkg.mod:name"."""
    module, _, attribute = spec.partition(":")
    found: Any = importlib.import_module(module)
    for part in attribute.split("."):
        found = getattr(found, part)
    return found


def is_network(found: Any, package: str) -> bool:
    """Tell whether something is a network class that a package of FACTORIES defines itself, below its networks."""
    if not inspect.isclass(found) or not issubclass(found, nn.Module):
        return False
    return _is_below(found.__module__, FACTORIES[package]) and _named_by(found) is found


def _is_builder(found: Any) -> bool:
    """Tell whether a function is listed here, or registered by its library as building a network."""
    if not inspect.isfunction(found):
        return False
    home = f"{found.__module__}:{found.__qualname__}"
    if home in _BUILDERS:
        return _named_by(found) is found
    if _is_below(found.__module__, ("torchvision.models",)):
        models = importlib.import_module("torchvision.models")
        return found.__name__ in models.list_models() and models.get_model_builder(found.__name__) is found
    if _is_below(found.__module__, ("timm.models",)):
        timm = importlib.import_module("timm")
        return timm.is_model(found.__name__) and timm.model_entrypoint(found.__name__) is found
    return False


def _named_by(found: Any) -> Any:
    """Return what its own module holds under its own name."""
    value: Any = sys.modules.get(found.__module__)
    for part in found.__qualname__.split("."):
        value = getattr(value, part, None)
    return value


def library(spec: str) -> str:
    """Return the package that a name begins with."""
    return spec.partition(":")[0].partition(".")[0]


def _is_public(module: str, package: str) -> bool:
    """Tell whether a file may have this module imported: what leads to its package's networks or lies below them.

    Scripts that convert weights lie among the networks of transformers, and import what they like.
    """
    if any(part.startswith(("_", "convert")) for part in module.split(".")):
        return False
    return any(_is_below(place, (module,)) or _is_below(module, (place,)) for place in FACTORIES[package])


def _is_below(module: str, places: tuple[str, ...]) -> bool:
    return any(module == place or module.startswith(f"{place}.") for place in places)
