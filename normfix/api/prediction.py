"""predict: one image in parts, exactly as the whole image would be predicted."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any, Literal, TypedDict
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from normfix.conversion.measurement import measure_
from normfix.conversion.measuring import freeze_sites_
from normfix.conversion.multiplicity import have_as_many, objection, of_single_images
from normfix.conversion.planning import decide
from normfix.conversion.rewriting import released, rewrite, rewrite_
from normfix.conversion.staged import predict_measured_
from normfix.conversion.targets import Target, measured_targets
from normfix.errors import NormfixError
from normfix.images.given import Given, images_of, opened
from normfix.images.rendering import Logits, Rendering
from normfix.images.sources import Image, TensorImage, confirm, middle_of, whole
from normfix.images.windows import ScaledImage
from normfix.images.writing import OutputFile
from normfix.networks.behaviour import state_of
from normfix.networks.calling import Caller, NotTaken, OutOfMemory, home_of, in_eval_mode, refusals
from normfix.networks.copying import copy_of, double_of, original_of, twin_of
from normfix.networks.examples import half_of, middle
from normfix.networks.footprints import calls_more, footprint
from normfix.networks.graph.replaying import same
from normfix.networks.numerics import exact_arithmetic, require_finite
from normfix.networks.provenance import attach_, provenance_of
from normfix.networks.surroundings import undisturbed
from normfix.proof.steps import TILES, identity
from normfix.records.plans import Plan
from normfix.records.saved import Provenance, Scaling, Source
from normfix.records.sites import Family, Finding, Scan
from normfix.records.spans import round_up
from normfix.records.verdicts import ProofStep
from normfix.scanning.base import Base, base_of
from normfix.scanning.known import ForwardFn, Known, known_of, scanned_of, with_halo
from normfix.scanning.renewal import keeps_geometry, renewed
from normfix.scanning.scan import look
from normfix.tiling.dependence import alike
from normfix.tiling.domain import extension, judge_size
from normfix.tiling.geometry import geometry_of
from normfix.tiling.grid import Geometry
from normfix.tiling.lengths import LARGEST, differing, exact_size, is_compared_whole, parts_compared
from normfix.tiling.stages.cache import hand_on, is_captured
from normfix.tiling.stages.options import Blocks
from normfix.tiling.stages.prediction import predict_in_stages, tell_fallback
from normfix.tiling.stages.refusals import NotInStages
from normfix.tiling.stages.resuming import resumable
from normfix.tiling.stitching import cropped, padded, tile_extents, tiled

__all__ = ["NotTiledError", "PredictOptions", "predict", "write_prediction", "write_stack"]

_LOG = logging.getLogger("normfix")
_TILE = 256
"""Pixels per axis of a tile that nobody stated."""

_WHOLE = frozenset({Family.ATTENTION, Family.POOL})
"""What is of the whole image in stages, where no constant replaces it."""

_HELD: WeakKeyDictionary[nn.Module, set[tuple[Any, ...]]] = WeakKeyDictionary()
"""At which sizes, and where no graph tells sizes with which values, tiles of a network equalled its whole."""

_PLANNED: WeakKeyDictionary[nn.Module, _Planned] = WeakKeyDictionary()
"""What is held of networks that were not converted, and of what modules and values."""

_FINEST = 32
"""Pixels for one position of an output, at most."""

_PAYS = 1 << 24
"""Pixels of halo, or of an image to be read whole, from which stages are worth capturing the network for."""

_PAYS_ON_A_GPU = 1 << 29
"""The same of halo on a GPU, which computes a hundred million pixels in the time in which it captures for one."""

_SHARE = 4
"""Stages that are captured take less than tiles whose halos are this part of the image, 1 / _SHARE."""


class PredictOptions(TypedDict, total=False):
    """Options of `predict` that say how an image is predicted, and not what becomes of the result."""

    halo: int | Sequence[int] | Literal["auto"]
    engine: Literal["auto", "stages", "tiles"]
    statistics: Literal["auto", "stored", "per-image"]
    blocks: Blocks | None
    forward_fn: ForwardFn | None
    output: str | int | None


@undisturbed()
def predict(
    model: nn.Module,
    image: Given,
    tile: int | Sequence[int] | None = None,
    *,
    halo: int | Sequence[int] | Literal["auto"] = "auto",
    engine: Literal["auto", "stages", "tiles"] = "auto",
    statistics: Literal["auto", "stored", "per-image"] = "auto",
    blocks: Blocks | None = None,
    forward_fn: ForwardFn | None = None,
    output: str | int | None = None,
    allow_nonfinite: bool = False,
    as_: str = "raw",
    logits: Logits | None = None,
) -> Tensor:
    """Predict one image in parts, exactly as the whole image would be predicted.

    Two engines give the same result. "tiles" runs the whole network on each tile with the whole network's halo.
    "stages" runs the network once, stage by stage over all blocks, each with the stage's own small halo, and
    keeps the maps in between: nearly no work is done twice, which pays on large images and deep networks.

    Args:
        model: without live statistics, or any with statistics="per-image"; not modified.
        image: (N, C, *space), any size, or one that is read by window (normfix.open_image), as files are; arrays and
            files hold pixel values, see normfix.convert. Where the network is not exact at that size, the image is
            extended by its edge pixels to the next exact size and the result cut back; by its own statistics it is
            taken as it is, where the network runs on that size in stages.
        tile: pixels per axis, multiples of the stride; default: 256.
        halo: pixels of context on every side of tiles; "auto" is what the network needs. One or one per axis ask for
            tiles.
        engine: "auto" takes stages where tiles would compute over 16 million pixels of halo (on a GPU 512 million, or
            the fourth part of the image once the network is captured) and the network can be captured, on images of
            over 16 million that are read by window, with a budget or store, and on a cluster.
        statistics: "auto" takes the stored ones, but of a network that was converted with per-image statistics those.
            "per-image" normalises the image (each of a batch) by its own statistics, measured over all of it before it
            is predicted, as the network did before it was converted to frozen statistics. With it a network that was
            not converted gives what it gives for the whole image: attention over all positions, pools to a fixed number
            of bins and maps resized with aligned corners are those of the whole image then. Such a network runs in
            stages, at the sizes that it takes.
        blocks: how to run in stages, and how many tiles share a call; blocks are of `tile` if they state no size.
        forward_fn: `forward_fn(model, image)` for another calling convention.
        output: key or index of the output that counts.
        allow_nonfinite: take NaN and infinite values in the prediction for what the network means.
        as_: "raw"; "classes", the number of the largest of several channels; "probabilities"; "mask", 255 where the
            probability is above 0.5, or "mask:0.3".
        logits: what makes probabilities of the output: "softmax" of several channels and "sigmoid" of one unless
            stated; "none" if it is probabilities already.

    Returns:
        (N, C', *out) in the model's dtype, on its device; classes and masks are uint8 (over 256 classes uint16),
        probabilities float32.

    Raises:
        NormfixError: NF409 if the network has live statistics or no halo is enough, NF402 for a tile that is
            off the stride grid, NF260 for an image at whose size the network is another, NF410 for a halo that is not
            enough or an engine, NF570 for tiles that the proof found to differ from the whole, NF32x where stages
            are asked for and not possible, NF326 to NF336 of the store and the cluster, NF148 and NF149 for
            statistics and predictions that are not finite, NF534 and NF535 for what the output does not mean, and
            codes of the image.
    """
    rendering = Rendering.parse(as_, logits)
    with opened(image, model) as source:
        job = _Prediction.of(
            model,
            source,
            tile,
            halo=halo,
            engine=engine,
            statistics=statistics,
            blocks=blocks,
            forward_fn=forward_fn,
            output=output,
        )
        with resumable(job.blocks.store):
            result = job.run()
            confirm(source)
    assert result is not None
    if not allow_nonfinite:
        require_finite(result, job.known.scan.model)
    rendering.channels(result.shape[1])
    if rendering.is_of_probabilities:
        rendering.require_logits(float(result.min()), float(result.max()))
    return rendering.of(result)


@undisturbed()
def write_prediction(
    model: nn.Module,
    image: Given,
    out: Path | str,
    tile: int | Sequence[int] | None = None,
    *,
    allow_nonfinite: bool = False,
    as_: str = "raw",
    logits: Logits | None = None,
    **options: Unpack[PredictOptions],
) -> tuple[tuple[int, ...], str]:
    """Predict one image into a new file, block by block; in stages where the network can. See `predict`.

    Args:
        model: as for `predict`.
        image: of a batch of one.
        out: ends in .npy, .tif, .zarr (OME-Zarr), .nii or .nii.gz; must not exist, and appears when it is whole. Size
            of pixels, their place and the order of channels are those of the image, as far as the format holds them.
        tile: as for `predict`.
        allow_nonfinite: as for `predict`.
        as_: as for `predict`. A TIFF of what is not raw is a hyperstack of ImageJ, where that holds it.
        logits: as for `predict`.
        **options: as for `predict`.

    Returns:
        Shape (C, *space) and dtype of what was written.

    Raises:
        NormfixError: NF114 for a file that cannot be written, and codes of `predict`.
    """
    out = Path(out)
    with ExitStack() as stack:
        source = stack.enter_context(opened(image, model))
        job = _Prediction.of(model, source, tile, **options)
        stack.enter_context(resumable(job.blocks.store))
        rendering = Rendering.parse(as_, logits)
        file = stack.enter_context(OutputFile(out, allow_nonfinite=allow_nonfinite, rendering=rendering))
        placement = getattr(source, "placement", None)
        if placement is not None:
            file.place(placement.scaled(job.scale))
        job.write(file)
        confirm(source)
    return file.written


@undisturbed()
def write_stack(
    model: nn.Module,
    planes: Iterable[ScaledImage],
    out: Path,
    stack: tuple[str, int],
    tile: int | Sequence[int] | None = None,
    *,
    allow_nonfinite: bool = False,
    as_: str = "raw",
    logits: Logits | None = None,
    **options: Unpack[PredictOptions],
) -> tuple[tuple[int, ...], str]:
    """Predict the planes of a stack, each by itself, into one new file. See `write_prediction`.

    Args:
        model: as for `predict`.
        planes: of one shape, each used before the next is asked for.
        out: as for `write_prediction`.
        stack: letter of the axis, Z or T, and how many planes there are.
        tile: as for `predict`.
        allow_nonfinite: as for `predict`.
        as_: as for `write_prediction`.
        logits: as for `predict`.
        **options: as for `predict`.

    Returns:
        Shape (planes, C, *space) and dtype of what was written.

    Raises:
        NormfixError: codes of `write_prediction`.
    """
    rendering = Rendering.parse(as_, logits)
    store = (options.get("blocks") or Blocks()).store
    with (
        resumable(store),  # all planes: what is done again begins with the first
        OutputFile(out, allow_nonfinite=allow_nonfinite, stack=stack, rendering=rendering) as file,
    ):
        for number, plane in enumerate(planes):
            job = _Prediction.of(model, plane, tile, **options)
            file.plane = number
            file.place(plane.placement.scaled((*[Fraction(1)] * (stack[0] == "Z"), *job.scale)))
            job.write(file)
            confirm(plane)
    return file.written


@dataclass(frozen=True, slots=True)
class _Planned:
    """What was held of a network at statistics of an image of a shape."""

    of: tuple[object, torch.Size]
    """The modules and values, and the shape."""
    scan: Scan
    plan: Plan
    extents: torch.Size
    """Of the part of the image that the network was scanned with."""


@dataclass(frozen=True, slots=True)
class _Prediction:
    """What to predict, checked."""

    owner: nn.Module
    """The caller's network, which keeps what is captured of copies."""
    model: nn.Module
    image: Image
    known: Known
    geometry: Geometry | None
    """None where attention over all positions leaves none."""
    blocks: Blocks
    engine: str
    statistics: str
    extended: bool = True
    """Whether the image is extended to a size that tiles are exact at; stages may do without."""
    told: list[Finding] = field(default_factory=list)
    """What was said of an extension."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        given: Tensor | Image,
        tile: int | Sequence[int] | None,
        *,
        halo: int | Sequence[int] | Literal["auto"] = "auto",
        engine: Literal["auto", "stages", "tiles"] = "auto",
        statistics: Literal["auto", "stored", "per-image"] = "auto",
        blocks: Blocks | None = None,
        forward_fn: ForwardFn | None = None,
        output: str | int | None = None,
    ) -> _Prediction:
        _require_one_of(("auto", "stages", "tiles"), engine=engine)
        _require_one_of(("auto", "stored", "per-image"), statistics=statistics)
        blocks = (blocks or Blocks()).sized(tile)
        owner, caller = model, Caller.of(provenance_of(model), forward_fn, output)
        taken = images_of(given, model, caller=caller)
        if statistics == "auto":
            statistics = _stated(model)
        if statistics == "per-image" and provenance_of(model) is None:
            model = _held(model, taken.excerpt(), caller)
        known = known_of(model, taken, forward_fn, output)
        exact = geometry_of(known.scan)
        sites = {site.id: site for site in known.scan.sites}
        in_stages = any(sites[name].family in _WHOLE and sites[name].refusal for name in known.live)
        in_stages = in_stages or (exact is None and statistics == "per-image")
        # what stages cannot do either they name themselves
        live = [name for name in known.live if not (in_stages and sites[name].refusal)]
        geometry = with_halo(exact, halo)
        if live or (geometry is None and not in_stages):
            reasons = [f"{site} is live" for site in live[:3]] or [f.message for f in known.scan.findings]
            raise _not_tiled(known.scan, reasons)
        _require_proved(model, known.scan)
        image = images_of(taken, model, like=known.scan.example).only()
        if in_stages:
            if halo != "auto" or engine == "tiles":
                raise NormfixError(
                    "NF410",
                    "pixels of it depend on all others, or on their place in the whole image (attention, pools to a "
                    "fixed number of bins, aligned corners), so no tile is enough: stages alone keep what is of the "
                    "whole image. Leave halo and engine out.",
                    where=f"engine={engine}, halo={halo}",
                )
            ndim = len(image.shape) - 2
            blocks = replace(blocks, tile=_TILE if blocks.tile is None else blocks.extents(ndim))
            _require_inside(known.scan, image.shape, image.shape[2:], _free(ndim))
            return cls(owner, model, image, known, None, blocks, "stages", statistics)
        assert geometry is not None
        assert exact is not None
        _require_enough(geometry, exact)
        blocks = replace(blocks, tile=tile_extents(blocks.tile or _TILE, geometry))
        if blocks.engine == "dask":
            engine = "stages"
        if halo != "auto" and engine == "stages":
            raise NormfixError(
                "NF410", "a halo belongs to engine tiles; stages measure their own.", where=f"halo={halo}"
            )
        if halo != "auto":
            engine = "tiles"
        _require_inside(known.scan, image.shape, blocks.extents(len(geometry.stride)), geometry)
        return cls(owner, model, image, known, geometry, blocks, engine, statistics)

    def run(self, out: OutputFile | None = None) -> Tensor | None:
        """Predict by one engine; the result, or None if it went to `out`."""
        if self.statistics == "per-image":
            if self.image.shape[0] > 1:
                self._require_apart()
                each = [replace(self, image=TensorImage(x)).run() for x in torch.split(whole(self.image), 1)]
                return torch.cat([y for y in each if y is not None])
            return self._of_the_image(out)
        model, caller, geometry = self.model, self.known.caller, self.geometry
        tile = self.blocks.extents(len(self.image.shape) - 2)
        self._tell_of_extension()
        if self.engine == "stages" or not self.extended or (self.engine == "auto" and self._pays(tile)):
            try:
                return predict_in_stages(
                    model,
                    self.image,
                    caller,
                    self.blocks,
                    geometry=geometry,
                    extended=self.extended,
                    sites=self.known.layers,
                    out=out,
                )
            except NotInStages as error:
                if self.engine == "stages" or not self.extended:
                    raise
                tell_fallback("the image is read whole and predicted in tiles", error)
        assert geometry is not None
        held, what = _HELD.setdefault(model, set()), self._compared(geometry, tile)
        if what not in held and self._require_alike(geometry, tile):
            held.add(what)
        twin = twin_of(model)
        with exact_arithmetic():
            image = whole(self.image)
            result = tiled(lambda x: caller(twin, x), image, tile, geometry, batch=self.blocks.batch)
            if what not in held and self._require_whole(result, image, geometry, tile):
                held.add(what)
            return result

    def _of_the_image(self, out: OutputFile | None) -> Tensor | None:
        """Predict by the image's own statistics: as they are measured, where no geometry hangs on them."""
        provenance = provenance_of(self.model)
        assert provenance is not None
        model, caller = copy_of(self.model), self.known.caller
        targets = measured_targets(model, provenance.plan)
        scan, owner = self.known.scan, original_of(self.owner)
        reason = objection(
            owner, in_eval_mode(model), provenance.plan, caller, scan.example, self.image.shape
        )
        if reason:
            raise NotTiledError("NF409", reason, where=scan.model)
        *before, last = self._ways()
        try:
            for way in before:  # what is extended says why
                try:
                    return way._measured_on_it(model, targets, out)
                except NotTaken:
                    continue
                except NotInStages:
                    # of a network that was not converted the whole image is the one that it is given
                    if provenance_of(self.owner) is None and self._is_taken():
                        raise
            return last._measured_on_it(model, targets, out)
        finally:
            hand_on(model, original_of(self.owner))

    def _is_taken(self) -> bool:
        """Tell whether the caller's network takes the image's size; of a large image it is run without numbers."""
        size, owner = (1, *self.image.shape[1:]), in_eval_mode(twin_of(self.owner))
        if math.prod(size[2:]) > LARGEST:
            return footprint(owner, self.known.caller, size) is not None
        image = whole(self.image)[:1].to(*home_of(owner))
        try:
            with torch.no_grad(), exact_arithmetic():
                self.known.caller(owner, image)
        except refusals():
            return False
        return True

    def _measured_on_it(
        self, model: nn.Module, targets: Sequence[Target], out: OutputFile | None
    ) -> Tensor | None:
        """Predict by statistics that are measured on the image, in one walk where that can be."""
        provenance, caller = provenance_of(model), self.known.caller
        assert provenance is not None
        self._tell_of_extension()
        if self.engine != "tiles" and targets:
            # values without a law are no statistics of blocks, but may be products and sums of exponentials
            live, plan = released(model, provenance.plan)
            if live is not model or keeps_geometry(model, provenance, middle_of(self.image), caller):
                modules = dict(live.named_modules())
                with suppress(NotInStages):  # what follows says why
                    return predict_measured_(
                        live,
                        measured_targets(live, plan),
                        self.image,
                        caller,
                        self.blocks,
                        geometry=self.geometry if live is model else None,
                        extended=self.extended,
                        sites=tuple(path for path in self.known.layers if path in modules),
                        out=out,
                    )
        return replace(self._fitted_(model, targets), statistics="stored").run(out)

    def _ways(self) -> list[_Prediction]:
        """Return what is tried in turn: where no tiles are exact at its size, the image as it is comes first."""
        missing = () if self.geometry is None else self.geometry.padding(self.image.shape[2:])
        return [replace(self, extended=False), self] if self.engine != "tiles" and any(missing) else [self]

    def _tell_of_extension(self) -> None:
        """Say once that the image is extended, if it is."""
        if self.geometry is None or self.told or not self.extended:
            return
        for finding in extension(self.image.shape[2:], self.geometry):
            _LOG.warning("%s", finding.line)
            self.told.append(finding)

    def _require_apart(self) -> None:
        """Refuse a batch of which the network does not treat the images apart: none has statistics of its own there.

        Raises:
            NotTiledError: NF409.
        """
        images = middle_of(self.image).to(*home_of(self.owner)).double()
        for axis, extent in enumerate(self.known.scan.example[2:], start=2):
            images = images.narrow(
                axis, max(0, images.shape[axis] - extent) // 2, min(extent, images.shape[axis])
            )
        network = in_eval_mode(double_of(self.owner))
        try:
            with torch.no_grad(), exact_arithmetic():
                batch, *each = (
                    self.known.caller.exactly(network, x) for x in (images, *torch.split(images, 1))
                )
        except refusals():  # it takes no batch, so each is meant by itself
            return
        if batch.shape != (alone := torch.cat(each)).shape or not alike(batch.double(), alone.double()):
            raise NotTiledError(
                "NF409",
                f"it gives the images of a batch of {len(images)} another output than each alone, so they have no "
                "statistics of their own there. Predict one image at a time, if each is meant by itself.",
                where=self.known.scan.model,
            )

    def _require_alike(self, geometry: Geometry, tile: Sequence[int]) -> bool:
        """Refuse an image at whose size tiles differ from the whole, where no graph tells how sizes are treated.

        Returns:
            Whether they were compared.

        Raises:
            NormfixError: NF264.
        """
        size, sizes = self.image.shape[2:], self.known.scan.sizes
        if sizes is None or not sizes.unknown:
            return False
        compared = self._require_no_difference(geometry, tile)
        if not sizes.exceeded(size) and not is_compared_whole(size, geometry):
            _LOG.warning(
                "NF261 an image of %s was not compared whole, strips as long and a window of its tiles were, and no "
                "graph tells how the network treats sizes: %s.",
                "x".join(map(str, size)),
                sizes.unknown[0].rstrip("."),
            )
        return compared

    def _require_whole(self, result: Tensor, image: Tensor, geometry: Geometry, tile: Sequence[int]) -> bool:
        """Hold what tiles gave against the whole: a network may be another while it is captured.

        Small images are run whole; of what differs float64 decides, as of the strips of large ones. What differs in
        float64 is no rounding, or turns on it, as a map does that is compared with its own maximum.

        Returns:
            Whether they were compared.

        Raises:
            NormfixError: NF264.
        """
        size = image.shape[2:]
        if all(n <= t for n, t in zip(size, tile, strict=True)):
            return False
        if is_compared_whole(size, geometry):
            part = slice(None if image.shape[0] * math.prod(size) <= LARGEST else 1)
            try:
                with torch.no_grad():
                    whole = self.known.caller(twin_of(self.model), padded(image[part], geometry))
            except OutOfMemory:  # tiles are what it has room for
                return False
            except refusals():
                return False
            ours, own = result[part], cropped(whole, size, geometry.scale)
            if same(ours, own):
                return True
            # of a network that rounds its extents up tiles may give more
            if ours.dtype == torch.float64 and ours.shape == own.shape:
                raise NormfixError(
                    "NF264",
                    f"tiles of this image of {'x'.join(map(str, size))} pixels differ from its whole in float64, while "
                    "tiles of other images equalled it: the network is another there, or turns on the rounding of a "
                    "value, as where a map is compared with its own maximum. Predict it whole.",
                    where=self.known.scan.model,
                )
        return self._require_no_difference(geometry, tile)

    def _require_no_difference(self, geometry: Geometry, tile: Sequence[int]) -> bool:
        """Compare tiles with the whole in float64 at the image's size.

        Returns:
            Whether they were compared.

        Raises:
            NormfixError: NF264.
        """
        scan, caller = self.known.scan, self.known.caller
        example = middle_of(self.image)[:1].to(*home_of(self.model)).double()
        double = double_of(self.model)

        def f(x: Tensor) -> Tensor:
            return caller.exactly(double, x)

        size, parts = self.image.shape[2:], tuple[tuple[int, ...], ...]()
        try:
            with exact_arithmetic():
                found = differing(f, example, size, tile, geometry)
                if found is None and self._is_doubtful(geometry):
                    parts = parts_compared(f, example, size, tile, geometry)
        except OutOfMemory:  # of float64 it takes twice as much
            return False
        except refusals():  # it takes no strip, which says nothing of its tiles
            return False
        if found is not None:
            unknown = scan.sizes.unknown if scan.sizes is not None else ()
            why = unknown[0] if unknown else "its graph does not say that it is another network there"
            raise NormfixError(
                "NF264",
                f"tiles differ from the whole at {'x'.join(map(str, found))} pixels, while they equalled it at the "
                f"sizes that were tried: {why.rstrip('.')}.",
                where=scan.model,
            )
        here, *others = ((1, example.shape[1], *extents) for extents in (exact_size(size, geometry), *parts))
        if others and calls_more(twin_of(self.model), caller, here, others):
            raise NormfixError(
                "NF264",
                f"an image of {'x'.join(map(str, size))} pixels is too large to be compared whole, and the network "
                "calls there what it calls on no strip of it and in no window, such as where both extents are large. "
                "Predict it whole, or take the branch out.",
                where=scan.model,
            )
        return True

    def _is_doubtful(self, geometry: Geometry) -> bool:
        """Tell whether the image is not compared whole, while it may be on another side of a branch than most sizes."""
        sizes, size = self.known.scan.sizes, self.image.shape[2:]
        if sizes is None or is_compared_whole(size, geometry):
            return False
        return bool(sizes.unknown or sizes.passed(exact_size(size, geometry)))

    def _compared(self, geometry: Geometry, tile: Sequence[int]) -> tuple[Any, ...]:
        """Return what tiles are compared at: a size, with the values of now where they may count."""
        sizes = self.known.scan.sizes
        state = state_of(self.model) if sizes is not None and sizes.unknown else ()
        return (self.known.scan, tuple(self.image.shape[2:]), tuple(tile), geometry, state)

    @property
    def scale(self) -> tuple[Fraction, ...]:
        """Return output positions per pixel, per axis."""
        if self.geometry is not None:
            return self.geometry.scale
        example = middle_of(self.image).to(*home_of(self.model))
        with torch.no_grad():
            given = self.known.caller(twin_of(self.model), example)
        pairs = zip(given.shape[2:], example.shape[2:], strict=True)
        return tuple(Fraction(after, before).limit_denominator(_FINEST) for after, before in pairs)

    def write(self, file: OutputFile) -> None:
        """Predict into a file."""
        result = self.run(file)
        if result is not None:
            file.create(result.shape[1:], result.dtype, result.shape[2:])
            file.write(tuple(slice(0, n) for n in result.shape), result)

    def _pays(self, tile: Sequence[int]) -> bool:
        """Tell whether stages were meant, or whether tiles would compute much more than the image or read it whole."""
        if self.blocks.budget is not None or self.blocks.store is not None:
            return True
        size = self.image.shape[2:]
        assert self.geometry is not None
        tiles = math.prod(-(-n // t) for n, t in zip(size, tile, strict=True))
        window = (min(n, t + sum(h)) for n, t, h in zip(size, tile, self.geometry.halo, strict=True))
        surplus = tiles * math.prod(window) - math.prod(size)
        opened = not isinstance(self.image, TensorImage)
        return surplus > self._least(math.prod(size)) or (opened and math.prod(size) > _PAYS)

    def _least(self, pixels: int) -> int:
        """Return how many pixels of halo cost more than stages do."""
        if home_of(self.model)[0].type == "cpu":
            return _PAYS
        captured = is_captured(self.model, self.known.caller, self.known.layers)
        return pixels // _SHARE if captured else _PAYS_ON_A_GPU

    def _fitted_(self, model: nn.Module, targets: Sequence[Target]) -> _Prediction:
        """Return the prediction by a copy of the model that is given the image's statistics, and their geometry.

        Raises:
            NormfixError: NF409 if no geometry holds under them.
        """
        provenance = provenance_of(self.model)
        assert provenance is not None
        caller = self.known.caller
        if targets:
            image = images_of(self.image, model)
            geometry = self.geometry if self.extended else None
            measure_(model, targets, image, caller, self.blocks, geometry=geometry)
        scan = renewed(model, provenance, middle_of(self.image), caller)
        exact = geometry_of(scan)
        if scan is self.known.scan:
            return replace(self, model=model)
        if exact is None:
            raise _not_tiled(scan, [scan.findings[-1].message])
        blocks = replace(self.blocks, tile=tile_extents(self.blocks.tile or _TILE, exact))
        _require_inside(scan, self.image.shape, blocks.extents(len(exact.stride)), exact)
        return replace(self, model=model, known=replace(self.known, scan=scan), geometry=exact, blocks=blocks)


def _stated(model: nn.Module) -> Literal["stored", "per-image"]:
    """Return what a network was converted for."""
    known = provenance_of(model)
    return "per-image" if known is not None and known.statistics.kind == "per-image" else "stored"


def _held(model: nn.Module, image: Tensor, caller: Caller) -> nn.Module:
    """Return a copy of a network that was not converted, its layers frozen at statistics of a part of the image.

    For another image of this shape, while modules and values are the same, what is held is as before. What else such an
    image would show, as a network that is converted does not look for either, its identity and the stages' program are
    compared on.

    Raises:
        NormfixError: NF409 if it does not compute what the network computes once they are.
    """
    known = _PLANNED.get(model)
    scanned = None if known is None else scanned_of(model, caller, known.scan)
    if known is None or scanned is None or known.of != (scanned, image.shape):
        base = base_of(model, image, caller)
        scan = look(base.copy, base.example, base.caller).scan
        plan = decide(scan.sites, model=scan.model, to="frozen")
        # only now: that its runs change nothing of the network was shown by the base
        scanned = scanned_of(model, caller, scan)
        if scanned is not None:
            _PLANNED[model] = _Planned((scanned, image.shape), scan, plan, base.example.shape[2:])
    else:
        scan, plan = known.scan, known.plan
        base = base_of(model, image, caller, example=middle(image, known.extents))
    held = in_eval_mode(rewrite_(base.copy(), plan))
    part = half_of(base.example)
    single = of_single_images(held, plan)
    if not have_as_many(original_of(model), held, single, base.caller, (part.shape, image.shape)):
        part = base.example
    try:
        frozen = _require_identity(base, scan, plan, part)
    except refusals():
        if part.shape == base.example.shape:
            raise
        frozen = _require_identity(base, scan, plan, base.example)  # more of it decides
    with torch.no_grad():  # what is captured and proved of it divides by them, so zeros and ones will not do
        for target, theirs in zip(measured_targets(held, plan), measured_targets(frozen, plan), strict=True):
            target.module.load_state_dict(theirs.module.state_dict())
    stated = None if caller.output is None else str(caller.output)
    source = Source(kind="object", spec=f"{type(model).__module__}:{type(model).__qualname__}")
    attach_(held, Provenance(plan=plan, scan=scan, scaling=Scaling(), source=source, output=stated))
    return held


def _require_identity(base: Base, scan: Scan, plan: Plan, image: Tensor) -> nn.Module:
    """Return a network with frozen layers; refuse one that they do not reproduce where they are measured.

    It is what `normfix.convert` proves; in float64, where the network computes in it, so that nothing is rounding.
    """

    def compared(network: nn.Module, image: Tensor) -> tuple[ProofStep, nn.Module]:
        frozen = in_eval_mode(rewrite(network, plan))
        freeze_sites_(frozen, measured_targets(frozen, plan), image, base.caller.exactly)
        outputs = [base.caller.exactly(net, image) for net in (frozen, network)]
        ours, own = (y if y.is_floating_point() else y.double() for y in outputs)  # classes
        return identity(ours, own), frozen

    network = in_eval_mode(copy_of(base.network))
    example = image[:1].to(*home_of(network))
    with torch.no_grad(), exact_arithmetic():
        try:
            step, frozen = compared(double_of(network), example.double())
        except refusals():
            step, frozen = compared(network, example)
    if step.status == "failed":
        distance = step.note or f"{step.value:.2g} sd"
        raise NotTiledError(
            "NF409",
            "with its statistics frozen at those of one image it gives another output for that image "
            f"({distance}): one of them is of something else than the image, such as parts of it that are stacked as a "
            "batch. Predict the image whole.",
            where=scan.model,
        )
    return frozen


def _require_proved(model: nn.Module, scan: Scan) -> None:
    """Refuse a network whose tiles its proof found to differ from the whole; say what else of it did not pass.

    Raises:
        NormfixError: NF570.
    """
    provenance = provenance_of(model)
    if provenance is None or scan is not provenance.scan or not provenance.unproved:
        return
    steps = "; ".join(step.headline for step in provenance.unproved)
    if any(step.name == TILES and step.status == "failed" for step in provenance.unproved):
        raise NotTiledError(
            "NF570",
            f"the proof of its conversion failed ({steps}), so its tiles are not its whole. Predict the image whole: "
            "model(image).",
            where=scan.model,
        )
    _LOG.warning(
        "NF570 %s: the proof of its conversion did not pass (%s). Its tiles are its whole, which may not be what the "
        "original gives.",
        scan.model,
        steps,
    )


def _free(ndim: int) -> Geometry:
    """Return the geometry of an image that is taken as it is."""
    ones = (1,) * ndim
    return Geometry(stride=ones, halo=((0, 0),) * ndim, scale=(Fraction(1),) * ndim, multiple=ones)


class NotTiledError(NormfixError):
    """Tiles of a network do not give its prediction of the whole image, whatever the image."""


def _not_tiled(scan: Scan, reasons: Sequence[str]) -> NotTiledError:
    return NotTiledError(
        "NF409",
        "tiles of this network do not give its prediction of the whole image: "
        f"{'; '.join(reasons)}. Convert it first.",
        where=scan.model,
    )


def _require_inside(scan: Scan, shape: Sequence[int], tile: Sequence[int], geometry: Geometry) -> None:
    """Refuse an image of a size at which the network is another than the one that was scanned; say what is unproved.

    Raises:
        NormfixError: NF260.
    """
    judgement = judge_size(scan.sizes, shape[2:], tile, geometry, shape[0])
    for finding in judgement.outside[:1]:
        raise NormfixError(finding.code, finding.message, where=scan.model)
    for finding in judgement.unproved:
        _LOG.warning("%s", finding.line)


def _require_one_of(choices: Sequence[str], **option: str) -> None:
    """Refuse what is none of an option's choices."""
    ((name, choice),) = option.items()
    if choice not in choices:
        raise NormfixError("NF410", f"give {' or '.join(choices)}.", where=f"{name}={choice!r}")


def _require_enough(geometry: Geometry, exact: Geometry) -> None:
    """Refuse to predict with less context than the network needs."""
    pairs = zip(geometry.halo, exact.halo, strict=True)
    if any(
        round_up(h, s) < round_up(e, s)
        for (given, need), s in zip(pairs, exact.stride, strict=True)
        for h, e in zip(given, need, strict=True)
    ):
        raise NormfixError(
            "NF410",
            f"the network needs (before, after) {exact.halo}, so tiles would differ from the whole image. "
            "Use 'auto'.",
            where="halo=" + ",".join(str(before) for before, _ in geometry.halo),
        )
