"""What a bioimage.io description declares, put into it in the words of its version: 0.4 or 0.5.

Both say the same of sizes, halo, tests, architecture and scaling, and here each is one class with the same methods. A
halo is declared in pixels of the output and cropped from both sides, and a tool reads it around every block, whose
size is `least` plus a multiple of `step`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any, Protocol

from normfix.records.saved import Scaling
from normfix.storage.opening.descriptions import ArchitectureOf

__all__ = ["AxisSize", "Declarations", "declarations_of"]

Content = dict[str, Any]

_KEPT = ("ensure_dtype",)
"""Steps that change no value, which stay before another scaling."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AxisSize:
    """What tools must know of an axis of space.

    `least` and `step` are input pixels, `halo` output pixels on each side, `scale` output pixels per input pixel.
    """

    least: int
    step: int
    halo: int
    scale: Fraction


class Declarations(Protocol):
    """What is set in a description of either version, whose plain values are changed in place."""

    @property
    def content(self) -> Content:
        """Return its plain values."""
        ...

    def least(self) -> tuple[int, ...]:
        """Return the sizes of the input's axes of space that are declared as the smallest, or as the only ones."""
        ...

    def set_sizes(self, axes: str, sizes: Sequence[AxisSize]) -> None:
        """Declare sizes of the input and halo of the output, for the axes of space in their order."""
        ...

    def set_scaling(self, axes: str, scaling: Scaling) -> None:
        """Replace preprocessing by a scaling over the whole image."""
        ...

    def set_tests(self, given: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        """Name the test tensors, each by file and sha256."""
        ...

    def set_architecture(self, entry: Content, architecture: ArchitectureOf) -> None:
        """Name what builds the network, in an entry of weights."""
        ...

    def drop_samples(self) -> None:
        """Leave out sample outputs, which were the original network's."""
        ...


def declarations_of(content: Content) -> Declarations:
    """Return a description's declarations, in the words of its version."""
    kind = _Words05 if str(content["format_version"]).startswith("0.5.") else _Words04
    return kind(content)


@dataclass(frozen=True, slots=True)
class _Words04:
    content: Content

    def least(self) -> tuple[int, ...]:
        (given,) = self.content["inputs"]
        shape = given["shape"]
        return tuple(shape["min"] if isinstance(shape, Mapping) else shape)[2:]

    def set_sizes(self, axes: str, sizes: Sequence[AxisSize]) -> None:
        (given,), (wanted,) = self.content["inputs"], self.content["outputs"]
        place = dict(zip(axes[2:], sizes, strict=True))
        shape = given["shape"]
        channels = shape["min"][1] if isinstance(shape, Mapping) else shape[1]
        first = [1, channels]
        given["shape"] = {
            "min": [*first, *(size.least for size in sizes)],
            "step": [0, 0, *(size.step for size in sizes)],
        }
        if not isinstance(wanted["shape"], Mapping):
            scale = [1.0, wanted["shape"][1] / channels, *(float(size.scale) for size in sizes)]
            offset = [0] * len(scale)
            wanted["shape"] = {"reference_tensor": given["name"], "scale": scale, "offset": offset}
        wanted["halo"] = [place[letter].halo if letter in place else 0 for letter in wanted["axes"]]

    def set_scaling(self, axes: str, scaling: Scaling) -> None:
        (given,) = self.content["inputs"]
        steps = [step for step in given.get("preprocessing") or () if step["name"] in _KEPT]
        over = axes[1:]
        values = scaling.values
        if scaling.kind == "fixed":
            kwargs: Content = {"mode": "fixed", "axes": over, "mean": [values[0]], "std": [values[1]]}
            steps.append({"name": "zero_mean_unit_variance", "kwargs": kwargs})
        elif scaling.kind == "zscore":
            steps.append({"name": "zero_mean_unit_variance", "kwargs": {"mode": "per_sample", "axes": over}})
        elif scaling.kind == "percentile":
            kwargs = {"mode": "per_sample", "axes": over, **_percentiles(values)}
            steps.append({"name": "scale_range", "kwargs": kwargs})
        given["preprocessing"] = steps

    def set_tests(self, given: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        self.content["test_inputs"] = [given["source"]]
        self.content["test_outputs"] = [wanted["source"]]

    def set_architecture(self, entry: Content, architecture: ArchitectureOf) -> None:
        entry["kwargs"] = dict(architecture.kwargs)
        entry.pop("architecture_sha256", None)
        if architecture.file is None:
            entry["architecture"] = f"{architecture.module}.{architecture.name}"
        else:
            entry["architecture"] = f"{architecture.file.name}:{architecture.name}"
            entry["architecture_sha256"] = architecture.file.sha256

    def drop_samples(self) -> None:
        self.content.pop("sample_outputs", None)


@dataclass(frozen=True, slots=True)
class _Words05:
    content: Content

    def least(self) -> tuple[int, ...]:
        (given,) = self.content["inputs"]
        sizes = [axis.get("size", 1) for axis in given["axes"] if axis["type"] == "space"]
        return tuple(size.get("min", 1) if isinstance(size, Mapping) else size for size in sizes)

    def set_sizes(self, axes: str, sizes: Sequence[AxisSize]) -> None:
        (given,), (wanted,) = self.content["inputs"], self.content["outputs"]
        named = {axis["id"]: axis for axis in given["axes"] if axis["type"] == "space"}
        outputs = [axis for axis in wanted["axes"] if axis["type"] == "space"]
        for (name, axis), size in zip(named.items(), sizes, strict=True):
            axis["size"] = {"min": size.least, "step": size.step}
            output = next(one for one in outputs if one["id"] == name)
            before = output.get("size")
            offset = before.get("offset", 0) if isinstance(before, Mapping) else 0
            output["size"] = {"tensor_id": given["id"], "axis_id": name, "offset": offset}
            output.pop("halo", None)
            if size.halo:
                output["halo"] = size.halo

    def set_scaling(self, axes: str, scaling: Scaling) -> None:
        (given,) = self.content["inputs"]
        steps = [step for step in given.get("preprocessing") or () if step["id"] in _KEPT]
        over = [axis["id"] if axis["type"] == "space" else axis["type"] for axis in given["axes"][1:]]
        values = scaling.values
        if scaling.kind == "fixed":
            kwargs: Content = {"mean": values[0], "std": values[1]}
            steps.append({"id": "fixed_zero_mean_unit_variance", "kwargs": kwargs})
        elif scaling.kind == "zscore":
            steps.append({"id": "zero_mean_unit_variance", "kwargs": {"axes": over}})
        elif scaling.kind == "percentile":
            steps.append({"id": "scale_range", "kwargs": {"axes": over, **_percentiles(values)}})
        given["preprocessing"] = steps

    def set_tests(self, given: Mapping[str, str], wanted: Mapping[str, str]) -> None:
        self.content["inputs"][0]["test_tensor"] = dict(given)
        self.content["outputs"][0]["test_tensor"] = dict(wanted)

    def set_architecture(self, entry: Content, architecture: ArchitectureOf) -> None:
        named: Content = {"callable": architecture.name, "kwargs": dict(architecture.kwargs)}
        if architecture.file is None:
            named["import_from"] = architecture.module
        else:
            named |= {"source": architecture.file.name, "sha256": architecture.file.sha256}
        entry["architecture"] = named

    def drop_samples(self) -> None:
        self.content["outputs"][0].pop("sample_tensor", None)


def _percentiles(values: Sequence[float]) -> dict[str, float]:
    return {"min_percentile": values[0], "max_percentile": values[1]}
