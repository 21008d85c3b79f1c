"""bioimage.io models, 0.4 and 0.5: a folder or zip archive with rdf.yaml, opened without running its code.

Callable and arguments are recognised and an installed library's class of that name is built by the gate that all files
go through, filled strictly, and believed once it gave the package's own test outputs for its test inputs. Where none is
recognised, the package's architecture file is shown, and runs only if the caller allows the very file, by its sha256.
"""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import types
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from normfix.errors import NormfixError, printable
from normfix.networks.calling import evaluating, failures
from normfix.networks.numerics import exact_arithmetic
from normfix.networks.provenance import declare_scaling_
from normfix.records.saved import Source
from normfix.storage.opening.allocation import uncounted
from normfix.storage.opening.configs import read_mapping
from normfix.storage.opening.descriptions import ArchitectureOf, Description, TensorOf, described
from normfix.storage.opening.factories import built
from normfix.storage.opening.formats import torchscript, unet3d
from normfix.storage.opening.packages import (
    PackageError,
    array_of,
    described_in,
    inside,
    require_digest,
    sha256_of,
    unpacked,
)
from normfix.storage.opening.pickles import read_torch
from normfix.storage.opening.processing import UnknownStepError, processed, scaling_of_steps
from normfix.storage.opening.request import Loaded, Request, factory, object_source
from normfix.storage.opening.state_dicts import filled
from normfix.storage.opening.workload import Workload

__all__ = ["allowed_code", "open_network", "recognises"]

_TORCH_EM = ("UNet2d", "UNet3d", "AnisotropicUNet")
_MONAI = ("AttentionUnet", "BasicUNet", "BasicUNetPlusPlus", "DynUNet", "SegResNet", "UNet", "VNet")
_LARGEST_CODE = 1 << 18
_MOST_PROCESSED = 1 << 27
"""Values of a test tensor, times the steps of its processing: 134 million take 3 s and 4 GB. The largest that people
publish have 70 million and one step."""
_CLOSE, _STRAY = 1e-3, 1e-4
"""The specification's own tolerances: relative and in sd of the output, and the share of values that may be off."""


class NotRecognised(NormfixError):  # noqa: N818 - what it is, not what went wrong
    """A package whose network is built by its own code, which nobody allowed (NF593)."""


class TestsDifferError(NormfixError):
    """A network that does not give the package's test outputs (NF594)."""

    __test__ = False


def recognises(path: Path) -> bool:
    """Recognise a folder or zip archive with a description, or the description itself."""
    return bool(described_in(path))


def open_network(path: Path, request: Request) -> Loaded:
    """Build, fill and test the network of a package.

    Raises:
        NormfixError: NF592 a package that is not what it says, NF593 if only its own code builds the network,
            NF594 if its tests do not hold; NF101, NF102, NF105, NF113, NF121 as for any file.
    """
    with unpacked(path) as folder:
        description, weights, tests = _read(folder, path)
        if description.architecture is None:
            loaded = torchscript.open_network(weights, request)
            return _believed(loaded, loaded.source, description, tests, path)
        source, network = _architecture(folder, description.architecture, request, str(path))
        content = read_torch(weights, request)
        if network is not None:
            request = replace(request, network=network)
            source = object_source(network)
        return _believed(filled(content, weights, source, request), source, description, tests, path)


def _read(folder: Path, path: Path) -> tuple[Description, Path, _Tests]:
    """Return what a package says, its weights and its tests, all of which are as stated."""
    description = described(read_mapping(folder / described_in(path)), str(path))
    _require_one_image(description, str(path))
    weights = inside(folder, description.weights.name, "the file of weights")
    require_digest(weights, description.weights.sha256, "the file of weights")
    return description, weights, _Tests.of(folder, description)


def _believed(loaded: Loaded, source: Source, description: Description, tests: _Tests, path: Path) -> Loaded:
    """Return a network once it gave the package's test outputs, with the package's scaling, and say what it is."""
    error = tests.error(loaded.model, str(path))
    scaling = scaling_of_steps(description.inputs[0], tests.channels)
    if scaling is not None and scaling.kind != "none":
        declare_scaling_(loaded.model, scaling)
    said = _said(description, source, scaling is None, error)
    return Loaded(loaded.model, source, (*loaded.notes, *said))


def allowed_code(folder: Path, description: Description) -> Source | None:
    """Return what builds the network of a package by its own code, once that was allowed and has run."""
    stated = description.architecture
    if stated is None or stated.file is None:
        return None
    module = _module_of(sha256_of(inside(folder, stated.file.name, "the architecture file")))
    return factory(f"{module}:{stated.name}", stated.kwargs) if module in sys.modules else None


def _module_of(digest: str) -> str:
    return f"normfix_package_{digest[:16]}"


def _said(description: Description, source: Source, unscaled: bool, error: float) -> Iterator[str]:
    """Yield what a user should know of what was opened."""
    yield f"built {source.spec}; on the package's test tensors it is within {error:.1e} sd of its test output."
    steps = [step.name for step in description.inputs[0].steps]
    if unscaled:
        yield f"preprocessing of the package ({', '.join(steps)}) is no scaling of the whole image; state it: --scale."
    elif steps:
        yield f"preprocessing of the package ({', '.join(steps)}) is the scaling of images, over the whole image."
    after = [step.name for output in description.outputs for step in output.steps]
    if after:
        yield f"postprocessing of the package ({', '.join(after)}) is no part of the network and stays with its tools."
    if len(description.outputs) > 1:
        names = ", ".join(output.name for output in description.outputs)
        yield f"it has several outputs ({printable(names)}): choose one with --output 0, 1, ..."


def _require_one_image(description: Description, where: str) -> None:
    """Refuse what is no network of one image in the usual order of axes."""
    if len(description.inputs) != 1:
        raise PackageError(
            f"its network takes {len(description.inputs)} inputs, and one image is taken here. Open it in Python, and "
            "say how it is called: forward_fn.",
            where,
        )
    axes = description.inputs[0].axes
    if axes[:2] != "bc" or not set(axes[2:]) <= set("zyx") or len(axes) < 3:
        raise PackageError(
            f"its network takes the axes {axes[:20]!r}; batch, channel and then space (bczyx, bcyx) are taken here.",
            where,
        )


def _architecture(
    folder: Path, stated: ArchitectureOf, request: Request, where: str
) -> tuple[Source, nn.Module | None]:
    """Return what builds the network, or the network itself where the package's own code was allowed to build it."""
    if request.named is not None:
        return request.named, None
    code = None
    if stated.file is not None and ":" not in stated.file.name:
        code = inside(folder, stated.file.name, "the architecture file")
        if code.stat().st_size > _LARGEST_CODE:
            raise PackageError("the architecture file is longer than any such file is.", where)
        require_digest(code, stated.file.sha256, "the architecture file")
        content = code.read_bytes()
        digest = hashlib.sha256(content).hexdigest()
        if digest in request.allow_code:
            # what was hashed is what runs, also where the file changes meanwhile
            return factory("package:network", {}), _built_by(content, digest, code.name, stated)
    source = _recognised(stated)
    if source is not None:
        return source, None
    raise _unrecognised(stated, code, request, where)


def _recognised(stated: ArchitectureOf) -> Source | None:
    """Return the installed class that a callable and its arguments mean, if there is one."""
    if stated.module:
        # by the gate, which says what is trusted
        return factory(f"{stated.module}:{stated.name}", stated.kwargs)
    if stated.name in _TORCH_EM and _is_installed("torch_em"):
        return factory(f"torch_em.model:{stated.name}", stated.kwargs)
    if stated.name in unet3d.CLASSES and _is_installed("pytorch3dunet"):
        return factory(f"{unet3d.__name__}:network", {**stated.kwargs, "name": stated.name})
    if stated.name in _MONAI and "spatial_dims" in stated.kwargs and _is_installed("monai"):
        return factory(f"monai.networks.nets:{stated.name}", stated.kwargs)
    return None


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def _unrecognised(stated: ArchitectureOf, code: Path | None, request: Request, where: str) -> NotRecognised:
    """Return the error for a network that only its own code builds, once that code was shown."""
    name = printable(stated.name[:80])
    known = "torch-em, pytorch-3dunet and MONAI"
    if code is None:
        assert stated.file is not None
        return NotRecognised(
            "NF593",
            f"its network {name} is built by code at {printable(stated.file.name[:120])}, and nothing is fetched. If "
            f"it is a network of {known}, install that library; else name it with --arch.",
            where=where,
        )
    digest = sha256_of(code)
    lines = code.read_bytes().decode("utf-8", "replace").splitlines()
    request.tell("\n".join([f"{code.name}, sha256 {digest}:", *map(printable, lines)]))
    return NotRecognised(
        "NF593",
        f"its network {name} is built by its own {printable(code.name[:80])}, which is no class that is known and "
        f"installed ({known}), and a file does not decide what runs here. Read the file; to run it, give "
        f"--allow-code {digest} (allow_code=[...] in Python), or name the network with --arch.",
        where=where,
    )


def _built_by(content: bytes, digest: str, name: str, stated: ArchitectureOf) -> nn.Module:
    """Build the network by the package's own code, which the caller allowed by this checksum."""
    module = types.ModuleType(_module_of(digest))
    # pickles and torch look classes up by their module
    sys.modules[module.__name__] = module
    try:
        exec(compile(content, name, "exec"), module.__dict__)  # noqa: S102 - allowed by its sha256
        make = getattr(module, stated.name)
    except failures() as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
        raise NormfixError("NF111", f"it fails: {reason}.", where=name) from error
    return built(make, stated.kwargs, f"{name}:{stated.name}")


class _Tests:
    """The tests of a package: what its network must give, read before anything is built."""

    def __init__(
        self, given: np.ndarray, wanted: list[np.ndarray], description: Description, size: int
    ) -> None:
        self._given, self._wanted, self._description, self._size = given, wanted, description, size
        self.channels = given.shape[1]

    @classmethod
    def of(cls, folder: Path, description: Description) -> _Tests:
        """Read the test tensors, whose checksums and axes must be those of the description."""
        arrays = []
        for tensor in (*description.inputs, *description.outputs):
            path = inside(folder, tensor.test.name, f"the test tensor of {tensor.name[:40]}")
            require_digest(path, tensor.test.sha256, f"the test tensor of {tensor.name[:40]}")
            mapped = array_of(path)
            if mapped.size * max(1, len(tensor.steps)) > _MOST_PROCESSED:
                raise NormfixError(
                    "NF121",
                    f"this test tensor has {mapped.size} values, and {len(tensor.steps)} steps of processing are "
                    f"stated for them; {_MOST_PROCESSED} of both together are computed. It is not opened; name the "
                    "network with --arch and give the file of weights alone.",
                    where=str(path),
                )
            array = np.array(mapped)
            if array.ndim != len(tensor.axes):
                raise PackageError(
                    f"it has {array.ndim} axes and should have {tensor.axes[:20]!r}.", str(path)
                )
            arrays.append(array)
        size = inside(folder, description.weights.name, "the file of weights").stat().st_size
        return cls(arrays[0], arrays[1:], description, size)

    def error(self, model: nn.Module, where: str) -> float:
        """Return how far the network is from the test outputs, in sd.

        Raises:
            TestsDifferError: NF594 if it is not within the specification's tolerance, or the tests show nothing.
        """
        try:
            given = processed(self._given, self._description.inputs[0])
            like = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(1))
            work = Workload(self._size, where, given.size, generous=True)
            with evaluating(model), exact_arithmetic(), uncounted(), work:
                results = _flat(model(torch.from_numpy(given).to(like)))
            pairs = zip(self._description.outputs, self._wanted, results, strict=True)
            return max(self._compared(tensor, wanted, result, where) for tensor, wanted, result in pairs)
        except NormfixError:
            raise
        except UnknownStepError as error:
            raise self._failed(
                f"its processing has a step that is not computed here ({error})", where
            ) from error
        except failures() as error:
            reason = f"{type(error).__name__}: {' '.join(str(error).split())[:160]}"
            raise self._failed(f"the network fails on them: {reason}", where) from error

    def _compared(self, tensor: TensorOf, wanted: np.ndarray, result: Tensor, where: str) -> float:
        actual = processed(result.double().numpy(), tensor)
        expected = wanted.astype(np.float64)
        if actual.shape != expected.shape:
            raise self._failed(
                f"{tensor.name[:40]} has the shape {actual.shape}, not {expected.shape}", where
            )
        sd = float(expected.std())
        if not 0 < sd < np.inf:
            raise self._failed(f"{tensor.name[:40]} is constant or not finite, which shows nothing", where)
        off = ~(np.abs(actual - expected) <= _CLOSE * (sd + np.abs(expected)))
        worst = float(np.nan_to_num(np.abs(actual - expected), nan=np.inf).max()) / sd
        if off.mean() > _STRAY:
            raise self._failed(
                f"{tensor.name[:40]} is up to {worst:.2g} sd off, at {off.mean():.1%} of its values", where
            )
        return worst

    @staticmethod
    def _failed(reason: str, where: str) -> TestsDifferError:
        return TestsDifferError(
            "NF594",
            f"the network that was built and filled is not shown to be the package's by its own test tensors: "
            f"{printable(reason)}. Weights, architecture and tests do not belong together, or the installed library "
            "computes otherwise than the package's code. Run that code: --allow-code with the sha256 of its file.",
            where=where,
        )


def _flat(result: Any) -> Sequence[Tensor]:
    if isinstance(result, Tensor):
        return [result]
    values = result.values() if isinstance(result, Mapping) else result
    return list(values)
