"""bioimage.io packages: kwargs with BatchNorm, weights, tests, and the halo and smallest size that are exact.

The description keeps its version and whatever else it says. Its tools tile by the halo that it declares, so that is
the measured one, and its smallest size leaves something within it. Forms for other runtimes are written anew from the
fixed network, or left out.
"""

from __future__ import annotations

import copy
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from numpy.typing import NDArray

from normfix.errors import NormfixError
from normfix.giving.architectures import architecture_of
from normfix.giving.declarations import AxisSize, Declarations, declarations_of
from normfix.giving.formats import plain, unet3d
from normfix.giving.gift import Gift, config_changes, copied, key_changes, write_tensors
from normfix.giving.refusals import NotGiven
from normfix.networks.numerics import exact_arithmetic
from normfix.records.extents import LARGEST
from normfix.records.returns import Change
from normfix.records.saved import Scaling, Source
from normfix.records.sites import Scan
from normfix.records.spans import round_up
from normfix.storage.exports import write_export
from normfix.storage.opening import open_path
from normfix.storage.opening.configs import read_mapping
from normfix.storage.opening.descriptions import ArchitectureOf, Description, as_described, described
from normfix.storage.opening.formats.bioimageio import allowed_code
from normfix.storage.opening.formats.unet3d import network as unet3d_network
from normfix.storage.opening.packages import (
    PackageError,
    array_of,
    described_in,
    inside,
    sha256_of,
)
from normfix.storage.opening.processing import processed, scaling_of_steps
from normfix.storage.opening.request import Request

__all__ = ["LOADER", "NAME", "advice", "builder", "candidates", "place", "recognises", "weights", "write"]

NAME = "bioimage.io package"

LOADER = """
import importlib, importlib.util, os, yaml
names = ("rdf.yaml", "bioimageio.yaml", "rdf.yml", "bioimageio.yml")
with open(next(p for p in (os.path.join(folder, n) for n in names) if os.path.isfile(p)), encoding="utf-8") as text:
    entry = yaml.safe_load(text)["weights"]["pytorch_state_dict"]
stated = entry["architecture"]
if isinstance(stated, str):
    source, colon, name = stated.rpartition(":")
    module, _, name = (None, None, name) if colon else name.rpartition(".")
    kwargs = entry["kwargs"]
else:
    source, module, name = stated.get("source"), stated.get("import_from"), stated["callable"]
    kwargs = stated["kwargs"]
if module:
    factory = getattr(importlib.import_module(module), name)
else:
    spec = importlib.util.spec_from_file_location("architecture", os.path.join(folder, source))
    code = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(code)
    factory = getattr(code, name)
network = factory(**kwargs)
state = torch.load(os.path.join(folder, file), weights_only=True)
network.load_state_dict(state, strict=True)
"""

_FORMS = {"torchscript": ".ts", "onnx": ".onnx"}
"""Forms that are written anew, and what their files end in here."""
_LONGEST_NAME = 200
_OF_THE_ORIGINAL = ("id", "id_emoji", "version", "version_number", "download_url", "rdf_source")
"""What names the original's very package, which the new one is not."""


def recognises(original: Path | None) -> bool:
    """Recognise a package."""
    return original is not None and bool(described_in(original))


def weights(original: Path) -> tuple[Path, ...]:
    """Return the state dict's file."""
    folder, _, description = _read(original)
    return (inside(folder, description.weights.name, "the file of weights"),)


def builder(original: Path, request: Request) -> Source | None:
    """Return what builds its network: the library's class, or its own code where that was allowed."""
    source = open_path(original, request).source
    folder, _, description = _read(original)
    return source if source.kind == "factory" else allowed_code(folder, description)


def place(weights: Path | None) -> str:
    """Return the name of the file of weights."""
    assert weights is not None
    return weights.name


def candidates(source: Source) -> Iterator[Mapping[str, Any]]:
    """Return arguments as the network's own library switches them."""
    if source.spec == f"{unet3d_network.__module__}:network":
        return unet3d.candidates(source)
    return plain.candidates(source)


def write(draft: Path, gifts: Sequence[Gift]) -> tuple[Change, ...]:
    """Copy the package, and write description, weights, tests and further forms of the fixed network."""
    (gift,) = gifts
    assert gift.original is not None
    folder, before, description = _read(gift.original)
    _require_one_output(description, str(folder))
    content = copy.deepcopy(before)
    leave = _old_files(before, description, gift)

    def reason(path: Path) -> str:
        return leave.get(path.relative_to(folder).as_posix(), "")

    changes = copied(folder, draft, reason)
    entry = _write_weights(draft, content, gift)
    declared = declarations_of(content)
    with as_described(str(folder)):
        sizes = _sizes(gift, _least(declared))
        declared.set_architecture(entry, _architecture(gift, description, draft))
        declared.set_sizes(description.inputs[0].axes, sizes)
        _set_scaling(declared, gift.known.scaling, description, str(folder))
        declared.drop_samples()
    _write_tests(draft, declared, gift, description, sizes)
    changes += _write_forms(draft, content, gift)
    _set_identity(content)
    _write_documentation(draft, content, gift, sizes)
    text = yaml.safe_dump(content, sort_keys=False, allow_unicode=True)
    name = described_in(gift.original)
    (draft / name).write_text(text, encoding="utf-8")
    changes += _differences(name, before, content)
    return (*changes, *key_changes(gift.file, gift.names_before, gift.state))


def advice(scan: Scan) -> str:
    """Say what the tools of bioimage.io do with blocks."""
    return (
        "bioimageio.core, ilastik and deepImageJ run the package unchanged and tile by the halo and sizes that its "
        "description declares. What is left to a tool is scaling: where it z-scores each block by itself (ilastik "
        "does), blocks differ again by that. Convert with the numbers of the whole image, `--scale MEAN,SD`: they "
        "become the package's preprocessing."
    )


def _read(original: Path) -> tuple[Path, dict[str, Any], Description]:
    """Return a package's folder and description, as plain values and read."""
    folder = original if original.is_dir() else original.parent
    content = dict(read_mapping(folder / described_in(original)))
    description = described(content, str(original))
    if description.architecture is None:
        raise NotGiven(
            "NF597",
            "its weights are TorchScript alone, of which normfix makes a program and no network of a library. Write "
            "the program: convert -o FILE.ts.",
            where=str(original),
        )
    return folder, content, description


def _require_one_output(description: Description, where: str) -> None:
    space = description.inputs[0].axes[2:]
    if len(description.outputs) > 1:
        raise NotGiven(
            "NF597",
            f"it has {len(description.outputs)} outputs, and the halo of one was measured. Write it for another "
            "runtime: convert -o FILE.ts, or use the folder through normfix.load.",
            where=where,
        )
    axes = description.outputs[0].axes
    if axes[:2] != "bc" or axes[2:] != space:
        raise NotGiven(
            "NF597",
            f"its output has the axes {axes[:20]!r} for an image of {description.inputs[0].axes[:20]!r}; a halo is "
            "declared where both have the same space, in one order.",
            where=where,
        )


def _old_files(content: Mapping[str, Any], description: Description, gift: Gift) -> dict[str, str]:
    """Return files of the original that are not copied, and why."""
    new = "it holds the original network, and is written anew"
    forms = [entry.get("source") for entry in content["weights"].values() if isinstance(entry, Mapping)]
    names = dict.fromkeys(map(str, forms), "it holds the original network")
    names[description.weights.name] = new
    assert description.architecture is not None
    code = description.architecture.file
    if code is not None and not _is_own(gift):
        names[code.name] = "the installed library's class takes its place"
    samples = [output.get("sample_tensor") for output in content["outputs"]]
    with as_described(str(gift.original)):
        samples += content.get("sample_outputs") or ()
    named = [s.get("source") if isinstance(s, Mapping) else s for s in samples]
    names |= {str(name): "it is the original network's output" for name in named if name}
    return names


def _is_own(gift: Gift) -> bool:
    return gift.source.spec.startswith("normfix_package_")


def _write_weights(draft: Path, content: dict[str, Any], gift: Gift) -> dict[str, Any]:
    """Write the state dict; return its entry."""
    write_tensors(dict(gift.state), draft / gift.file)
    entry: dict[str, Any] = content["weights"]["pytorch_state_dict"]
    entry |= {"source": gift.file, "sha256": sha256_of(draft / gift.file)}
    # it was converted from another form, of the original
    entry.pop("parent", None)
    return entry


def _architecture(gift: Gift, description: Description, draft: Path) -> ArchitectureOf:
    if not _is_own(gift):
        return architecture_of(gift.source.spec, gift.args, draft)
    stated = description.architecture
    assert stated is not None
    assert stated.file is not None
    file = replace(stated.file, sha256=sha256_of(draft / stated.file.name))
    return ArchitectureOf(name=stated.name, kwargs=gift.args, file=file)


def _least(declared: Declarations) -> tuple[int, ...]:
    """Return the smallest size that is declared, which a test image is extended to."""
    sizes = declared.least()
    if not all(type(n) is int for n in sizes) or math.prod(sizes) > LARGEST:
        raise ValueError(f"no image is of at least {str(sizes)[:80]} pixels")
    return sizes


def _sizes(gift: Gift, least: Sequence[int]) -> tuple[AxisSize, ...]:
    """Return what each axis of space needs: a halo of whole strides, and blocks with something within it."""
    scan = gift.known.scan
    assert scan.stride is not None
    assert scan.halo_rounded is not None
    assert scan.scale is not None
    assert scan.exact_sizes is not None
    halos = scan.halo_rounded if gift.shorter is None else gift.shorter.halo
    runs = scan.smallest_tile or (1,) * len(scan.stride)
    sizes = []
    for stride, multiple, halo, scale, stated, runs_on in zip(
        scan.stride, scan.exact_sizes, halos, scan.scale, least, runs, strict=True
    ):
        step, side = math.lcm(stride, multiple), max(halo)
        sizes.append(
            AxisSize(
                least=round_up(max(2 * side + 1, stated, runs_on), step),
                step=step,
                halo=math.ceil(side * Fraction(scale)),
                scale=Fraction(scale),
            )
        )
    return tuple(sizes)


def _set_scaling(declared: Declarations, scaling: Scaling, description: Description, where: str) -> None:
    """Declare the scaling that the constants belong to, where the package's own is another."""
    said = scaling_of_steps(description.inputs[0], 1)
    if scaling == said or (said is None and scaling.kind in ("none", "preprocess")):
        return
    if scaling.kind not in ("none", "fixed", "zscore", "percentile"):
        raise NotGiven(
            "NF597",
            f"its constants belong to images scaled by {scaling.kind}, for which a description has no step. Convert "
            "with --scale MEAN,STD, or without --scale, as the package says.",
            where=where,
        )
    declared.set_scaling(description.inputs[0].axes, scaling)


def _write_tests(
    draft: Path, declared: Declarations, gift: Gift, before: Description, sizes: Sequence[AxisSize]
) -> None:
    """Write what the network is given and gives in tests: the original's image, extended to a size that it takes."""
    (given,), (wanted,) = before.inputs, before.outputs
    image = np.array(array_of(draft / given.test.name))
    extents = [_extent(n, size) for n, size in zip(image.shape[2:], sizes, strict=True)]
    wide = [(0, 0), (0, 0), *((0, max(0, m - n)) for n, m in zip(image.shape[2:], extents, strict=True))]
    cut: Any = (..., *(slice(m) for m in extents))
    image = np.pad(image, wide, mode="symmetric")[cut]
    after = described(declared.content, str(draft))
    if after.inputs[0].steps != given.steps and gift.known.scaling.kind == "fixed":
        image = _in_range(image, *gift.known.scaling.values)
    like = next(p for p in gift.network.parameters() if p.is_floating_point())
    with torch.no_grad(), exact_arithmetic():
        tensor = gift.caller.exactly(
            gift.network, torch.from_numpy(processed(image, after.inputs[0])).to(like)
        )
    files = []
    for file, array in ((given.test, image), (wanted.test, processed(tensor.double().numpy(), wanted))):
        dtype = np.load(draft / file.name, mmap_mode="r").dtype
        np.save(draft / file.name, array.astype(dtype))
        files.append({"source": file.name, "sha256": sha256_of(draft / file.name)})
    declared.set_tests(*files)


def _extent(pixels: int, size: AxisSize) -> int:
    """Return the largest size that is declared and not beyond, else the least."""
    return size.least + max(0, pixels - size.least) // size.step * size.step


def _in_range(image: NDArray[Any], mean: float, sd: float) -> NDArray[Any]:
    """Return a test image as the one whose numbers its scaling has."""
    moved = (image - image.mean()) / (image.std() or 1.0) * sd + mean
    if image.dtype.kind in "iu":
        limits = np.iinfo(image.dtype)
        moved = np.clip(np.rint(moved), limits.min, limits.max)
    return np.asarray(moved.astype(image.dtype))


def _write_forms(draft: Path, content: dict[str, Any], gift: Gift) -> list[Change]:
    """Write the forms that the package had for other runtimes; return those that are left out."""
    left = []
    entries = content["weights"]
    for kind in [kind for kind, entry in entries.items() if kind != "pytorch_state_dict"]:
        entry = entries.pop(kind)
        if entry is None:
            continue
        try:
            entries[kind] = _form(draft, kind, _free_name(draft, kind, entry, gift), gift)
        except NormfixError as error:
            reason = f"{error.code} {error.message}"
            left.append(
                Change(file=described_in(draft), kind="left out", name=f"weights.{kind}", after=reason)
            )
    return left


def _free_name(draft: Path, kind: str, entry: Any, gift: Gift) -> str:
    """Return the name of a form's file, which is that of no other file."""
    assert gift.original is not None
    with as_described(f"weights.{kind}"):
        name = Path(entry["source"]).name
    usual = name.strip(".") and len(name) <= _LONGEST_NAME and name.isprintable()
    if not usual or name == described_in(gift.original) or (draft / name).exists():
        raise PackageError(f"its file is named as none can be here ({name[:80]!r}).", f"weights.{kind}")
    return name


def _form(draft: Path, kind: str, name: str, gift: Gift) -> dict[str, Any]:
    if kind not in _FORMS:
        raise NotGiven("NF597", "PyTorch does not write this form; convert it with bioimageio add-weights.")
    written = draft / f"{Path(name).stem}-fixed{_FORMS[kind]}"
    export = write_export(written, gift.converted, gift.caller, gift.known)
    path = written.replace(draft / name)
    versions = dict(export.versions)
    entry = {"source": name, "sha256": sha256_of(path), "parent": "pytorch_state_dict"}
    if kind == "onnx":
        return {**entry, "opset_version": int(versions["opset"])}
    return {**entry, "pytorch_version": versions["torch"].partition("+")[0]}


def _set_identity(content: dict[str, Any]) -> None:
    """Make it a package of its own whose parent is the original."""
    parent = {"id": content["id"]} if content.get("id") else None
    if parent and isinstance(content.get("version"), str) and content["format_version"].startswith("0.5."):
        parent["version"] = content["version"]
    for name in _OF_THE_ORIGINAL:
        content.pop(name, None)
    if parent:
        content["parent"] = parent
    config = content.get("config")
    own = config.get("bioimageio") if isinstance(config, dict) else None
    if isinstance(own, dict):
        for name in ("nickname", "nickname_icon", "doi"):
            own.pop(name, None)
    content["name"] = f"{str(content.get('name', 'network'))[:100]} (constant statistics)"


def _write_documentation(draft: Path, content: dict[str, Any], gift: Gift, sizes: Sequence[AxisSize]) -> None:
    """Add what was changed to the package's documentation."""
    path = _documentation(draft, content, gift)
    content["documentation"] = path.relative_to(draft).as_posix()
    text = f"# {content['name']}"
    if path.is_file():
        text = path.read_text(encoding="utf-8", errors="surrogateescape").rstrip()
    parent = content.get("parent", {}).get("id", "")
    of = f" of `{parent}`" if parent else ""
    halo = " x ".join(str(size.halo) for size in sizes)
    least = " x ".join(str(size.least) for size in sizes)
    lines = [
        "## Changes",
        "",
        f"- The norms{of} that computed statistics of each block are BatchNorms with those of a whole image (normfix). "
        f"{_accuracy(gift, halo)} The smallest block is {least} pixels.",
    ]
    path.write_text("\n".join([text, "", *lines, ""]), encoding="utf-8", errors="surrogateescape")


def _documentation(draft: Path, content: Mapping[str, Any], gift: Gift) -> Path:
    """Return the package's own text, or the place of a new one, which nothing else has."""
    forms = (entry.get("source") for entry in content["weights"].values() if isinstance(entry, Mapping))
    taken = {gift.file, *map(str, forms)}
    try:
        path = inside(draft, content.get("documentation"), "the documentation")
    except PackageError:
        path = draft
    if path.suffix == ".md" and path.relative_to(draft).as_posix() not in taken:
        return path
    names = ("documentation.md", *(f"documentation-{number}.md" for number in range(2, 100)))
    return next(draft / name for name in names if not (draft / name).exists())


def _accuracy(gift: Gift, halo: str) -> str:
    """Say how near to the whole blocks are, read with the halo that is declared."""
    blocks = f"Blocks read with the declared halo ({halo} pixels) and cropped by it"
    sd = "standard deviations of the output"
    if gift.shorter is None:
        return f"{blocks} equal the whole image: {gift.verdict.max_sd:.1g} {sd} apart."
    exact = " x ".join(str(max(pair)) for pair in gift.known.scan.halo_rounded or ())
    return (
        f"{blocks} are up to {gift.shorter.max_sd:.1g} {sd} from the whole image, {gift.shorter.mean_sd:.1g} on "
        f"average, on the image that this was measured on; exact is {exact} pixels."
    )


def _differences(file: str, before: Any, after: Any, place: str = "") -> Iterator[Change]:
    """Yield the values of a description that changed, each by its place."""
    if isinstance(before, Mapping) and isinstance(after, Mapping):
        for name in [*before, *(name for name in after if name not in before)]:
            inner = f"{place}.{name}" if place else str(name)
            if name not in after:
                yield Change(file=file, kind="left out", name=inner)
            elif name not in before:
                yield from config_changes(file, f"{place}." if place else "", {}, {name: _plain(after[name])})
            else:
                yield from _differences(file, before[name], after[name], inner)
    elif (
        isinstance(before, list) and isinstance(after, list) and len(before) == len(after) and _nested(before)
    ):
        for number, pair in enumerate(zip(before, after, strict=True)):
            yield from _differences(file, *pair, f"{place}.{number}")
    elif before != after:
        yield Change(
            file=file,
            kind="config",
            name=place,
            before=json.dumps(_plain(before)),
            after=json.dumps(_plain(after)),
        )


def _nested(values: Sequence[Any]) -> bool:
    return any(isinstance(value, Mapping) for value in values)


def _plain(value: Any) -> Any:
    """Return a value as JSON has it: YAML has dates too."""
    return json.loads(json.dumps(value, default=str))
