"""Group normalisation: one statistic per image and group of channels, then an affine map per channel.

With group mean m_g and deviation s_g = sqrt(v_g + eps), channel mean m_c and deviation s_c likewise:

    w (x - m_g) / s_g + b  ==  w' (x - m_c) / s_c + b'
    with  w' = w s_c / s_g  and  b' = b + w (m_c - m_g) / s_g

so frozen group statistics can be stored broadcast to channels with w and b untouched, or, for BatchRenorm,
as channel statistics with w' and b' (normfix.conversion.rewriting).

Population law: per channel first, then channels of a group pooled: v_g = mean_c(v_c) + Var_c(m_c).
"""

from __future__ import annotations

from torch import nn

from normfix.records.sites import Family, LayerSpec
from normfix.scanning.census import Call
from normfix.scanning.rules.rule import Reading

__all__ = ["GroupRule"]


class GroupRule:
    """Reads F.group_norm."""

    family = Family.GROUP
    functions = frozenset({"group_norm", "torch.group_norm"})
    modules = (nn.GroupNorm,)

    def read(self, call: Call, space: frozenset[int], owner: nn.Module) -> Reading:
        """Read one F.group_norm call; see Rule.read."""
        given = call.arguments
        shape = given["input"].shape
        if not any(dim >= 2 for dim in space):
            return Reading(live=False, reduces="channels of one pixel")
        layer = LayerSpec(
            ndim=len(shape) - 2,
            features=shape[1],
            groups=int(given["num_groups"]),
            eps=float(given["eps"]),
            affine=given["weight"] is not None,
            carries=False,
        )
        return Reading(live=True, reduces="space and the channels of a group, per image", layer=layer)
