"""What a bioimage.io model description (0.4, 0.5) says of its network: weights, architecture, axes, processing, tests.

Both versions say the same in other words; here they become one record. It is read as plain values, and nothing of it
is looked up anywhere.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from normfix.errors import NormfixError
from normfix.storage.opening.packages import PackageError

__all__ = ["ArchitectureOf", "Description", "File", "Step", "TensorOf", "as_described", "described"]

_LETTERS = {"batch": "b", "channel": "c", "index": "i", "time": "t"}


@dataclass(frozen=True, slots=True, kw_only=True)
class File:
    """A file of the package by name, and its stated checksum."""

    name: str
    sha256: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Step:
    """One step of pre- or postprocessing; `axes` are letters, None for all of the tensor."""

    name: str
    kwargs: Mapping[str, Any]
    axes: str | None


@dataclass(frozen=True, slots=True, kw_only=True)
class TensorOf:
    """An input or output: its axes as letters, what is done with it, and the tensor to test with."""

    name: str
    axes: str
    steps: tuple[Step, ...]
    test: File


@dataclass(frozen=True, slots=True, kw_only=True)
class ArchitectureOf:
    """What builds the network: a callable of a file, or of an installed module."""

    name: str
    kwargs: Mapping[str, Any]
    module: str = ""
    file: File | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Description:
    """What is needed to open the network of a package and to prove that it is the right one.

    Without an architecture its weights are TorchScript.
    """

    name: str
    weights: File
    architecture: ArchitectureOf | None
    inputs: tuple[TensorOf, ...]
    outputs: tuple[TensorOf, ...]


def described(content: Any, where: str) -> Description:
    """Read a description's plain values.

    Raises:
        PackageError: NF592 if it is of another version or kind, or lacks what it must have.
    """
    with as_described(where):
        new = _require_model(content, where).startswith("0.5.")
        entry = content["weights"].get("pytorch_state_dict")
        script = content["weights"]["torchscript"] if entry is None else entry
        read = _architecture if new else _architecture_of_0_4
        tensors = _tensors if new else _tensors_of_0_4
        return Description(
            name=str(content.get("name", ""))[:200],
            weights=_file(script["source"], script.get("sha256")),
            architecture=None if entry is None else read(entry),
            inputs=tensors(content, "inputs"),
            outputs=tensors(content, "outputs"),
        )


@contextmanager
def as_described(where: str) -> Iterator[None]:
    """Refuse a description in which what is read within is not what the specification says.

    Raises:
        PackageError: NF592.
    """
    try:
        yield
    except NormfixError:
        raise
    except (LookupError, TypeError, ValueError, AttributeError, StopIteration) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())[:120]}"
        raise PackageError(
            f"it is no model description of bioimage.io ({reason}). Validate it: bioimageio validate-format.",
            where,
        ) from error


def _require_model(content: Any, where: str) -> str:
    """Return the version of a description of a model that has a state dict, or TorchScript."""
    version, kind, formats = (
        str(content["format_version"])[:20],
        content.get("type", "model"),
        content["weights"],
    )
    if kind != "model" or not version.startswith(("0.4.", "0.5.")):
        raise PackageError(
            f"it describes a {kind!s:.20} in version {version}; models of 0.4 and 0.5 are opened.", where
        )
    if formats.get("pytorch_state_dict") is None and formats.get("torchscript") is None:
        raise PackageError(
            f"its weights are {', '.join(map(str, formats))[:120]}; a network is opened from pytorch_state_dict or "
            "torchscript.",
            where,
        )
    return version


def _file(source: Any, sha256: Any = None) -> File:
    """Return a file that is named by a text or by a mapping with its checksum."""
    if isinstance(source, Mapping):
        source, sha256 = source["source"], source.get("sha256", sha256)
    return File(name=_text(source), sha256=None if sha256 is None else _text(sha256))


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value:
        raise TypeError(f"{value!r:.60} is no text")
    return value


def _kwargs(value: Any) -> Mapping[str, Any]:
    if value is None:
        return {}
    if not isinstance(value, Mapping) or not all(isinstance(key, str) for key in value):
        raise TypeError("kwargs is no mapping of names")
    return dict(value)


def _architecture(entry: Mapping[str, Any]) -> ArchitectureOf:
    stated = entry["architecture"]
    name, kwargs = _text(stated["callable"]), _kwargs(stated.get("kwargs"))
    if "import_from" in stated:
        return ArchitectureOf(name=name, kwargs=kwargs, module=_text(stated["import_from"]))
    return ArchitectureOf(name=name, kwargs=kwargs, file=_file(stated["source"], stated.get("sha256")))


def _architecture_of_0_4(entry: Mapping[str, Any]) -> ArchitectureOf:
    """Read "unet.py:UNet2d", or "package.module.UNet2d"."""
    text, kwargs = _text(entry["architecture"]), _kwargs(entry.get("kwargs"))
    source, colon, name = text.rpartition(":")
    if colon:
        return ArchitectureOf(name=name, kwargs=kwargs, file=_file(source, entry.get("architecture_sha256")))
    module, _, name = text.rpartition(".")
    return ArchitectureOf(name=_text(name), kwargs=kwargs, module=_text(module))


def _tensors(content: Mapping[str, Any], kind: str) -> tuple[TensorOf, ...]:
    steps = "preprocessing" if kind == "inputs" else "postprocessing"
    return tuple(
        TensorOf(
            name=_text(tensor.get("id", kind)),
            axes="".join(map(_letter, tensor["axes"])),
            steps=tuple(
                _step(s["id"], s.get("kwargs"), _axes(s.get("kwargs"))) for s in tensor.get(steps) or ()
            ),
            test=_file(tensor["test_tensor"]),
        )
        for tensor in content[kind]
    )


def _letter(axis: Mapping[str, Any]) -> str:
    kind = axis["type"]
    return _text(axis["id"])[0] if kind == "space" else _LETTERS[kind]


def _axes(kwargs: Any) -> str | None:
    """Return the axes that a step of 0.5 runs over, as letters; None for all."""
    names: Sequence[str] | None = (kwargs or {}).get("axes")
    return None if names is None else "".join(_LETTERS.get(name, name) for name in names)


def _tensors_of_0_4(content: Mapping[str, Any], kind: str) -> tuple[TensorOf, ...]:
    steps = "preprocessing" if kind == "inputs" else "postprocessing"
    tests = content["test_inputs" if kind == "inputs" else "test_outputs"]
    return tuple(
        TensorOf(
            name=_text(tensor["name"]),
            axes=_text(tensor["axes"]),
            steps=tuple(
                _step(s["name"], s.get("kwargs"), (s.get("kwargs") or {}).get("axes"))
                for s in tensor.get(steps) or ()
            ),
            test=_file(test),
        )
        for tensor, test in zip(content[kind], tests, strict=True)
    )


def _step(name: Any, kwargs: Any, axes: Any) -> Step:
    return Step(name=_text(name), kwargs=_kwargs(kwargs), axes=None if axes is None else _text(axes))
