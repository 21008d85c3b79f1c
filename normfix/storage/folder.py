"""The saved folder: model.safetensors, normfix.json, README.md; written whole or not at all.

Nothing in it is code or a pickle. Tensors that share storage are stored once and their other names listed.
normfix.json holds what rebuilds the network (source, plan), what using it needs (geometry, scaling), what
was proved, a checksum of the weights and a probe: the output for a seeded input, which a reload must repeat.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor, nn

from normfix.errors import NormfixError
from normfix.images.drafts import UnwritableError, cannot_write, drafting, require_unnamed, sweep
from normfix.records.certificates import Certificate
from normfix.records.encoding import SCHEMA, parsed, read_text
from normfix.records.measurements import CalibrationSummary
from normfix.records.saved import Probe, Provenance, Saved
from normfix.records.verdicts import Proof
from normfix.reporting.page import markdown
from normfix.storage.instructions import arguments_of

__all__ = [
    "CARD",
    "GRAPH",
    "MANIFEST",
    "PROGRAM",
    "WEIGHTS",
    "appearing",
    "digest_of",
    "load_weights_",
    "manifest_of",
    "program_beside",
    "read_manifest",
    "require_absent",
    "require_unchanged",
    "seeded_input",
    "unchanging",
    "with_aliases",
    "write_folder",
]

MANIFEST, WEIGHTS, CARD = "normfix.json", "model.safetensors", "README.md"
PROGRAM = "program.pt2"
"""Beside the weights where the folder cannot say how to build the network."""
GRAPH = "graph.pt2"
"""Elsewhere: the same without the weights, which `normfix verify` derives the reach from."""


@dataclass(frozen=True, slots=True)
class _Stored:
    tensors: dict[str, Tensor]
    aliases: tuple[tuple[str, str], ...]


@contextmanager
def appearing(target: Path) -> Iterator[Path]:
    """Give a temporary folder beside `target` that becomes `target` if the block succeeds; else nothing is left.

    Raises:
        NormfixError: NF114 if `target` exists, before or after the block, or its parent cannot be written.
    """
    require_absent(target)
    made: list[Path] = []
    try:
        try:
            made = [parent for parent in target.parents if not parent.exists()]
            target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise cannot_write(target, error) from error
        with drafting(target) as draft:
            try:
                draft.mkdir()
            except OSError as error:
                raise cannot_write(target, error) from error
            yield draft
    finally:
        for parent in made:
            with suppress(OSError):  # not empty: the folder appeared, or something else of the user's did
                parent.rmdir()


def require_absent(target: Path) -> None:
    """Refuse an output that exists.

    Raises:
        NormfixError: NF114.
    """
    sweep(target.parent)
    require_unnamed(target)


def write_folder(
    folder: Path,
    model: nn.Module,
    provenance: Provenance,
    proof: Proof | None,
    calibration: CalibrationSummary | None,
    probe: Probe | None,
    certificate: Certificate | None = None,
) -> None:
    """Write weights, manifest and card of a saved model into an existing folder; a program is there already.

    Raises:
        NormfixError: NF114 if the disk is full or fails.
    """
    try:
        _write(folder, model, provenance, proof, calibration, probe, certificate)
    except (OSError, SafetensorError) as error:
        raise UnwritableError("NF114", f"cannot write there: {error}.", where=folder.name) from error


def _write(
    folder: Path,
    model: nn.Module,
    provenance: Provenance,
    proof: Proof | None,
    calibration: CalibrationSummary | None,
    probe: Probe | None,
    certificate: Certificate | None,
) -> None:
    stored = _stored(model)
    save_file(stored.tensors, folder / WEIGHTS, metadata={"format": "pt"})
    program = folder / PROGRAM
    saved = Saved(
        schema=SCHEMA,
        provenance=provenance,
        aliases=stored.aliases,
        sha256=digest_of(folder / WEIGHTS),
        program=digest_of(program) if program.exists() else "",
        calibration=calibration,
        proof=proof,
        probe=probe,
        certificate=certificate,
    ).sealed()
    (folder / MANIFEST).write_text(saved.dumps(), encoding="utf-8")
    (folder / CARD).write_text(_card(saved), encoding="utf-8")
    shutil.copymode(folder / MANIFEST, folder / WEIGHTS)  # safetensors lets nobody else read


def read_manifest(folder: Path) -> Saved:
    """Read normfix.json and check its own checksum and that of the weights.

    Raises:
        NormfixError: NF101 unreadable, NF108 malformed or of another schema, NF115 it or the weights changed.
    """
    saved = manifest_of(folder)
    weights = folder / WEIGHTS
    if not weights.is_file():
        raise NormfixError("NF101", "the folder has no weights file.", where=str(weights))
    require_unchanged(weights, saved.sha256)
    return saved


def manifest_of(folder: Path) -> Saved:
    """Read normfix.json alone, which says nothing of the files beside it.

    Raises:
        NormfixError: NF101 and NF108 for a damaged one, NF115 if it was edited.
    """
    path = folder / MANIFEST
    return Saved.opened(parsed(read_text(path), str(path)), str(path))


@contextmanager
def unchanging(folder: Path) -> Iterator[None]:
    """Refuse weights and program of a folder that become other files between their check and the end of the block.

    Raises:
        NormfixError: NF115.
    """
    paths = (folder / WEIGHTS, folder / PROGRAM)
    before = [_identity(path) for path in paths]
    yield
    for path, identity in zip(paths, before, strict=True):
        if _identity(path) != identity:
            raise NormfixError(
                "NF115",
                "it changed while it was read, so what was checked is not what was opened. Open it again when nothing "
                "writes to the folder.",
                where=str(path),
            )


def _identity(path: Path) -> tuple[int, ...]:
    """Return what tells a file from others and from itself once it was written; () where there is none."""
    try:
        state = path.stat()
    except OSError:
        return ()
    return (state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns)


def program_beside(folder: Path, saved: Saved) -> Path | None:
    """Return the program of a saved folder; None if it has none.

    Raises:
        NormfixError: NF115 if it is not the one that was saved.
    """
    path = folder / PROGRAM
    if not saved.program or not path.is_file():
        return None
    require_unchanged(path, saved.program)
    return path


def require_unchanged(path: Path, sha256: str) -> None:
    """Refuse a file that is another than was saved.

    Raises:
        NormfixError: NF101 if it cannot be read, NF115.
    """
    try:
        found = digest_of(path)
    except OSError as error:
        raise NormfixError("NF101", f"cannot read this file: {error.strerror}.", where=str(path)) from error
    if found != sha256:
        raise NormfixError(
            "NF115",
            "it is not the file that was saved: the checksum in normfix.json differs. Fetch or convert the "
            "network again.",
            where=str(path),
        )


def load_weights_(model: nn.Module, weights: Mapping[str, Tensor], saved: Saved, where: str) -> None:
    """Load saved weights into a rewritten model, strictly, in place.

    Raises:
        NormfixError: NF105 if names or shapes differ: another base network.
    """
    full = with_aliases(weights, saved)
    _match_dtypes_(model, full)
    try:
        model.load_state_dict(full, strict=True)
    except RuntimeError as error:
        reason = "; ".join(line.strip() for line in str(error).splitlines()[1:4])
        raise NormfixError(
            "NF105",
            f"the saved weights do not fit this network: {reason}. It is not the one that was converted.",
            where=where,
        ) from error


def with_aliases(weights: Mapping[str, Tensor], saved: Saved) -> dict[str, Tensor]:
    """Return saved weights under all their names."""
    others = {alias: weights[name] for alias, name in saved.aliases if name in weights}
    return {**weights, **others}


def _match_dtypes_(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Rebuild a folder saved in another dtype in that dtype, buffers that are not saved included."""
    stored = {tensor.dtype for tensor in weights.values() if tensor.is_floating_point()}
    own = {tensor.dtype for tensor in model.state_dict().values() if tensor.is_floating_point()}
    if len(stored) == 1 and not stored & own:
        model.to(dtype=stored.pop())
    for name, tensor in weights.items():
        _match_dtype_(model, name, tensor)


def _match_dtype_(model: nn.Module, name: str, tensor: Tensor) -> None:
    path, _, attribute = name.rpartition(".")
    try:
        current = getattr(model.get_submodule(path), attribute)
    except AttributeError:
        return  # load_state_dict names what does not fit
    if isinstance(current, Tensor) and current.dtype != tensor.dtype:
        current.data = current.data.to(tensor.dtype)


def _stored(model: nn.Module) -> _Stored:
    """Return each distinct tensor once, contiguous, and the other names of shared ones."""
    names: dict[tuple[object, ...], str] = {}
    tensors: dict[str, Tensor] = {}
    aliases = []
    for name, tensor in model.state_dict().items():
        if not isinstance(tensor, Tensor):
            raise NormfixError(
                "NF502",
                f"its state holds {type(tensor).__name__}, and a folder holds only tensors. Keep such state in "
                "buffers.",
                where=name,
            )
        place = (tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
        if tensor.numel() and place in names:
            aliases.append((name, names[place]))
        else:
            names[place] = name
            tensors[name] = tensor.detach().cpu().contiguous().clone()
    return _Stored(tensors, tuple(aliases))


def digest_of(path: Path) -> str:
    """Return the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _card(saved: Saved) -> str:
    source = saved.provenance.source
    base = source.origin.removeprefix("hf-hub:").partition("@")[0]
    if not base and source.spec.startswith("timm:") and "." in source.spec:
        base = f"timm/{source.spec.removeprefix('timm:')}"
    return markdown("normfix.storage", "card.md", saved=saved, base=base, arguments=arguments_of(source))


def seeded_input(probe_shape: tuple[int, ...], seed: int, dtype: torch.dtype) -> Tensor:
    """Return the reproducible input of a probe: normal values, shape as stored."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(probe_shape, generator=generator, dtype=torch.float64).to(dtype)
