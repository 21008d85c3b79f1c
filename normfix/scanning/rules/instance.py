"""Instance normalisation: y = (x - mean_nc) / sqrt(var_nc + eps) * w + b, per image and channel.

With tracked statistics in eval mode it already uses constants, which are carried over as they are. (PyTorch
tracks the mean of the images' variances and drops the variance of their means, so such constants can be too
small; `normfix calibrate` measures them anew.)

Population law: mean over all pixels of all images; variance E[var_i] + Var[mean_i], pixel-weighted.
"""

from __future__ import annotations

from torch import nn

from normfix.records.sites import Family, LayerSpec
from normfix.scanning.census import Call
from normfix.scanning.rules.rule import Reading

__all__ = ["InstanceRule"]


class InstanceRule:
    """Reads F.instance_norm."""

    family = Family.INSTANCE
    functions = frozenset({"instance_norm", "torch.instance_norm"})
    modules = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)

    def read(self, call: Call, space: frozenset[int], owner: nn.Module) -> Reading:
        """Read one F.instance_norm call; see Rule.read."""
        given = call.arguments
        shape = given["input"].shape
        live = bool(given["use_input_stats"])
        layer = LayerSpec(
            ndim=len(shape) - 2,
            features=shape[1],
            groups=shape[1],
            eps=float(given["eps"]),
            affine=given["weight"] is not None,
            carries=not live,
        )
        return Reading(live=live, reduces="space, per image and channel" if live else "nothing", layer=layer)
