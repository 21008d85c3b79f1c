"""What is known of a network before it is used: how it is called, where it is live, the halo its tiles need."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

from torch import Tensor, nn

from normfix.errors import NormfixError
from normfix.images.collections import Images
from normfix.images.given import GivenImages, images_of
from normfix.networks.behaviour import digest_of_tensor, digest_of_values, open_behaviour_of, state_of
from normfix.networks.calling import Caller
from normfix.networks.copying import original_of
from normfix.networks.graph.program import require_free
from normfix.networks.intake import is_lazy
from normfix.networks.provenance import has_known_values, is_current, provenance_of
from normfix.networks.responses import is_as_known, response_of
from normfix.records.extents import WIDEST
from normfix.records.saved import Provenance
from normfix.records.sites import Scan
from normfix.scanning.base import base_of
from normfix.scanning.renewal import renewed
from normfix.scanning.scan import look
from normfix.tiling.grid import Geometry

__all__ = ["ForwardFn", "Known", "known_of", "scanned_of", "with_halo"]

ForwardFn = Callable[[nn.Module, Tensor], Any]


@dataclass(frozen=True, slots=True)
class Known:
    """How to call a model, its scan, which of its sites are live and the paths of its converted layers."""

    caller: Caller
    scan: Scan
    live: tuple[str, ...]
    layers: tuple[str, ...] = ()


def known_of(
    model: nn.Module, image: GivenImages | Images, forward_fn: ForwardFn | None, output: str | int | None
) -> Known:
    """Take what travels with the model, or scan it where that is of other modules or of another output."""
    require_free(model)
    known = provenance_of(model)
    if known is not None and is_current(model) and output in (None, known.output, _as_index(known.output)):
        caller = Caller.of(known, forward_fn)
        if is_as_known(model, caller, known.scan.example, known.scan.sizes):
            left = tuple(d.site.id for d in known.plan.left_live)
            layers = tuple(d.target for d in known.plan.converted)
            scan = _of_now(model, known, image, caller)
            return Known(caller, scan, left, layers)
    caller = Caller.of(known, forward_fn, output)
    return _scanned(model, images_of(image, model, caller=caller).excerpt(), caller)


_RENEWED: WeakKeyDictionary[nn.Module, tuple[object, Scan]] = WeakKeyDictionary()
"""The scan of each converted network whose weights were changed since, and under which weights."""


def _of_now(model: nn.Module, known: Provenance, image: GivenImages | Images, caller: Caller) -> Scan:
    """Return the scan of a converted network with the geometry that it has under its weights of now."""
    if has_known_values(model):
        return known.scan
    owner, values = original_of(model), (known.scan, digest_of_values(model))
    last = _RENEWED.get(owner)
    if last is None or last[0] != values:
        excerpt = images_of(image, model, caller=caller).excerpt()
        last = _RENEWED[owner] = values, renewed(model, known, excerpt, caller, reweighted=True)
    return last[1]


_LAST: WeakKeyDictionary[nn.Module, tuple[object, Known]] = WeakKeyDictionary()
"""The last scan of each network, and of what."""


def _scanned(model: nn.Module, image: Tensor, caller: Caller) -> Known:
    """Scan a network, or recall the last scan: of the same modules, values and image, so that nothing can differ."""
    owner = original_of(model)
    last = _LAST.get(owner)
    if last is None or last[0] != _key_of(owner, caller, image, last[1].scan):
        base = base_of(model, image, caller)
        scan = look(base.copy, base.example, base.caller).scan
        known = Known(base.caller, scan, tuple(site.id for site in scan.live))
        # only now: that its runs change nothing of the network was shown by the base
        key = _key_of(owner, caller, image, scan)
        if key is None:  # nor is it kept: it may hold the network, and then neither would ever go
            return known
        last = _LAST[owner] = key, known
    return last[1]


def _key_of(model: nn.Module, caller: Caller, image: Tensor, scan: Scan) -> object:
    same = scanned_of(model, caller, scan)
    return None if same is None else (same, image.shape, digest_of_tensor(image))


def scanned_of(model: nn.Module, caller: Caller, scan: Scan) -> object:
    """Return what compares equal as long as a network has the modules and values that it was scanned with.

    Args:
        model: a network.
        caller: calls it.
        scan: of it, which is to be kept: of which sizes it is may tell what must be run.

    Returns:
        None where no scan is to be kept: nothing shows all that the network or a function of the caller's reads.
    """
    if is_lazy(model) or caller.forward_fn is not None:
        return None
    behaviour = open_behaviour_of(model)
    if behaviour is None:
        return None
    return behaviour, state_of(model), caller, response_of(model, caller, scan.example, scan.sizes)


def _as_index(output: str | None) -> int | None:
    return int(output) if output is not None and output.isdigit() else None


def with_halo(geometry: Geometry | None, halo: object) -> Geometry | None:
    """Return the geometry with a halo of the caller's on every side, one for all axes or one for each.

    Raises:
        NormfixError: NF410 for what is neither "auto" nor a number of pixels that a halo can have, or one per axis.
    """
    if halo == "auto":
        return geometry
    ndim = None if geometry is None else len(geometry.stride)
    pixels: tuple[Any, ...] = tuple(halo) if isinstance(halo, list | tuple) else (halo,) * (ndim or 1)
    given = bool(pixels) and all(type(n) is int and 0 <= n <= WIDEST for n in pixels)
    if not given or (ndim and len(pixels) != ndim):
        raise NormfixError(
            "NF410",
            f"give 'auto', a number of pixels from 0 to {WIDEST}, or one per axis.",
            where=f"halo={halo!r}",
        )
    return geometry and replace(geometry, halo=tuple((n, n) for n in pixels))
