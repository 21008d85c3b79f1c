"""Forms for other runtimes, ONNX (.onnx) and TorchScript (.ts): the network in eval as a function of one image.

Constants are what those runtimes have: batch normalisation, or a convolution that took it in. A form is kept only if it
gave the converted network's output in a fresh process without normfix, on other sizes and batches where these are
free, and if tiles of it, computed by the form itself, are its whole: on strips that are longer than its windows.
"""

from __future__ import annotations

import importlib
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from normfix.errors import NormfixError, reason_of
from normfix.images.drafts import cannot_write, drafting, require_unnamed
from normfix.networks.calling import Caller, evaluating, failures, home_of, refusals
from normfix.networks.copying import cpu_twin_of, double_of
from normfix.networks.graph.capture import AsFunction, export, free_dimensions
from normfix.networks.graph.isolation import silence
from normfix.networks.graph.program import unguarded
from normfix.networks.numerics import exact_arithmetic
from normfix.records.exports import Export
from normfix.records.measurements import CalibrationSummary
from normfix.records.saved import Provenance
from normfix.records.sites import Scan
from normfix.records.spans import round_up
from normfix.records.verdicts import Proof
from normfix.storage.folder import MANIFEST, seeded_input
from normfix.storage.fresh import run_alone
from normfix.storage.probe import SEED, saved_inside
from normfix.tiling.geometry import geometry_of, thinnest
from normfix.tiling.grid import Tile, grid
from normfix.tiling.strips import longer_than_windows

__all__ = ["is_export_name", "require_exporter", "write_export"]

_EXACT = 1e-5
"""In sd of the output: what float32 runtimes with other orders of sums differ by on networks of 20 norms."""
_ROUNDINGS = 4
"""A difference of so many noise floors is rounding, as in check."""
_NEEDS = {".onnx": ("onnx", "onnxscript", "onnxruntime"), ".ts": ()}
_SMALL = 64


class NotExported(NormfixError):  # noqa: N818 - what it is, not what went wrong
    """A network that cannot be written for another runtime (NF590)."""


class WrongExportError(NormfixError):
    """A form that was written does not give the network's output, or its tiles are not its whole (NF591)."""


def is_export_name(path: str | Path) -> bool:
    """Tell whether an output is a form for another runtime, by its name."""
    return Path(path).suffix in _NEEDS


def require_exporter(path: str | Path) -> None:
    """Refuse a form whose writer or runtime is not installed.

    Raises:
        NormfixError: NF590.
    """
    suffix = Path(path).suffix
    for package in _NEEDS.get(suffix, ()):
        try:
            importlib.import_module(package)
        except ImportError as error:
            raise NotExported(
                "NF590",
                f"writing {suffix} and running it once needs {package}, which is not installed: {error}. "
                "pip install 'normfix[onnx]'.",
                where=str(path),
            ) from error


def write_export(
    path: Path,
    model: nn.Module,
    caller: Caller,
    provenance: Provenance,
    proof: Proof | None = None,
    calibration: CalibrationSummary | None = None,
) -> Export:
    """Write a converted network for another runtime, once that gave its output in a fresh process.

    Args:
        path: ends in .onnx or .ts and does not exist.
        model: the converted network; its output that counts is the form's only one.
        caller: calls it.
        provenance: of the network; plan, geometry and scaling travel in the file as normfix.json.
        proof: of the conversion, travels likewise.
        calibration: likewise.

    Raises:
        NormfixError: NF114 if the file exists or cannot be written, NF590 if it cannot be exported or its runtime is
            not installed, NF591 if the form differs from the network.
    """
    require_unnamed(path)
    require_exporter(path)
    model = cpu_twin_of(model)
    dtype = home_of(model)[1]
    if dtype == torch.bfloat16:
        raise NotExported(
            "NF590", "it computes in bfloat16, which these runtimes take no image in. Convert it with --dtype float32.",
            where=str(path),
        )  # fmt: skip
    saved = saved_inside(model, caller, provenance, proof, calibration)
    example = seeded_input((1, *provenance.scan.example[1:]), SEED, dtype)
    network = AsFunction(model, caller)
    write = _onnx if path.suffix == ".onnx" else _torchscript
    with evaluating(network), exact_arithmetic():
        try:
            with silence():
                content, versions, free = write(network, example, saved.sealed().dumps())
        except NormfixError:
            raise
        except failures() as error:
            reason = reason_of(error)
            raise NotExported(
                "NF590",
                f"torch {torch.__version__} does not write it as {path.suffix}: {reason}. Save a program (-o FILE.pt2) "
                "or a folder.",
                where=str(path),
            ) from error
        cases, note = _cases(model, caller, provenance, example, free)
        between = _between(model, caller, provenance.scan, example, free)
    try:
        with drafting(path) as draft:
            draft.write_bytes(content)
            tried = [*cases, *between]
            differences = _alone(draft, tried, packages=_packages(model, path.suffix))
            sizes = _sizes(provenance.scan, path.suffix)
            if any(
                _is_off(case, pair) for case, pair in zip(between, differences[len(cases) :], strict=True)
            ):
                tried = cases
                sizes = (f"{_unit_words(provenance.scan)}, where alone it was the network", *sizes)
            return replace(_judged(path, versions, free, tried, differences[: len(tried)], note), sizes=sizes)
    except OSError as error:
        raise cannot_write(path, error) from error


_Written = tuple[bytes, tuple[tuple[str, str], ...], tuple[int, ...]]


def _onnx(network: nn.Module, example: Tensor, manifest: str) -> _Written:
    """Return the network as ONNX, what wrote it and which dimensions are free."""
    program = export(network, example)
    written = torch.onnx.export(
        program, dynamo=True, verbose=False, input_names=["image"], output_names=["output"]
    )
    assert written is not None  # it is None only where a file is named
    proto = written.model_proto
    entry = proto.metadata_props.add()
    entry.key, entry.value = MANIFEST, manifest
    opset = max(o.version for o in proto.opset_import if o.domain in ("", "ai.onnx"))
    runtime = importlib.import_module("onnxruntime").__version__
    versions = ("opset", str(opset)), ("torch", torch.__version__), ("onnxruntime", runtime)
    return proto.SerializeToString(), versions, free_dimensions(program)


def _torchscript(network: nn.Module, example: Tensor, manifest: str) -> _Written:
    """Return the network traced, what wrote it and which dimensions it was found to be free in.

    A trace has no signature, so whether a dimension is free is tried: the trace and the network on another extent.
    """
    with unguarded(network):
        traced = torch.jit.trace(network, example, check_trace=False)  # type: ignore[no-untyped-call]
    whole = io.BytesIO()
    torch.jit.save(traced, whole, _extra_files={MANIFEST: manifest.encode()})
    free = tuple(d for d in range(example.dim()) if d != 1 and _runs(network, _grown(example, (d,))))
    return whole.getvalue(), (("torch", torch.__version__),), free


def _sizes(scan: Scan, suffix: str) -> tuple[str, ...]:
    """Return in words what sizes must be: as for the network itself, and for a trace on the side it was traced on."""
    if scan.sizes is None:
        return ()
    sides = [c.text for c in scan.sizes.crossed] if suffix == ".ts" else []
    return (*scan.sizes.limits(), *(f"sizes where, as where it was traced, {text}" for text in sides))


def _runs(network: nn.Module, image: Tensor) -> bool:
    try:
        network(image)
    except refusals():
        return False
    return True


def _grown(example: Tensor, free: tuple[int, ...]) -> Tensor:
    """Return another seeded input, larger in the given dimensions: one more image, 64 more pixels."""
    shape = [n + (1 if d == 0 else _SMALL) * (d in free) for d, n in enumerate(example.shape)]
    return seeded_input(tuple(shape), SEED + 1, example.dtype)


@dataclass(frozen=True, slots=True)
class _Case:
    """An input, what the network gives for it, the largest difference that is rounding there, tiles to cut it into.

    Where it `may_fail`, the form need not run on it.
    """

    image: Tensor
    output: Tensor
    sd: float
    limit: float
    tiles: tuple[Tile, ...] = ()
    may_fail: bool = False

    def arrays(self, number: int) -> Mapping[str, np.ndarray]:
        """Return it as the script takes it."""
        sizes = self.output.shape[2:]
        tiles = [_ends(tile, sizes) for tile in self.tiles]
        return {
            f"{number}.input": self.image.numpy(),
            f"{number}.output": self.output.numpy(),
            f"{number}.may_fail": np.array(self.may_fail),
            f"{number}.tiles": np.array(tiles, dtype=np.int64).reshape(len(tiles), 3, len(sizes), 2),
        }


def _ends(tile: Tile, sizes: torch.Size) -> list[list[tuple[int, int]]]:
    """Return a tile as numbers, also where it ends with the output."""
    stops = [n if write.stop is None else write.stop for write, n in zip(tile.write, sizes, strict=True)]
    lengths = [stop - write.start for stop, write in zip(stops, tile.write, strict=True)]
    return [
        [(read.start, read.stop) for read in tile.read],
        [(keep.start, keep.start + n) for keep, n in zip(tile.keep, lengths, strict=True)],
        [(write.start, write.start + n) for write, n in zip(tile.write, lengths, strict=True)],
    ]


def _cases(
    model: nn.Module, caller: Caller, provenance: Provenance, example: Tensor, free: tuple[int, ...]
) -> tuple[list[_Case], str]:
    """Return what to run: the example, another size and batch, three images, a strip cut into tiles along each axis."""
    double = double_of(model)
    case = partial(_case, partial(caller, model), partial(caller.in_double, double))
    images = [example, *([_grown(example, free)] if free else [])]
    if 0 in free:
        images.append(seeded_input((3, *example.shape[1:]), SEED + 1, example.dtype))
    cases = [case(image) for image in images if image is example or _runs(AsFunction(model, caller), image)]
    geometry = geometry_of(provenance.scan)
    space = tuple(range(2, example.dim()))
    note = ""
    if provenance.plan.left_live:
        note = "its tiles were not compared, because sites stay live"
    elif geometry is None:
        note = "its tiles were not compared, because it has no halo"
    elif not set(space) <= set(free):
        note = "its tiles were not compared, because it takes one size"
    else:
        thin = thinnest(partial(caller, model), example, geometry)
        for axis in range(len(space)):
            image, tile = longer_than_windows(example, geometry, axis, thin)
            cases.append(case(image, tuple(grid(image.shape[2:], tile, geometry))))
    return cases, note


def _between(
    model: nn.Module, caller: Caller, scan: Scan, example: Tensor, free: tuple[int, ...]
) -> list[_Case]:
    """Return an image whose extents lie between the multiples that all others have, if the network takes it.

    Padding that Python computes from a size is a constant in a form, and none at these multiples.
    """
    grown = [d - 2 for d in free if d >= 2]
    units = _units(scan)
    shape = list(example.shape)
    for axis in grown:
        shape[2 + axis] = round_up(shape[2 + axis], units[axis]) + units[axis] + (units[axis] > 1)
    image = seeded_input(tuple(shape), SEED + 2, example.dtype)
    if all(units[axis] == 1 for axis in grown) or not _runs(AsFunction(model, caller), image):
        return []
    double = partial(caller.in_double, double_of(model))
    return [replace(_case(partial(caller, model), double, image), may_fail=True)]


def _units(scan: Scan) -> tuple[int, ...]:
    """Return per axis what extents are multiples of at which tiles begin and end; 1 where that is not known."""
    geometry = geometry_of(scan)
    if geometry is None:
        return (1,) * (len(scan.example) - 2)
    return tuple(map(math.lcm, geometry.stride, geometry.multiple))


def _unit_words(scan: Scan) -> str:
    return f"sizes that are multiples of {'x'.join(map(str, _units(scan)))}"


def _is_off(case: _Case, pair: list[float]) -> bool:
    return pair[0] / case.sd > case.limit


def _case(
    single: Callable[[Tensor], Tensor],
    double: Callable[[Tensor], Tensor],
    image: Tensor,
    tiles: tuple[Tile, ...] = (),
) -> _Case:
    output = single(image).contiguous()
    exact = double(image.double())
    sd = float(exact.std(correction=0)) or 1.0
    noise = float((output.double() - exact).abs().max()) / sd
    return _Case(image, output, sd, max(_EXACT, _ROUNDINGS * noise), tiles)


def _packages(model: nn.Module, suffix: str) -> Iterator[str]:
    """Yield what the fresh process must do without: normfix, the network's packages, and torch for ONNX."""
    roots = {type(module).__module__.partition(".")[0] for module in model.modules()} - {"torch"}
    own = roots - {"builtins", "__main__"} | {"normfix"} | ({"torch"} if suffix == ".onnx" else set())
    yield from sorted(own)


def _alone(path: Path, cases: list[_Case], *, packages: Iterator[str]) -> list[list[float]]:
    """Run the file in a fresh process; return per case how far it is from the output, and its tiles from its whole.

    Raises:
        WrongExportError: NF591 if it does not run there.
    """
    script = Path(__file__).with_name("exports_alone.py")
    # in the draft's folder nothing stays that is left by a kill
    with tempfile.TemporaryDirectory(prefix="normfix-", dir=path.parent) as folder:
        stored = Path(folder) / "cases.npz"
        arrays = [case.arrays(number) for number, case in enumerate(cases)]
        np.savez(stored, **{name: array for each in arrays for name, array in each.items()})  # type: ignore[arg-type]
        printed, reason = run_alone(script, str(path), str(stored), str(torch.get_num_threads()), *packages)
    if reason:
        raise WrongExportError(
            "NF591", f"in a fresh process it does not run: {reason[:300]}. Nothing was kept.", where=path.name
        )
    differences: list[list[float]] = json.loads(printed)
    return differences


def _judged(
    path: Path,
    versions: tuple[tuple[str, str], ...],
    free: tuple[int, ...],
    cases: list[_Case],
    differences: list[list[float]],
    note: str,
) -> Export:
    """Hold each difference against what is rounding there.

    Raises:
        WrongExportError: NF591.
    """
    in_sd = [[value / case.sd for value in pair] for case, pair in zip(cases, differences, strict=True)]
    for case, (whole, tiles) in zip(cases, in_sd, strict=True):
        shape = "x".join(map(str, case.image.shape))
        if whole > case.limit:
            what = f"it is {whole:.1e} sd from the network on an input of {shape}"
        elif tiles > case.limit:
            what = f"its tiles are {tiles:.1e} sd from its whole on an input of {shape}"
        else:
            continue
        raise WrongExportError(
            "NF591",
            f"run alone in a fresh process {what}, where rounding is {case.limit:.0e}. Nothing was kept. A network "
            "that computes with its sizes in Python may be tied to one by this form: try the other, or -o FILE.pt2.",
            where=str(path),
        )
    return Export(
        form="onnx" if path.suffix == ".onnx" else "torchscript",
        versions=versions,
        free=free,
        shapes=tuple(tuple(case.image.shape) for case in cases),
        max_sd=max(whole for whole, _ in in_sd),
        tiles_sd=None if note else max(tiles for _, tiles in in_sd),
        limit_sd=max(case.limit for case in cases),
        note=note,
    )
