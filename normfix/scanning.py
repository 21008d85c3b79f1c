"""Find every statistic of the tile in one network: the census at two image sizes, read by the rules.

Running at two sizes tells space from channels without knowing the network: a dimension is space if its
extent follows the image's. It also finds reductions nobody listed: a call whose output grows more slowly
with the image than its input has computed something over space, and one that grows faster compares all
pixels with all others. Such a statistic is live only if its result meets a spatial map again; a
classifier's final pool does not.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

from normfix.calling import REFUSALS
from normfix.census import LEAVES, Call, Recorder, census
from normfix.records import Family, Finding, Site
from normfix.rules import RULES, rule_of

__all__ = ["Survey", "materialise_", "survey"]

Run = Callable[[nn.Module, Tensor], Tensor]
Follow = Callable[[Recorder], AbstractContextManager[None]]

_REDUCED, _SQUARED = 0.75, 1.4
_FREQUENCY = frozenset({"fft_fft2", "fft_fftn", "fft_rfft2", "fft_rfftn", "fft_fft", "fft_rfft"})
_ATTENTION = frozenset({"scaled_dot_product_attention", "multi_head_attention_forward"})
_POOLS = ("adaptive_avg_pool", "adaptive_max_pool", "avg_pool", "max_pool")
_SHAPING = frozenset({"__getitem__", "interpolate", "upsample", "size", "expand", "expand_as", "pad"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What one look at the calls of a forward pass found.

    `other` is the input of another size that was tried with the same calls; `reaching` the ids of calls whose
    result is a spatial map, meets one later on, or leaves tensors.
    """

    sites: tuple[Site, ...]
    uncalled: tuple[str, ...]
    dense: bool
    dilution: tuple[int, ...]
    findings: tuple[Finding, ...]
    other: Tensor | None = None
    reaching: frozenset[str] = frozenset()


def survey(
    model: nn.Module, run: Run, example: Tensor, follow: Follow = lambda recorder: nullcontext()
) -> Survey:
    """Find the sites of a network.

    Args:
        model: run in the mode it is in; not modified.
        run: calls the model on one input and returns the output tensor that matters.
        example: (N, C, *space); a second, nearby size is tried as well.
        follow: as for `census`, for each run.

    Raises:
        NormfixError: NF109 if the network does not run on the example.
    """
    calls, invocations, output = census(model, run, example, follow)
    other = _second_look(model, run, example, [c.function for c in calls], follow)
    growth = _Growth(example, calls, other)
    modules = dict(model.named_modules())
    met = _meeting_space(calls, growth)
    sites = tuple(
        site
        for position, call in enumerate(calls)
        if (site := _site(position, call, growth, modules, invocations, met)) is not None
    )
    norms = tuple(kind for rule in RULES for kind in rule.modules)
    uncalled = tuple(p for p, m in modules.items() if isinstance(m, norms) and not invocations[p])
    return Survey(
        sites=sites,
        uncalled=uncalled,
        dense=growth.of_output(output, other),
        dilution=growth.dilution(),
        findings=_findings(example, other, uncalled),
        other=other.example if other else None,
        reaching=_reaching(calls, growth),
    )


def materialise_(model: nn.Module, run: Run, example: Tensor) -> None:
    """Let lazily initialised modules take their shapes from one forward pass, in place.

    Raises:
        NormfixError: NF109 if the network does not run on the example.
    """
    if any(
        isinstance(p, UninitializedParameter | UninitializedBuffer)
        for p in (*model.parameters(), *model.buffers())
    ):
        census(model, run, example)


@dataclass(frozen=True, slots=True)
class _Look:
    example: Tensor
    calls: list[Call]
    output: Tensor


def _second_look(
    model: nn.Module, run: Run, example: Tensor, functions: list[str], follow: Follow
) -> _Look | None:
    """Run at another size; None if the network accepts none of those tried with the same calls."""
    space = example.shape[2:]
    trials: list[list[int]] = [[n // 2 for n in space]] if all(n % 32 == 0 and n >= 64 for n in space) else []
    trials += [[n + step for n in space] for step in (32, 64, 128)]
    for trial in trials:
        resized = _resize(example, trial)
        try:
            calls, _, output = census(model, run, resized, follow)
        except REFUSALS:  # this size is not accepted
            continue
        if [c.function for c in calls] == functions:
            return _Look(resized, calls, output)
    return None


def _resize(example: Tensor, size: Sequence[int]) -> Tensor:
    """Repeat or cut the example to another spatial size."""
    for axis, n in enumerate(size, start=2):
        example = example.index_select(axis, torch.arange(n, device=example.device) % example.shape[axis])
    return example


class _Growth:
    """How extents follow the image's, from the same calls at two sizes.

    Without a second size, dimensions from 2 on of a tensor of the input's rank count as space.
    """

    def __init__(self, example: Tensor, calls: list[Call], other: _Look | None) -> None:
        self._example = example
        self._calls = calls
        self._other = other
        self._unit = self._log_ratio(tuple(example.shape), tuple(other.example.shape)) if other else 1.0

    def space(self, position: int) -> frozenset[int]:
        """Return the dimensions of the call's main operand that are space."""
        operand = _operand_shape(self._calls[position])
        if self._other is None:
            return frozenset(range(2, len(operand)))
        resized = _operand_shape(self._other.calls[position])
        return frozenset(i for i, (a, b) in enumerate(zip(operand, resized, strict=True)) if a != b)

    def inputs(self, position: int) -> float:
        """Return the exponent of the fastest growing input: 1 grows as the image does, 0 not at all."""
        return max(
            (self._exponent(position, "inputs", i) for i in range(len(self._calls[position].inputs))),
            default=0,
        )

    def outputs(self, position: int) -> float:
        """Return the exponent of the fastest growing output."""
        return max(
            (self._exponent(position, "outputs", i) for i in range(len(self._calls[position].outputs))),
            default=0,
        )

    def of_output(self, output: Tensor, other: _Look | None) -> bool:
        """Tell whether the network's output grows as its input does."""
        if other is None:
            return output.dim() == self._example.dim() and all(n > 1 for n in output.shape[2:])
        grown = all(a != b for a, b in zip(output.shape[2:], other.output.shape[2:], strict=True))
        return output.dim() == self._example.dim() and grown

    def dilution(self) -> tuple[int, ...]:
        """Return per axis the least common multiple of how much coarser than the image the feature maps are."""
        rank = self._example.dim()
        found = [1] * (rank - 2)
        looks = self._other.calls if self._other else self._calls
        for here, there in zip(self._calls, looks, strict=True):
            for a, b in zip(here.outputs, there.outputs, strict=True):
                if len(a) == rank:
                    for axis in range(rank - 2):
                        found[axis] = math.lcm(found[axis], self._coarseness(axis, a[axis + 2], b[axis + 2]))
        return tuple(found)

    def _coarseness(self, axis: int, here: int, there: int) -> int:
        """Return image pixels per pixel of a map whose extent is `here`, and `there` at the other size."""
        image = self._example.shape[axis + 2]
        if self._other is None:
            return image // here if here > 1 and image % here == 0 else 1
        other = self._other.example.shape[axis + 2]
        step, change = other - image, there - here
        if change and step % change == 0:
            return abs(step // change)
        ratio = (
            round(image / here) if here > 1 else 1
        )  # sizes that the stride does not divide round down or up
        fits = all(
            extent in (n // ratio, -(-n // ratio)) for n, extent in ((image, here), (other, there)) if ratio
        )
        return ratio if ratio > 1 and fits else 1

    def _exponent(self, position: int, side: str, which: int) -> float:
        shape: tuple[int, ...] = getattr(self._calls[position], side)[which]
        if self._other is None:
            return float(any(n > 1 for n in shape[2:]))
        shapes = getattr(self._other.calls[position], side)
        if which >= len(shapes):
            return 0.0
        return self._log_ratio(shape, shapes[which]) / self._unit

    @staticmethod
    def _log_ratio(a: tuple[int, ...], b: tuple[int, ...]) -> float:
        return math.log(max(1, math.prod(b)) / max(1, math.prod(a)))


def _meeting_space(calls: list[Call], growth: _Growth) -> frozenset[int]:
    """Return the reductions whose result meets a spatial map again, or leaves tensors and may decide a branch."""
    carried: dict[int, frozenset[int]] = {}
    met: frozenset[int] = frozenset()
    for position, call in enumerate(calls):
        inherited = frozenset().union(*(carried.get(serial, frozenset()) for serial in call.reads))
        if growth.outputs(position) >= _REDUCED or call.function in LEAVES:
            met |= inherited
        if _is_reduction(position, call, growth):
            inherited |= {position}
        for serial in call.writes:
            carried[serial] = carried.get(serial, frozenset()) | inherited
    return met


def _reaching(calls: list[Call], growth: _Growth) -> frozenset[str]:
    """Return the ids of all calls whose result is a spatial map, meets one later on, or leaves tensors."""
    useful: set[int] = set()
    found = set()
    for position in reversed(range(len(calls))):
        call = calls[position]
        if useful & {*call.writes} or growth.outputs(position) >= _REDUCED:
            found.add(f"{call.owner or '(root)'}/{call.invocation}/{call.function}/{call.index}")
        if useful & {*call.writes} or growth.outputs(position) >= _REDUCED or call.function in LEAVES:
            useful |= {*call.reads}
    return frozenset(found)


def _is_reduction(position: int, call: Call, growth: _Growth) -> bool:
    if call.function in _SHAPING | LEAVES or rule_of(call.function) is not None:
        return False
    into = growth.inputs(position)
    # what shrinks from squared is the second half of an attention, named at its first half
    return _REDUCED <= into <= _SQUARED and growth.outputs(position) < _REDUCED * into


def _site(
    position: int,
    call: Call,
    growth: _Growth,
    modules: dict[str, nn.Module],
    invocations: Counter[str],
    met: frozenset[int],
) -> Site | None:
    owner = modules[call.owner]
    rule = rule_of(call.function)
    anchor = next(path for path in reversed(call.within) if invocations[path] == 1)
    common: dict[str, Any] = {
        "owner": call.owner,
        "invocation": call.invocation,
        "function": call.function,
        "index": call.index,
        "owner_class": call.owner_class,
        "anchor": anchor,
        "holder": _holder(call.owner, anchor, modules),
        "within": call.within,
        "line": call.line,
    }
    if rule is not None:
        if not call.arguments["input"].depends:
            return Site(
                family=rule.family, live=False, reduces="weights, not the image", swappable=False, **common
            )
        reading = rule.read(call, growth.space(position), owner)
        swappable = type(owner) in rule.modules and invocations[call.owner] == 1
        return Site(
            family=rule.family,
            live=reading.live,
            reduces=reading.reduces,
            swappable=swappable,
            layer=reading.layer,
            refusal=reading.refusal,
            **common,
        )
    family = _global_family(position, call, growth)
    if family is None:
        return None
    live = position in met or family is Family.ATTENTION or growth.outputs(position) >= _REDUCED
    return Site(
        family=family,
        live=live,
        reduces="space" if live else "space, and the result never meets a map again",
        swappable=False,
        refusal=_REFUSALS[family],
        **common,
    )


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _holder(owner: str, anchor: str, modules: dict[str, nn.Module]) -> str:
    """Return where a new layer can be kept: a container would run, or hand out, whatever is added to it."""
    norms = tuple(kind for rule in RULES for kind in rule.modules)
    below = [path for path in modules if path and (not anchor or path.startswith(f"{anchor}."))]
    candidates: list[str] = [*((owner,) if owner == anchor or owner in below else ()), anchor, *below]
    for path in candidates:
        replaced = path not in (owner, anchor) and isinstance(modules[path], norms)
        if not isinstance(modules[path], _CONTAINERS) and not replaced:
            return path
    return anchor


_REFUSALS = {
    Family.POOL: "a pooled statistic inside a forward; normfix converts normalising calls only so far",
    Family.REDUCTION: "a hand-written statistic; normfix converts normalising calls only so far",
    Family.ATTENTION: "every pixel looks at every other; there is no constant that could replace that",
    Family.OTHER: "it orders or transforms the whole extent; there is no constant that could replace that",
}


def _global_family(position: int, call: Call, growth: _Growth) -> Family | None:
    if call.function in _ATTENTION:
        return Family.ATTENTION if growth.inputs(position) >= _REDUCED else None
    if call.function in _FREQUENCY:
        return Family.OTHER
    if growth.outputs(position) > _SQUARED * max(1.0, growth.inputs(position)):
        return Family.ATTENTION
    if _is_reduction(position, call, growth):
        return Family.POOL if call.function.startswith(_POOLS) else Family.REDUCTION
    return None


def _operand_shape(call: Call) -> tuple[int, ...]:
    given = call.arguments.get("input")
    if given is not None:
        return given.shape  # type: ignore[no-any-return]
    return call.inputs[0]


def _findings(example: Tensor, other: _Look | None, uncalled: tuple[str, ...]) -> tuple[Finding, ...]:
    found = []
    if other is None:
        size = "x".join(map(str, example.shape[2:]))
        found.append(
            Finding(
                code="NF201",
                where="input size",
                message=f"the network ran at {size} only, so space was told from channels by position.",
            )
        )
    found += [
        Finding(code="NF202", where=path, message="a norm the network owns but never called on this input.")
        for path in uncalled
    ]
    return tuple(found)
