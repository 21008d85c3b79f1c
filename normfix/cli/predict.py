"""normfix predict: one image to a file, or several to a folder, each whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import click

from normfix.cli.answers import Predicted
from normfix.cli.extents import Extents, HaloExtents, context_option
from normfix.cli.failures import each
from normfix.cli.options import Arguments, image_options, model_options, override_option
from normfix.cli.outputs import is_image, output, tell
from normfix.cli.showing import format_option, note, show
from normfix.cli.stages import blocks_of, require_workers_used, stage_options, working
from normfix.errors import NormfixError
from normfix.images.drafts import cannot_write, require_possible
from normfix.images.rendering import Rendering
from normfix.tiling.stages.cluster import require_cluster

if TYPE_CHECKING:
    from torch import nn

    from normfix.images.drafts import Naming
    from normfix.images.opening import Opener
    from normfix.images.windows import ScaledImage

__all__ = ["predict_command"]

_ENDINGS = [".tif", ".npy", ".zarr", ".nii", ".nii.gz"]


@click.command("predict")
@model_options
@click.argument("images", nargs=-1, required=True)
@click.option(
    "-o",
    "--out",
    required=True,
    help="File to write, .npy, .tif, .nii, .nii.gz or .zarr; for several images a folder. Never over anything.",
)
@click.option(
    "--ending",
    type=click.Choice(_ENDINGS),
    help="Of the files in a folder. Default: that of the image, .tif for PNG and JPEG.",
)
@click.option(
    "--tile", type=Extents(1), help="Tile size in pixels; one number, or one per axis. Default: 256."
)
@context_option()
@click.option(
    "--batch",
    type=click.IntRange(1),
    help="Tiles in one call of the network. Default: 1 on the CPU, as many as pay on a GPU.",
)
@click.option(
    "--engine",
    type=click.Choice(["auto", "tiles", "stages", "dask"]),
    default="auto",
    show_default=True,
    help="stages: run once, stage by stage over blocks, for images larger than memory. auto: stages where they pay. "
    "dask: stages on the cluster at --scheduler; needs a --store that all of it sees.",
)
@click.option(
    "--statistics",
    type=click.Choice(["auto", "stored", "per-image"]),
    default="auto",
    show_default=True,
    help="auto: as the network was converted, else stored. per-image: normalise the image by its own statistics, "
    "measured over all of it. So an unconverted network gives its output of the whole image, attention over all "
    "positions included.",
)
@click.option(
    "--allow-nonfinite",
    is_flag=True,
    help="Write NaN and infinite values that the network gives, instead of refusing them.",
)
@click.option(
    "--as",
    "as_",
    default="raw",
    show_default=True,
    metavar="raw|classes|probabilities|mask[:P]",
    help="classes: number of the largest of several channels, uint8. mask: 255 where the probability is above P "
    "(0.5), uint8. A TIFF of these opens in Fiji as a hyperstack.",
)
@click.option(
    "--logits",
    type=click.Choice(["softmax", "sigmoid", "none"]),
    help="What makes probabilities of the output. Default: softmax of several channels, sigmoid of one; none: it is "
    "probabilities already.",
)
@stage_options
@image_options
@override_option
@format_option
def predict_command(
    images: tuple[str, ...],
    out: str,
    ending: str | None,
    tile: int | tuple[int, ...] | None,
    halo: HaloExtents,
    batch: int | None,
    engine: str,
    statistics: Literal["auto", "stored", "per-image"],
    allow_nonfinite: bool,
    as_: str,
    logits: str | None,
    format_: str,
    **options: Any,
) -> int:
    """Predict IMAGES tile by tile with a converted MODEL, exactly as the whole images would be predicted.

    Images are files, folders and patterns. With -o FOLDER each prediction is named after its image; one image that
    fails does not hinder the others, is named at the end, and the command exits 2. With --slices the planes of a
    stack are predicted each by itself, and the prediction is a stack.

    With --engine stages and --store the same command goes on where it was stopped.

    \b
    Example:
      normfix predict fixed nuclei.tif -o prediction.tif
    """
    require_possible(Path(out))
    arguments = Arguments.take(options, images)
    Rendering.parse(as_, logits)
    require_cluster("dask" if engine == "dask" else "local", options["scheduler"], options["store"])
    require_workers_used(engine in ("auto", "stages"))

    def opened() -> _Run:
        settings = {
            "tile": tile,
            "halo": halo,
            "engine": "stages" if engine == "dask" else engine,
            "statistics": statistics,
            "blocks": replace(blocks_of(options, "dask" if engine == "dask" else "local"), batch=batch),
            "output": arguments.output,
            "allow_nonfinite": allow_nonfinite,
            "as_": as_,
            "logits": logits,
        }
        return _Run.of(arguments, settings, format_)

    from normfix.images.names import find_images

    paths = find_images(images)
    if _is_folder(Path(out)):
        return _predict_each(opened, list(dict.fromkeys(paths)), Path(out), ending)
    return _predict_one(opened, paths, out, ending)


def _predict_one(opened: Callable[[], _Run], paths: Sequence[Path], out: str, ending: str | None) -> int:
    from normfix.images.names import require_image_name

    require_image_name(Path(out))
    if ending is not None:
        raise click.UsageError(f"--ending is of the files in a folder; -o {out} has its own")
    if len(paths) != 1:
        reason = f"{len(paths)} images go to a folder: give -o a name without an ending."
        raise NormfixError("NF531", reason, where=out)
    with output(out, is_image) as place:
        run = opened()
        record = run.predict(paths[0], place)
    run.show(record)
    tell(place)
    return 0


def _predict_each(opened: Callable[[], _Run], paths: Sequence[Path], folder: Path, ending: str | None) -> int:
    _require_folder(folder)
    targets = _targets(paths, folder, ending)
    with _made(folder):
        return _predict_to(opened, dict(zip(paths, targets, strict=True)), folder)


def _predict_to(opened: Callable[[], _Run], targets: Mapping[Path, Path], folder: Path) -> int:
    run = opened()

    from normfix.api.prediction import NotTiledError
    from normfix.tiling.stages.resuming import resumable

    made: list[Path] = []

    def work(number: int, path: Path) -> None:
        target = targets[path]
        with output(str(target), is_image) as place, resumable(run.settings["blocks"].store, target.name):
            record = run.predict(path, place)
        run.show(record)
        made.append(target)

    try:
        failed = each(targets, work, hopeless=(NotTiledError,))
    except KeyboardInterrupt:
        note(
            f"{len(made)} of {len(targets)} images were predicted before, to {folder}; the same command goes on."
        )
        raise
    note(f"{len(targets) - len(failed)} of {len(targets)} images predicted, to {folder}.")
    if failed:
        note(f"Failed: {', '.join(map(str, failed))}.")
    return 2 if failed else 0


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Make a folder, which is gone again if it was not there and nothing came into it.

    Raises:
        NormfixError: NF114 if it cannot be made.
    """
    fresh = not folder.exists()
    try:
        folder.mkdir(exist_ok=True)
    except OSError as error:
        raise cannot_write(folder, error) from error
    try:
        yield
    finally:
        if fresh and not any(folder.iterdir()):
            folder.rmdir()


@dataclass(frozen=True, slots=True)
class _Run:
    """Predicts one image after another with one network."""

    model: nn.Module
    opener: Opener
    settings: dict[str, Any]
    format: str
    slices: str | None

    @classmethod
    def of(cls, arguments: Arguments, settings: dict[str, Any], format_: str) -> _Run:
        model = arguments.open().model
        return cls(model, arguments.opener(model), settings, format_, arguments.slices)

    def predict(self, path: Path, place: Naming) -> Predicted:
        """Write the prediction of an image, and return its record, to be shown once the prediction has its name."""
        from normfix.api.prediction import write_prediction, write_stack

        with self.opener.open(path) as image, working(path) as watch:
            for text in image.notes:
                note(text)
            settings = {**self.settings, "blocks": replace(self.settings["blocks"], watch=watch)}
            if self.slices is None:
                shape, dtype = write_prediction(self.model, image, place.path, **settings)
            else:
                planes, stack = self._planes(path, image), (self.slices, image.planes)
                shape, dtype = write_stack(self.model, planes, place.path, stack, **settings)
        return Predicted(path=str(place.target), shape=shape, dtype=dtype)

    def show(self, record: Predicted) -> None:
        """Show the record of a prediction."""
        show(record, f"{record.path}: {'x'.join(map(str, record.shape))}, {record.dtype}", self.format)

    def _planes(self, path: Path, first: ScaledImage) -> Iterator[ScaledImage]:
        yield first
        for plane in range(1, first.planes):
            with self.opener.open(path, plane) as image:
                yield image


def _is_folder(out: Path) -> bool:
    """Tell whether -o means a folder of predictions, and not one that is a prediction itself (Zarr)."""
    return not out.suffix or (out.is_dir() and out.suffix.lower() != ".zarr")


def _require_folder(folder: Path) -> None:
    """Refuse a folder that cannot be made, before anything is computed for it.

    Raises:
        NormfixError: NF114.
    """
    if os.path.lexists(folder) and not folder.is_dir():
        raise NormfixError("NF114", "it exists and is no folder. Name another one.", where=str(folder))
    if not folder.parent.is_dir():
        raise NormfixError("NF114", f"there is no folder {folder.parent} to make it in.", where=str(folder))


def _targets(paths: Sequence[Path], folder: Path, ending: str | None) -> list[Path]:
    """Return where each prediction goes.

    Raises:
        NormfixError: NF531 if two go to one file, or one to its own image.
    """
    taken: dict[Path, Path] = {}
    for path in paths:
        target = folder / _named(path, ending)
        if target in taken or (target.exists() and any(target.samefile(p) for p in paths)):
            other = taken.get(target, target)
            raise NormfixError(
                "NF531",
                f"the prediction of {path} would be written over {other if other == target else f'that of {other}'}. "
                "Name another folder, or give them in several commands.",
                where=str(target),
            )
        taken[target] = path
    return list(taken)


def _named(path: Path, ending: str | None) -> str:
    """Return the name of an image's prediction.

    >>> _named(Path("cells/a.PNG"), None), _named(Path("t1.nii.gz"), None), _named(Path("b.npy"), ".tif")
    ('a.tif', 't1.nii.gz', 'b.tif')
    """
    from normfix.images.endings import OUTPUTS, suffix_of

    own = suffix_of(path)
    stem = path.name[: len(path.name) - len(own)]
    return stem + (ending or (own if own in OUTPUTS else ".tif"))
