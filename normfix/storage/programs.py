"""Exported programs (.pt2) in and out: one file that needs neither normfix nor the network's source.

Opening raises a program into modules (normfix.networks.graph) and replays it against the file before it is used.
Writing exports a network, makes sure that nothing but torch's own operators is in it, and runs the file in a
fresh process in which normfix and the network's packages cannot be imported: its output must be the network's
to the bit. What normfix knows of the network travels inside, as the file's extra file normfix.json.
"""

from __future__ import annotations

import hashlib
import io
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from normfix.errors import NormfixError
from normfix.images.drafts import cannot_write, drafting, require_unnamed
from normfix.networks.calling import evaluating, failures, home_of, refusals
from normfix.networks.devices import bytes_of
from normfix.networks.graph.capture import export, free_dimensions, image_of
from normfix.networks.graph.isolation import silence
from normfix.networks.graph.program import ProgramNetwork
from normfix.networks.graph.raising import raised, unlifted
from normfix.networks.graph.replaying import same
from normfix.networks.numerics import exact_arithmetic
from normfix.networks.randomness import OwnRandomness
from normfix.networks.releases import writes_archives
from normfix.records.encoding import parsed
from normfix.records.saved import Saved
from normfix.storage.fresh import run_alone
from normfix.storage.opening.workload import Foreseen, TooMuchError, Workload

__all__ = [
    "SUFFIX",
    "export_program",
    "open_program",
    "require_program_name",
    "write_beside",
    "write_program",
]

SUFFIX = ".pt2"
MANIFEST = "normfix.json"
Reader = Callable[[Path, dict[str, str]], ExportedProgram]
_OURS = ("normfix",)
_SAMPLE = {1: 256, 2: 64, 3: 64}


def open_program(path: Path, read: Reader) -> tuple[ProgramNetwork, Saved | None]:
    """Open a .pt2 file as a module, with what normfix knew of it if it wrote the file.

    Args:
        path: of the file.
        read: opens it safely, and fills the extra files that are asked for.

    Raises:
        NormfixError: NF115 if what normfix knew was edited or is of other tensors, NF144 if
            running it once takes too much, NF224 if it is no program of one image, or differs
            from the file once it is raised; the reader's codes.
    """
    extra = {MANIFEST: ""}
    program = read(path, extra)
    try:
        with silence(), torch.no_grad():
            with Workload(path.stat().st_size, str(path)):
                model = raised(program)
            model.unproved = _too_long(model, program, path)
            if not model.unproved:
                with Workload(path.stat().st_size, str(path)):
                    _require_replay(model, program, str(path))
    except NormfixError:
        raise
    except failures() as error:
        raise _unreadable(path, error) from error
    text: Any = extra[MANIFEST]
    if not text:
        return model, None
    saved = _manifest(text, path)
    if saved.sha256 and saved.sha256 != _digest(program):
        raise NormfixError(
            "NF115",
            f"its {MANIFEST} was written with other tensors than these, so its plan, halo and scaling say nothing of "
            "this program. Write the program again.",
            where=str(path),
        )
    return model, saved


def require_program_name(path: str, model: nn.Module) -> bool:
    """Tell whether an output is a program, by its name.

    Raises:
        NormfixError: NF227 if a program is to be written under another name.
    """
    named = Path(path).suffix == SUFFIX
    if isinstance(model, ProgramNetwork) and not named:
        raise NormfixError(
            "NF227", "what was an exported program is written as one: give a file ending in .pt2.", where=path
        )
    return named


class NotExportable(NormfixError):  # noqa: N818 - what it is, not what went wrong
    """A network that torch.export does not take, or that calls what only normfix has (NF225, NF420)."""


class WrongProgramError(NormfixError):
    """A program that was written does not give the network's output (NF226)."""


def export_program(
    model: nn.Module, run: Callable[[nn.Module, Tensor], Any] | None, example: Tensor
) -> ExportedProgram:
    """Export a network in eval mode, with batch and sizes free where it allows that.

    Args:
        model: not modified.
        run: calls the model where `model(image)` is not how it is called; the program then takes the image.
        example: (1, C, *space) that the network runs on.

    Raises:
        NormfixError: NF225 if torch.export fails, or operators other than torch's own are in the program; NF420 if
            torch is too old to write programs that can be read.
    """
    if not writes_archives():
        raise NotExportable(
            "NF420",
            f"exported programs are written and read from torch 2.8 on, and this is {torch.__version__}. Save a folder "
            "instead.",
            where=type(model).__name__,
        )
    network = model if run is None else _Called(model, run)
    try:
        with evaluating(network), exact_arithmetic():
            program = export(network, example[:1])
    except failures() as error:
        reason = " ".join(str(error).split())[:200]
        raise NotExportable(
            "NF225",
            f"torch.export failed: {type(error).__name__}: {reason}. Save a folder instead.",
            where=type(model).__name__,
        ) from error
    foreign = sorted(
        {str(t) for t in _targets(program) if t.namespace not in ("aten", "prim", "prims", "higher_order")}
    )
    if any(name.startswith(_OURS) for name in foreign):
        raise NotExportable(
            "NF225", f"it calls {', '.join(foreign)}, which only normfix has.", where="program"
        )
    return program


def write_program(
    path: Path, program: ExportedProgram, model: nn.Module, run: Callable[..., Any], saved: Saved
) -> None:
    """Write a program to a new file, once it gave the network's output to the bit in a fresh process.

    Args:
        path: ends in .pt2 and does not exist.
        program: exported from `model`.
        model: the converted network, the reference.
        run: calls it and returns all that the program returns.
        saved: travels inside.

    Raises:
        NormfixError: NF114 if the file exists or cannot be written, NF226 if its output differs.
    """
    require_unnamed(path)
    try:
        with drafting(path) as draft:
            _write(draft, program, saved)
            expected = draft.with_name("expected.safetensors")
            _require_equal(draft, program, model, run, expected, str(path))
    except OSError as error:
        raise cannot_write(path, error) from error


def _write(path: Path, program: ExportedProgram, saved: Saved) -> None:
    """Write a program by way of memory: where there is no room, torch's own writer ends the process."""
    whole = io.BytesIO()
    saved = replace(saved, sha256=_digest(program)).sealed()
    with silence():
        torch.export.save(program, whole, extra_files={MANIFEST: saved.dumps()})
    path.write_bytes(whole.getbuffer())


def write_beside(
    path: Path, program: ExportedProgram, model: nn.Module, run: Callable[..., Any], saved: Saved
) -> None:
    """Write a program into a folder that is read back by other means; it is compared in this process.

    Raises:
        NormfixError: NF226 if its output differs from the network's, NF114 if it cannot be written.
    """
    try:
        _write(path, program, saved)
    except OSError as error:
        raise cannot_write(path, error) from error
    with silence():
        body = torch.export.load(path).module()
    with evaluating(model), exact_arithmetic():
        for image in _inputs(program, model, run):
            try:
                # a program that draws moves no generator of torch's
                with OwnRandomness():
                    mine = tree_leaves(body(image.clone()))
            except failures() as error:  # guards of one size in a program that is said to take all
                path.unlink()
                reason = " ".join(str(error).split())[:160]
                raise WrongProgramError("NF226", f"it does not run: {reason}.", where=path.name) from error
            theirs = tree_leaves(run(model, image.clone()))
            if not all(same(a, b) for a, b in zip(mine, theirs, strict=True) if isinstance(b, Tensor)):
                path.unlink()
                raise WrongProgramError("NF226", "it does not give the network's output.", where=path.name)


class _Called(nn.Module):
    """A network that is called in its own way, as a function of one image."""

    def __init__(self, network: nn.Module, run: Callable[[nn.Module, Tensor], Any]) -> None:
        super().__init__()
        self.network = network
        self._run = run

    def forward(self, image: Tensor) -> Any:
        return self._run(self.network, image)


def _too_long(model: ProgramNetwork, program: ExportedProgram, path: Path) -> str:
    """Return why a program cannot be run when it is opened: its size is fixed, and one run takes long.

    Raises:
        NormfixError: NF144 if that is out of proportion to the image, or takes more memory than there is.
    """
    if not model.fixed:
        return ""
    shape, size = _replayed_shape(model), path.stat().st_size
    dtype = image_of(program).meta["val"].dtype
    try:
        with Foreseen(size, str(path)):
            drawn = torch.empty(shape, dtype=torch.float64, device="meta")
            image = drawn.to(dtype)
            # as read, and as the file has it
            for _ in range(2):
                model(image.clone())
    except TooMuchError:
        with Foreseen(size, str(path), math.prod(shape)) as large:
            model(torch.empty(shape, dtype=dtype, device="meta"))
    except failures():
        return ""  # what values decide cannot be foreseen; it is counted while it is run
    else:
        return ""
    return (
        f"{path}: it is fixed to images of {'x'.join(map(str, shape))}, and running one takes about "
        f"{large.seconds:.0f} s, so it was not run to compare what was read with the file. "
        "Exported with free sizes, it would be."
    )


def _replayed_shape(model: ProgramNetwork) -> list[int]:
    """Return the extents of the image that a program is compared on."""
    sample = (2, 1, *(_SAMPLE[len(model.shape) - 2],) * 3)
    return [n or d for n, d in zip(model.shape, sample, strict=False)]


def _require_replay(model: ProgramNetwork, program: ExportedProgram, where: str) -> None:
    """Run the raised program beside the file's own, on another size than it was exported with if it may be."""
    shape = _replayed_shape(model)
    image = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    like = image_of(program).meta["val"]
    image = image.to(like.device, like.dtype)
    body = unlifted(program)
    with exact_arithmetic():
        # networks that add noise draw the same twice
        with OwnRandomness():
            mine = tree_leaves(model(image.clone()))
        with OwnRandomness():
            theirs = tree_leaves(body(image.clone()))
    if not all(same(a, b) for a, b in zip(mine, theirs, strict=True) if isinstance(b, Tensor)):
        raise NormfixError(
            "NF224",
            "what was read from the file does not compute what the file computes, so it is not used.",
            where=where,
        )


def _targets(program: ExportedProgram) -> Iterator[OpOverload]:
    for module in program.graph_module.modules():
        for node in getattr(module, "graph", program.graph).nodes:
            if isinstance(node.target, OpOverload):
                yield node.target


def _require_equal(
    draft: Path,
    program: ExportedProgram,
    model: nn.Module,
    run: Callable[..., Any],
    expected: Path,
    where: str,
) -> None:
    """Run the file where neither normfix nor the network's packages can be imported, and compare bits."""
    tensors: dict[str, Tensor] = {}
    with evaluating(model), exact_arithmetic():
        for number, image in enumerate(_inputs(program, model, run)):
            tensors[f"{number}.input"] = image.cpu()
            for position, output in enumerate(tree_leaves(run(model, image.clone()))):
                if isinstance(output, Tensor):
                    tensors[f"{number}.output.{position}"] = output.cpu().contiguous().clone()
    expected.write_bytes(save(tensors))
    script = Path(__file__).with_name("programs_alone.py")
    words = (str(draft), str(expected), str(torch.get_num_threads()), *_packages(model))
    if reason := run_alone(script, *words)[1]:
        raise WrongProgramError(
            "NF226", f"run alone in a fresh process: {reason}. Nothing was kept.", where=where
        )


def _inputs(program: ExportedProgram, model: nn.Module, run: Callable[..., Any]) -> Iterable[Tensor]:
    """Yield seeded inputs: the size it was exported at and, as far as they are free, another batch and size."""
    shape = [int(n) if isinstance(n, int) else int(n.node.hint) for n in image_of(program).meta["val"].shape]
    free, (device, dtype) = free_dimensions(program), home_of(model)
    if 0 in free:
        shape[0] = 1
    shapes = [shape, [n + 2 * (d == 0) + 64 * (d >= 2) if d in free else n for d, n in enumerate(shape)]]
    for seed, chosen in enumerate(shapes):
        image = torch.randn(chosen, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        image = image.to(device, dtype)
        try:
            run(model, image.clone())
        except refusals():
            if not seed:
                raise
            continue
        yield image


def _packages(model: nn.Module) -> Sequence[str]:
    """Return what the fresh process must do without: normfix and the packages of the network's classes."""
    roots = {type(module).__module__.partition(".")[0] for module in model.modules()}
    return sorted((roots | set(_OURS)) - {"torch", "builtins", "__main__"})


def _manifest(text: str, path: Path) -> Saved:
    where = f"{path}: {MANIFEST}"
    return Saved.opened(parsed(text, where), where)


def _digest(program: ExportedProgram) -> str:
    """Return the checksum of a program's tensors by name: what its statement belongs to."""
    digest = hashlib.sha256()
    for values in (program.state_dict, program.constants):
        for name in sorted(values):
            tensor = values[name]
            if not isinstance(tensor, Tensor):
                continue
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}\n".encode())
            digest.update(bytes_of(tensor))
    return digest.hexdigest()


def _unreadable(path: Path, error: Exception) -> NormfixError:
    reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
    return NormfixError("NF224", f"cannot read this program: {reason}.", where=str(path))
