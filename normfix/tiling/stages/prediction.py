"""Calibrate and predict stage by stage over blocks, where the network can be captured; the reason where not."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import ExitStack

from torch import Tensor, nn

from normfix.errors import NormfixError
from normfix.images.sources import Image
from normfix.images.writing import OutputFile
from normfix.networks.calling import Caller, home_of
from normfix.networks.copying import twin_of
from normfix.networks.numerics import exact_arithmetic
from normfix.tiling.grid import Geometry
from normfix.tiling.stages.cache import program_of, schedule_of
from normfix.tiling.stages.execution import execute
from normfix.tiling.stages.options import Blocks
from normfix.tiling.stages.placing import Destination
from normfix.tiling.stages.running import Statistic, kept_name

__all__ = ["predict_in_stages", "tell_fallback"]


_LOG = logging.getLogger("normfix")


def tell_fallback(what: str, error: NormfixError) -> None:
    """Say on stderr, before it runs, that something else runs than was asked for, and why."""
    _LOG.warning("%s, for the network cannot run in stages: %s", what, error)


def predict_in_stages(
    model: nn.Module,
    image: Image,
    caller: Caller,
    blocks: Blocks,
    *,
    geometry: Geometry | None,
    extended: bool = True,
    sites: Sequence[str] = (),
    statistics: Sequence[Statistic] = (),
    out: OutputFile | None = None,
) -> Tensor | None:
    """Predict an image stage by stage over blocks.

    Args:
        model: without live statistics; in eval mode, where statistics of it are to be measured.
        image: of any size.
        caller: calls the model and picks the output.
        blocks: how to run in stages.
        geometry: of the network; None where it has none, so that the image is taken as it is.
        extended: extend the image to a size that the network is exact at, in any tiles, and cut the result back; if
            not, it is taken as it is, and proved at its own size.
        sites: paths of the layers to cut at; default: before norms, or after convolutions.
        statistics: what is measured of this image on the way, each before it is read; its sites are among `sites`.
        out: where the prediction goes; default: into memory.

    Returns:
        (N, C', *out), or None if it went to `out`.

    Raises:
        NotInStages: NF320 to NF325 where this network cannot run so.
    """
    ndim = len(image.shape) - 2
    # what a statistic is written to is the model's own
    network = model if statistics else twin_of(model)
    with ExitStack() as stack:
        stack.enter_context(exact_arithmetic())
        missing = (0,) * ndim if geometry is None else geometry.padding(image.shape[2:])
        whole = image.padded(missing if extended else (0,) * ndim)
        stride = None if geometry is None else geometry.stride
        program = stack.enter_context(program_of(network, caller, tuple(sites), whole, stride))
        is_known = extended or not any(missing)
        measured = tuple(statistic.site for statistic in statistics)
        planned = schedule_of(program, stride, [whole], measured=measured, outputs=True, is_known=is_known)
        lasts = blocks.store is not None
        result = program.outputs[0]
        space = image.shape[2:] if any(missing) else None
        place = Destination(result, space, planned.maps.maps[result].scale, home_of(model)[0], out)
        store, journal = stack.enter_context(blocks.run(planned, [whole], statistics))
        execute(
            planned,
            [whole],
            tile=blocks.extents(ndim),
            store=store,
            statistics=statistics,
            settled=program.following_(network),
            sink=place.wait if lasts else place.take,
            keep=[place.node] if lasts else [],
            engine=blocks.crew,
            journal=journal,
            watch=blocks.watch,
        )
        if lasts:
            place.copy(store[kept_name(0, place.node)])
    return place.result()
