"""Layer normalisation: statistics over the trailing dimensions, live only where these include space.

Over channels alone, as in transformers and ConvNeXt, it belongs to one pixel and is left alone. Over
(C, *space) it is a group norm with one group whose affine map may differ from pixel to pixel; that map ties
the network to one image size, so the norm is converted only where the map is absent or constant over space.

Population law: as for group normalisation, with one group (over space alone: one per channel).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from normfix.records.sites import Family, LayerSpec
from normfix.scanning.census import Call
from normfix.scanning.rules.rule import Reading

__all__ = ["LayerRule", "OverChannelsRule"]

_PIXELWISE = "its affine map differs from pixel to pixel, which ties the network to one image size"
_PARTIAL = "it leaves a statistic that varies along an axis of the image, which has no population law"


class LayerRule:
    """Reads F.layer_norm."""

    family = Family.LAYER
    functions = frozenset({"layer_norm", "torch.layer_norm"})
    modules = (nn.LayerNorm,)

    def read(self, call: Call, space: frozenset[int], owner: nn.Module) -> Reading:
        """Read one F.layer_norm call; see Rule.read."""
        given = call.arguments
        shape = given["input"].shape
        first = len(shape) - len(given["normalized_shape"])
        reduced = set(range(first, len(shape)))
        if not reduced & space:
            return Reading(live=False, reduces="channels of one pixel")
        whole = set(range(2, len(shape))) <= reduced and len(shape) > 2 and 1 not in space
        if not whole:
            return Reading(live=True, reduces=f"dimensions {sorted(reduced)}", refusal=_PARTIAL)
        affine = given["weight"] is not None
        layer = LayerSpec(
            ndim=len(shape) - 2,
            features=shape[1],
            groups=1 if 1 in reduced else shape[1],
            eps=float(given["eps"]),
            affine=affine,
            carries=False,
        )
        reduces = "channels and space, per image" if 1 in reduced else "space, per image and channel"
        refusal = ""
        if affine and (type(owner) is not nn.LayerNorm or not _constant_over_space(owner, len(shape) - 2)):
            refusal = _PIXELWISE
        return Reading(live=True, reduces=reduces, layer=layer, refusal=refusal)


class OverChannelsRule:
    """Reads F.rms_norm and F.local_response_norm: local unless the RMS runs over space, which is refused."""

    family = Family.RESPONSE
    functions = frozenset({"rms_norm", "local_response_norm"})
    modules = ()

    def read(self, call: Call, space: frozenset[int], owner: nn.Module) -> Reading:
        """Read one call; see Rule.read."""
        if call.function == "rms_norm":
            rank = len(call.arguments["input"].shape)
            first = rank - len(call.arguments["normalized_shape"])
            if space & set(range(first, rank)):
                return Reading(
                    live=True, reduces="space", refusal="normfix has no rule for an RMS over space yet"
                )
        return Reading(live=False, reduces="channels of one pixel")


def _constant_over_space(norm: nn.LayerNorm, ndim: int) -> bool:
    given = (p for p in (norm.weight, norm.bias) if p is not None)
    return all(torch.equal(flat, flat[:, :1].expand_as(flat)) for flat in (_flat(p, ndim) for p in given))


def _flat(parameter: Tensor, ndim: int) -> Tensor:
    return parameter.detach().reshape(-1, *parameter.shape[-ndim:]).flatten(1)
