"""Run the demo: scan, tiled prediction with seams, conversion both ways, proof, pictures and a page.

Importing this module does not import torch; running it does.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from normfix.errors import NormfixError
from normfix.records.progress import Progress, silent
from normfix.records.saved import Scaling, Source

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from normfix.choosing.choose import Choice
    from normfix.conversion.results import Conversion
    from normfix.records.candidates import ChoiceRecord
    from normfix.records.verdicts import Verdict
    from normfix.reporting.panels import Drawing

__all__ = ["SCALING", "TILE", "DemoResult", "Maps", "demo_image", "predictions", "run_demo"]

SCALING = Scaling(kind="percentile", values=(1.0, 99.8))
"""How the demo network's training images were scaled, and therefore every image it is given."""

TILE = 128

PART = 320
"""Pixels on each side of the parts on which constants are compared."""

_FACTORY = "normfix.demo.network:nuclei_unet"


@dataclass(frozen=True, slots=True)
class DemoResult:
    """What the demo found: its text for a terminal, its page, and whether everything was proved."""

    text: str
    page: Path
    passed: bool


@dataclass(frozen=True, slots=True)
class Maps:
    """Predictions of the demo image, (H, W) each."""

    whole: NDArray[np.float32]
    tiled: NDArray[np.float32]
    repaired: NDArray[np.float32]


def run_demo(out: str, progress: Progress = silent) -> DemoResult:
    """Write the demo folder: two converted networks, three pictures and index.html.

    Args:
        out: folder to write; must not exist.
        progress: called with (stage, done, total).

    Raises:
        NormfixError: NF114 if the folder exists, NF117 if the demo image is not installed.
    """
    from normfix.api.conversion import convert
    from normfix.choosing.choose import choose
    from normfix.demo.network import nuclei_unet
    from normfix.proof.check import check
    from normfix.storage.folder import appearing
    from normfix.storage.saving import save

    image, pixels = demo_image()
    network = nuclei_unet()
    with appearing(Path(out)) as draft:
        progress("tile the original", 0, 1)
        before = check(network, image, TILE)
        progress("tile the original", 1, 1)
        source = Source(kind="factory", spec=_FACTORY)
        done = {
            to: convert(network, image, to, tile=TILE, progress=_named(progress, to))
            for to in ("frozen", "batchrenorm")
        }
        for to, conversion in done.items():
            if conversion.proof.passed:
                save(conversion, draft / to, source, scaling=SCALING)
        choice = choose(network, _parts(image), progress=_named(progress, "constants"))
        maps = predictions(network, done["frozen"], image)
        _write_pictures(draft, pixels, maps, before.sd)
        _write_page(draft, done, before, choice)
    passed = all(conversion.proof.passed for conversion in done.values())
    return DemoResult(_text(done, before, choice.headline), Path(out) / "index.html", passed)


def _parts(image: Tensor) -> list[Tensor]:
    """Return what constants are compared on: parts of the image, so that it does not take long."""
    return [image[..., :PART, start : start + PART].contiguous() for start in (0, PART)]


def _named(progress: Progress, to: str) -> Progress:
    return lambda stage, done, total: progress(f"{to}: {stage}", done, total)


def demo_image() -> tuple[Tensor, NDArray[np.uint8]]:
    """Return the scaled image (1, 1, H, W) and its pixels (H, W)."""
    from normfix.demo.data import nuclei_image
    from normfix.images.axes import to_tensor
    from normfix.images.scaling import scaled

    try:
        pixels = nuclei_image()
    except ImportError as error:
        raise NormfixError("NF117", str(error), where="normfix demo") from error
    return to_tensor(scaled(pixels[None], SCALING, "the demo image")), pixels


def predictions(network: Any, done: Conversion, image: Tensor) -> Maps:
    """Predict the demo image (1, 1, H, W) whole, and in tiles before and after conversion."""
    import torch

    from normfix.api.prediction import predict
    from normfix.tiling.geometry import geometry_of
    from normfix.tiling.stitching import tiled

    geometry = geometry_of(done.scan)
    assert geometry is not None
    with torch.no_grad():
        whole, seams = network(image), tiled(network, image, TILE, geometry)
    repaired = predict(done.model, image, TILE)
    return Maps(*(m[0, 0].numpy() for m in (whole, seams, repaired)))


def _write_pictures(folder: Path, pixels: NDArray[np.uint8], maps: Maps, sd: float) -> None:
    from normfix.reporting.pictures import closeups, difference, overview

    pictures = {
        "overview.png": overview(pixels, maps.tiled, maps.repaired, TILE),
        "closeups.png": closeups(pixels, maps.whole, maps.tiled, maps.repaired, TILE),
        "difference.png": difference(maps.whole, maps.tiled, maps.repaired, sd, TILE),
    }
    for name, png in pictures.items():
        (folder / name).write_bytes(png)


def _write_page(folder: Path, done: dict[str, Conversion], before: Verdict, choice: Choice) -> None:
    from normfix.reporting.page import render
    from normfix.reporting.places import places

    page = render(
        "demo.html",
        pictures={p.stem: p.read_bytes() for p in sorted(folder.glob("*.png"))},
        scan=done["frozen"].scan,
        conversions={to: conversion.record for to, conversion in done.items()},
        before=before,
        choice=choice.record,
        places=[_beside(place.drawings, choice.record) for place in places(choice.places)[:2]],
        window=choice.record.window[0],
        part=PART,
        tile=TILE,
    )
    (folder / "index.html").write_text(page, encoding="utf-8")


def _beside(drawings: Sequence[Drawing], record: ChoiceRecord) -> list[Drawing]:
    """Return of a place the image, the original's own windows, whole-image constants, and the recommended or next."""
    others = [c.name for c in record.candidates if c.name not in ("whole", "batchrenorm")]
    rival = others[0] if record.recommended == "whole" else record.recommended
    named = {drawing.name: drawing for drawing in drawings}
    own = next(c.name for c in record.references if "own windows" in c.name)
    return [named[name] for name in ("image", own, "whole", rival)]


def _text(done: dict[str, Conversion], before: Verdict, choice: str) -> str:
    scan = done["frozen"].scan
    assert scan.halo is not None
    assert scan.stride is not None
    lines = [
        f"{len(scan.live)} norms compute statistics of the tile; stride {scan.stride[0]}, halo {scan.halo[0]}"
    ]
    lines.append(_line("original", before))
    lines += [_line(to, c.verdict) for to, c in done.items() if c.verdict is not None]
    return "\n".join([*lines, f"constants: {choice}"])


def _line(name: str, verdict: Verdict) -> str:
    mismatch = "" if verdict.tile_mismatch is None else f", tile mismatch {verdict.tile_mismatch:.2g}"
    return f"{name}, tiles of {TILE}: {verdict.status}, up to {verdict.max_sd:.2g} sd from the whole image{mismatch}"
