"""Find every statistic of the tile in one network: the census at two image sizes, read by the rules.

Running at two sizes tells space from channels without knowing the network: a dimension is space if its
extent follows the image's. It also finds reductions nobody listed: a call whose output grows more slowly
with the image than its input has computed something over space, and one that grows faster compares all
pixels with all others. Such a statistic is live only if its result meets a spatial map again; a
classifier's final pool does not.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parameter import UninitializedBuffer, UninitializedParameter
from torch.utils._pytree import tree_map

from normfix.conversion.interception import obstacle
from normfix.networks.calling import refusals
from normfix.records.sites import Finding, Site, StatisticSpec
from normfix.scanning.census import Call, Follow, Settle, alone, census
from normfix.scanning.growth import Growth, Pass, look_again, look_at_two, ran_otherwise
from normfix.scanning.liveness import Role, live_positions, looks_alone, reached_positions, roles, tails
from normfix.scanning.products import Factor, written_out
from normfix.scanning.rules import RULES, rule_of
from normfix.scanning.rules.keys import UNASKED, factors_of, keys_refusal, specify_keys
from normfix.scanning.rules.statistics import family_of, refusal_of, specify

__all__ = ["Survey", "materialise_", "survey"]

Run = Callable[[nn.Module, Tensor], Tensor]


_IDLE = "which the output that counts does not depend on"


@dataclass(frozen=True, slots=True, kw_only=True)
class Survey:
    """What one look at the calls of a forward pass found.

    `result` is what the network gave, `invocations` how often each module ran for it; `other` is the input of another
    size that was tried with the same calls; `runs` are all inputs that it ran on, each with what it gave; `reaching`
    the ids of calls from which a path leads to the result, or out of tensors, without passing a statistic that can be
    frozen; `mapping` those of sites that make a map of a map and look by name or growth as if each pixel had seen all.
    `elsewhere` are extents at which the network makes other calls than here, where no other size has those of here;
    `apart` extents at which it makes other calls than at the sizes of this look.
    """

    sites: tuple[Site, ...]
    uncalled: tuple[str, ...]
    result: Tensor
    invocations: Counter[str]
    follows: frozenset[int]
    dilution: tuple[int, ...]
    findings: tuple[Finding, ...]
    other: Tensor | None = None
    runs: tuple[tuple[Tensor, Tensor], ...] = ()
    reaching: frozenset[str] = frozenset()
    mapping: frozenset[str] = frozenset()
    elsewhere: tuple[int, ...] | None = None
    apart: tuple[int, ...] | None = None

    @property
    def output(self) -> tuple[int, ...]:
        """Return the shape of the result."""
        return tuple(self.result.shape)

    @property
    def dense(self) -> bool:
        """Tell whether the result is a map of the image: (N, C, *space)."""
        rank = len(self.dilution) + 2
        return len(self.output) == rank and self.follows >= frozenset(range(2, rank))

    def sizes(self, example: Tensor) -> list[Tensor]:
        """Return the inputs known to run with the same calls, the smaller first."""
        return sorted([example, *([] if self.other is None else [self.other])], key=Tensor.numel)


def survey(
    model: nn.Module,
    run: Run,
    example: Tensor,
    follow: Follow = alone,
    exact: Sequence[int] = (),
    *,
    stacked: bool = True,
    keys: int | None = None,
    swap: bool = True,
) -> Survey:
    """Find the sites of a network.

    Args:
        model: run in the mode it is in; not modified.
        run: calls the model on one input and returns the output tensor that matters.
        example: (N, C, *space); a second, nearby size is tried as well.
        follow: as for `census`, for each run.
        exact: per axis, what the extents are multiples of for which the network is known to be exact; () if unknown.
        stacked: run on two images as well where there is a statistic that is no norm: it says how that is frozen or why
            not, and nothing of what is live.
        keys: how many keys of attention shall be held of all images together, 0 for all; None to leave attention as it
            is.
        swap: a norm's module may be replaced by another class; if not, its calls are intercepted.

    Raises:
        NormfixError: NF109 if the network does not run on the example.
    """
    calls, invocations, output = census(model, run, example, follow=follow)
    other = look_again(model, run, example, calls, follow, exact)
    smaller = other.example if other is not None and other.example.numel() < example.numel() else example
    passes = [] if other is None else [other]

    def two() -> Pass | None:
        look = look_at_two(model, run, smaller, calls) if stacked else None
        passes.extend([] if look is None else [look])
        return look

    growth = Growth(example, calls, other, two)
    modules = dict(model.named_modules())
    found = _Sites(calls, growth, modules, invocations, keys, swap=swap)
    if not _are_idle(model, run, example, found.idle(), output):
        found.doubt_dataflow()
    sites = found.find()
    norms = tuple(kind for rule in RULES for kind in rule.modules)
    uncalled = tuple(p for p, m in modules.items() if isinstance(m, norms) and not invocations[p])
    elsewhere = None if other else ran_otherwise(model, run, example, exact)
    return Survey(
        sites=sites,
        uncalled=uncalled,
        result=output,
        invocations=invocations,
        follows=growth.of_output(output),
        dilution=growth.dilution(),
        findings=_findings(example, other, uncalled, elsewhere),
        other=other.example if other else None,
        runs=((example, output), *((look.example, look.output) for look in passes)),
        reaching=found.reaching(),
        mapping=found.mapping(),
        elsewhere=elsewhere,
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


def _are_idle(model: nn.Module, run: Run, example: Tensor, idle: Collection[str], output: Tensor) -> bool:
    """Tell whether the output stays what it is, to the bit, whatever calls return that seem not to lead to it.

    A path that no census sees (through TorchScript, or another library's arrays) shows here.
    """

    def settle(change: Callable[[object], object]) -> Settle:
        def settled(site: str, func: Callable[..., Any], args: Any, kwargs: Mapping[str, Any]) -> Any:
            result = func(*args, **kwargs)
            return tree_map(change, result) if site in idle else result

        return settled

    def equal(change: Callable[[object], object]) -> bool:
        try:
            return torch.equal(census(model, run, example, settle(change))[2], output)
        except refusals():
            return False

    return not idle or all(map(equal, (_turned, _enlarged)))


def _turned(value: object) -> object:
    """Return other numbers than a tensor of floats holds."""
    return 1 - 3 * value if isinstance(value, Tensor) and value.is_floating_point() else value


def _enlarged(value: object) -> object:
    return 1e4 * value + 1e4 if isinstance(value, Tensor) and value.is_floating_point() else value


class _Sites:
    """Turns the calls of one forward pass into sites."""

    def __init__(
        self,
        calls: list[Call],
        growth: Growth,
        modules: dict[str, nn.Module],
        invocations: Counter[str],
        keys: int | None,
        *,
        swap: bool,
    ) -> None:
        self._calls, self._growth, self._keys, self._swap = calls, growth, keys, swap
        self._modules, self._invocations = modules, invocations
        self._roles = roles(calls, growth, lambda name: rule_of(name) is not None)
        self._after = tails(calls, growth, self._roles)
        self._products = self._held_products()
        self._refusals = {p: self._refusal(p, role) for p, role in self._roles.items()}
        cuts = {p for p, role in self._roles.items() if self._can_cut(role) and not self._refusals[p]}
        held = {p: self._kept_reads(p) for p in cuts if self._roles[p] is Role.PAIRS}
        self._live = live_positions(calls, growth, cuts, held)
        self._reached = reached_positions(calls)
        self._positions = [p for p, c in enumerate(calls) if p in self._roles or rule_of(c.function)]

    def find(self) -> tuple[Site, ...]:
        """Return the sites in the order of the calls."""
        return tuple(self._site(position) for position in self._positions)

    def reaching(self) -> frozenset[str]:
        """Return the ids of all calls from which a path leads on to the result without passing a frozen one."""
        return frozenset(self._calls[position].id for position in self._live)

    def idle(self) -> frozenset[str]:
        """Return the ids of the sites from which no path leads to the result that counts."""
        reads = (p for p in self._positions if self._calls[p].reads)
        return frozenset(self._calls[position].id for position in reads if position not in self._reached)

    def doubt_dataflow(self) -> None:
        """Take every site for one that the result depends on."""
        self._live |= frozenset(self._positions) - self._reached
        self._reached |= frozenset(self._positions)

    def mapping(self) -> frozenset[str]:
        """Return the ids of the sites that look by name or growth alone as if each pixel had seen all."""
        return frozenset(
            self._calls[position].id
            for position, role in self._roles.items()
            if looks_alone(self._calls[position], role, self._growth.space(position))
        )

    def _site(self, position: int) -> Site:
        call = self._calls[position]
        anchor = self._anchor(call)
        common: dict[str, Any] = {
            "owner": call.owner,
            "invocation": call.invocation,
            "function": call.function,
            "index": call.index,
            "owner_class": call.owner_class,
            "anchor": anchor,
            "holder": _holder(call.owner, anchor, self._modules),
            "within": call.within,
            "line": call.line,
            "others": self._others(position, anchor),
        }
        read = self._norm if rule_of(call.function) is not None else self._statistic
        return read(position, call, common)

    def _norm(self, position: int, call: Call, common: dict[str, Any]) -> Site:
        rule = rule_of(call.function)
        assert rule is not None
        owner = self._modules[call.owner]
        if not call.arguments["input"].depends:
            return Site(
                family=rule.family, live=False, reduces="weights, not the image", swappable=False, **common
            )
        reading = rule.read(call, self._growth.space(position), owner)
        if position not in self._reached:
            return Site(
                family=rule.family,
                live=False,
                reduces=f"{reading.reduces}, {_IDLE}",
                swappable=False,
                **common,
            )
        swappable = (
            self._swap
            and type(owner) in rule.modules
            and self._invocations[call.owner] == 1
            and _is_all_it_runs(owner)
        )
        return Site(
            family=rule.family,
            live=reading.live,
            reduces=reading.reduces,
            swappable=swappable,
            layer=reading.layer,
            refusal=reading.refusal or ("" if swappable else self._recomputed(call)),
            **common,
        )

    def _statistic(self, position: int, call: Call, common: dict[str, Any]) -> Site:
        role, live, refusal = self._roles[position], position in self._live, self._refusals[position]
        spec: StatisticSpec | None = None
        if live and not refusal and role is Role.PAIRS:
            spec = specify_keys(position, self._calls, self._growth, self._products, self._keys or 0)
        elif live and not refusal:
            spec = specify(position, self._calls, role, self._growth, self._after)
        unused = (
            _IDLE if position not in self._reached else "and only constants or no map at all depend on it"
        )
        return Site(
            family=family_of(call, role),
            live=live,
            reduces="space" if live else f"space, {unused}",
            swappable=False,
            refusal=refusal if live else "",
            statistic=spec,
            **common,
        )

    def _refusal(self, position: int, role: Role) -> str:
        call = self._calls[position]
        reason = refusal_of(position, self._calls, role, self._growth, self._after)
        if role is Role.PAIRS:
            unheld = keys_refusal(position, self._calls, self._growth, self._products) or self._recomputed(
                call
            )
            if self._keys is not None:
                return unheld
            return reason if unheld else UNASKED
        return reason or self._recomputed(call)

    def _held_products(self) -> dict[int, Factor]:
        """Return the keys and values of attention that is written out, by the calls that take them.

        Where keys are held, its second product is a site as well and its softmax none: it runs along what is held.
        """
        found: dict[int, Factor] = {}
        for products in written_out(self._calls, self._growth):
            pair = {products.first: products.keys, products.second: products.values}
            if any(
                keys_refusal(p, self._calls, self._growth, pair) or self._recomputed(self._calls[p])
                for p in pair
            ):
                continue
            found |= pair
            if self._keys is not None:
                self._roles |= dict.fromkeys(pair, Role.PAIRS)
                self._roles.pop(products.softmax, None)
        return found

    def _kept_reads(self, position: int) -> frozenset[int]:
        """Return what an attention still reads whose keys and values are held."""
        held = {factor.number for factor in factors_of(position, self._calls, self._products)}
        return frozenset(s for n, s in enumerate(self._calls[position].reads) if n not in held)

    def _can_cut(self, role: Role) -> bool:
        return role in (Role.TOTAL, Role.QUOTIENT) or (role is Role.PAIRS and self._keys is not None)

    def _recomputed(self, call: Call) -> str:
        """Refuse what no interception sees, and what a checkpoint inside the intercepted forward runs once more."""
        if not self._once(call):
            return (
                "forward_fn runs the whole network more than once, each time with other statistics. Put what it does "
                "into a module that calls the network, and convert that"
            )
        anchor = self._anchor(call)
        if call.hooked:
            return "a hook of the network computes it, outside of every forward. Call the hook's function in forward"
        if reason := obstacle(self._modules[anchor]):
            return f"the calls of {anchor or 'the root'} cannot be intercepted: {reason}"
        below = call.within[call.within.index(anchor) :]
        if not set(below) & set(call.checkpointed):
            return ""
        return (
            f"{anchor or 'the root'} recomputes it by an activation checkpoint inside its own forward, where an "
            "interception would be lost without a word under torch.compile. Switch checkpointing off, or put the "
            "checkpoint around the module"
        )

    def _anchor(self, call: Call) -> str:
        """Return the innermost module that ran once and has room for a layer; a container alone has none."""
        once = self._once(call) or [""]
        roomy = (p for p in once if not _is_container(self._modules[_holder(call.owner, p, self._modules)]))
        return next(roomy, once[0])

    def _once(self, call: Call) -> list[str]:
        """Return the modules around a call that ran once, the innermost first."""
        return [path for path in reversed(call.within) if self._invocations[path] == 1]

    def _others(self, position: int, anchor: str) -> tuple[int, int]:
        """Count the calls of the same function inside the anchor that are no sites: before, and in all."""
        sites = set(self._positions)
        alike = [
            p
            for p, c in enumerate(self._calls)
            if c.function == self._calls[position].function and anchor in c.within and p not in sites
        ]
        return sum(p < position for p in alike), len(alike)


def _is_all_it_runs(owner: nn.Module) -> bool:
    """Tell whether a norm holds its affine map, and no module that its hooks run.

    Pruning and old weight_norm compute weight and bias before each call; observers of quantisation are its children.
    """
    computed = (name for name in ("weight", "bias") if name not in owner._parameters)
    return not owner._modules and all(getattr(owner, name, None) is None for name in computed)


_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)


def _is_container(module: nn.Module) -> bool:
    return isinstance(module, _CONTAINERS)


def _holder(owner: str, anchor: str, modules: dict[str, nn.Module]) -> str:
    """Return where a new layer can be kept: a container would run, or hand out, whatever is added to it."""
    norms = tuple(kind for rule in RULES for kind in rule.modules)
    below = [path for path in modules if path and (not anchor or path.startswith(f"{anchor}."))]
    candidates: list[str] = [*((owner,) if owner == anchor or owner in below else ()), anchor, *below]
    for path in candidates:
        replaced = path not in (owner, anchor) and isinstance(modules[path], norms)
        if not _is_container(modules[path]) and not replaced:
            return path
    return anchor


def _findings(
    example: Tensor, other: Pass | None, uncalled: tuple[str, ...], otherwise: Sequence[int] | None
) -> tuple[Finding, ...]:
    found = []
    if other is None:
        size = "x".join(map(str, example.shape[2:]))
        message = f"the network ran at {size} only, so space was told from channels by position."
        if otherwise is not None:
            message = (
                f"at {size} the network makes other calls than at {'x'.join(map(str, otherwise))}, as one does that "
                f"keeps a mask or map of {size}, so space was told from channels by position. Scan with an example of "
                "another size."
            )
        found.append(Finding(code="NF201", where="input size", message=message))
    found += [
        Finding(code="NF202", where=path, message="a norm the network owns but never called on this input.")
        for path in uncalled
    ]
    return tuple(found)
